"""Language modelling: continuing a pretrained model, or training one from scratch, on plain text."""
