"""`synth decontaminate`: pairs and texts that share words with benchmarks are found, listed and kept out."""
