"""Making a run's Accelerator and trackers, and exchanging results between processes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.compat.of_others import ACCELERATOR_STATE, ORIGINAL_FORWARD, RESET_ACCELERATOR
from hf_glu.errors import OptionError
from hf_glu.training.options import TrainingOptions
from hf_glu.training.results import Results

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECT = "hf_glu"
FUSED = ("cpu", "cuda")  # devices whose AdamW has a kernel in every torch that is supported
Merged = TypeVar("Merged")


def make_accelerator(options: TrainingOptions, folder: Path | None = None) -> Accelerator:
    """Make an Accelerator, also if an earlier run in this process had another precision.

    Raises:
        OptionError: the tracker isn't installed (Accelerate would only warn).
    """
    precision = options.mixed_precision()
    if ACCELERATOR_STATE.find() and AcceleratorState().mixed_precision != precision:
        RESET_ACCELERATOR.find()()
    if options.tracker == "none":
        return Accelerator(mixed_precision=precision)
    if find_spec(options.tracker) is None:
        raise OptionError(f"tracker={options.tracker} is not installed: pip install {options.tracker}")
    return Accelerator(mixed_precision=precision, log_with=options.tracker, project_dir=folder)


def make_optimizer(groups: list[dict[str, Any]], accelerator: Accelerator) -> torch.optim.AdamW:
    """Make AdamW, in one kernel for each parameter where that is all it takes.

    A loss scale needs to hear of steps that were left out, which a kernel leaves out without a word.

    Args:
        groups: from `parameter_groups`.
        accelerator: of the run.
    """
    tensors = [tensor for group in groups for tensor in group["params"]]
    known = all(tensor.device.type in FUSED and tensor.is_floating_point() for tensor in tensors)
    return torch.optim.AdamW(groups, fused=(known and accelerator.scaler is None) or None)


def start_trackers(accelerator: Accelerator, options: JsonObject) -> None:
    """Begin to track a run; options are strings, since TensorBoard takes no lists."""
    accelerator.init_trackers(PROJECT, config={key: str(value) for key, value in options.items()})


def track(accelerator: Accelerator, values: JsonObject, step: int) -> None:
    """Log values of a step; trackio's own run is told, since Accelerate before 1.14 keeps the step from it."""
    for tracker in accelerator.trackers:
        if tracker.name != "trackio":
            tracker.log(values, step=step)
        elif accelerator.is_main_process:
            accelerator.get_tracker("trackio", unwrap=True).log(values, step=step)


def own_forward(model: PreTrainedModel) -> Callable[..., Any] | None:
    """Return the forward that a model has beside its class's, None where it has none."""
    return vars(model).get("forward")


def restore_forward(model: PreTrainedModel, forward: Callable[..., Any] | None) -> None:
    """Give a model the forward that it had before it was prepared: what `own_forward` returned.

    Accelerate's own way from mixed precision back takes the forward's decorators off, too: such a model returns no
    hidden states, for one.
    """
    for name in ("forward", ORIGINAL_FORWARD.name):
        vars(model).pop(name, None)
    if forward is not None:
        model.forward = forward


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether each process holds only a part of the weights (FSDP, DeepSpeed)."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def share_results(results: Results | None) -> Results:
    """Send the main process's results to all processes, and return them."""
    shared: Results = broadcast_object_list([results])[0]
    return shared


def merge(accelerator: Accelerator, found: dict[int, Merged]) -> dict[int, Merged]:
    """Merge the results of all processes, by row; what several have is there once."""
    if accelerator.num_processes == 1:
        return found
    return {key: value for part in gather_object([found]) for key, value in part.items()}
