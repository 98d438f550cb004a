"""Checks of a checkpoint's ``config.json``, which anybody may have written, before Transformers builds its model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hf_glu.activation  # noqa: F401  (its kinds have sections in a config)
from hf_glu.checkpoint.files import CONFIG_FILE
from hf_glu.checkpoint.jsonio import JsonObject, read_object
from hf_glu.compat.of_models import MODEL_MAPPING
from hf_glu.config.glu import GluConfig
from hf_glu.config.section import MAX_LAYERS
from hf_glu.errors import CheckpointError, HfGluError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# a model is built layer by layer, also on the meta device: what these count is what takes time
COUNTS = frozenset(
    "num_hidden_layers num_layers num_decoder_layers num_encoder_layers encoder_layers decoder_layers n_layer n_layers "
    "depth num_hidden_groups inner_group_num num_local_experts num_experts n_routed_experts num_attention_heads n_head "
    "num_heads".split()
)
LARGEST = 2**40
DEEPEST, LINE = 20, 500


@contextmanager
def reading(source: object, *, why: str = "can't be loaded") -> Iterator[None]:
    """Turn any exception inside of the block into one CheckpointError that names ``source``."""
    try:
        yield
    except HfGluError:
        raise
    except Exception as error:  # a broken config runs into any line of any model's code
        raise CheckpointError(f"{source} {why}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that isn't empty, after the error's class where that tells more.

    Where a library lacks a name that hf_glu knows to be needed, what the table of such names says of it.
    """
    from hf_glu.compat.table import missing_in

    if row := missing_in(error):
        return str(row.missing())
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind, lines = type(error).__name__, [shorten(line) for line in lines[:1]]
    told = isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) and type(error) is not RecursionError
    return kind if not lines else lines[0] if told else f"{kind}: {lines[0]}"


def shorten(line: str) -> str:
    """Return a line cut to `LINE` characters: a broken file may be quoted in it."""
    return line if len(line) <= LINE else f"{line[:LINE]}..."


def check_config(folder: Path) -> None:
    """Check a folder's ``config.json``, if it has one: types, sizes, and the ``hf_glu`` entry.

    Raises:
        CheckpointError, DataError: it is no config: other types than a config has, numbers that no model has.
        HfGluError: its ``hf_glu`` entry can't be read.
    """
    path = folder / CONFIG_FILE
    if path.is_file():
        _check(read_object(path), path)


def _check(config: JsonObject, path: Path, depth: int = 0) -> None:
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{path}: architectures must be a list of names, got {shown(names)}")
    if not isinstance(config.get("model_type", ""), str):
        raise CheckpointError(f"{path}: model_type must be a name, got {shown(config['model_type'])}")
    for key, value in config.items():
        if isinstance(value, int) and abs(value) > (MAX_LAYERS if key in COUNTS else LARGEST):
            raise CheckpointError(f"{path}: no model has {key}={shown(value)}")
        if isinstance(value, dict) and depth < DEEPEST:
            _check(value, path, depth + 1)
    GluConfig.from_dict(config.get("hf_glu"))


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the model class that a config names under ``architectures``; without a name, the base model's class.

    Raises:
        CheckpointError: it names another kind of class than a model of its own.
    """
    import transformers

    names = config.architectures or []
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and _fits(found, config):
            return found
    if any(getattr(transformers, name, None) is not None for name in names):
        raise CheckpointError(f"config.json names {shown(names[0])}, which is no model of the type {config.model_type}")
    base = MODEL_MAPPING.of(transformers.AutoModel)[type(config)]
    return base[0] if isinstance(base, (list, tuple)) else base


def _fits(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Return whether a model class is built from this config, or from a config inside of it."""
    kinds = (type(config), *getattr(config, "sub_configs", {}).values())
    wanted = getattr(model_class, "config_class", None)
    return isinstance(wanted, type) and any(issubclass(kind, wanted) for kind in kinds)
