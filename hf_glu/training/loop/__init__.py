"""The training loop: batches, learning rates, checkpoints, interrupts."""
