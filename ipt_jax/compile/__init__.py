"""`ipt compile`: the real train step, compiled for hardware that is not here, and what its program needs."""
