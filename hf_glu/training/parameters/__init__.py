"""Choosing and shaping what is trained: optimizer groups, gates only, annealing, homeostasis, LoRA."""
