"""`synth inspect`: groups as a person reads them."""
