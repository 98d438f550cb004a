"""Staging a push: a checkpoint's files in a folder of their own, with code and a card beside them.

The user's folder is only read. Weights are linked, all else is copied, since code and card change it. What the folder
has of code stays there: that which is pushed was written by hf_glu for this very model, and nobody else's is run.
"""

from __future__ import annotations

import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import hf_glu
from hf_glu.checkpoint.carrying import check_inside, clean_json, is_code
from hf_glu.checkpoint.files import (
    CARD_FILE,
    CHECKPOINT_PREFIX,
    CONFIG_FILE,
    LOG_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    WEIGHTS_INDEX_FILE,
)
from hf_glu.checkpoint.jsonio import JsonObject, write_json
from hf_glu.config.glu import GluConfig
from hf_glu.errors import CheckpointError
from hf_glu.publishing.hub.manifest import WEIGHTS, digest, read_manifest

# hidden; of a training run (whose card says what ``run.json`` does, but for local paths); of an earlier push itself
LEFT_OUT = (
    ".*",
    "__pycache__",
    f"{CHECKPOINT_PREFIX}*",
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "random_states_*.pkl",
    RUN_FILE,
    LOG_FILE,
    MANIFEST_FILE,
)
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".ot", ".h5", ".msgpack")
TEXT = (".json", ".jsonl", ".md", ".txt", ".html", ".csv", ".yaml", ".yml", ".toml", ".jinja")
OURS = (REPORT_FILE, RESULTS_FILE)


def list_files(folder: Path, root: Path | None = None) -> tuple[list[str], list[str]]:
    """List the files of a checkpoint, and what of its folder is left out, as paths relative to it.

    Raises:
        CheckpointError: a link that leads out of the folder, other than one to weights.
    """
    files: list[str] = []
    left_out: list[str] = []
    for path in sorted(folder.iterdir()):
        if is_code(path.name) or any(fnmatch(path.name, pattern) for pattern in LEFT_OUT):
            left_out.append(path.name)
            continue
        if not (path.name.endswith(".safetensors") and path.is_file()):  # weights may lie anywhere
            check_inside(path, root or folder)
        if path.is_dir():
            inner, outer = list_files(path, root or folder)
            files += [f"{path.name}/{name}" for name in inner]
            left_out += [f"{path.name}/{name}" for name in outer]
        else:
            files.append(path.name)
    return files, left_out


def check_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Check a checkpoint's config and weights without loading it; return what `list_files` does.

    Raises:
        CheckpointError: it is no checkpoint, its config can't be read, its weights aren't whole or no safetensors.
        HfGluError: ``config.hf_glu`` isn't valid.
    """
    files, left_out = list_files(folder)
    if CONFIG_FILE not in files:
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}: push a folder that save_pretrained or `hf-glu` has written"
        )
    GluConfig.from_dict(read_config(folder).get("hf_glu"))
    for name in files:
        if name.endswith(UNSAFE):
            raise CheckpointError(
                f"{folder / name} isn't safetensors, and loading such a file can run code: load the model, write it "
                "anew with save_pretrained, and push that folder"
            )
    if not any(fnmatch(name, pattern) for name in files for pattern in WEIGHTS):
        raise CheckpointError(f"{folder} has no weights: {WEIGHTS_FILE}, or its shards, should be beside {CONFIG_FILE}")
    _check_weights(folder, files)
    return files, left_out


def read_config(folder: Path) -> JsonObject:
    """Read a folder's ``config.json``.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE} must hold a JSON object, got {type(config).__name__}")
    return config


def _check_weights(folder: Path, files: list[str]) -> None:
    from safetensors import SafetensorError, safe_open

    for name in files:
        if name.endswith(".safetensors"):
            try:
                safe_open(folder / name, "pt").__exit__(None, None, None)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{folder / name} isn't a whole safetensors file: {error}") from error
    index = folder / WEIGHTS_INDEX_FILE
    if index.is_file() and WEIGHTS_FILE not in files:
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} isn't the index of shards: {error!r}") from error
        if missing := sorted(shards - set(files)):
            raise CheckpointError(f"{folder} lacks {missing[0]}, which {index.name} names")


def stage_folder(folder: Path, files: list[str], stage: Path) -> None:
    """Fill ``stage`` with the files of ``folder``, without a card that an earlier push made: it is written anew."""
    earlier = read_manifest(folder / MANIFEST_FILE).get("card")
    for name in files:
        source, target = folder / name, stage / name
        if name == CARD_FILE and earlier and digest(source) == earlier:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            _link(source.resolve(), target)
        else:
            shutil.copy(source, target)


def clean_stage(stage: Path, folder: Path | None) -> list[str]:
    """Remove code, references to code and local paths from what is pushed; return the names of what was removed.

    Args:
        stage: what is to be pushed, which is written to.
        folder: where it comes from; None: from memory.

    Raises:
        CheckpointError: another text names a folder of this machine.
    """
    left_out: list[str] = []
    places = _places(folder)
    for path in sorted(stage.rglob("*")):
        name = path.relative_to(stage).as_posix()
        if is_code(name) and path.is_file():
            path.unlink()
            left_out.append(name)
        elif path.suffix == ".json":
            left_out += [f"{entry} of {name}" for entry in clean_json(path, path, ours=name in OURS)]
        if path.suffix in TEXT and (found := places.search(path.read_text(encoding="utf-8", errors="replace"))):
            raise CheckpointError(
                f"{name} names {found[0]}, a folder of this machine: take that out, or the file (`hf-glu report` "
                "writes a report anew)"
            )
    return left_out


def _places(folder: Path | None) -> re.Pattern[str]:
    """Return a pattern that finds the source folder, the one above it, and the user's home in a text."""
    roots = (folder.absolute(), folder.resolve()) if folder else ()
    places = {place for root in roots for place in (root, root.parent)} | {Path.home()}
    deep = sorted(str(place) for place in places if len(place.parts) > 2)  # /root may stand in anybody's text
    return re.compile(rf"(?:{'|'.join(map(re.escape, deep))})(?![\w.-])" if deep else "(?!)")


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source)
    except OSError:  # Windows without the right to do so
        shutil.copy(source, target)


def complete(stage: Path, origin: Path, *, repo_id: str, code: bool, tags: tuple[str, ...]) -> list[str]:
    """Add code if asked for, a card if nobody has written one, and the manifest; return the code's files.

    Args:
        stage: what is to be pushed.
        origin: where it comes from, with the result files that the card is made of.
        repo_id: where it goes.
        code: whether to add it.
        tags: further ones for the card.

    Raises:
        HfGluError: the code or the card can't be written.
    """
    from hf_glu.publishing.card.card import describe, is_generated
    from hf_glu.publishing.hub.flat import write_code

    written = write_code(stage) if code else []
    card = stage / CARD_FILE
    generated = not card.is_file() or is_generated(card.read_text(encoding="utf-8", errors="replace"))
    if generated:
        auto_map = read_config(stage).get("auto_map", {})
        card.write_text(describe(origin, repo_id=repo_id, auto_map=auto_map), encoding="utf-8")
    if tags:
        _add_tags(card, tags)
    known = {"hf_glu": hf_glu.__version__, "card": digest(card) if generated else None, "code": written}
    write_json(stage / MANIFEST_FILE, known)
    return written


def _add_tags(card: Path, tags: tuple[str, ...]) -> None:
    from huggingface_hub import ModelCard

    loaded = ModelCard.load(card)
    known = loaded.data.tags or []
    loaded.data.tags = [*known, *(tag for tag in tags if tag not in known)]
    loaded.save(card)
