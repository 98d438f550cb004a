"""Where a model's files are: a local folder, or a repository on the Hub."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from hf_glu.errors import CheckpointError

PROBE_SECONDS = 3.0
_ADVICE = "give a local folder, or a repository id such as google-bert/bert-base-uncased"


def resolve(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Return the local folder of ``source``: itself, or the Hub's snapshot of that repository.

    Without a network this takes no more than `PROBE_SECONDS`; what the cache has is used.

    Raises:
        CheckpointError: there is no such folder or repository, or the Hub can't be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{source} is a file: {_ADVICE}")
    if not _is_repository_id(str(source)):
        raise CheckpointError(f"there is no folder {source}: {_ADVICE}")
    return _snapshot(str(source), revision)


def _is_repository_id(source: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if source.startswith((".", "/", "~")) or source.endswith("/"):
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _snapshot(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    offline = not reachable()
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=offline))
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if _offline() else "the Hub can't be reached"
        raise CheckpointError(f"there is no folder {repository}, {why}, and it isn't in the cache: {_ADVICE}") from None
    except GatedRepoError:
        raise CheckpointError(f"{repository} is gated: accept its terms on the Hub, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"the Hub has no repository {repository} (or it is private: `hf auth login`)") from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"the Hub refused {repository}: {str(error).splitlines()[0]}") from None


def _offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return bool(is_offline_mode())


def reachable() -> bool:
    """Tell whether the Hub answers, after at most `PROBE_SECONDS`; at once where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    if _offline():
        return False
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    target = urlsplit(proxy or constants.ENDPOINT)
    port = target.port or (443 if target.scheme == "https" else 80)
    answers: list[bool] = []

    def connect() -> None:
        try:
            with socket.create_connection((target.hostname or "", port), timeout=PROBE_SECONDS):
                answers.append(True)
        except OSError:
            answers.append(False)

    probe = Thread(target=connect, daemon=True)  # looking a name up knows no timeout of its own
    probe.start()
    probe.join(PROBE_SECONDS)
    return bool(answers and answers[0])
