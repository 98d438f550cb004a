"""What large models cost on paper: formulas, shapes, tables, and a check against small models."""
