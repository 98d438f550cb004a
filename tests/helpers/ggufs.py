"""Tiny GGUF files."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import numpy as np

LETTERS = "\u2581" + ascii_lowercase + digits  # the first is a space
HIDDEN, WIDTH, LAYERS, HEADS, WORDS = 32, 64, 2, 2, 3 + len(LETTERS)


def write(path: Path, kind: Any = np.float32) -> Path:
    """Write a Llama with random weights, and a tokenizer."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *LETTERS])
    writer.add_token_scores([0.0] * WORDS)
    writer.add_token_types([2, 3, 3, *[1] * (WORDS - 3)])
    square, up = (HIDDEN, HIDDEN), (WIDTH, HIDDEN)
    shapes = {"token_embd": (WORDS, HIDDEN), "output": (WORDS, HIDDEN)}
    for layer in range(LAYERS):
        parts = {f"attn_{part}": square for part in ("q", "k", "v", "output")}
        parts |= {"ffn_gate": up, "ffn_up": up, "ffn_down": up[::-1]}
        shapes |= {f"blk.{layer}.{part}": shape for part, shape in parts.items()}
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(HIDDEN, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (rng.standard_normal(shape) * 0.1).astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
