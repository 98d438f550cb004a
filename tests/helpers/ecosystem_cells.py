"""The matrix: every tool that is tried around a model, and what comes of it for each kind of FFN.

A cell is ``same`` numbers, unless the tool's row says with which words it is refused. ``docs/results/ecosystem.md`` is
this table: ``python tests/helpers/ecosystem_cells.py > docs/results/ecosystem.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = ("geglu", "reglu, native", "learnable", "stateful", "canon", "modulated", "experts", "native bank")
GRAPH, TRAINED = 2e-6, 1e-5


def refused(words: str, *kinds: str) -> dict[str, str]:
    """Return a row's refusals: the same words for each of the kinds, all of them where none is named."""
    return dict.fromkeys(kinds or KINDS, words)


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One tool.

    Attributes:
        title: what the table calls it.
        where: the module of the function that tries it, and the function; ``processes``: it runs in two processes.
        needs: packages without which the row is skipped.
        fake: whether what runs is a stand-in that does what the tool does.
        refused: kind -> a part of the message.
        measured: the kinds that it has been run with; of the others the table says nothing.
        close: the most that numbers may differ by.
        fast: whether it runs with the fast tests.
    """

    title: str
    where: str
    needs: tuple[str, ...] = ()
    fake: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    measured: tuple[str, ...] = KINDS
    close: float = 0.0
    fast: bool = False

    def outcome(self, kind: str) -> str:
        """Return what the table says."""
        if kind not in self.measured:
            return "-"
        return "refused" if kind in self.refused else "same"


_READS = ("stateful", "canon", "modulated")
_LLAMA = ("reglu, native", "learnable", *_READS, "experts")
_IGNORED = "which has an activation of its own and would ignore the model's"
TOOLS = (
    Tool(title="`kernels.kernelize`, `use_kernels=True`", where="swaps.kernelized", fake=True, fast=True),
    Tool(title="`use_liger_kernel`: Liger on a model", where="swaps.liger_on_a_model", fake=True, fast=True),
    Tool(
        title="Liger's SwiGLU classes before a model is built", where="swaps.liger_classes", fake=True,
        refused=refused("Activation function .* not supported", *_LLAMA),
    ),
    Tool(
        title="Liger's GeGLU classes, which look at no name", where="swaps.liger_careless_classes", fake=True,
        refused=refused(_IGNORED, *_LLAMA),
    ),
    Tool(
        title="fusion mappings, `fusion_config`", where="swaps.fused", fake=True,
        refused=refused(_IGNORED, *(kind for kind in KINDS if kind not in ("experts", "native bank"))),
        measured=tuple(kind for kind in KINDS if kind != "reglu, native"),
    ),
    Tool(title="wrappers around each module (TransformerBridge)", where="swaps.bridged", fake=True),
    Tool(title="hooks on each module (nnsight)", where="swaps.traced", fake=True),
    Tool(title="Trainer, label smoothing, accumulation", where="training.smoothed", close=TRAINED),
    Tool(title="TRL's SFT, loss in chunks", where="training.sft", needs=("trl", "datasets"), close=TRAINED),
    Tool(title="TRL's DPO", where="training.dpo", needs=("trl", "datasets"), close=TRAINED),
    Tool(title="TRL's GRPO, accumulation", where="training.grpo", needs=("trl", "datasets"), close=TRAINED),
    Tool(title="DeepSpeed ZeRO-2", where="training.zero", fake=True, close=TRAINED),
    Tool(title="FSDP2, two processes", where="processes.fsdp", close=TRAINED),
    Tool(title="DDP, `static_graph=True`, two processes", where="processes.ddp", close=TRAINED),
    Tool(title="tensor parallel plan, two processes", where="processes.tensor_parallel", close=GRAPH),
    Tool(
        title="expert parallel plan, two processes", where="processes.expert_parallel",
        refused={**refused("has no `(e|t)p_plan`"), "native bank": "can't be spread over processes"},
    ),
    Tool(title="`torch.export`", where="graphs.exported", close=GRAPH),
    Tool(title="`torch.jit.trace`", where="graphs.jit_traced", close=GRAPH),
    Tool(title="Transformers' Dynamo exporter", where="graphs.dynamo", close=GRAPH),
    Tool(title="Transformers' ONNX exporter", where="graphs.onnx", needs=("onnx", "onnxscript", "onnxruntime"),
         close=GRAPH),
    Tool(
        title="Transformers' OpenVINO exporter", where="graphs.openvino", needs=("openvino",), close=GRAPH,
    ),
    Tool(
        title="Transformers' ExecuTorch exporter", where="graphs.executorch", needs=("executorch",),
        refused={
            "geglu": "failed with error 0x12",  # a stock GPT-NeoX, too
            **refused("not in Core ATen opset", "experts"), **refused("data-dependent expression", "native bank"),
        },
        close=GRAPH,
    ),
    Tool(title="torchao, int8 on load", where="loading.torchao", needs=("torchao",), close=GRAPH),
    Tool(title="bitsandbytes, 4 bits on load", where="loading.bitsandbytes", needs=("bitsandbytes",), close=GRAPH),
    Tool(title="layers on the disk, `device_map`", where="loading.offloaded"),
    Tool(
        title="vLLM's Transformers backend", where="serving.vllm", fake=True,
        refused=refused("whose states vllm doesn't keep", *_READS),
    ),
    Tool(
        title="continuous batching, `generate_batch`", where="serving.continuous_batching",
        refused=refused("whose states a paged cache doesn't keep", *_READS),
    ),
)  # fmt: skip
ELSEWHERE = {
    "GGUF files, read and converted": "tests/checkpoint/test_gguf.py",
    "a stock form for GGUF converters (`hf-glu export --native`)": "tests/publishing/test_export.py",
    "routers' losses under Trainer, TRL, accumulation": "tests/ffn/test_router_losses.py",
    "SFT and DPO with routers' balance losses": "tests/recipes/test_sft.py",
    "training on two processes, DDP and FSDP2, by `hf-glu finetune`": "tests/plugin/test_processes.py",
    "pipelines, sentence-transformers, serve, lm-eval": "tests/plugin/test_friends.py",
    "PEFT": "tests/training/test_peft.py",
}

PAGE = """\
# Other people's tools

What becomes of a gated FFN in the tools around Transformers: the same numbers, or one clear error. A tool that would
compute something else without a word is a bug; please report it.

Each cell is a test on a tiny decoder whose gates, states and routers do something, against the same model without the
tool: logits of several lengths and numbers of texts, padding left out; gradients where a tool trains; generated tokens
where it serves. Rows marked * run a stand-in that does what the tool does (a layer that hard-codes SiLU in the place of
a hub kernel), since the tool itself needs a GPU or isn't what tests install. A dash is a cell that wasn't run.

{table}

In words: kernels for SwiGLU are kept away from FFNs that have another gate, whose stock forward stays; everything else
in the model gets its kernels. A class or a fusion that ignores the activation is refused when the model is built or
converted; in a model that names nothing of ours (a native reglu) only Liger's and `kernels`' are, since anybody's own
FFN may compute what it likes there. Gates that read the text are refused by servers that put many texts into one row.
Tensor parallelism leaves FFNs whole that are widened or sparse, or whose gates have parameters of each unit; families
without a plan for experts are refused by Transformers itself. ExecuTorch's runtime refuses the GPT-NeoX of the first
kind, stock or not, at another number of texts than the example's; its compiler refuses sorting, and rows that are
counted.

Tested elsewhere:

{elsewhere}

One thing can't be caught from here: llama.cpp's converter takes a Llama's gate for SiLU whatever its config names.
`hf-glu export --native` writes for it what it reads, and refuses the rest.
"""


def markdown() -> str:
    """Return the page."""
    rows = ["| tool | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for tool in TOOLS:
        cells = " | ".join(tool.outcome(kind) for kind in KINDS)
        rows.append(f"| {tool.title}{' *' if tool.fake else ''} | {cells} |")
    elsewhere = [f"- {what}: `{where}`" for what, where in ELSEWHERE.items()]
    return PAGE.format(table="\n".join(rows), elsewhere="\n".join(elsewhere))


if __name__ == "__main__":
    print(markdown(), end="")
