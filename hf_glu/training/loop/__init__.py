"""The loop of Accelerate: batches, schedules, checkpoints, interrupts."""
