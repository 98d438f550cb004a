"""Mixtures of experts that may each have another activation: the router, the experts, the FFN of both."""

from hf_glu.ffn.experts.ffn import ExpertFFN, find_experts
from hf_glu.ffn.experts.router import Router, Routing

__all__ = ["ExpertFFN", "Router", "Routing", "find_experts"]
