"""Between our checkpoints and Hugging Face directories, both ways, tensor by tensor."""
