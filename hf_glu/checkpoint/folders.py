"""Writing a checkpoint's folder whole or not at all, and copying what belongs to a model beside its weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from hf_glu.checkpoint.carrying import check_inside, clean_json, is_code
from hf_glu.checkpoint.files import (
    CARD_FILE,
    CHECKPOINT_PREFIX,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    LOG_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    RUN_FILE,
    SENTENCE_TRANSFORMERS_FILE,
)
from hf_glu.checkpoint.gguf import is_gguf, save_gguf_tokenizer
from hf_glu.checkpoint.writing import user_path, whole_folder, writing
from hf_glu.errors import CheckpointError

_WEIGHTS = (
    *(".safetensors", ".bin", ".index.json", ".h5", ".msgpack", ".ot", ".pt", ".pth", ".ckpt"),
    *(".onnx", ".onnx_data", ".xml", ".gguf", ".tflite", ".pt2", ".pte"),
)
# folders of the source's weights in other forms, as its repository may have them
_OTHER_FORMS = ("onnx", "openvino", "coreml", "*.mlpackage", "original", f"{CHECKPOINT_PREFIX}*")
_WRITTEN_ANEW = {CONFIG_FILE, REPORT_FILE}
# what is said of the source, and what was measured on it, isn't true of what is made from it
_OF_THE_SOURCE = {CARD_FILE, RUN_FILE, RESULTS_FILE, LOG_FILE}


def check_destination(destination: str | os.PathLike[str]) -> Path:
    """Check that a new folder can be made at ``destination``; return its absolute path, links followed.

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
    """Yield a temporary folder that becomes ``destination`` at the end of the block, or vanishes if anything fails.

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


def copy_other_files(source: Path, destination: Path) -> None:
    """Copy a checkpoint's tokenizer, subfolders and other files, but no weights, config or card.

    The source's weights, in whatever form, aren't those of what is made from it; those of sentence-transformers modules
    in folders of their own come along. Code stays behind, and what configs say of it. Of a GGUF file, the tokenizer in
    it is written.

    Raises:
        CheckpointError: a link that leads out of ``source``.
    """
    if is_gguf(source):
        save_gguf_tokenizer(source, destination)
        return
    modules = _modules(source)
    for path in sorted(source.iterdir()):
        left = path.name in _WRITTEN_ANEW | _OF_THE_SOURCE
        left = left or (path.name == GENERATION_CONFIG_FILE and (destination / path.name).exists())  # a model's own
        if not left and not path.name.startswith(".") and not _is_of_weights(path):
            _copy(path, destination / path.name, source, whole=path.name in modules)


def _modules(folder: Path) -> set[str]:
    """Return the names of the folders of sentence-transformers modules, which have weights beside the model's."""
    try:
        listed = json.loads((folder / SENTENCE_TRANSFORMERS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    return {str(each.get("path")) for each in listed if isinstance(each, dict)} if isinstance(listed, list) else set()


def _is_of_weights(path: Path) -> bool:
    if path.is_dir():
        return any(fnmatch(path.name, pattern) for pattern in _OTHER_FORMS)
    return path.name.endswith(_WEIGHTS)


def _copy(path: Path, target: Path, root: Path, *, whole: bool) -> None:
    """Copy a file or folder; ``whole``: with the weights in it."""
    check_inside(path, root)
    if path.is_dir():
        target.mkdir(exist_ok=True)
        for inner in sorted(path.iterdir()):
            if whole or not _is_of_weights(inner):
                _copy(inner, target / inner.name, root, whole=whole)
        if not any(target.iterdir()):
            target.rmdir()
    elif path.suffix == ".json":
        clean_json(path, target)
    elif not is_code(path.name):
        shutil.copy2(path, target)
