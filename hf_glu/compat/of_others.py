"""What the plugin, training and publishing use of Transformers, PEFT, Accelerate and evaluate without promise."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from hf_glu.compat.private import Private

SEEN = "5.6 to 5.24"
_LOADING = "converting a dense checkpoint while it is loaded"
_EXPORT = "export as a graph"
_EXPORTERS = "5.23 to 5.24"

CONVERSIONS = Private(
    where="transformers.modeling_utils", name="get_model_conversion_mapping", seen=SEEN, need=_LOADING, vital=True
)
REMEMBERED = Private(
    where="transformers.core_model_loading", name="_weight_conversions", seen=SEEN, need=_LOADING, mark=True
)
CONVERTER = Private(where="transformers.core_model_loading", name="WeightConverter", seen=SEEN, need=_LOADING)
CONVERSION_OPS = Private(where="transformers.core_model_loading", name="ConversionOps", seen=SEEN, need=_LOADING)

EXPORT_BACKENDS = Private(where="transformers.exporters.auto", name="EXPORT_BACKENDS", seen=_EXPORTERS, need=_EXPORT)
EXPORTER_CLASS = Private(where="transformers.exporters.auto", name="get_exporter_class", seen=_EXPORTERS, need=_EXPORT)
EXPORTED = Private(where="transformers.exporters.base", name="ExportedModel", seen=_EXPORTERS, need=_EXPORT)
QUANTIZER = Private(
    where="transformers.exporters.quantizers", name="OnnxRuntimeQuantizer", seen=_EXPORTERS, need="int8 graphs"
)
QUANTIZER_CONFIG = Private(
    where="transformers.exporters.quantizers", name="OnnxRuntimeDynamicConfig", seen=_EXPORTERS, need="int8 graphs"
)

PEFT_LOADED = Private(
    where="transformers.integrations.peft", name="_hf_peft_config_loaded", seen=SEEN, mark=True,
    need="pushing an adapter alone", otherwise="the whole model is pushed",
)  # fmt: skip
UNLOAD = Private(
    where="peft.tuners.tuners_utils:BaseTuner", name="_unload_and_optionally_merge", seen="0.20 to 0.21",
    need="merging an adapter of experts", otherwise="PEFT's own merging is left alone",
)  # fmt: skip
TRAINED_COPY = Private(
    where="peft.utils.other", name="ModulesToSaveWrapper", seen="0.20 to 0.21", need="merging an adapter of experts"
)
DORA = Private(
    where="peft.tuners.lora.dora", name="DoraLinearLayer", seen="0.20 to 0.21",
    need="refusing DoRA where it would be NaN", otherwise="it isn't refused",
)  # fmt: skip
_KERNELS = "keeping kernels for SwiGLU away from gates that are none"
KERNELIZE_LAYER = Private(
    where="kernels.layer.kernelize", name="kernelize_layer", seen="0.17", need=_KERNELS, otherwise="none is kept away"
)
LIGER_BIND = Private(
    where="liger_kernel.transformers.monkey_patch", name="_bind_method_to_module", seen="0.8", need=_KERNELS,
    otherwise="none is kept away",
)  # fmt: skip
_BY_REQUEST = "steering by request"
PREPARE_GENERATION = Private(
    where="transformers.generation.utils:GenerationMixin", name="_prepare_generation_config", seen=SEEN,
    need=_BY_REQUEST, otherwise="classes with a generate of their own don't say that they aren't steered",
)  # fmt: skip
SERVING, BATCHING = (
    tuple(
        Private(where=f"transformers.cli.serving.utils:{manager}", name=name, seen=SEEN, need=_BY_REQUEST)
        for name in ("generate_streaming", "generate_non_streaming", *more)
    )
    for manager, more in (("GenerateManager", ()), ("CBGenerateManager", ("init_cb",)))
)
ACCELERATOR_STATE = Private(
    where="accelerate.state:AcceleratorState", name="_shared_state", seen="1.12 to 1.15",
    need="a second run in one process",
)  # fmt: skip
RESET_ACCELERATOR = Private(
    where="accelerate.state:AcceleratorState", name="_reset_state", seen="1.12 to 1.15",
    need="a second run of another precision in one process",
)  # fmt: skip
ORIGINAL_FORWARD = Private(
    where="accelerate:Accelerator", name="_original_forward", seen="1.12 to 1.15", mark=True,
    need="taking mixed precision off a model again", otherwise="a mark stays",
)  # fmt: skip
DATA_ROOT = Private(
    where="evaluate.module", name="_data_dir_root", seen="0.4.5 to 0.4.6", mark=True,
    need="metrics where the home folder is read-only", otherwise="a folder is made",
)  # fmt: skip


def trusted(load: Callable[..., Any]) -> dict[str, Any]:
    """Return what a loader of graphs wants to be told before it reads one that we have written: from 5.24 on."""
    return {"trust_remote_code": True} if "trust_remote_code" in signature(load).parameters else {}
