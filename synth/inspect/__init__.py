"""`synth inspect`: show groups in the terminal or on a page."""
