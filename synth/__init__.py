"""Turns raw text into question-answer pairs and augmented documents. `read_groups(DIR)` iterates over what was made."""

from synth.groups import read_groups

__all__ = ["read_groups"]
