"""Where a model's files are: a local folder, or a repository on the Hub."""

from __future__ import annotations

import os
import socket
import time
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from hf_glu.checkpoint.writing import reason_of, user_path
from hf_glu.errors import CheckpointError, shown

PROBE_SECONDS, HOLDS = 3.0, 30.0
_ADVICE = "give a local folder, or a repository id such as google-bert/bert-base-uncased"


def resolve(source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of ``source``: itself, or the Hub's snapshot of that repository.

    Without a network this takes no more than `PROBE_SECONDS`; what the cache has is used. The Hub is the one that
    ``HF_ENDPOINT`` names.

    Args:
        source: the folder or repository; ``user/name@REVISION`` is that repository at a branch, tag or commit.
        revision: the same, where ``source`` doesn't say it.
        token: for private and gated repositories; None: the one of `hf auth login` or ``HF_TOKEN``.

    Raises:
        CheckpointError: there is no such folder, repository or revision, or the Hub can't be reached.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"{type(source).__name__} is no checkpoint: {_ADVICE}")
    path = user_path(source)
    try:
        found = path.is_dir(), path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise CheckpointError(f"{shown(str(source))} can't be read: {reason_of(error)}") from error
    if found[0]:
        return path
    if found[1]:
        raise CheckpointError(f"{source} is a file: {_ADVICE}")
    name, _, suffix = str(source).partition("@")
    if name.startswith((".", "/", "~")) or name.endswith("/"):
        raise CheckpointError(f"there is no folder {source}: {_ADVICE}")
    if reason := invalid_name(name):
        raise CheckpointError(
            f"there is no folder {source}, and no repository can have that name ({reason}): {_ADVICE}"
        )
    return _snapshot(name, suffix or revision, token)


def invalid_name(name: str) -> str | None:
    """Return why a repository can't be called ``name``; None if it can."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error).splitlines()[0].partition(":")[0].rstrip(".")
    return None


def _snapshot(repository: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    local, failures = not reachable(), network_errors()
    try:
        return Path(snapshot_download(repository, revision=revision, token=token, local_files_only=local))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"there is no folder {repository}, {unreachable()}, and it isn't in the cache: {_ADVICE}"
        ) from None
    except GatedRepoError:
        raise CheckpointError(f"{repository} is gated: accept its terms on the Hub, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"the Hub has no repository {repository} (or it is private: `hf auth login`)") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repository} has no branch, tag or commit {revision!r}") from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"the Hub refused {repository}: {refusal(error)}") from None
    except failures as error:
        raise CheckpointError(f"{repository} can't be downloaded: {str(error) or type(error).__name__}") from None


def refusal(error: Any) -> str:
    """Return the Hub's answer to a request that it refused, as one line."""
    status = error.response.status_code
    if status == 401:
        return "it doesn't accept the token: `hf auth login`, or set HF_TOKEN"
    return str(error.server_message or str(error)).strip().splitlines()[0] + f" (HTTP {status})"


def network_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that the Hub's client raises if a connection fails, or a file can't be written."""
    from huggingface_hub.errors import HfHubHTTPError

    # of httpx or, in newer versions, httpx2
    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"), OSError


def unreachable() -> str:
    """Return as words why the Hub can't be reached: offline mode, or no connection."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if _offline() else f"the Hub ({constants.ENDPOINT}) can't be reached"


def _offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return bool(is_offline_mode())


def reachable() -> bool:
    """Return whether the Hub answers, after at most `PROBE_SECONDS`; at once where HF_HUB_OFFLINE is set.

    An answer holds for up to `HOLDS` seconds, so that one command asks once, however many checkpoints it names.
    """
    from huggingface_hub import constants

    if _offline():
        return False
    target = urlsplit(constants.ENDPOINT)
    proxy = getproxies().get(target.scheme) or getproxies().get("all")
    if proxy and not proxy_bypass(target.netloc):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)
    return _answers(target.hostname or "", port, int(time.monotonic() / HOLDS))


@lru_cache(maxsize=8)
def _answers(host: str, port: int, period: int) -> bool:
    """Return whether something listens there, asked once in a period."""
    answers: list[bool] = []

    def connect() -> None:
        try:
            with socket.create_connection((host, port), timeout=PROBE_SECONDS):
                answers.append(True)
        except OSError:
            answers.append(False)

    probe = Thread(target=connect, daemon=True)  # looking a name up knows no timeout of its own
    probe.start()
    probe.join(PROBE_SECONDS)
    return bool(answers and answers[0])
