"""The mathematics of activations: formulas, their products, mixtures and shifts, and the kernels that save memory."""
