"""A script for a fresh process: it runs a checkpoint on given inputs.

With the plugin it is loaded by `load_model`. Without it, hf_glu can't be imported, and Transformers
loads the code beside the checkpoint: nothing of hf_glu is imported up here.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

# what the process that asks writes, and what it reads afterwards
ORDER_FILE, INPUTS_FILE = "order.json", "inputs.safetensors"
WEIGHTS_FILE, OUTPUTS_FILE = "weights.json", "outputs.safetensors"


def main(scratch: str) -> None:
    """Write ``outputs.safetensors`` and ``weights.json`` as ``order.json`` asks, on ``inputs.safetensors``."""
    order = json.loads(Path(scratch, ORDER_FILE).read_text(encoding="utf-8"))
    if order["auto_class"]:
        hide_plugin()
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(order["threads"])
    model = load(order).to(order["device"]).eval()
    for tensor in (*model.parameters(), *model.buffers()):  # as `hf_glu.instruments.equality.align` does
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    weights = {name: checksum(tensor) for name, tensor in model.state_dict().items()}
    Path(scratch, WEIGHTS_FILE).write_text(json.dumps(weights), encoding="utf-8")
    inputs = load_file(Path(scratch, INPUTS_FILE), device=order["device"])
    with torch.no_grad():
        outputs = model(**inputs)
    tensors = {key: value for key, value in outputs.items() if isinstance(value, torch.Tensor)}
    floating = {key: value.cpu().clone().contiguous() for key, value in tensors.items() if value.is_floating_point()}
    save_file(floating, Path(scratch, OUTPUTS_FILE))


def checksum(tensor: Any) -> str:
    """Return a tensor's SHA-256, as `hf_glu.instruments.equality.checksum` does."""
    import torch

    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def hide_plugin() -> None:
    """Make hf_glu impossible to import, also where `hf-glu run` has loaded it before this."""
    if "hf_glu" in sys.modules:
        sys.modules["hf_glu"].unregister()
    for name in [name for name in sys.modules if name.split(".")[0] == "hf_glu"]:
        del sys.modules[name]
    sys.modules["hf_glu"] = None  # type: ignore[assignment]


def load(order: dict[str, Any]) -> Any:
    """Load the model that ``order`` names.

    Raises:
        RuntimeError: some of its weights are missing, or it isn't the code beside it that was loaded.
    """
    options = {"dtype": "auto", **order["options"]}
    if not order["auto_class"]:
        from hf_glu.checkpoint.loading import load_model

        return load_model(order["folder"], **options)
    import transformers

    auto = getattr(transformers, order["auto_class"])
    model, info = auto.from_pretrained(order["folder"], trust_remote_code=True, output_loading_info=True, **options)
    if not type(model).__module__.startswith("transformers_modules."):
        raise RuntimeError(f"{order['auto_class']} gives {type(model).__module__}.{type(model).__name__}")
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            raise RuntimeError(f"{kind.replace('_', ' ')}: {sorted(info[kind])[0]}")
    return model


if __name__ == "__main__":
    main(sys.argv[1])
