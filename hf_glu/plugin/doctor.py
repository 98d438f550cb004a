"""``hf-glu doctor``: does the installed Transformers have what the plugin hooks, and what else is there?"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from typing import Any

from hf_glu import plugin
from hf_glu.errors import IncompatibleTransformersError

_EXTRAS = ("accelerate", "datasets", "evaluate", "peft", "scikit-learn", "matplotlib", "onnxruntime", "torchao")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding; ``needed`` ones decide whether hf_glu works."""

    name: str
    ok: bool
    detail: str
    needed: bool = True


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All findings."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether everything that is needed is there."""
        return all(check.ok for check in self.checks if check.needed)

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as plain data."""
        return {"healthy": self.healthy, "checks": [asdict(check) for check in self.checks]}


def examine() -> Diagnosis:
    """Check versions, every hook, the Hub's reachability and the extras."""
    checks = [Check(name="python", ok=True, detail=platform.python_version())]
    checks += [_version(name) for name in ("torch", "transformers")]
    checks += [_hook(module) for module in plugin.HOOKED]
    checks += [_version(name, needed=False) for name in _EXTRAS]
    return Diagnosis(checks=(*checks, _hub()))


def _version(package: str, *, needed: bool = True) -> Check:
    try:
        return Check(name=package, ok=True, detail=metadata.version(package), needed=needed)
    except metadata.PackageNotFoundError:
        return Check(name=package, ok=False, detail=f"not installed: pip install {package}", needed=needed)


def _hook(module: str) -> Check:
    try:
        import_module(module)
    except IncompatibleTransformersError as error:
        return Check(name=f"hook {module}", ok=False, detail=str(error))
    except ImportError as error:
        return Check(name=f"hook {module}", ok=False, detail=f"can't be imported: {error}")
    return Check(name=f"hook {module}", ok=plugin.is_registered(), detail="in place")


def _hub() -> Check:
    from hf_glu.checkpoint.hub import reachable

    ok = reachable()
    detail = "reachable" if ok else "can't be reached: local folders and the cache work"
    return Check(name="Hub", ok=ok, detail=detail, needed=False)
