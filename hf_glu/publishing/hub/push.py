"""Pushing a model to the Hub: checked first, then pushed as one commit."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.checkpoint.loading import load_model
from hf_glu.checkpoint.writing import scratch_folder
from hf_glu.errors import CheckpointError
from hf_glu.publishing.hub.checking import check_loads, expected_outputs
from hf_glu.publishing.hub.staging import check_folder, clean_stage, complete, stage_folder
from hf_glu.publishing.hub.upload import PushTarget, commit

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MESSAGE = "Push with hf_glu"
MAX_SHARD_SIZE = "50GB"


@dataclass(frozen=True, kw_only=True)
class Published:
    """The result of a push.

    Attributes:
        repo: the repository, ``user/name``.
        url: its page.
        commit: the commit's id: ``user/name@COMMIT`` names this state forever.
        revision: the branch.
        files: the files and their bytes.
        code: those of them that load the model where hf_glu isn't installed.
        left_out: what of the source isn't the model's, or is somebody's code.
        checked: how the model was loaded in fresh processes, where it gave bitwise the same outputs.
    """

    repo: str
    url: str
    commit: str
    revision: str
    files: dict[str, int]
    code: tuple[str, ...]
    left_out: tuple[str, ...]
    checked: tuple[str, ...]

    def to_dict(self) -> JsonObject:
        """Return the result as plain data."""
        return asdict(self)


def push(
    source: str | os.PathLike[str] | PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    tags: Iterable[str] = (),
    code: bool = True,
    check: bool = True,
) -> Published:
    """Push a model to the Hub: weights, config, tokenizer, card, and code for those who have no hf_glu.

    Nothing is sent before a fresh process has loaded the files and computed the same, bit by bit. All files come in
    one commit, after the upload of the large ones, so that the repository never has half a push; what an earlier push
    has left there (shards, code) goes in the same commit. A card that its owner has written there stays.

    What the source has of code, and says of it in its configs, stays behind (``left_out``) and is never run. So do
    local paths.

    Going back is a push, too: ``push("user/name@COMMIT", "user/name")``.

    Args:
        source: a checkpoint's folder, which is only read; a repository (``user/name@COMMIT``); or a model.
        repo_id: the repository, made where there is none; without ``user/`` in the account of the token.
        tokenizer: of a model; a folder has its own.
        private: of a new repository; None: as the account's default is.
        token: with the right to write; None: the one of `hf auth login` or ``HF_TOKEN``.
        revision: a branch, made where there is none; None: ``main``.
        message: of the commit.
        tags: further ones for the card.
        code: whether to add code by which ``trust_remote_code=True`` loads the model without hf_glu.
        check: whether to load it first in fresh processes.

    Raises:
        CheckpointError: the source is no checkpoint, or doesn't load as what it is.
        PublishingError: the Hub refuses or can't be reached.
    """
    target = PushTarget(repo=repo_id, token=token, revision=revision, private=private)
    return _publish(source, target, tokenizer=tokenizer, message=message, tags=tags, code=code, check=check)[0]


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = MAX_SHARD_SIZE,
    tags: str | list[str] | None = None,
    code: bool = True,
    check: bool = True,
) -> CommitInfo:
    """Push ``model`` as `push` does: what ``model.push_to_hub`` does where the plugin is registered.

    Arguments and result are those of Transformers' ``push_to_hub``; ``code`` and ``check`` are `push`'s.

    Raises:
        CheckpointError: it doesn't load as what it is.
        PublishingError: the Hub refuses or can't be reached.
    """
    known = token if isinstance(token, str) else None
    target = PushTarget(repo=repo_id, token=known, revision=revision, private=private, create_pr=create_pr)
    given = [tags] if isinstance(tags, str) else tags or []
    return _publish(
        model,
        target,
        message=commit_message,
        description=commit_description,
        code=code,
        check=check,
        tags=[*(getattr(model, "model_tags", None) or []), *given],
        max_shard_size=max_shard_size,
    )[1]


def _publish(
    source: str | os.PathLike[str] | PreTrainedModel,
    target: PushTarget,
    *,
    tokenizer: PreTrainedTokenizerBase = None,
    message: str | None = None,
    description: str | None = None,
    tags: Iterable[str] = (),
    code: bool = True,
    check: bool = True,
    max_shard_size: int | str | None = MAX_SHARD_SIZE,
) -> tuple[Published, CommitInfo]:
    path = source if isinstance(source, (str, os.PathLike)) else None
    if path is not None and tokenizer is not None:
        raise CheckpointError("a folder has its own tokenizer: save the other one into it")
    folder = resolve(path, token=target.token) if path is not None else None
    names, left_out = check_folder(folder) if folder is not None else ([], [])
    target = target.named()
    with scratch_folder() as stage:
        if folder is not None:
            stage_folder(folder, names, stage)
        else:
            model = cast("PreTrainedModel", source)
            model.save_pretrained(stage, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(stage)
        left_out += clean_stage(stage, folder)
        written = complete(stage, folder or stage, repo_id=target.repo, code=code, tags=tuple(tags))
        checked: tuple[str, ...] = ()
        if check:
            expected = expected_outputs(load_model(folder) if folder is not None else source)
            checked = check_loads(stage, expected, code=bool(written))
        made, names = commit(stage, target, message=message or MESSAGE, description=description)
        files = {name: (stage / name).stat().st_size for name in names}
    published = Published(
        repo=target.repo,
        url=f"{target.api.endpoint}/{target.repo}",
        commit=made.oid,
        revision=target.revision or "main",
        files=files,
        code=tuple(written),
        left_out=tuple(left_out),
        checked=checked,
    )
    return published, made
