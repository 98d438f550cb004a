"""What fine-tuning a model of a given shape costs on many devices: parameters, memory and step time on paper.

Symbols: H hidden size, W width, L layers, E experts, k experts a token, V vocabulary, T tokens on a device, b bytes
of a number, n devices, e devices that share the experts.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from hf_glu.errors import OptionError

# multiples of W that each FFN keeps for the backward pass: the operands of what comes after the in-projection
KEPT = {"dense": 2, "native": 4, "fused": 4}
LEAN = 2  # of a fused one after `hf_glu.save_memory`: [g | u]
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model.

    Attributes:
        hidden, width, layers, heads, kv_heads, vocab: H, W, L, attention heads, their keys' and values' heads, V.
        ffn: ``dense``, ``native`` (the family's own gate) or ``fused`` (hf_glu's ``[g | u]``).
        experts, top_k: E and k; 0: one FFN. ``fused`` experts are hf_glu's, ``native`` ones Mixtral's.
        block: ``llama`` (RMSNorm, rotary positions, no biases) or ``gpt2`` (LayerNorm, learned positions, biases).
        positions: learned ones.
        tied: whether the head is the embedding.

    Raises:
        OptionError: an unknown ``ffn`` or ``block``, or k that is not 1 to E.
    """

    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    ffn: str = "native"
    experts: int = 0
    top_k: int = 0
    block: str = "llama"
    positions: int = 0
    tied: bool = False

    def __post_init__(self) -> None:
        if self.ffn not in KEPT or self.block not in ("llama", "gpt2"):
            raise OptionError(f"no {self.ffn!r} FFN in {self.block!r}: dense, native, fused in llama or gpt2")
        if not min(self.experts, 1) <= self.top_k <= self.experts:
            raise OptionError(f"top_k must be 1 to {self.experts}, the number of experts, got {self.top_k}")

    @property
    def key_width(self) -> int:
        """Channels of the keys, and of the values."""
        return self.hidden // self.heads * self.kv_heads


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters: all, those that a token uses, all experts', one layer's, those outside of layers."""

    total: int
    active: int
    routed: int
    layer: int
    outer: int


def parameters(shape: Shape) -> Parameters:
    """Count the parameters of ``shape``; they equal those of the Transformers model.

    One FFN has r W H + H W, with r = 2 where it is gated and 1 where it is not; a router has E H.
    """
    hidden, biased = shape.hidden, shape.block == "gpt2"
    rows = shape.width * (1 if shape.ffn == "dense" else 2)
    ffn = rows * hidden + shape.width * hidden + biased * (rows + hidden)
    in_rows = hidden + 2 * shape.key_width
    attention = in_rows * hidden + hidden * hidden + biased * (in_rows + hidden)
    norm = hidden * (1 + biased)
    routed = shape.experts * ffn
    layer = attention + 2 * norm + (routed + shape.experts * hidden if shape.experts else ffn)
    outer = shape.vocab * hidden * (1 if shape.tied else 2) + shape.positions * hidden + norm
    total, idle = shape.layers * layer + outer, shape.layers * ffn * (shape.experts - shape.top_k)
    return Parameters(total=total, active=total - idle, routed=shape.layers * routed, layer=layer, outer=outer)


def kept_bytes(shape: Shape, *, dtype_bytes: int = 2, save_memory: bool = False) -> dict[str, int]:
    """Return the bytes that autograd keeps for a token: in one layer's ``ffn`` and ``rest``, and in the ``loss``.

    - FFN: b m W, m of `KEPT` or `LEAN`; of experts k b (m W + 2 H), for a row that is sent and one that comes back,
      and where b < 4 the float32 input of hf_glu's router.
    - rest: RMSNorm keeps x in float32, the normalised x, and its output; LayerNorm x and its output; attention q, k, v
      and its output, and a log-sum for each head in float32.
    - loss: the last norm and V log-probabilities in float32.

    Raises:
        OptionError: ``save_memory`` where there is no FFN that it changes.
    """
    b, hidden = dtype_bytes, shape.hidden
    if save_memory and (shape.ffn != "fused" or shape.experts):
        raise OptionError(f"save_memory is for fused FFNs, not {shape.ffn} {'experts' if shape.experts else 'ones'}")
    units = b * (LEAN if save_memory else KEPT[shape.ffn]) * shape.width
    norm = 2 * b * (hidden + 1) if shape.block == "gpt2" else FP32 * (hidden + 1) + 2 * b * hidden
    attention = b * 2 * (hidden + shape.key_width) + FP32 * shape.heads
    routed = shape.top_k * (units + 2 * b * hidden) + (FP32 * hidden if shape.ffn == "fused" and b < FP32 else 0)
    return {
        "ffn": routed if shape.experts else units,
        "rest": 2 * norm + attention,
        "loss": norm + FP32 * shape.vocab,
    }


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device: its shards of weights, gradients and optimizer; what autograd keeps of the layers; and

    gathered: two layers and the embeddings as a whole, and one layer's gradients, while they are used;
    loss: what autograd keeps for the loss, the logits, and their gradient in float32.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    kept: float
    loss: float

    @property
    def total(self) -> float:
        """The sum, above the true peak: not all of it is there at once."""
        return float(sum(astuple(self)))


def training_memory(
    shape: Shape, *, tokens: int, dtype_bytes: int = 2, optimizer_bytes: int = 12, sharding: int = 1,
    expert_parallel: int = 1, save_memory: bool = False, checkpointing: bool = False,
) -> Memory:  # fmt: skip
    """Return the memory of a training step.

    Args:
        shape, tokens, dtype_bytes: T; b of weights, gradients and activations.
        optimizer_bytes: for a parameter; 12: AdamW's two moments and a float32 copy of the weight.
        sharding: n, over which FSDP shards everything.
        expert_parallel: e of these; a device gathers only its own E / e experts, over n / e devices.
        save_memory: as `hf_glu.save_memory`.
        checkpointing: a layer keeps its input only, and one layer at a time is computed again.
    """
    counts, b = parameters(shape), dtype_bytes
    common, routed = _gathered(shape, sharding, expert_parallel)
    outer = counts.outer * (sharding > 1)
    kept = kept_bytes(shape, dtype_bytes=b, save_memory=save_memory)
    each = kept["ffn"] + kept["rest"]
    layers = shape.layers * b * shape.hidden + each if checkpointing else shape.layers * each
    return Memory(
        weights=b * counts.total / sharding,
        gradients=b * counts.total / sharding,
        optimizer=optimizer_bytes * counts.total / sharding,
        gathered=b * (3 * (common + routed) / shape.layers + outer),
        kept=tokens * layers,
        loss=tokens * (kept["loss"] + shape.vocab * (b + FP32)),
    )


def _gathered(shape: Shape, devices: int, expert_parallel: int) -> tuple[float, float]:
    """Return the parameters of all layers that a device gathers: those outside of experts, and those of its experts."""
    if expert_parallel < 1 or devices < 1 or devices % expert_parallel or max(shape.experts, 1) % expert_parallel:
        raise OptionError(f"{expert_parallel} must divide the {devices} devices and the {shape.experts} experts")
    counts = parameters(shape)
    common = counts.layer * shape.layers - counts.routed
    return common * (devices > 1), counts.routed / expert_parallel * (devices > expert_parallel)


def training_flops(shape: Shape, *, sequence: int, checkpointing: bool = False) -> int:
    """Return the FLOPs of a token's forward and backward pass.

    6 for each active weight of layers and head, 6 L S H in causal attention over S tokens; checkpointing computes the
    layers' forward pass, a third of theirs, again.
    """
    counts = parameters(shape)
    layers = 6 * (counts.active - counts.outer + shape.layers * sequence * shape.hidden)
    return layers + (layers // 3 if checkpointing else 0) + 6 * shape.vocab * shape.hidden


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step: arithmetic, FSDP's gathering and scattering, sending tokens to experts and back."""

    compute: float
    fsdp: float
    experts: float

    @property
    def overlapped(self) -> float:
        """FSDP's communication runs beside the arithmetic; the experts' can't."""
        return max(self.compute, self.fsdp) + self.experts

    @property
    def exposed(self) -> float:
        """Nothing runs beside anything."""
        return float(sum(astuple(self)))


def step_time(
    shape: Shape, *, tokens: int, sequence: int, devices: int, flops: float, efficiency: float, bandwidth: float,
    expert_parallel: int = 1, expert_bandwidth: float | None = None, dtype_bytes: int = 2, checkpointing: bool = False,
) -> StepTime:  # fmt: skip
    """Return the time of a training step; for arguments that aren't told of here see `training_memory`.

    compute = T `training_flops` / (flops efficiency); FSDP moves 3 b P (n - 1) / n bytes (weights for forward and
    backward, gradients once); the experts' all-to-all 4 T k H b (e - 1) / e a layer (there and back, forward and
    backward).

    Args:
        sequence: S, tokens that attend to each other.
        flops, efficiency: of a device in a second, and the share that it reaches.
        bandwidth: bytes in a second that a device receives while it gathers.
        expert_bandwidth: of the all-to-all; None: the same.
    """
    common, routed = _gathered(shape, devices, expert_parallel)
    common += parameters(shape).outer
    group = devices // expert_parallel
    moved = 3 * dtype_bytes * (common * (devices - 1) / devices + routed * (group - 1) / group)
    rows = tokens * shape.top_k * shape.layers * (expert_parallel - 1) / expert_parallel
    sent = 4 * rows * shape.hidden * dtype_bytes
    work = tokens * training_flops(shape, sequence=sequence, checkpointing=checkpointing)
    return StepTime(
        compute=work / (flops * efficiency), fsdp=moved / bandwidth, experts=sent / (expert_bandwidth or bandwidth)
    )


def conversion_cost(
    before: Shape, after: Shape, *, disk: float, constant: float, stream: bool = False, dtype_bytes: int = 2
) -> dict[str, float]:
    """Return the ``memory`` in bytes and the ``seconds`` on the disk of converting a checkpoint.

    In memory: the converted model, and the FFN that is being converted once more. Streaming: one in-projection, its
    wide one and the half that is put beside it, 4 b W H, however large the model and its shards are. ``disk``: bytes
    read or written in a second; ``constant``: of a process with torch and hf_glu imported.

    Raises:
        OptionError: what isn't streamed: experts, another width.
    """
    if stream and (after.experts or after.width != before.width):
        raise OptionError("experts and other widths aren't streamed: stream=False")
    old, new, matrix = parameters(before).total, parameters(after).total, before.width * before.hidden
    held = 4 * matrix if stream else new + 3 * matrix
    return {"memory": constant + dtype_bytes * held, "seconds": dtype_bytes * (old + new) / disk}
