"""Several fine-tunes as one mixture."""
