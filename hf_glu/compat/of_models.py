"""What hf_glu uses of Transformers' models without Transformers' promise to keep it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Collection
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

from hf_glu.compat.private import Private

SEEN = "5.6 to 5.24"
_MODEL, _CONFIG = "transformers.modeling_utils:PreTrainedModel", "transformers:PretrainedConfig()"
_BANK = "transformers.integrations.moe"
_BANKS = "giving a family's own experts other activations"
_EXPERTS = "experts in the place of dense FFNs"
_RULES = "what the class said of the FFN isn't said of its experts"

# banks of experts; what a bank says of itself, its class's decorator has written
APPLY_GATE = Private(where=_BANK, name="_apply_gate", seen=SEEN, need=_BANKS, mark=True, otherwise="no bank is found")
IS_TRANSPOSED = Private(
    where=_BANK, name="is_transposed", seen=SEEN, need=_BANKS, mark=True, otherwise="no bank is found"
)
HAS_BIAS = Private(where=_BANK, name="has_bias", seen=SEEN, need=_BANKS, mark=True)
IS_CONCATENATED = Private(
    where=_BANK, name="is_concatenated", seen="5.9 to 5.24", need=_BANKS, mark=True,
    otherwise="gpt-oss' halves are taken by turns, all others' are [g | u], as before there was the name",
)  # fmt: skip
EXPERT_PARALLEL = Private(
    where=_BANK, name="_is_expert_parallel", seen="5.18 to 5.24", need=_BANKS, mark=True,
    otherwise="experts that are spread over processes aren't told",
)  # fmt: skip
POST_NORM = Private(
    where=_BANK, name="has_post_expert_norm", seen="5.20 to 5.24", need=_BANKS, mark=True,
    otherwise="no bank has such a norm",
)  # fmt: skip

CAN_RECORD = Private(
    where=_MODEL, name="_can_record_outputs", seen=SEEN, need="watching a family's own routers",
    otherwise="their entropy isn't told",
)  # fmt: skip

GATE_ALONE = Private(
    where="transformers.models.mamba.modeling_mamba", name="mamba_selective_scan", seen="5.15 to 5.24",
    need="giving a mixer another gate than its convolution's activation",
    otherwise="the two are one, and only a mixer whose convolution has silu is converted",
)  # fmt: skip

# rules of a class, by the names of parameters and modules
KEEP_FP32 = Private(where=_MODEL, name="_keep_in_fp32_modules", seen=SEEN, need=_EXPERTS, otherwise=_RULES)
KEEP_FP32_STRICT = Private(
    where=_MODEL, name="_keep_in_fp32_modules_strict", seen=SEEN, need=_EXPERTS, otherwise=_RULES
)
IGNORE_MISSING = Private(
    where=_MODEL, name="_keys_to_ignore_on_load_missing", seen=SEEN, need=_EXPERTS, otherwise=_RULES
)
IGNORE_UNEXPECTED = Private(
    where=_MODEL, name="_keys_to_ignore_on_load_unexpected", seen=SEEN, need="loading a gated model"
)
TIED_KEYS = Private(where=_MODEL, name="_tied_weights_keys", seen=SEEN, need=_EXPERTS, otherwise=_RULES)
NO_SPLIT = Private(where=_MODEL, name="_no_split_modules", seen=SEEN, need=_EXPERTS, otherwise=_RULES)
TP_PLAN = Private(
    where=_MODEL, name="_tp_plan", seen=SEEN, need="tensor parallelism of gated FFNs", mark=True,
    otherwise="a gated FFN isn't left out of the plan",
)  # fmt: skip

# building, initialising and loading
FROM_CONFIG = Private(
    where=_MODEL, name="_from_config", seen=SEEN, need="building a model of a config, without weights"
)
INIT_WEIGHTS = Private(where=_MODEL, name="_init_weights", seen=SEEN, need="initialising a head or an FFN anew")
INITIALIZED = Private(
    where="transformers.initialization", name="_is_hf_initialized", seen=SEEN, mark=True,
    need="leaving alone what a checkpoint has loaded",
)  # fmt: skip
META_SAFE = Private(
    where="transformers.initialization", name="meta_device_safe_creation_ops", seen=SEEN,
    need="foreseeing what a converted config builds", otherwise="families that compute as they are built are refused",
)  # fmt: skip
CHECKPOINTING = Private(
    where="transformers.modeling_utils", name="_gradient_checkpointing_func", seen=SEEN, mark=True,
    need="gradient checkpointing of activations that read the text",
)  # fmt: skip
NAME_OR_PATH = Private(
    where="transformers.configuration_utils", name="_name_or_path", seen=SEEN, mark=True,
    need="having a converted model name no checkpoint", otherwise="it names the one that it was loaded from",
)  # fmt: skip
ATTENTION = Private(
    where="transformers.configuration_utils", name="_attn_implementation", seen=SEEN, mark=True,
    need="comparing a checkpoint before it is pushed",
)  # fmt: skip
EXPERTS_IMPLEMENTATION = Private(
    where="transformers.configuration_utils", name="_experts_implementation", seen=SEEN, mark=True,
    need="benches of a family's own experts",
)  # fmt: skip
MODEL_MAPPING = Private(
    where="transformers:AutoModel", name="_model_mapping", seen=SEEN, need="finding the class that a config is for"
)
MODEL_CLASS = Private(
    where="transformers.models.auto.auto_factory", name="_get_model_class", seen=SEEN,
    need="publishing code with a checkpoint",
)  # fmt: skip
CAUSAL_LOSS = Private(
    where="transformers.loss.loss_utils", name="ForCausalLMLoss", seen=SEEN,
    need="knowing which tokens a model's loss is of", otherwise="the routers' losses are refused in a Trainer",
)  # fmt: skip
CAN_SET_ATTENTION = Private(
    where=_MODEL, name="_can_set_attn_implementation", seen=SEEN, need="code published with a checkpoint"
)
CAN_SET_EXPERTS = Private(
    where=_MODEL, name="_can_set_experts_implementation", seen=SEEN, need="code published with a checkpoint"
)
INITIALIZE_WEIGHTS = Private(
    where=_MODEL, name="_initialize_weights", seen=SEEN, need="building a gated model", vital=True
)
FINALIZE_LOADING = Private(
    where=_MODEL, name="_finalize_model_loading", seen=SEEN, need="loading a gated model", vital=True
)
PAGED = Private(
    where="transformers.generation.continuous_batching.cache", name="PagedAttentionCache", seen=SEEN,
    need="refusing continuous batching of stateful gates", otherwise="a paged cache isn't told",
)  # fmt: skip
CROP = Private(
    where="transformers.cache_utils:Cache.crop", name="tokens_to_remove", seen="5.15 to 5.24", mark=True,
    need="taking tokens back from a cache", otherwise="its crop takes the length that is to stay",
)  # fmt: skip
ACTIVATION_TABLE = Private(
    where="transformers.activations", name="ClassInstantier", seen=SEEN, need="building an activation by its name",
    vital=True,
)  # fmt: skip
ACTIVATION_CLASSES = Private(
    where="transformers.activations", name="ACT2CLS", seen=SEEN, need="listing activations without waiting for torch",
    otherwise="torch and Transformers are imported first",
)  # fmt: skip


def activation_names() -> Collection[str]:
    """Return the names of Transformers' activations: of its table, or, until that is imported, of its source."""
    table = getattr(sys.modules.get(ACTIVATION_CLASSES.module), "ACT2FN", None)
    return _names_in_source() if table is None else dict.keys(table)  # not its own `keys`, which may derive more


@cache
def _names_in_source() -> tuple[str, ...]:
    spec = find_spec(ACTIVATION_CLASSES.package)
    files = [Path(folder, "activations.py") for folder in (spec and spec.submodule_search_locations) or ()]
    for node in (node for file in files if file.is_file() for node in ast.parse(file.read_bytes()).body):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            if ast.unparse(node.targets[0]) == ACTIVATION_CLASSES.name:
                return tuple(str(ast.literal_eval(key)) for key in node.value.keys if key is not None)
    return tuple(dict.keys(import_module(ACTIVATION_CLASSES.module).ACT2FN))


def cropped(crop: Callable[..., Any], argument: int, seen: Callable[[], int]) -> int:
    """Return how many tokens a cache's ``crop`` takes back, called with ``argument``.

    Up to Transformers 5.14 a positive argument is the length that is to stay.

    Args:
        crop: the method of the cache's own class.
        argument: what it is called with.
        seen: tells how many tokens the cache has.
    """
    if argument < 0 or CROP.name in signature(crop).parameters:
        return abs(int(argument))
    return max(0, seen() - int(argument))


def is_concatenated(bank: Any) -> bool:
    """Return whether the halves of a bank's in-projection are one after the other, not by turns (gpt-oss)."""
    return bool(IS_CONCATENATED.of(bank, not hasattr(bank, "alpha")))
