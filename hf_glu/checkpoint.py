"""Checkpoints on disk: loading one with the class that it names, converting one, never leaving half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_glu.conversion import Report, convert, plan, to_native
from hf_glu.conversion.native import dense_t5_sites
from hf_glu.conversion.steps import Target
from hf_glu.errors import CheckpointError, HfGluError
from hf_glu.hub import resolve
from hf_glu.jsonio import write_json
from hf_glu.probe import give_pad_token
from hf_glu.provenance import CARD_FILE, REPORT_FILE, base_of

_WEIGHTS = (".safetensors", ".bin", ".index.json", ".h5", ".msgpack", ".onnx", ".gguf", ".pt", ".ot")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
)
_WRITTEN_ANEW = {"config.json", "generation_config.json", REPORT_FILE}
# what is said of the source, and what was measured on it, isn't true of what is made from it
_OF_THE_SOURCE = {CARD_FILE, "run.json", "results.json", "log.jsonl"}


def load_model(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None, **options: Any
) -> Any:
    """Load a checkpoint (local folder or Hub id) with the class that its config names, in the dtype that it has.

    Args:
        source: the folder or repository.
        revision, token: of the repository, see `hf_glu.hub.resolve`.
        options: further keyword arguments of ``from_pretrained``.

    Raises:
        CheckpointError: it can't be found or loaded, or some of its weights are missing.
    """
    import transformers
    from safetensors import SafetensorError

    folder = resolve(source, revision=revision, token=token)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model_class = _model_class(config)
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **{"dtype": "auto", **options})
    except HfGluError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"{source} can't be loaded: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{source} lacks weights of {model_class.__name__}, such as {missing[0]}")
    return model


def load_skeleton(source: str | os.PathLike[str]) -> Any:
    """Return the model of a checkpoint on the meta device: all of its modules and shapes, none of its weights.

    Raises:
        CheckpointError: it can't be found, or its config can't be built.
    """
    import torch
    from transformers import AutoConfig

    folder = resolve(source)
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return _model_class(config)._from_config(config)
    except HfGluError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{source} can't be loaded: {first_line(error)}") from error


def _model_class(config: Any) -> Any:
    """Return the class that a config names, else the base model's."""
    import transformers

    name = next((name for name in config.architectures or [] if hasattr(transformers, name)), None)
    if name:
        return getattr(transformers, name)
    base = transformers.AutoModel._model_mapping[type(config)]
    return base[0] if isinstance(base, (list, tuple)) else base


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """Return the tokenizer beside a checkpoint, with a token to pad with.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    folder = resolve(source)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):  # Transformers would make up an empty one
        raise CheckpointError(f"{source} has no tokenizer, which texts need")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source} has no tokenizer that can be loaded: {first_line(error)}") from error
    give_pad_token(tokenizer)
    return tokenizer


def read_texts(path: Path) -> list[str]:
    """Return the lines of a text file that aren't empty.

    Raises:
        CheckpointError: there is no such file, or no text in it.
    """
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} can't be read as text: {getattr(error, 'strerror', None) or error}") from error
    if not texts:
        raise CheckpointError(f"{path} has no text in it")
    return texts


def encode(source: str | os.PathLike[str], texts: list[str]) -> dict[str, Any]:
    """Return ``texts`` as the inputs that the tokenizer beside a checkpoint makes of them.

    Raises:
        CheckpointError: there is no tokenizer.
    """
    return dict(load_tokenizer(source)(texts, padding=True, truncation=True, return_tensors="pt"))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that says anything."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_destination(destination: str | os.PathLike[str]) -> Path:
    """Return the absolute path of ``destination``, or raise CheckpointError where something is there already."""
    final = Path(destination).expanduser().absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"{destination} exists already and isn't an empty folder: choose another destination")
    return final


@contextmanager
def staged_folder(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder that becomes ``destination`` at the end, or vanishes where anything goes wrong.

    Raises:
        CheckpointError: the destination exists and isn't an empty folder, or can't be written.
    """
    final = check_destination(destination)
    stage = final.parent / f".{final.name}.partial-{os.getpid()}"
    try:
        stage.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{destination} can't be written: {error.strerror}") from error
    try:
        yield stage
        if final.exists():
            final.rmdir()
        stage.rename(final)
    except OSError as error:
        if isinstance(error, HfGluError):
            raise
        raise CheckpointError(f"{destination} can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def copy_other_files(source: Path, destination: Path, *, keep: tuple[str, ...] = ()) -> None:
    """Copy what belongs to a checkpoint beside weights, config and card (but for ``keep``): tokenizer, subfolders."""
    for path in sorted(source.iterdir()):
        if (
            (path.name in _WRITTEN_ANEW and path.name not in keep)
            or path.name in _OF_THE_SOURCE
            or path.name.startswith(".")
            or path.name.endswith(_WEIGHTS)
        ):
            continue
        if path.is_dir():
            shutil.copytree(path, destination / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, destination / path.name)


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    target: Target | None = None,
    *,
    width: int | str = "keep",
    layers: Any = None,
    exclude: str | None = None,
    calibration: Sequence[str] | None = None,
    distill_steps: int | None = None,
    native: bool = False,
    experts: str | None = None,
    top_k: int | None = None,
    check: bool = True,
    base_model: str | None = None,
) -> Report:
    """Convert the checkpoint ``source`` (local folder or Hub id) into the new folder ``destination``.

    Weights, config, tokenizer and other files are there afterwards, and the report as ``hf_glu_report.json``; where
    anything goes wrong, ``destination`` isn't, and ``source`` is never written to.

    Args:
        source, destination: the checkpoints.
        target, width, layers, exclude, distill_steps, experts, top_k, check: as in `hf_glu.convert`.
        calibration: texts, for the tokenizer beside the checkpoint.
        native: whether to write a T5 in the layout of T5 v1.1, which loads without hf_glu (see `hf_glu.to_native`).
        base_model: what the model card calls ``source``, where that is a folder.

    Raises:
        CheckpointError: one of the two can't be read or written.
        HfGluError: as `hf_glu.convert`.
    """
    folder, base = resolve(source), base_of(source, base_model)
    check_destination(destination)
    fitted, bias = calibration is not None, False if native else None
    # says what can't be before weights are read
    skeleton = load_skeleton(folder)
    if native:
        dense_t5_sites(skeleton)
    if experts is None and target is not None:
        plan(skeleton, target, width=width, layers=layers, exclude=exclude, fitted=fitted, bias=bias)
    tokenizer = load_tokenizer(folder) if fitted else None
    with staged_folder(destination) as stage:
        model = load_model(folder)
        report = convert(
            model, target, width=width, layers=layers, exclude=exclude, calibration=calibration, tokenizer=tokenizer,
            distill_steps=distill_steps, bias=bias, experts=experts, top_k=top_k, check=check,
        )  # fmt: skip
        if native:
            to_native(model)
        model.save_pretrained(stage)
        copy_other_files(folder, stage)
        write_json(stage / REPORT_FILE, {**report.to_dict(), "base": base})
    return report
