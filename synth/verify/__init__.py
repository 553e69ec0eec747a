"""Scores of pairs, described in docs/reference/verify.md."""
