"""`synth mine`: pairs from rules instead of a synthesizer, the baseline in Table 4 of the paper."""
