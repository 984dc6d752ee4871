"""The training loop, a step, checkpoints."""
