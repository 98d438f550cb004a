"""Checkpoints on disk: loading one with the class that it names, converting one, never leaving half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_glu.checkpoint.carrying import REFERENCES, check_inside, clean_json, is_code
from hf_glu.checkpoint.config_file import check_config, model_class_of, reading
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.provenance import CARD_FILE, REPORT_FILE, base_of
from hf_glu.checkpoint.writing import user_path, whole_folder, writing
from hf_glu.compat.of_models import FROM_CONFIG
from hf_glu.conversion import Report, convert, plan, to_native
from hf_glu.conversion.converting import check_experts
from hf_glu.conversion.steps import Target
from hf_glu.conversion.t5_layout import dense_t5_sites
from hf_glu.errors import CheckpointError
from hf_glu.instruments.probe import give_pad_token

_WEIGHTS = (".safetensors", ".bin", ".index.json", ".h5", ".msgpack", ".onnx", ".gguf", ".pt", ".ot")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
)
FEWEST, SMALL = 4, 2**24  # numbers of a model for each byte of its files, and those of a model that is small
_WRITTEN_ANEW = {"config.json", "generation_config.json", REPORT_FILE}
# what is said of the source, and what was measured on it, isn't true of what is made from it
_OF_THE_SOURCE = {CARD_FILE, "run.json", "results.json", "log.jsonl"}


def load_model(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None, **options: Any
) -> Any:
    """Load a checkpoint (local folder or Hub id) with the class that its config names, in the dtype that it has.

    Args:
        source: the folder or repository.
        revision, token: of the repository, see `hf_glu.checkpoint.hub.resolve`.
        options: further keyword arguments of ``from_pretrained``.

    Raises:
        CheckpointError: it can't be found or loaded, or some of its weights are missing.
    """
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


def _read_config(folder: Path) -> Any:
    """Return a checkpoint's config; nothing of the code that it names is run."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    forget_code(config)
    return config


def forget_code(config: Any) -> None:
    """Take out of a config what it says of the code of the checkpoint that it was loaded from."""
    for name in REFERENCES:
        config.__dict__.pop(name, None)


def load_skeleton(source: str | os.PathLike[str]) -> Any:
    """Return the model of a checkpoint on the meta device: all of its modules and shapes, none of its weights.

    Raises:
        CheckpointError: it can't be found, or its config can't be built.
    """
    folder = resolve(source)
    check_config(folder)
    with reading(source):
        return _build_skeleton(_read_config(folder))


def _build_skeleton(config: Any) -> Any:
    import torch

    with torch.device("meta"):
        return FROM_CONFIG.of(model_class_of(config))(config)


def _check_size(folder: Path, skeleton: Any) -> None:
    """Raise CheckpointError where a config says a far larger model than its files can hold, before it is allocated."""
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    wanted = sum(tensor.numel() for tensor in skeleton.state_dict().values())
    if stored and wanted > FEWEST * stored + SMALL:
        raise CheckpointError(f"{folder} says a model of {wanted:,} numbers, and its files have {stored:,} bytes")


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """Return the tokenizer beside a checkpoint, with a token to pad with.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    folder = resolve(source)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):  # Transformers would make up an empty one
        raise CheckpointError(f"{source} has no tokenizer, which texts need")
    with reading(source, why="has no tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    give_pad_token(tokenizer)
    return tokenizer


def read_texts(path: Path) -> list[str]:
    """Return the lines of a text file that aren't empty.

    Raises:
        CheckpointError: there is no such file, or no text in it.
    """
    try:
        texts = [line.strip() for line in user_path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
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


def check_destination(destination: str | os.PathLike[str]) -> Path:
    """Return the absolute path of ``destination``, links followed.

    Raises:
        CheckpointError: something is there already, or nothing can be.
    """
    final = Path(os.path.realpath(user_path(destination)))
    with writing(destination):
        try:
            os.lstat(final)  # also says that a name is too long
        except FileNotFoundError:
            return final
        if not final.is_dir() or any(final.iterdir()):
            raise CheckpointError(f"{destination} exists already and isn't an empty folder: choose another destination")
        if final.is_mount():
            raise CheckpointError(f"{destination} is a mount point, which can't be replaced: choose a folder in it")
    return final


@contextmanager
def staged_folder(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder that becomes ``destination`` at the end, or vanishes where anything goes wrong.

    Raises:
        CheckpointError: the destination exists and isn't an empty folder, or can't be written.
    """
    stage = None
    try:
        with writing(destination), whole_folder(check_destination(destination)) as stage:
            yield stage
    except CheckpointError as error:
        if stage is None or str(stage) not in str(error):
            raise
        raise CheckpointError(str(error).replace(str(stage), str(destination))) from error


def copy_other_files(source: Path, destination: Path, *, keep: tuple[str, ...] = ()) -> None:
    """Copy what belongs to a checkpoint beside weights, config and card (but for ``keep``): tokenizer, subfolders.

    Code stays behind, and what configs say of it.

    Raises:
        CheckpointError: a link that leads out of ``source``.
    """
    for path in sorted(source.iterdir()):
        if (
            (path.name in _WRITTEN_ANEW and path.name not in keep)
            or path.name in _OF_THE_SOURCE
            or path.name.startswith(".")
            or path.name.endswith(_WEIGHTS)
        ):
            continue
        _copy(path, destination / path.name, source)


def _copy(path: Path, target: Path, root: Path) -> None:
    check_inside(path, root)
    if path.is_dir():
        target.mkdir(exist_ok=True)
        for inner in sorted(path.iterdir()):
            _copy(inner, target / inner.name, root)
    elif path.suffix == ".json":
        clean_json(path, target)
    elif not is_code(path.name):
        shutil.copy2(path, target)


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
    check: bool | str = True,
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
    if experts is not None:
        resized = fitted or width != "keep" or bias is not None
        check_experts(skeleton, target, experts, top_k, layers=layers, exclude=exclude, resized=resized)
    elif target is not None:
        plan(skeleton, target, width=width, layers=layers, exclude=exclude, fitted=fitted, bias=bias)
    tokenizer = load_tokenizer(folder) if fitted else None
    with staged_folder(destination) as stage:
        model = load_model(folder)
        with reading(source, why="can't be converted"):  # a model that loads needn't run
            report = convert(
                model, target, width=width, layers=layers, exclude=exclude, calibration=calibration,
                tokenizer=tokenizer, distill_steps=distill_steps, bias=bias, experts=experts, top_k=top_k, check=check,
            )  # fmt: skip
        if native:
            to_native(model)
        model.save_pretrained(stage)
        copy_other_files(folder, stage)
        write_json(stage / REPORT_FILE, {**report.to_dict(), "base": base})
    return report
