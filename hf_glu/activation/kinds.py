"""The files of activations that hf_glu brings: importing this fills the registry."""

from hf_glu.activation import canon, gated, learnable, moa, modulated, smear, stateful

KINDS = (gated, learnable, moa, modulated, stateful, canon, smear)
