"""Token shards, the plan of a mix, and the loader that follows it. Imports no jax."""
