"""Scores on pairs: what each says stands in docs/verify.md."""
