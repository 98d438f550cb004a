"""GGUF files as sources of conversions: read as Transformers reads them, every weight unpacked to floating point."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from hf_glu.checkpoint.config_file import first_line, model_class_of, reading
from hf_glu.checkpoint.writing import user_path
from hf_glu.config.extras import need
from hf_glu.errors import CheckpointError

SUFFIX = ".gguf"


def is_gguf(source: object) -> bool:
    """Return whether ``source`` names a GGUF file, ``FOLDER/FILE.gguf``."""
    return isinstance(source, (str, os.PathLike)) and str(source).endswith(SUFFIX) and not user_path(source).is_dir()


def gguf_file(source: str | os.PathLike[str]) -> Path:
    """Return the path of a GGUF file.

    Raises:
        CheckpointError: there is none.
        MissingPackageError: the package that reads it isn't installed.
    """
    path = user_path(source)
    if not path.is_file():
        raise CheckpointError(f"there is no file {source}")
    need("gguf", what="a GGUF file")
    return path


def read_gguf_config(source: str | os.PathLike[str]) -> Any:
    """Return the config of a GGUF file, with the class of its model: a language model, where the family has one.

    Raises:
        CheckpointError: it is no GGUF file, or of a family that Transformers doesn't read.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    path = gguf_file(source)
    with reading(source):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    heads = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    config.architectures = [names[config.model_type] for names in heads if config.model_type in names][:1]
    return config


def load_gguf(source: str | os.PathLike[str], *, dtype: Any = "auto", **options: Any) -> Any:
    """Return the model of a GGUF file as an ordinary model, in float32 unless ``dtype`` says otherwise.

    Raises:
        CheckpointError: it can't be loaded, or lacks weights.
    """
    import torch
    import transformers

    from hf_glu.conversion.gguf import forget_gguf

    path, config = gguf_file(source), read_gguf_config(source)
    if hasattr(transformers, "GgufConfig"):  # which may keep weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with reading(source):
        model, info = model_class_of(config).from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32 if dtype == "auto" else dtype,
            output_loading_info=True, **options,
        )  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{source} lacks weights of {type(model).__name__}, such as {missing[0]}")
    forget_gguf(model)
    return model


def load_gguf_tokenizer(source: str | os.PathLike[str]) -> Any:
    """Return the tokenizer in a GGUF file.

    Raises:
        CheckpointError: it has none that Transformers reads.
    """
    from transformers import AutoTokenizer

    path = gguf_file(source)
    with reading(source, why="has no tokenizer that can be loaded"):
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def save_gguf_tokenizer(source: str | os.PathLike[str], destination: Path) -> None:
    """Write the tokenizer in a GGUF file into a folder; warn where there is none that Transformers reads."""
    try:
        load_gguf_tokenizer(source).save_pretrained(destination)
    except CheckpointError as error:
        warnings.warn(f"no tokenizer is written: {first_line(error)}", stacklevel=2)
