"""``config.hf_glu``: the one entry in a model's ``config.json`` that holds hf_glu's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from hf_glu.config.experts import ExpertOptions
from hf_glu.config.layers import LayerSpec, check_layers, selected
from hf_glu.config.registry import registry
from hf_glu.config.section import MAX_LAYERS, MAX_WIDTH, Entry, is_count, is_name
from hf_glu.errors import OptionError, refuse_unknown, shown

Section = TypeVar("Section", bound=Entry)
VERSION = 1
MAX_FUNCTIONS = 64  # of a mix
MULTIPLE = 64


def iso_width(dense: int) -> int:
    """Return the width at which a gated FFN has as many parameters as a dense one of width ``dense``.

    That is 2/3 of it, rounded to the nearest multiple of 64 (from a dense width of 192 on; below, to the nearest
    integer): 3072 -> 2048, 1536 -> 1024, 1024 -> 704, 40 -> 27.
    """
    multiple = MULTIPLE if dense >= 3 * MULTIPLE else 1
    return max(1, round(2 * dense / 3 / multiple)) * multiple


def check_plain(options: GluConfig) -> None:
    """Raise OptionError where the format, a name or the bias can't be used."""
    if not is_count(options.version, VERSION):
        raise OptionError(
            f"config.hf_glu has version {shown(options.version)}; this hf_glu reads 1 to {VERSION}: upgrade hf_glu"
        )
    for key in ("activation", "dense_act"):
        value = getattr(options, key)
        if value is not None and not is_name(value):
            raise OptionError(f"config.hf_glu {key} must be an activation's name, got {shown(value)}")
    if options.bias is not None and not isinstance(options.bias, bool):
        raise OptionError(f"config.hf_glu bias must be true, false or null, got {shown(options.bias)}")
    if options.sparsity is not None and not isinstance(options.sparsity, Mapping):  # read where it is put on a model
        raise OptionError(f"config.hf_glu sparsity must be a dict, got {shown(options.sparsity)}")


def check_sections(options: GluConfig) -> None:
    """Raise OptionError where a kind can't read its section."""
    for kind in registry.sections.values():
        if kind.section:
            options.read(kind.section)


def check_width(width: Any) -> None:
    """Raise OptionError unless ``width`` is None, ``iso`` or a positive number."""
    if width is not None and width != "iso" and not is_count(width, MAX_WIDTH):
        units = f"a number of units of at least 1 and at most {MAX_WIDTH:,}"
        raise OptionError(f"width must be 'keep', 'iso' or {units}, got {shown(width)}")


def check_mix(mix: Any) -> None:
    """Raise where the options of learnable and adaptive activations can't be read."""
    if mix is None:
        return
    if not isinstance(mix, Mapping):
        raise OptionError(f"config.hf_glu mix must be a dict with functions, per, gate and rank, got {shown(mix)}")
    refuse_unknown(mix, ("functions", "per", "gate", "rank"), "config.hf_glu mix")
    names = mix.get("functions", ["relu"])
    listed = isinstance(names, (list, tuple)) and 0 < len(names) <= MAX_FUNCTIONS
    if not listed or not all(map(is_name, names)):
        raise OptionError(f"config.hf_glu mix functions must be a list of activations' names, got {shown(names)}")
    for key, values in (("per", ("layer", "channel")), ("gate", ("softmax", "linear"))):
        if mix.get(key, values[0]) not in values:
            raise OptionError(f"config.hf_glu mix {key} must be {values[0]!r} or {values[1]!r}, got {shown(mix[key])}")
    rank = mix.get("rank")
    if rank is not None and not is_count(rank, MAX_WIDTH):
        most = f"a number from 1 up to {MAX_WIDTH:,}, or null for no limit"
        raise OptionError(f"config.hf_glu mix rank must be {most}, got {shown(rank)}")


def check_by_layer(names: Any) -> None:
    """Raise OptionError unless ``names`` is None or maps selections of layers to activations' names."""
    if names is None:
        return
    if not isinstance(names, Mapping) or not 0 < len(names) <= MAX_LAYERS:
        example = {"0-3": "geglu", "4,5": "swiglu"}
        raise OptionError(f"an activation is a name, those by layer are such as {example}, got {shown(names)}")
    for layers, name in names.items():
        if not isinstance(layers, str) or not is_name(name):
            raise OptionError(f"activations by layer map such as '0-3' to a name, got {shown(layers)}: {shown(name)}")
        check_layers(layers)


def name_at(names: Mapping[str, str] | None, layer: int, stack: str | None) -> str | None:
    """Return the value of the first key of ``names`` that selects ``layer`` of ``stack``, or None."""
    found = (name for layers, name in (names or {}).items() if selected(check_layers(layers), layer, stack))
    return next(found, None)


@dataclass(frozen=True, kw_only=True, init=False)
class GluConfig:
    """Options of the gated feed-forward networks of one model; every field has a good default.

    The activation itself is not here: it is the name in the model's own field (``hidden_act``,
    ``activation_function``, ``feed_forward_proj``, ...).

    Beside these fields, each kind of wrapper has a section of its own, under its key: ``state`` of ``stateful_``
    activations (`hf_glu.config.state.StateOptions`), ``context`` of ``modulated_`` ones
    (`hf_glu.config.context.ContextOptions`), and whatever other kinds are registered (`registry.sections`).
    ``GluConfig(state={"alpha": 1.0}).state`` is such a section, None where it has the defaults.

    Attributes:
        version: format of this entry, 1.
        activation: the gated activation, where the model's family has no field of its own for it (Bloom, MPT, XLM).
        dense_act: elementwise activation of whatever reads the same config field but is not a gated FFN (an LM
            head's transform, layers outside of ``layers``). None: the config class's own default.
        bias: bias on the fused in-projection ``[gate | up]``. None: as the stock class has it.
        layers: which layers are gated (see `hf_glu.config.layers`). None: all.
        by_layer: activations of some of these layers, ``{"0-3": "geglu"}``; the first key that selects a layer counts.
            None: all have the model's own.
        mix: of ``learnable_`` and ``moa_`` activations: ``{"functions": [...], "per": "layer" or "channel"}``; the mix
            starts at the first function. None: the plain activation first, per layer. Of ``moa_`` ones also ``gate``,
            ``softmax`` or ``linear``, and its ``rank``.
        width: units of a gated FFN: a number, or ``iso`` (see `iso_width`). None: as many as the dense one has.
        experts: the FFNs are experts (see `hf_glu.config.experts.ExpertOptions`); ``width`` is that of an expert. None:
            one FFN.
        sparsity: which small entries the FFNs leave out (see `hf_glu.config.sparsity.SparsityOptions`). None: none.
        sections: those of the kinds by their keys, as far as they have one.

    Raises:
        UnknownNameError: unknown key.
        OptionError: a value of the wrong type, or written by a newer hf_glu.
    """

    version: int = VERSION
    activation: str | None = None
    dense_act: str | None = None
    bias: bool | None = None
    layers: LayerSpec = None
    by_layer: dict[str, str] | None = None
    mix: dict[str, Any] | None = None
    width: int | str | None = None
    experts: dict[str, Any] | None = None
    sparsity: dict[str, Any] | None = None
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __init__(self, **options: Any) -> None:
        given = {**(options.pop("sections", None) or {}), **options}  # `dataclasses.replace` gives all of them
        refuse_unknown(given, KEYS | registry.sections.keys(), "config.hf_glu")
        for known in fields(self):
            if known.name in KEYS:
                object.__setattr__(self, known.name, given.get(known.name, known.default))
        sections = {key: given[key] for key in registry.sections if given.get(key) is not None}
        object.__setattr__(self, "sections", sections)
        self._validate()

    def _validate(self) -> None:
        """Raise OptionError where a value can't be used."""
        check_plain(self)
        check_width(self.width)
        check_mix(self.mix)
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_by_layer(self.by_layer)
        ExpertOptions.from_dict(self.experts)
        check_sections(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any] | GluConfig | None) -> GluConfig:
        """Validate ``entry`` (None means all defaults)."""
        if entry is None:
            return cls()
        if isinstance(entry, GluConfig):
            return entry
        if not isinstance(entry, Mapping):
            raise OptionError(f"config.hf_glu must be a dict of options, got {type(entry).__name__}")
        refuse_unknown(entry, KEYS | registry.sections.keys(), "config.hf_glu")
        return cls(**entry)

    @classmethod
    def of(cls, config: Any) -> GluConfig:
        """Read the options of a Transformers config."""
        return cls.from_dict(getattr(config, "hf_glu", None))

    def name_at(self, name: str | None, layer: int, stack: str | None) -> str | None:
        """Return the activation at ``layer`` of ``stack``, where the model's own is ``name``; None: none of ours."""
        if not selected(self.layers, layer, stack):
            return None
        return name_at(self.by_layer, layer, stack) or name

    def read(self, section: type[Section]) -> Section:
        """Return the options of a kind that has this section."""
        return section.from_dict(self.sections.get(section.key))

    if not TYPE_CHECKING:  # which knows `sections` only

        def __getattr__(self, key: str) -> dict[str, Any] | None:
            """Return a kind's section by its key."""
            if key in registry.sections:
                return self.__dict__.get("sections", {}).get(key)
            raise AttributeError(f"GluConfig has no {key!r}")

    @property
    def expert_options(self) -> ExpertOptions | None:
        """The options of the experts, None where there are none."""
        return ExpertOptions.from_dict(self.experts)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain dict that ``config.json`` stores: the version and whatever is not the default."""
        found = asdict(self)
        found |= found.pop("sections")
        return {key: value for key, value in found.items() if key == "version" or value is not None}


KEYS = frozenset(field.name for field in fields(GluConfig)) - {"sections"}
