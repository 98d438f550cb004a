"""What the code of a checkpoint goes without, by what its model has: definitions, with what stands in their place.

A text "" stands for nothing: whatever only calls such a definition is left out, too. Kernels that save time or memory
are never there: the formulas beside them compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from hf_glu.publishing.hub.source import Place

Stubs = Mapping[Place, str]
# attributes and methods that only choose another kernel; and GluConfig's short ways to its sections
OFF = frozenset({"saves_memory", "is_fused", "_is_few", "not TYPE_CHECKING"})
# conditions of what hears a router
UNHEARD = frozenset({"hears", "confidence is not None", "given is not None"})

_BUILD, _SITES, _CONFIG = "hf_glu.ffn.build", "hf_glu.ffn.sites", "hf_glu.config.glu"
_CONTEXT, _KINDS = "hf_glu.ffn.context_sites", "hf_glu.config.kinds"
_LOOP, _NATIVE = "hf_glu.ffn.experts.loop", "hf_glu.ffn.experts.native"
_ASKED, _FIELDS = "hf_glu.ffn.experts.asked", "hf_glu.config.router_fields"
_SCAN = "hf_glu.activation.kernels.scan"
_REGISTRY, _LAYERS = "hf_glu.config.registry", "hf_glu.config.layers"

# the names' grammar in brief: the activations of a model are known
_READINGS = "        self.readings: dict[str, Reading] = {}\n"
_READ = """    def read(self, name: str) -> Reading | None:
        return self.readings.get(name)

"""
_REGISTRY_OF_NAMES = '''\
class Registry:
    """The activations that this code has, by name, and what the names consist of."""

    def __init__(self) -> None:
        self.entries: dict[str, Activation] = {}
        self.sections: dict[str, Any] = {}
        self.readings: dict[str, Reading] = {}

    def find(self, name: object) -> Activation | None:
        return self.entries.get(name) if isinstance(name, str) else None

    def read(self, name: str) -> Reading | None:
        return self.readings.get(name)

    def is_stock(self, name: str) -> bool:
        return name not in self.entries and name in dict.keys(transformers.activations.ACT2FN)

    def unknown(self, name: object, kind: str = "") -> UnknownNameError:
        return UnknownNameError(f"unknown {kind}activation {shown(name)}; {nearest(name, self.entries)}")

    def __getitem__(self, name: str) -> Activation:
        if found := self.find(name):
            return found
        raise self.unknown(name)'''
_KIND = '''\
@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a kind says of itself."""

    flag: str
    section: Any
    check: Any = allow
    parts: Any = no_parts'''
_NEAREST = """\
def nearest(name: object, valid: Iterable[str], *, limit: int = 3, among: Any = None) -> str:
    close = get_close_matches(str(name)[:LONGEST], names := sorted(valid), limit)
    return f"did you mean {close[0]!r}?" if close else "valid: " + ", ".join(names)"""
ALWAYS: Stubs = {
    (_REGISTRY, "Registry"): _REGISTRY_OF_NAMES,
    ("hf_glu.activation.stock", "elementwise_names"): """\
def elementwise_names() -> list[str]:
    return [*dict.keys(transformers.activations.ACT2FN)]""",
    (_KINDS, "Kind"): _KIND,
    (_KINDS, "Activation.to_dict"): "",
    (_KINDS, "Activation.__post_init__"): "",
    (_SITES, "Sites"): "Sites = list",
    (_SITES, "Site.__repr__"): "",
    (_SITES, "need_model"): "",
    ("hf_glu.errors", "nearest"): _NEAREST,
    ("hf_glu.compat.of_torch", "is_traced"): """\
def is_traced() -> bool:
    return torch.jit.is_tracing() or getattr(torch.compiler, "is_exporting", bool)()""",
    ("hf_glu.compat.of_torch", "grouped_mm"): """\
def grouped_mm(x: Any, weights: Any, ends: Any) -> Any:
    return functional.grouped_mm(x, weights, offs=ends)""",
    # the recurrence, on a CPU token by token: what the package's operator computes, bit by bit
    (_SCAN, "stateful"): """def stateful(
    gate: Tensor, alpha: Tensor, beta: Tensor, decay: Tensor, *, start: Tensor | None = None,
    valid: Tensor | None = None, restart: Tensor | None = None, reverse: bool = False, backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    if torch.jit.is_tracing():
        raise OptionError("a trace would be of texts of one length: install hf_glu to trace a stateful model")
    if gate.shape[1] == 1 and start is not None and valid is None and restart is None and not torch.is_grad_enabled():
        alpha, beta, decay = (parameter.to(start.dtype) for parameter in (alpha, beta, decay))
        return step(gate, alpha, beta, decay, start.unsqueeze(1))
    if restart is not None and reverse:
        restart = torch.cat([restart[:, 1:], torch.zeros_like(restart[:, :1])], dim=1)
    if gate.device.type != "cpu" or torch.compiler.is_compiling() or getattr(torch.compiler, "is_exporting", bool)():
        return traced(gate, alpha, beta, decay, start, valid, restart, reverse)
    g = gate.to(torch.promote_types(gate.dtype, torch.float32))
    alpha, beta, decay = (parameter.to(g.dtype) for parameter in (alpha, beta, decay))
    counts = None if valid is None else valid.unsqueeze(-1).to(g.dtype)
    kept = None if restart is None else 1 - restart.unsqueeze(-1).to(g.dtype)
    n = torch.sigmoid(g)
    x, rates = n * (1 - decay), decay.expand(1, g.shape[1], -1)
    if counts is not None:
        x, rates = x * counts, counts * decay
    if kept is not None:
        rates = (kept if counts is None else counts * kept) * decay
    if counts is not None:
        rates = rates + (1 - counts) * (1 if kept is None else kept)
    state = g.new_zeros(g.shape[0], g.shape[2]) if start is None else start.to(g.dtype)
    steps = list(zip(x.unbind(1), rates.unbind(1), strict=True))
    before, after = [], []
    for new, rate in reversed(steps) if reverse else steps:
        before.append(state)
        state = torch.addcmul(new, state, rate)
        after.append(state)
    read, states = (torch.stack(part[::-1] if reverse else part, 1) for part in (before, after))
    read = read if kept is None else read * kept
    return torch.addcmul(torch.addcmul(g, n, beta), read, alpha - beta).to(gate.dtype), states""",
    (_LOOP, "ExpertLoop"): "",
    ("hf_glu.activation.kernels.sharpening", "sharpen"): """\
def sharpen(gate: Tensor, scores: Tensor, response: Tensor, experts: Tensor | None = None) -> Tensor:
    return _formula(gate, scores, response, experts)""",
    (_LOOP, "Dispatch"): "",
    (_LOOP, "Combine"): "",
    (_SITES, "Site.to_dict"): "",
    (_SITES, "Site.parameters"): "",
    ("hf_glu.ffn.experts.ffn", "ExpertFFN.to_dict"): "",
    ("hf_glu.errors", "shown"): "def shown(value: object) -> str:\n    return repr(value)[:80]",
    # what a config says was checked when the code was written
    (_CONFIG, "check_width"): "",
    (_CONFIG, "check_plain"): "",
    (_CONFIG, "check_sections"): "",
    (_CONFIG, "check_mix"): "",
    (_CONFIG, "check_by_layer"): "",
    ("hf_glu.config.experts", "ExpertOptions.__post_init__"): "",
    ("hf_glu.config.experts", "ExpertOptions._check_sources"): "",
    ("hf_glu.config.experts", "check_size"): "",
    ("hf_glu.config.state", "StateOptions.__post_init__"): "",
    ("hf_glu.config.context", "ContextOptions.__post_init__"): "",
    ("hf_glu.config.canon", "CanonOptions.__post_init__"): "",
    ("hf_glu.config.smear", "SmearOptions.__post_init__"): "",
    ("hf_glu.config.section", "Entry.to_dict"): "",
    ("hf_glu.config.experts", "ExpertOptions.to_dict"): "",
    # so was where an activation may be
    (_CONTEXT, "check_routed"): "",
    ("hf_glu.ffn.experts.group", "check_shared"): "",
    ("hf_glu.activation.kappa", "response_of"): "",
    # router logits are for trainers; the losses and their coefficient are there
    (_ASKED, "ask"): '''\
def ask(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    outer, config = asking(), getattr(model, "config", None)
    if kwargs.get("output_router_logits"):
        raise OptionError("the code of this checkpoint returns no router logits: install hf_glu")
    known, graded = (None, torch.is_grad_enabled()) if outer is None else (outer.coefficient, outer.graded)
    begin_asking(Asking(model, False, coefficient_in(config) if known is None else known, graded))
    return kwargs''',
    (_ASKED, "note_logits"): "",
    (_ASKED, "answer"): '''\
def answer(now: Any, output: Any, loss: Tensor | None, weight: Tensor | float) -> Any:
    return output''',
    (_FIELDS, "coefficient_in"): '''\
def coefficient_in(config: Any) -> float | None:
    name = "router_aux_loss_coef"
    return None if hasattr(type(config), name) else getattr(config, name, None)''',
    (_FIELDS, "add_router_fields"): "",
}  # fmt: skip
WITHOUT_EXPERTS: Stubs = {
    ("hf_glu.ffn.experts.ffn", "ExpertFFN"): "ExpertFFN = ()",
    ("hf_glu.ffn.expert_sites", "FirstOnly"): "FirstOnly = ()",
    ("hf_glu.ffn.experts.ffn", "find_experts"): '''\
def find_experts(model: nn.Module) -> dict[str, Any]:
    return {}''',
    (_BUILD, "build_experts"): '''\
def build_experts(model: nn.Module, config: Any, sites: list[Site], options: GluConfig) -> list[Site]:
    if options.experts is not None:
        raise ConversionError("the code of this checkpoint has no experts: install hf_glu")
    return sites''',
}  # fmt: skip
WITHOUT_COPIES: Stubs = {
    ("hf_glu.ffn.experts.copies", "Copies"): """def Copies(*sizes: int) -> Any:
    raise OptionError("the code of this checkpoint has no copies of experts: install hf_glu")""",
}
WITHOUT_BANKS: Stubs = {
    (_NATIVE, "MixedBank"): "MixedBank = ()",
    (_BUILD, "mix_banks"): "",
    (_SITES, "find_banks"): """def find_banks(model: nn.Module) -> list[Site]:
    return []""",
}
WITHOUT_MIXERS: Stubs = {
    ("hf_glu.ffn.mixers", "own_gate"): "",
    (_SITES, "convertible_sites"): """def convertible_sites(model: nn.Module) -> list[Site]:
    return find_sites(model)""",
}
WITHOUT_OPTIONS: Stubs = {("hf_glu.config.experts", "ExpertOptions"): ""}
WITHOUT_READERS: Stubs = {("hf_glu.activation.context.hooks", "watch_context"): ""}
WITHOUT_SECTIONS: Stubs = {(_CONTEXT, "settle_kinds"): ""}
WITHOUT_CHECKS: Stubs = {(_CONTEXT, "check_kinds"): ""}
WITHOUT_PARTS: Stubs = {(_CONTEXT, "place_parts"): ""}
WITHOUT_DERIVED: Stubs = {("hf_glu.ffn.config_fields", "sync_derived"): ""}
WITHOUT_LAYERS: Stubs = {
    (_CONFIG, "name_at"): '''\
def name_at(names: Mapping[str, str] | None, layer: int, stack: str | None) -> str | None:
    return check_layers(names)''',
    (_LAYERS, "check_layers"): '''\
def check_layers(spec: Any) -> None:
    if spec is not None:
        raise OptionError("the code of this checkpoint gates all layers: install hf_glu to select some")''',
    (_LAYERS, "selected"): '''\
def selected(spec: None, layer: int, stack: str | None = None) -> bool:
    return True''',
    (_BUILD, "check_selection"): "",
}  # fmt: skip
WITHOUT_WIDTH: Stubs = {
    (_BUILD, "gated_width"): '''\
def gated_width(width: int | str | None, dense: int) -> int:
    if width is not None:
        raise OptionError("the code of this checkpoint has no width of its own: install hf_glu")
    return dense''',
}  # fmt: skip
WITHOUT_NAMES: Stubs = {(_BUILD, "give_dense_configs"): ""}
WITHOUT_KAPPA: Stubs = {
    (_REGISTRY, "hears"): "def hears(name: str) -> bool: return False",
    ("hf_glu.activation.kappa", "for_experts"): "",
}
WITHOUT_KINDS: Stubs = {
    ("hf_glu.ffn.completeness", "refuse_losses"): '''\
def refuse_losses(model: Any, load_config: Any, loading_info: Any) -> None:
    missing = dict.fromkeys(_untied(model, loading_info.missing_keys), "isn't in the checkpoint")
    unexpected = _unmatched(loading_info.unexpected_keys, model._keys_to_ignore_on_load_unexpected)
    if _no_checkpoint(model, set(missing), unexpected):
        return
    mismatched = loading_info.mismatched_keys
    found = {key: f"is {list(has)} in the checkpoint, not {list(want)}" for key, has, want in mismatched}
    found |= missing | dict.fromkeys(unexpected, "has no place in the model")
    sites = [*convertible_sites(model), *find_banks(model)]
    paths = {path for site in sites for path in (*site.parts, f"{site.path}.{site.row.act}".removeprefix("."))}
    bad = sorted(key for key in found if _within(key, paths | set(find_experts(model))))
    if bad:
        raise CheckpointError(
            f"{load_config.pretrained_model_name_or_path}: {bad[0]} {found[bad[0]]} (and {len(bad) - 1} more): "
            "another FFN. To turn a dense checkpoint into a gated model, run `hf-glu convert SRC DST --to NAME`"
        )''',
    (_REGISTRY, "Registry"): _REGISTRY_OF_NAMES.replace(_READ, "").replace(_READINGS, ""),
    (_REGISTRY, "unwrapped"): "def unwrapped(name: str) -> str:\n    return name",
    (_REGISTRY, "reads_text"): "def reads_text(name: str) -> bool: return False",
}  # fmt: skip
