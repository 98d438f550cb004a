"""Fine-tuning with Accelerate, and the optimizer's parameter groups."""
