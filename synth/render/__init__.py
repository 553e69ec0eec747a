"""`synth render`: render groups as augmented documents and data sets for the hub."""
