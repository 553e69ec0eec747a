"""`synth render`: groups become augmented documents and data sets for the hub."""
