"""Which parameters are trained, and how: groups, gates, annealing, homeostasis, adapters."""
