"""What every stage shares that is not about text: settings, files, hashes, progress, pages. No jax, no torch."""
