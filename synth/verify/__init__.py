"""Scores of pairs, described in docs/verify.md."""
