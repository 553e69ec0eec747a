"""Training: state, loss, optimizer, the jitted step, checkpoints, and the loop around them."""
