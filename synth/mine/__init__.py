"""`synth mine`: pairs by rules instead of a synthesizer, the baseline that the paper compares with (its Table 4)."""
