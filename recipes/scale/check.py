"""The formulas beside Transformers' own models and what is measured here; see recipes/SCALE.md."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hf_glu
from hf_glu.bench.ffn import FusedFFN
from hf_glu.bench.memory import saved_bytes
from hf_glu.bench.steps import trained
from hf_glu.bench.timing import interleave
from hf_glu.config.experts import ExpertOptions
from hf_glu.config.glu import iso_width
from hf_glu.ffn.experts import ExpertFFN
from recipes.scale.formulas import Shape, kept_bytes, parameters

Data = dict[str, Any]
TINY = {"hidden": 128, "layers": 2, "heads": 4, "vocab": 96}
SHAPES = {
    "Llama": Shape(width=512, kv_heads=2, **TINY),
    "GPT-2": Shape(width=512, kv_heads=4, ffn="dense", block="gpt2", positions=64, tied=True, **TINY),
    "Mixtral": Shape(width=512, kv_heads=2, experts=8, top_k=2, **TINY),
}
TOKENS, TIMED = 37, {"hidden": 384, "width": 1536}
_STREAM = """
import sys
import torch, hf_glu.checkpoint.streaming, hf_glu.conversion
from transformers import GPT2LMHeadModel
peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
before = peak()
hf_glu.convert_stream(sys.argv[1], sys.argv[2], "geglu_new")
print(before, peak())
"""


def build(shape: Shape, *, iso_of: int | None = None) -> Any:
    """Return the model of ``shape`` by its config alone; ``iso_of``: the dense width, for ``{"width": "iso"}``."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    from transformers import MixtralConfig, MixtralForCausalLM  # isort: skip

    fused = shape.ffn == "fused"
    entry: Data = {"width": "iso"} if iso_of else {}
    name = "swiglu" if shape.block == "llama" else "geglu"
    if fused and shape.experts:  # the backend that a GPU has
        entry = {"experts": {"groups": f"{name}*{shape.experts}", "top_k": shape.top_k, "backend": "grouped"}}
    if shape.block == "gpt2":
        config: Any = GPT2Config(
            n_embd=shape.hidden, n_inner=iso_of or shape.width, n_layer=shape.layers, n_head=shape.heads,
            vocab_size=shape.vocab, n_positions=shape.positions, tie_word_embeddings=shape.tied, resid_pdrop=0.0,
            activation_function="geglu" if fused else "gelu", embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        config.hf_glu = entry or None
        return GPT2LMHeadModel(config)
    sizes: Data = {
        "hidden_size": shape.hidden, "intermediate_size": shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
    }  # fmt: skip
    if shape.experts and not fused:
        config = MixtralConfig(**sizes, num_local_experts=shape.experts, num_experts_per_tok=shape.top_k)
        config._experts_implementation = "grouped_mm"
        return MixtralForCausalLM(config)
    config = LlamaConfig(**sizes, hidden_act=name if fused else "silu")
    config.hf_glu = entry or None
    return LlamaForCausalLM(config)


def counted(shape: Shape, *, iso_of: int | None = None) -> int:
    """Return the parameters of the real model, built without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(shape, iso_of=iso_of).parameters())


def kept(shape: Shape, dtype: torch.dtype, *, save_memory: bool = False) -> tuple[float, int]:
    """Return what autograd keeps of the real model for a token, and what the formula says."""
    torch.manual_seed(0)
    model = build(shape).to(dtype).train()
    if save_memory:
        hf_glu.save_memory(model)
    ids = torch.randint(0, shape.vocab, (1, TOKENS))
    own = [*model.parameters(), *model.buffers()]
    measured = saved_bytes(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, own)
    parts = kept_bytes(shape, dtype_bytes=dtype.itemsize, save_memory=save_memory)
    return measured / TOKENS, shape.layers * (parts["ffn"] + parts["rest"]) + parts["loss"]


def small_shapes() -> list[tuple[str, Shape, bool]]:
    """Return the shapes whose models are small, with whether `hf_glu.save_memory` is used."""
    llama, gpt2 = SHAPES["Llama"], SHAPES["GPT-2"]
    fused, iso = replace(gpt2, ffn="fused"), replace(gpt2, ffn="fused", width=iso_width(gpt2.width))
    return [
        *((f"{name}, stock", shape, False) for name, shape in SHAPES.items()),
        ("GPT-2, geglu", fused, False), ("GPT-2, geglu, save_memory", fused, True), ("GPT-2, geglu, iso", iso, False),
        ("GPT-2, 8 experts", replace(fused, experts=8, top_k=2), False),
        ("Llama, 8 experts", replace(llama, ffn="fused", experts=8, top_k=2), False),
    ]  # fmt: skip


def counts() -> list[Data]:
    """Return the rows of parameters at full size."""
    from recipes.scale import tables as scale

    rows = []
    for size, name, shape, base in scale.named_shapes():
        found = counted(shape, iso_of=base.width if name == scale.ISO else None)
        said = parameters(shape).total
        rows.append({"model": size, "variant": name, "formula": f"{said:,}", "model's": f"{found:,}",
                     "equal": str(found == said)})  # fmt: skip
    return rows


def keeping() -> list[Data]:
    """Return the rows of bytes that autograd keeps."""
    rows = []
    for name, shape, lean in small_shapes():
        for dtype in (torch.float32, torch.bfloat16):
            measured, said = kept(shape, dtype, save_memory=lean)
            rows.append({
                "model": name, "dtype": str(dtype).removeprefix("torch."), "formula, bytes a token": str(said),
                "measured": f"{measured:.0f}", "measured / formula": f"{measured / said:.3f}",
            })  # fmt: skip
    return rows


def timing(tokens: int, rounds: int = 7) -> list[Data]:
    """Return the rows of times: a forward and backward pass of FFNs, beside the ratio of their FLOPs."""
    hidden, width = TIMED["hidden"], TIMED["width"]
    torch.manual_seed(0)

    def fused(units: int) -> nn.Module:
        weights = (torch.randn(units, hidden), torch.randn(units, hidden), torch.randn(hidden, units))
        return FusedFFN(hidden, units, "geglu", tuple(0.05 * weight for weight in weights))  # type: ignore[arg-type]

    dense = nn.Sequential(nn.Linear(hidden, width, bias=False), nn.GELU(), nn.Linear(width, hidden, bias=False))
    twice = nn.Sequential(nn.Linear(hidden, 2 * width, bias=False), nn.GELU(), nn.Linear(2 * width, hidden, bias=False))
    experts = ExpertFFN(hidden, width, ExpertOptions(groups="geglu*8", top_k=2), bias=False)
    named = {"dense": dense, "dense, twice as wide": twice, "geglu": fused(width),
             "geglu, iso width": fused(iso_width(width)), "8 experts, top 2": experts}  # fmt: skip
    flops = {"dense": 1.0, "dense, twice as wide": 2.0, "geglu": 1.5,
             "geglu, iso width": 1.5 * iso_width(width) / width, "8 experts, top 2": 3.0}  # fmt: skip
    contenders = trained(named, torch.randn(1, tokens, hidden).requires_grad_())
    found = interleave({name: each.call for name, each in contenders.items()}, rounds=rounds)
    ratios = {name: found.ratio(name, "dense").median for name in named}
    return [
        {"FFN": name, "tokens": f"{tokens:,}", "x FLOPs": f"{flops[name]:.2f}", "x time": f"{ratio:.2f}",
         "time / FLOPs": f"{ratio / flops[name]:.2f}"} for name, ratio in ratios.items()
    ]  # fmt: skip


def streaming() -> list[Data]:
    """Return the rows of memory that streaming adds to a process: a longer model, and a wider one."""
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    rows = []
    for layers, width in ((2, 4096), (8, 4096), (2, 16384)):
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch, "dense")
            config = GPT2Config(
                n_embd=1024, n_inner=width, n_layer=layers, n_head=8, vocab_size=99, n_positions=64, bos_token_id=0,
                eos_token_id=0, architectures=["GPT2LMHeadModel"],
            )  # fmt: skip
            config.save_pretrained(source)
            with torch.device("meta"):
                shapes = {key: value.shape for key, value in GPT2LMHeadModel(config).named_parameters()}
            tensors = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
            save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
            size = sum(tensor.nbytes for tensor in tensors.values())
            del tensors
            command = [sys.executable, "-c", _STREAM, str(source), str(Path(scratch, "gated"))]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        before, peak = (int(number) for number in done.stdout.split()[-2:])
        rows.append({
            "layers": str(layers), "width": str(width), "shard, MB": f"{size / 1e6:.0f}",
            "4 b W H, MB": f"{4 * 2 * 1024 * width / 1e6:.0f}", "process before, MB": f"{before / 1e6:.0f}",
            "measured more, MB": f"{(peak - before) / 1e6:.0f}",
        })  # fmt: skip
    return rows


def run() -> Data:
    """Return all comparisons."""
    torch.set_num_threads(1)
    return {
        "Parameters": counts(), "Kept for the backward pass": keeping(),
        "Time of an FFN's pass": [*timing(256), *timing(2048)], "Streaming": streaming(),
    }  # fmt: skip
