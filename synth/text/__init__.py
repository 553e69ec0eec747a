"""Words and sentences of natural language."""
