"""`synth decontaminate`: finds pairs and texts that overlap with benchmark data, and excludes them."""
