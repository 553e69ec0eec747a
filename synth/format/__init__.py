"""The text format of prompts and answers: written, truncated to a budget, parsed."""
