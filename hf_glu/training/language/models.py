"""The model and the tokenizer of language modelling: a pretrained checkpoint's, or new ones."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed

from hf_glu.checkpoint.config_file import check_config, model_class_of, reading
from hf_glu.checkpoint.gguf import is_gguf, load_gguf, load_gguf_tokenizer
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.jsonio import JsonObject, read_object
from hf_glu.checkpoint.loading import forget_code, load_skeleton, load_tokenizer
from hf_glu.checkpoint.writing import user_path
from hf_glu.config.traits import cut_at, text_config, vocabulary
from hf_glu.errors import CheckpointError, OptionError, nearest, shown
from hf_glu.instruments.probe import probe_inputs, try_run
from hf_glu.training.data.models import give_padding
from hf_glu.training.language.objectives import HIDDEN, OBJECTIVES, Objective, objective_of
from hf_glu.training.language.options import LONGEST_BLOCK, LanguageOptions
from hf_glu.training.language.tokenizers import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# fields of older files, or of ours, that configs read or need no more
OLD_FIELDS = frozenset({
    "auto_map", "gradient_checkpointing", "hf_glu", "n_ctx", "output_past", "position_embedding_type", "pretraining_tp",
    "task_specific_params", "torch_dtype", "use_bfloat16",
})  # fmt: skip
# what a config calls the ids of special tokens, and what a tokenizer does
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def load_language_model(
    options: LanguageOptions, seed: int, *, whole: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Objective]:
    """Load a pretrained model for its objective, in float32, with its tokenizer.

    Args:
        options: say which.
        seed: of a head that the checkpoint doesn't have, which a warning tells of.
        whole: whether it must have one.

    Raises:
        CheckpointError: it can't be found or loaded, or lacks weights.
        OptionError: it can't be trained so.
    """
    import transformers

    source = options.model
    set_seed(seed)
    if is_gguf(source):
        model, tokenizer = load_gguf(source), load_gguf_tokenizer(source)
        name = objective_of(model.config, options.objective)
        if name != "clm":
            raise OptionError(f"a GGUF file is trained by clm, not by {name}")
        return _ready(model, tokenizer, name, options)
    folder = resolve(source)
    check_config(folder)
    with reading(source, why="can't be loaded as a language model"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = load_tokenizer(folder)
        name = objective_of(config, options.objective, taught=bool(options.teacher))
        kind = model_class(name, config)
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        if whole:
            raise CheckpointError(f"{source} lacks weights of {type(model).__name__}, such as {missing[0]}")
        _log.warning(
            "%s lacks weights of %s, such as %s: they begin at random", source, type(model).__name__, missing[0]
        )
    forget_code(model.config)
    return _ready(model, tokenizer, name, options)


def model_class(objective: str, config: PreTrainedConfig) -> Any:
    """Return the class that loads a model for an objective: for hidden states the one that its config names."""
    import transformers

    if objective == HIDDEN:
        return model_class_of(config)
    return getattr(transformers, OBJECTIVES[objective].auto_class)  # type: ignore[attr-defined]


def make_language_model(
    options: LanguageOptions, texts: Iterable[str], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Objective]:
    """Build a model from its config alone, with another model's tokenizer or one that is trained on ``texts``.

    Raises:
        OptionError, CheckpointError: the config can't be read or built, or there is no such tokenizer.
    """
    import transformers

    values = read_config(str(options.config))
    config = make_config(values)
    name = objective_of(config, options.objective)
    if options.train_tokenizer:
        tokenizer = train_tokenizer(texts, options.train_tokenizer, name)
    else:
        tokenizer = load_tokenizer(str(options.tokenizer))
    size = values.get("vocab_size", len(tokenizer))
    values = {**values, "vocab_size": size, **_token_ids(values, config, tokenizer)}
    set_seed(seed)
    with reading(options.config, why="can't be built"):
        kind = getattr(transformers, OBJECTIVES[name].auto_class)  # type: ignore[attr-defined]
        model = kind.from_config(make_config(values), dtype=torch.float32)
    try_run(model, probe_inputs(model), instead=": change the sizes in config")
    return _ready(model, tokenizer, name, options)


def language_skeleton(options: LanguageOptions) -> PreTrainedModel:
    """Build the model of a job on the meta device: its modules and shapes, without weights.

    Raises:
        CheckpointError, OptionError: it can't be found or built.
    """
    import transformers

    if options.model:
        return load_skeleton(options.model)
    values = read_config(str(options.config))
    if "vocab_size" not in values:
        values["vocab_size"] = options.train_tokenizer or len(load_tokenizer(str(options.tokenizer)))
    config = make_config(values)
    kind = getattr(transformers, OBJECTIVES[objective_of(config, options.objective)].auto_class)  # type: ignore[attr-defined]
    with reading(options.config, why="can't be built"), torch.device("meta"):
        return kind.from_config(config)


def read_config(text: str) -> JsonObject:
    """Read the config of a model from a JSON file, or from JSON itself.

    Raises:
        OptionError: it is none.
    """
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else read_object(user_path(text))
    except ValueError as error:
        raise OptionError(f"config is no JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise OptionError('config must be an object with a model_type, such as {"model_type": "gpt2", "n_layer": 6}')
    return found


def make_config(values: JsonObject) -> PreTrainedConfig:
    """Make a config of what a file says.

    Raises:
        OptionError, CheckpointError: there is no such model type, or the values can't be.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, more = values["model_type"], {key: value for key, value in values.items() if key != "model_type"}
    if kind not in CONFIG_MAPPING:
        raise OptionError(f"there is no model_type {shown(kind)}; {nearest(kind, list(CONFIG_MAPPING))}")
    with reading("config", why="can't be read"):
        config = AutoConfig.for_model(kind, **more)
    known = _known_fields(type(config))
    for key in more:
        if key in known or key.startswith("_"):
            continue
        other = AutoConfig.for_model(kind, **{name: value for name, value in more.items() if name != key})
        if {**config.to_dict(), key: None} == {**other.to_dict(), key: None}:  # some read fields of other names, too
            raise OptionError(f"a config of {kind} has no {shown(key)}, which would do nothing; {nearest(key, known)}")
    layers = getattr(text_config(config), "num_hidden_layers", None)
    if type(layers) is int and layers < 1:
        raise OptionError(f"a model needs a layer at least, and config has {layers}")
    return config


def _known_fields(kind: type[PreTrainedConfig]) -> set[str]:
    """Return the fields that a config may say: the family's, those of all, and what older files have."""
    from transformers import GenerationConfig, PreTrainedConfig

    general = {*PreTrainedConfig().to_dict(), *vars(GenerationConfig()), *_SPECIAL, *OLD_FIELDS}
    own = {*signature(kind.__init__).parameters, *kind.attribute_map}
    with suppress(ValueError, TypeError, AttributeError):  # a family without defaults
        own |= set(kind().to_dict())
    return own | general


def _token_ids(values: JsonObject, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the ids of special tokens, as the tokenizer has them, that the config doesn't say itself."""
    found = {name: getattr(tokenizer, name, None) for name in _SPECIAL[:3]}
    if config.is_encoder_decoder:
        found["decoder_start_token_id"] = tokenizer.pad_token_id
    return {name: number for name, number in found.items() if name not in values}


def _ready(
    model: Any, tokenizer: PreTrainedTokenizerBase, name: str, options: LanguageOptions
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Objective]:
    give_padding(model, tokenizer)
    size = vocabulary(model.config)
    if size is not None and len(tokenizer) > size:
        raise OptionError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model's vocabulary {size:,}: is it another model's?"
        )
    return model, tokenizer, OBJECTIVES[name](tokenizer, options).of_model(model)


def block_length(
    asked: int | None, objective: Objective, tokenizer: PreTrainedTokenizerBase, *configs: PreTrainedConfig
) -> int:
    """Return how many tokens a block has that all models of ``configs`` read: a student and its teacher, say.

    Raises:
        OptionError: more than they read, or than the objective takes.
    """
    limit = min(cut_at(config, tokenizer, sys.maxsize) for config in configs)
    if asked is not None and asked > limit:
        readers = "the model, which reads" if len(configs) == 1 else "model and teacher, which read"
        raise OptionError(f"max_length={asked} is too long for {readers} {limit} tokens: give at most that")
    length = asked or min(limit, LONGEST_BLOCK)
    objective.check(length)
    return length


def config_file(text: str) -> Path | None:
    """Return the path of a config that is given as a file, None where it is JSON itself."""
    return None if text.lstrip().startswith("{") else user_path(text)
