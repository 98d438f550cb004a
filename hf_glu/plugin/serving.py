"""Hook of ``transformers serve``: a request for what can't be steered is answered with the reason, before it runs.

A request's ``generation_config`` is that of a ``generate``, which steers by itself (`hf_glu.plugin.generation`) and
fails by itself: but a client would see a bare "Internal Server Error" then. Here it gets status 400 and the line,
whether it streams or not, and where requests are batched, whose manager passes over entries that it doesn't know.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import isawaitable, signature
from types import ModuleType
from typing import Any

from hf_glu.compat.of_others import BATCHING, SERVING
from hf_glu.errors import NoSiteError, OptionError, UnknownNameError
from hf_glu.plugin.generation import BATCHED, check_reached
from hf_glu.plugin.patching import Patches

BAD_REQUEST = 400


def install(module: ModuleType, patches: Patches) -> None:
    """Wrap what both managers of generation, one by one and batched, do with a request."""
    for row in (*SERVING, *BATCHING):
        manager = getattr(module, row.where.rpartition(":")[2], None)
        patches.set(manager, row.name, _checked(row.of(manager), batched=row in BATCHING))


def _checked(plain: Any, *, batched: bool) -> Any:
    parameters = signature(plain)

    @wraps(plain)
    def handle(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs).arguments
        with _telling():
            _check(given["model"], given["gen_config"], batched)
        found = plain(*args, **kwargs)
        return _told(found) if isawaitable(found) else found

    return handle


async def _told(answer: Awaitable[Any]) -> Any:
    """Return an answer, or the reason why there is none, which is known as late as the model runs."""
    with _telling():
        return await answer


@contextmanager
def _telling() -> Iterator[None]:
    """Turn what is wrong with a request into what its client sees; other errors stay the server's."""
    try:
        yield
    except (OptionError, UnknownNameError, NoSiteError) as error:
        from fastapi import HTTPException

        raise HTTPException(status_code=BAD_REQUEST, detail=str(error)) from error


def _check(model: Any, config: Any, batched: bool) -> None:
    from hf_glu.plugin.modulations import check_wanted, wanted_of  # with models, as in the other hook

    wanted = wanted_of(model, config)
    if wanted and batched:
        raise OptionError(BATCHED)
    if wanted:
        check_reached(model)
        check_wanted(model, wanted)
