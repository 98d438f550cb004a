"""Tiny, randomly initialised models of every text model type that Transformers knows.

A model type is any key of the causal-LM, masked-LM, seq2seq-LM and sequence-classification auto mappings. Its default
configuration is shrunk by one rule: every integer attribute takes the value listed for its name in `SIZES`,
sub-configurations are shrunk the same way, and per-layer lists keep one layer of each distinct kind. What the rule
cannot know about a family is data: `OVERRIDES` (configuration) and `INPUTS` (what a forward needs beside token ids).

    >>> model = tiny_model("bert")
    >>> logits = model(**tiny_inputs(model)).logits
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

HEADS: tuple[Mapping[str, str], ...] = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
"""The auto mappings, in the order of preference."""

LAYERS, EOS, SPECIAL, FIRST_ID = 2, 2, 7, 8
"""Layers per stack, the end-of-sequence id, the id of all other special tokens, the first ordinary token id."""

_SIZES = """
0 pad_token_id num_kv_shared_layers
1 n_group topk_group num_expert_group n_groups first_k_dense_replace num_dense_layers n_shared_experts
1 num_sparse_encoder_layers num_sparse_decoder_layers
2 num_hidden_layers num_layers n_layer n_layers num_decoder_layers encoder_layers decoder_layers depth num_blocks
2 num_encoder_layers num_self_attends_per_block num_layers_per_stack num_global_layers attn_layer_period
2 speech_encoder_layers t2u_encoder_layers t2u_decoder_layers conf_num_hidden_layers
2 num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k zero_expert_num eos_token_id
2 encoder_sparse_step decoder_sparse_step
2 num_key_value_heads num_kv_heads swa_num_key_value_heads kv_n_heads linear_num_key_heads
3 bos_token_id decoder_start_token_id self_attention_widening_factor cross_attention_widening_factor
4 num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads attention_heads
4 num_encoder_attention_heads num_decoder_attention_heads num_self_attention_heads num_cross_attention_heads
4 swa_num_attention_heads index_n_heads linear_num_heads linear_num_value_heads num_attention_heads_per_layer
4 speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads conf_num_attention_heads
4 mamba_n_heads mamba_num_heads num_query_groups attention_window mm_tokens_per_image
4 num_experts n_routed_experts num_local_experts moe_num_experts
8 head_dim d_kv d_head dim_head attention_head_size kv_channels rotary_dim query_pre_attn_scalar swa_head_dim index_topk
8 qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim
8 block_multiple_of state_size mamba_d_state ssm_state_size time_step_rank mamba_dt_rank
16 kv_lora_rank q_lora_rank o_lora_rank adapter_rank laurel_rank hc_lowrank embedding_rank router_hidden_size
16 sliding_window attention_window_size sliding_window_size attention_chunk_size chunk_size context_size
16 mamba_chunk_size hidden_size_per_layer_input downsample_hidden_size output_channels nemo_conv_channels
16 mamba_d_head mamba_head_dim
32 hidden_size d_model n_embd dim emb_dim embed_dim d_latents embedding_size embedding_dim hidden_dim lru_width
32 word_embed_proj_dim input_embedding_size output_embedding_size true_hidden_size intra_bottleneck_size ple_embed_dim
32 hidden_size_global out_hidden_size encoder_hidden_size cross_attention_hidden_size backbone_hidden_size
32 pooler_hidden_size prediction_head_size pronunciation_embed_dim shape_embed_dim image_size audio_hidden_size
32 adapter_in_dim adapter_input_size adapter_out_dim projector_input_dim projector_output_dim vision_output_dim
32 output_dim ext_pw_out_channel depthwise_separable_out_channel
48 moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size
48 shared_experts_intermediate_size moe_shared_expert_intermediate_size
56 intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner dff dim_ff n_inner ffn_hidden_size mlp_dim
56 feed_forward_size intermediate_size_mlp dense_intermediate_size speech_encoder_intermediate_size
56 t2u_encoder_ffn_dim t2u_decoder_ffn_dim
64 max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions max_target_positions
64 max_encoder_position_embeddings max_decoder_position_embeddings original_max_position_embeddings model_max_length
64 max_2d_position_embeddings max_pos_emb num_position_embeddings rel_extent num_hash_buckets mamba_d_ssm
64 encoder_hash_byte_group_vocab
99 vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input entity_vocab_size
99 pronunciation_vocab_size shape_vocab_size audio_vocab_size char_vocab_size t2u_vocab_size unit_hifi_gan_vocab_size
"""
SIZES: dict[str, int] = {n: int(size) for size, *names in map(str.split, _SIZES.split("\n")[1:-1]) for n in names}
"""The tiny value of every integer attribute that sets a size, by name; other integers keep their defaults."""

FILLED = {
    *("eos_token_id", "pad_token_id", "vocab_size", "head_dim", "num_key_value_heads"),
    *("intermediate_size", "ffn_hidden_size", "n_inner"),
    *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
}
"""Attributes set even where the default is None; all others with that default are derived by the configuration."""

_DENSE_AND_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_ASSISTANT_LAYERS = {"layer_types": 2 * ["sliding_attention", "full_attention"], "num_hidden_layers": 4}
_SWA_RANKS = {"swa_kv_lora_rank": 16, "swa_q_lora_rank": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}
_SWA_HEADS = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
_REFORMER_CHUNKS = {"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "attn_layers": ["local", "lsh"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"use_cache": False},  # its cache asks for a `num_hidden_layers` that the configuration lacks
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cohere2_moe": {**_DENSE_AND_SPARSE, "num_shared_experts": 1},
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 1e4}},
    "distilbert": {"hidden_dim": 56},  # its name for the width of the feed-forward networks
    "dots3_note_text": {"head_dim": 16, **_SWA_HEADS, **_SWA_RANKS},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {"enable_moe_block": True, "moe_intermediate_size": 48, "top_k_experts": 2, "global_head_dim": 16},
    "gemma4_unified_assistant": {"text_config": {**_ASSISTANT_LAYERS, "num_kv_shared_layers": 2}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling_text": _DENSE_AND_SPARSE,
    "jamba": {"attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},  # four and two of these make up the hidden size
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},  # has to be divisible by 6
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mamba2": {"head_dim": 16},
    "markuplm": {"max_depth": 4},
    "mellum": _DENSE_AND_SPARSE,
    "minimax_m3_vl_text": _DENSE_AND_SPARSE,
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "neomme": {"head_dim": 16},
    "qwen4_exp_text": {**_INDEXER, "indexer_budget": 8, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {**_REFORMER_CHUNKS, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "hash_seed": 0},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "vibevoice_acoustic_tokenizer_encoder": {"depths": [1, 1, 1], "downsampling_ratios": [2, 2], "num_filters": 4},
    "xlstm": {"ffn_round_up_to_multiple_of": 8, "qk_dim_factor": 2.0, "v_dim_factor": 2.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}
"""Configuration values by (sub-)configuration model type or model class; a nested dict is for a sub-configuration."""

B, L = 2, 12
INPUTS: dict[str, dict[str, Any]] = {
    "gemma4_unified_assistant": {
        "inputs_embeds": (B, L, 64),
        "shared_kv_states": {"full_attention": 2 * ((B, 2, L, 16),), "sliding_attention": 2 * ((B, 2, L, 8),)},
    },
    "voxtral_realtime": {"input_features": (B, 128, 8 * L)},
}
"""Shapes of the real-valued inputs that a forward cannot do without, by model type, nested as it expects them."""

UNBUILDABLE: dict[str, str] = {
    "gemma3n": "needs the packages timm and pillow for its vision tower (gemma3n_text has the same decoder)",
    "gemma4_assistant": "Transformers 5.23 contradicts itself: the configuration must share keys and values among all "
    "layers, but then `kv_sharing_modes` of its text configuration raises",
    "layoutlmv2": "needs the package detectron2 for its visual backbone",
}
"""The model types that cannot be built here, each with the reason."""


def model_classes(model_type: str) -> list[str]:
    """Return all classes listed for `model_type`, the preferred one first."""
    return list(dict.fromkeys(head[model_type] for head in HEADS if model_type in head))


def model_types() -> dict[str, str]:
    """Return the class to build for each model type: its causal LM, else masked LM, seq2seq LM, classifier."""
    return {model_type: model_classes(model_type)[0] for model_type in sorted(set().union(*HEADS))}


def _shrink(name: str, value: Any, overrides: Mapping[str, Any]) -> Any:
    """Shrink one value: sub-configurations by recursion, integers by name, the rest stays."""
    if isinstance(value, PreTrainedConfig):
        return _tiny(value, overrides.get(name, {}))
    if type(value) is int or (value is None and name in FILLED):
        return SIZES.get(name, SPECIAL if name.endswith(("_token_id", "_token_index")) else value)
    return value


def _layers(values: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Cut the per-layer lists among `values` to one layer of each distinct kind, and at least `LAYERS` layers."""
    lists = {n: v for n, v in values.items() if isinstance(v, list | tuple) and len(set(map(str, v))) < len(v) == depth}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
    kinds = list(islice(cycle(kinds), max(LAYERS, len(kinds))))
    cut: dict[str, Any] = {
        n: [_shrink(n, v, {}) for v in column] for n, column in zip(lists, zip(*kinds, strict=True), strict=False)
    }
    return cut | ({"num_hidden_layers": len(kinds)} if len(kinds) > LAYERS else {})


def _tiny(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Make a configuration of the class of `config` that is as small as `SIZES` says."""
    overrides = OVERRIDES.get(config.model_type, {}) | dict(overrides)
    fields = {f.name: config.attribute_map.get(f.name, f.name) for f in dataclasses.fields(config)}
    given = {
        n: vars(config)[key] for n, key in fields.items() if key in vars(config) and (n == key or key not in fields)
    }
    derived = {f.name for f in dataclasses.fields(config) if f.default is None} - FILLED
    parts = {n for n, v in given.items() if isinstance(v, PreTrainedConfig)}

    kwargs = {n: _shrink(n, v, overrides) for n, v in given.items() if n in parts or n not in derived}
    if given.get("num_key_value_heads", 0) in (None, given.get("num_attention_heads")):  # no grouped-query attention
        kwargs["num_key_value_heads"] = SIZES["num_attention_heads"]
    kwargs |= _layers(given, getattr(config, "num_hidden_layers", 0))
    kwargs |= {n: v for n, v in overrides.items() if n not in parts}
    return type(config)(**kwargs)


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Make the tiny configuration of `model_type`; `overrides` come last, nested dicts for sub-configurations."""
    return _tiny(CONFIG_MAPPING[model_type](), overrides)


def tiny_model(model_type: str, class_name: str | None = None, seed: int = 0, **overrides: Any) -> nn.Module:
    """Build a tiny `model_type` in eval mode, of the preferred class or `class_name`, with seeded random weights."""
    class_name = class_name or model_types()[model_type]
    cls = getattr(transformers, class_name)
    config = tiny_config(model_type, **OVERRIDES.get(class_name, {}) | overrides)
    if not isinstance(config, cls.config_class):
        config = config.get_text_config(decoder=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = cls(config)
    return model.eval()


def _random(shape: Any) -> Any:
    """Put fixed random tensors in the place of the shapes of a nested structure."""
    if isinstance(shape, dict):
        return {name: _random(item) for name, item in shape.items()}
    if isinstance(shape[0], tuple):
        return tuple(map(_random, shape))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tiny_inputs(model: nn.Module) -> dict[str, Any]:
    """Make the inputs of `model`: ordinary ids that end with EOS, for a decoder too, and its `INPUTS`."""
    config: Any = model.config
    ids = torch.arange(FIRST_ID, FIRST_ID + B * L).reshape(B, L)
    ids[:, -1] = EOS
    inputs: dict[str, Any] = {"input_ids": ids}
    if config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs | {name: _random(shape) for name, shape in INPUTS.get(config.model_type, {}).items()}
