"""The sentences of a model card: what the model is, what its activations do, its limits."""

from __future__ import annotations

from collections.abc import Iterator

from hf_glu.activation import registry
from hf_glu.checkpoint.hub import invalid_name
from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.config.glu import GluConfig
from hf_glu.config.layers import STACKS
from hf_glu.config.registry import Activation
from hf_glu.conversion.routes import APPROXIMATE, EXACT, ROUNDING
from hf_glu.ffn.config_fields import plain_name
from hf_glu.ffn.families import ACTIVATION_FIELDS
from hf_glu.publishing.card.known import BaseFacts, Facts
from hf_glu.publishing.training import is_language, trained_on


def options_of(facts: Facts) -> GluConfig:
    """Return the options in ``config.hf_glu``, of the config or the first config inside of it that has them."""
    return GluConfig.from_dict(next((c["hf_glu"] for c in _configs(facts["config"]) if c.get("hf_glu")), None))


def name_of(facts: Facts) -> str | None:
    """Return the activation that the config names, ours or not; None if it names none."""
    fields = ((config, field) for config in _configs(facts["config"]) for field in ACTIVATION_FIELDS)
    named = next((name for config, field in fields if (name := plain_name(config.get(field)))), None)
    return options_of(facts).activation or named


def _configs(config: JsonObject) -> Iterator[JsonObject]:
    """Yield a config and those inside of it."""
    yield config
    for key, value in config.items():
        if isinstance(value, dict) and key not in ("hf_glu", "auto_map"):
            yield from _configs(value)


def names_in(facts: Facts) -> list[str]:
    """Return the names of the FFNs' activations, those of experts one by one."""
    options = options_of(facts)
    if experts := options.expert_options:
        names = [group.name for group in (*experts.experts, *experts.always_on)]
    else:
        names = [*(options.by_layer or {}).values()] or [str(name_of(facts))]
    return list(dict.fromkeys(names))


def activations(facts: Facts) -> list[Activation]:
    """Return the registry's entries of the model's activations."""
    return [entry for name in names_in(facts) if (entry := registry.find(name))]


def needs_plugin(facts: Facts) -> bool:
    """Return whether stock Transformers can't load the model."""
    return bool(options_of(facts).to_dict().keys() - {"version"} or activations(facts))


def refused_name(facts: Facts) -> str | None:
    """Return the activation's name for which stock Transformers refuses the model; None if it doesn't."""
    named = (plain_name(config.get(field)) for config in _configs(facts["config"]) for field in ACTIVATION_FIELDS)
    return next((name for name in named if registry.find(name)), None)


def architecture(facts: Facts) -> str:
    """Return the model class that the config names; an empty text if that can't be one."""
    named = facts["config"].get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    return first if isinstance(first, str) and first.isidentifier() else ""


def summary(facts: Facts) -> str:
    """Return the sentence that says what the model is."""
    base, trained, merged = facts["base"], facts["run"], facts.get("merged")
    what = _link(base) if base else f"A `{architecture(facts) or facts['config'].get('model_type', 'model')}`"
    if merged:
        *most, last = map(_link, merged)
        what = f"A mixture of {', '.join(most)} and {last}"
    if facts["conversion"]:
        clause = f", whose {_conversion(facts)}"
    else:
        clause = f", whose {_structure(facts)}" if needs_plugin(facts) else ""
    if trained or facts.get("healing"):
        then = " and which was then" if clause and not (trained and trained.get("new")) else ","
        return f"{what}{clause}{then} {_training(facts)}."
    if facts["conversion"] and facts["conversion"].get("changed"):
        return f"{what}{clause}. Its weights or options have been changed since; what by isn't known."
    return f"{what}{clause}. It was not trained afterwards." if facts["conversion"] else f"{what}{clause}."


def _training(facts: Facts) -> str:
    """Return what was done after the conversion."""
    run, healing = facts["run"], facts.get("healing")
    healed = f"healed by `{healing['teacher']}` on unlabelled text" if healing else ""
    if run is None or (healing and healing["in_run"]):
        return healed
    done = trained_on(run["task"], run["options"], new=run.get("new", False))
    return f"{healed}, and {done}" if healed else done


def _link(base: BaseFacts) -> str:
    name = base["name"]
    return f"[{name}](https://huggingface.co/{name})" if is_repository(base) else f"`{name}`"


def is_repository(base: BaseFacts) -> bool:
    """Return whether a base is said to be on the Hub, under a name that can be one there."""
    return bool(base.get("repository")) and not invalid_name(base["name"])


def _conversion(facts: Facts) -> str:
    """Return the clause that says what the conversion has changed."""
    conversion, options = facts["conversion"], options_of(facts)
    assert conversion is not None
    source = " and ".join(f"`{name}`" for name in conversion["from"])
    if not conversion.get("changes", True):
        return "feed-forward networks were left as they were"
    if "grow" in conversion.get("made", ()):
        return f"experts, {source} before, were copied: {'; '.join(conversion['routes'])}"
    if options.expert_options and facts["banks"]:
        return f"experts, all {source} before, got activations of their own: {_experts(facts)}"
    if facts.get("merged"):
        return f"feed-forward networks{_where(options)}, one model's each, became experts: {_experts(facts)}"
    if options.expert_options:
        return f"feed-forward networks, {source} before, became mixtures of experts{_where(options)}: {_experts(facts)}"
    parts = "mixers' gates" if conversion["mixers"] else "feed-forward networks"
    if facts["run"] and facts["run"]["options"].get("random"):
        return f"{parts} were replaced by randomly initialised ones with {_targets(facts)}"
    return f"{parts} were converted from {source} to {_targets(facts)}"


def _structure(facts: Facts) -> str:
    """Return the clause that says what the FFNs compute, from the config alone."""
    options = options_of(facts)
    if options.expert_options and facts["banks"]:
        return f"experts have activations of their own: {_experts(facts)}"
    if options.expert_options:
        return f"feed-forward networks{_where(options)} are mixtures of experts: {_experts(facts)}"
    parts = "mixers' gates" if "mamba" in facts["config"].get("model_type", "") else "feed-forward networks"
    return f"{parts} compute {_targets(facts)}"


def _experts(facts: Facts) -> str:
    experts = options_of(facts).expert_options
    assert experts
    if facts["banks"]:
        return f"`{experts.groups}`"
    shared = f" and all of `{experts.shared}`" if experts.shared else ""
    return f"`{experts.groups}`, {experts.top_k} of them{shared} for each token"


def _targets(facts: Facts) -> str:
    """Return the activations with the layers that have them."""
    options, target = options_of(facts), facts["conversion"].get("target") if facts["conversion"] else None
    if options.by_layer:
        return " and ".join(f"`{name}` ({_layers(key)})" for key, name in options.by_layer.items())
    name = name_of(facts)
    if not needs_plugin(facts) and isinstance(target, str):
        name = target  # the family has it itself, under the name of its elementwise part
    return f"`{name}`{_where(options)}"


def _where(options: GluConfig) -> str:
    if options.layers is None:
        return ""
    if not isinstance(options.layers, dict):
        return f" ({_layers(options.layers)})"
    return f" ({', '.join(f'{_layers(part)} of the {stack}' for stack, part in options.layers.items())})"


def _layers(key: str | list[int]) -> str:
    """Return a selection of layers in words: ``encoder 0-3`` is *layers 0-3 of the encoder*."""
    if isinstance(key, list):
        key = ",".join(map(str, key))
    stack, _, rest = key.partition(" ") if key.split()[0] in STACKS else ("", "", key)
    numbers = rest.replace(",", ", ")
    layers = "all layers" if rest in ("", "all") else f"layer{'' if rest.isdecimal() else 's'} {numbers}"
    return f"{layers} of the {stack}" if stack else layers


def traits(facts: Facts) -> list[str]:
    """Return a sentence on each trait of the model's activations."""
    flags = {flag for entry in activations(facts) for flag in entry.flags}
    functions = ", ".join(f"`{name}`" for name in (options_of(facts).mix or {}).get("functions", ()))
    return [kind.trait.format(functions=functions or "several") for kind in registry.kinds if kind.flag in flags]


def limits(facts: Facts) -> list[str]:
    """Return the sentences on limits that hold for this model."""
    run = facts["run"]
    conversion: JsonObject = {**(facts["conversion"] or {})}
    options = run["options"] if run else {}
    promise, random = conversion.get("promise"), options.get("random")
    changed, sparse = bool(conversion.get("changed")), options_of(facts).sparsity is not None
    exact, known = promise in (EXACT, ROUNDING) and not changed, "max_abs_difference" in conversion or changed
    language = is_language(options)
    unit, length = "hundredths of a nat" if language else "tenths of a point", options.get("max_length")
    cases = {
        "It computes what the base model computes, and nothing better: it is made to be fine-tuned.": exact
        and not run
        and not sparse
        and not facts.get("healing"),
        "The conversion is approximate: before any training the outputs are not the base model's.": promise
        == APPROXIMATE
        and not random,
        "The converted feed-forward networks began at random: what had been learned there is lost.": random
        and conversion,
        "Exactness holds in float32, outside of autocast.": exact and not random,
        "What the conversion changed in the outputs was not measured.": promise and not known and not random,
        "All experts are in memory, however few a token uses.": options_of(facts).expert_options is not None,
        "Feed-forward networks leave small entries out: without hf_glu they are dense, and give other outputs.": sparse,
        f"One run, one seed and one data set: a difference of a few {unit} is noise.": run and not facts["comparison"],
        "One data set and few seeds: differences within the standard deviations are noise.": facts["comparison"],
        f"Longer texts than {length} tokens were cut in training.": length and not language,
        f"It was trained on blocks of {length} tokens.": length and language,
        "No results are beside it: nothing is known of its quality.": not run and not facts.get("healing"),
        "Whatever the base model can't do or gets wrong, this one inherits.": facts["base"] and not facts.get("merged"),
    }
    return [text for text, holds in cases.items() if holds]
