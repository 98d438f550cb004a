"""The Accelerator of a run, its trackers, and what its processes exchange."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from hf_glu.compat.of_others import ACCELERATOR_STATE, RESET_ACCELERATOR
from hf_glu.errors import OptionError
from hf_glu.training.options import TrainingOptions

PROJECT = "hf_glu"


def make_accelerator(options: TrainingOptions, folder: Path | None = None) -> Accelerator:
    """Return an Accelerator, also where an earlier run in this process had another precision.

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


def start_trackers(accelerator: Accelerator, options: dict[str, Any]) -> None:
    """Begin to track a run; TensorBoard takes numbers and strings only."""
    accelerator.init_trackers(PROJECT, config={key: str(value) for key, value in options.items()})


def is_sharded(accelerator: Accelerator) -> bool:
    """Tell whether each process will hold a part of the weights only."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def share_results(results: dict[str, Any]) -> dict[str, Any]:
    """Return the main process' results on all processes."""
    shared: dict[str, Any] = broadcast_object_list([results])[0]
    return shared


def merge(accelerator: Accelerator, found: dict[int, Any]) -> dict[int, Any]:
    """Return the results of all processes, by their number; what several have is there once."""
    if accelerator.num_processes == 1:
        return found
    return {key: value for part in gather_object([found]) for key, value in part.items()}
