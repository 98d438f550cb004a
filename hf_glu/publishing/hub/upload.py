"""Uploading: one commit at the end, so that the repository is either as before or wholly as pushed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import hf_glu
from hf_glu.checkpoint.files import CARD_FILE, MANIFEST_FILE
from hf_glu.checkpoint.hub import invalid_name, network_errors, reachable, refusal, unreachable
from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.checkpoint.writing import scratch_folder
from hf_glu.errors import OptionError, PublishingError
from hf_glu.publishing.hub.manifest import digest, read_manifest, stale_files

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

# seconds before trying again; inside of each try the client itself repeats a failed upload, five times within 23 s
WAITS = (2.0, 8.0)
_BUSY = (408, 429, 500, 502, 503, 504)
_COMMIT = re.compile("[0-9a-f]{40}")
_OR_ALL = "or all of it where only the answer was lost, and the local files are as they were: push again"
Result = TypeVar("Result")
# what the Hub's status codes mean to somebody who pushes
_MEANINGS = {
    401: "the Hub doesn't accept the token: `hf auth login`, set HF_TOKEN or give --token",
    403: "the token may not write to {repo}: it needs the right to write, and {repo} must be yours or your "
    "organization's ({said})",
    404: "the Hub has no {repo} that this token may see ({said})",
    412: "{repo} has been changed by somebody else meanwhile: push again",
}


@dataclass(frozen=True, kw_only=True)
class PushTarget:
    """The repository that a push goes to.

    Attributes:
        repo: the repository, ``user/name``.
        token: with the right to write.
        revision: a branch, made where there is none; None: ``main``.
        private: of a new repository; None: as the account's default is.
        create_pr: propose the commit instead of making it.

    Raises:
        PublishingError: no repository can have this name, or there is no token.
        OptionError: the revision is a commit.
    """

    repo: str
    token: str | None = field(default=None, repr=False)
    revision: str | None = None
    private: bool | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        from huggingface_hub import get_token

        if reason := invalid_name(self.repo):
            raise PublishingError(f"{self.repo!r} can't be a repository's name ({reason}): give one such as user/name")
        if self.revision and _COMMIT.fullmatch(self.revision):
            raise OptionError(f"revision {self.revision} is a commit, and pushes go to a branch: give a branch's name")
        if not (self.token or get_token()):
            raise PublishingError("there is no token to push with: `hf auth login`, set HF_TOKEN or give --token")

    @property
    def api(self) -> HfApi:
        """The Hub's client."""
        from huggingface_hub import HfApi

        return HfApi(token=self.token, library_name="hf_glu", library_version=hf_glu.__version__)

    def named(self) -> PushTarget:
        """Return the target with ``user/`` before the repository's name, if that lacks it.

        Raises:
            PublishingError: the Hub can't be reached, or doesn't accept the token.
        """
        if not reachable():
            raise PublishingError(f"{unreachable()}: nothing was pushed")
        user = self.attempt(self.api.whoami)["name"]
        return self if "/" in self.repo else replace(self, repo=f"{user}/{self.repo}")

    def attempt(self, action: Callable[[], Result]) -> Result:
        """Call ``action``, again after a while if the network or the Hub fails; return its result.

        Raises:
            PublishingError: the Hub refuses, or the last try has failed.
        """
        failures: tuple[type[Exception], ...] = (*network_errors(), RuntimeError, ValueError)
        for wait in (*WAITS, None):
            try:
                return action()
            except PublishingError:
                raise
            except failures as error:
                cause = _cause(error)
                if wait is None or not _passing(cause):
                    raise PublishingError(self.explain(cause)) from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def explain(self, error: BaseException) -> str:
        """Return one line that says what went wrong, and what to do."""
        response = getattr(error, "response", None)
        if response is None:
            said = " ".join(str(error).split()) or type(error).__name__
            if not _passing(error):
                return f"{self.repo} can't be pushed: {said}"
            return f"the connection to the Hub broke ({said}): {self.repo} has nothing of this push, {_OR_ALL}"
        said = refusal(error)
        meaning = _MEANINGS.get(response.status_code, "the Hub refused {repo}: {said}")
        return meaning.format(repo=self.repo, said=said)


def _cause(error: BaseException) -> BaseException:
    """Return the error that the client has wrapped in a RuntimeError."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _passing(error: BaseException) -> bool:
    """Return whether trying again may help: a busy Hub, or a broken connection."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in _BUSY
    return isinstance(error, (network_errors()[0], ConnectionError, TimeoutError))


def commit(
    stage: Path, target: PushTarget, *, message: str, description: str | None = None
) -> tuple[CommitInfo, list[str]]:
    """Push the files in ``stage`` as one commit; return the client's CommitInfo and the names of the files.

    A try after a lost answer finds the files there already, and commits nothing again.

    Raises:
        PublishingError: the Hub refuses or can't be reached; the repository is as it was.
    """
    return target.attempt(lambda: _commit(stage, target, message, description))


def _commit(stage: Path, target: PushTarget, message: str, description: str | None) -> tuple[CommitInfo, list[str]]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, repo, branch = target.api, target.repo, target.revision
    api.create_repo(repo, private=target.private, exist_ok=True)
    if branch and not target.create_pr and not branch.startswith("refs/pr"):
        api.create_branch(repo, branch=branch, exist_ok=True)
    head = api.model_info(repo, revision=branch)
    assert head.sha is not None
    if target.private and not head.private:
        raise PublishingError(f"{repo} exists and is public, which a push can't change: give another name")
    there = [file.rfilename for file in head.siblings or ()]
    names = sorted(path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file())
    with scratch_folder() as scratch:
        earlier = _read_earlier(api, repo, head.sha, there, scratch)
        if CARD_FILE in there and _is_theirs(stage, earlier, api, repo, head.sha, scratch):
            names.remove(CARD_FILE)
    stale = stale_files(there, names, earlier)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=stage / name) for name in names
    ]
    operations += [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale]
    made = api.create_commit(
        repo,
        operations,
        commit_message=message,
        commit_description=description,
        revision=branch,
        parent_commit=head.sha,
        create_pr=target.create_pr,
    )
    return made, names


def _read_earlier(api: HfApi, repo: str, revision: str, there: list[str], scratch: Path) -> JsonObject:
    if MANIFEST_FILE not in there:
        return {}
    return read_manifest(Path(api.hf_hub_download(repo, MANIFEST_FILE, revision=revision, local_dir=scratch)))


def _is_theirs(stage: Path, earlier: JsonObject, api: HfApi, repo: str, revision: str, scratch: Path) -> bool:
    """Return whether the repository's card was written by its owner, and the one in ``stage`` was generated."""
    from hf_glu.publishing.card.card import is_generated

    if read_manifest(stage / MANIFEST_FILE)["card"] is None:
        return False
    card = Path(api.hf_hub_download(repo, CARD_FILE, revision=revision, local_dir=scratch))
    return digest(card) != earlier.get("card") and not is_generated(card.read_text(encoding="utf-8", errors="replace"))
