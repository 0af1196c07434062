"""Training: state, loss, optimiser, pure step, loop, checkpoints, metrics."""
