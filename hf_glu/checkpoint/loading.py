"""Loading what a checkpoint holds: its model by the class that its config names, its tokenizer, its shapes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_glu.checkpoint.carrying import REFERENCES
from hf_glu.checkpoint.config_file import check_config, model_class_of, reading
from hf_glu.checkpoint.files import TOKENIZER_FILES
from hf_glu.checkpoint.gguf import is_gguf, load_gguf, load_gguf_tokenizer, read_gguf_config
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.writing import user_path
from hf_glu.compat.of_models import FROM_CONFIG
from hf_glu.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FEWEST, SMALL = 4, 2**24  # numbers of a model for each byte of its files, and those of a model that is small


def load_model(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None, **options: Any
) -> PreTrainedModel:
    """Load a model (local folder or Hub id) by the class that its config names, in the dtype of its weights.

    Args:
        source: the folder or repository.
        revision, token: of the repository, see `hf_glu.checkpoint.hub.resolve`.
        options: further keyword arguments of ``from_pretrained``.

    Raises:
        CheckpointError: it can't be found or loaded, or some of its weights are missing.
    """
    if is_gguf(source):
        return load_gguf(source, **options)
    folder = resolve(source, revision=revision, token=token)
    check_config(folder)
    options = {"dtype": "auto", "ignore_mismatched_sizes": True, **options}
    with reading(source):
        config = _read_config(folder)
        model_class = model_class_of(config)
        if isinstance(config, model_class.config_class):  # else it is built from a part of the config
            _check_size(folder, _build_skeleton(config))
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    forget_code(model.config)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{source} lacks weights of {model_class.__name__}, such as {missing[0]}")
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise CheckpointError(f"{source} has {name} of shape {list(found)}, where its config says {list(wanted)}")
    return model


def _read_config(folder: Path) -> PreTrainedConfig:
    """Return a checkpoint's config, without running the code that it may name."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    forget_code(config)
    return config


def forget_code(config: PreTrainedConfig) -> None:
    """Remove the entries of a config that name code of the checkpoint that it was loaded from."""
    for name in REFERENCES:
        config.__dict__.pop(name, None)


def load_skeleton(source: str | os.PathLike[str]) -> PreTrainedModel:
    """Build a checkpoint's model on the meta device: its modules and shapes, without weights.

    Raises:
        CheckpointError: it can't be found, or its config can't be built.
    """
    if is_gguf(source):
        with reading(source):
            return _build_skeleton(read_gguf_config(source))
    folder = resolve(source)
    check_config(folder)
    with reading(source):
        return _build_skeleton(_read_config(folder))


def _build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    import torch

    with torch.device("meta"):
        return FROM_CONFIG.of(model_class_of(config))(config)


def _check_size(folder: Path, skeleton: PreTrainedModel) -> None:
    """Raise CheckpointError, before memory is allocated, if a config describes a model that its files can't hold."""
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    wanted = sum(tensor.numel() for tensor in skeleton.state_dict().values())
    if stored and wanted > FEWEST * stored + SMALL:
        raise CheckpointError(f"{folder} says a model of {wanted:,} numbers, and its files have {stored:,} bytes")


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer, and give it a padding token if it has none.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    from hf_glu.instruments.probe import give_pad_token

    if is_gguf(source):
        tokenizer = load_gguf_tokenizer(source)
        give_pad_token(tokenizer)
        return tokenizer
    folder = resolve(source)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # Transformers would make up an empty one
        raise CheckpointError(f"{source} has no tokenizer, which texts need")
    with reading(source, why="has no tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    give_pad_token(tokenizer)
    return tokenizer


def read_texts(path: Path) -> list[str]:
    """Return the lines of a text file, without empty ones.

    Raises:
        CheckpointError: there is no such file, or no text in it.
    """
    try:
        texts = [line.strip() for line in user_path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} can't be read as text: {getattr(error, 'strerror', None) or error}") from error
    if not texts:
        raise CheckpointError(f"{path} has no text in it")
    return texts


def encode(source: str | os.PathLike[str], texts: list[str]) -> dict[str, Tensor]:
    """Tokenize ``texts`` by a checkpoint's tokenizer: a padded batch of tensors.

    Raises:
        CheckpointError: there is no tokenizer.
    """
    return dict(load_tokenizer(source)(texts, padding=True, truncation=True, return_tensors="pt"))
