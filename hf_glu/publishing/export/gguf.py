"""A stock form for llama.cpp's converter to GGUF, which reads an activation's name in one family only.

For ModernBERT it takes ``hidden_activation`` along, and every name that it doesn't know for GeGLU, ``relu`` for no
gated one; of all others it takes the activation that the family has by default. It says no word, so that what it would
misread isn't written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_glu.activation.stock import same_function
from hf_glu.checkpoint.files import CONFIG_FILE
from hf_glu.checkpoint.jsonio import read_object, write_json
from hf_glu.checkpoint.loading import load_model
from hf_glu.errors import ConversionError, NoSiteError
from hf_glu.ffn.config_fields import activation_field, field_default, plain_name
from hf_glu.publishing.export.folding import write_folded
from hf_glu.publishing.export.samples import Outputs, expected_outputs

# model type -> the stock name of an activation -> the name by which llama.cpp computes the same
READ = {
    "modernbert": {"gelu": "geglu", "gelu_python": "geglu", "silu": "swiglu", "swish": "swiglu", "relu": "reglu"},
}  # fmt: skip


def write_for_gguf(source: Path, stage: Path) -> tuple[str, Outputs, Outputs]:
    """Write a checkpoint in its stock form, with the name of its activation that llama.cpp reads.

    Returns:
        What it is, and the outputs before and of the stock form.

    Raises:
        ConversionError: it has none, or llama.cpp would compute another activation.
    """
    model = load_model(source)
    try:
        note, before, after = write_folded(model, stage)
    except NoSiteError:  # stock already
        note, before = type(model).__name__, expected_outputs(model)
        after = before
        model.save_pretrained(stage)
    name_for_gguf(model.config, stage)
    return note, before, after


def name_for_gguf(config: Any, folder: Path) -> None:
    """Write the name of a stock model's activation that llama.cpp reads into the config of a folder.

    Raises:
        ConversionError: there is none.
    """
    field = activation_field(config)
    if field is None:
        return
    name, known = str(plain_name(getattr(config, field))), READ.get(config.model_type)
    if known is None and not same_function(name, field_default(config, field)):
        raise ConversionError(
            f"llama.cpp takes the gate of every {config.model_type} for {field_default(config, field)}, whatever the "
            f"config names, and this one has {name}: export it as onnx or program instead"
        )
    if known is not None:
        if name not in known:
            raise ConversionError(
                f"llama.cpp takes an activation that it doesn't know for GeGLU, and this {config.model_type} has "
                f"{name}; it knows {', '.join(sorted(known))}: export it as onnx or program instead"
            )
        path = folder / CONFIG_FILE
        write_json(path, {**read_object(path), field: known[name]})
