"""`synth run`: raw texts become groups of texts with pairs."""
