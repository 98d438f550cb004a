"""Tiny models of families that have banks of experts of their own."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from hf_glu.ffn.sites import find_banks

_BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_NARROW = {"moe_intermediate_size": 16}
_DEEPSEEK = _BASE | _MLA | _NARROW | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
MODELS = {
    "Mixtral": _BASE | {"num_local_experts": 4},
    "Qwen2Moe": _BASE | _NARROW | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": _BASE | _NARROW | {"num_experts": 4, "head_dim": 8},
    "Olmoe": _BASE | {"num_experts": 4},
    "GptOss": _BASE | {"num_local_experts": 4, "head_dim": 8},
    "DeepseekV2": _DEEPSEEK,
    "DeepseekV3": _DEEPSEEK | {"n_group": 1, "topk_group": 1},
}
SOURCE = {"GptOss": "quick_gelu"}


def make(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**MODELS[name], **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for bank in find_banks(model):
        for parameter in bank.anchor.parameters():
            parameter.data.normal_(std=0.3)
    return model
