"""Mistral and Llama in Flax NNX: configuration, layers, attention, and where weights are stored."""
