"""``hf-glu doctor``: does the installed Transformers have what the plugin hooks, and what else is there?"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

from hf_glu import plugin
from hf_glu.checkpoint.config_file import first_line
from hf_glu.compat.private import Private
from hf_glu.compat.table import rows
from hf_glu.config.extras import EXTRAS, install

_DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where a package isn't called as it is imported


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
    """Check versions, every hook, the extras, every private name and the Hub's reachability; never raises."""
    checks = [Check(name="python", ok=True, detail=platform.python_version())]
    checks += [_version(name, f"pip install {name}") for name in ("torch", "transformers", "accelerate")]
    checks += [_hook(module) for module in plugin.hooked()]
    checks += [_version(_DISTRIBUTIONS.get(name, name), install(name), needed=False) for name in EXTRAS]
    checks += [_private(row) for row in rows()]
    return Diagnosis(checks=(*checks, _hub()))


def _version(package: str, command: str, *, needed: bool = True) -> Check:
    """Report the version of a package, or the command that installs it."""
    try:
        return Check(name=package, ok=True, detail=metadata.version(package), needed=needed)
    except metadata.PackageNotFoundError:
        return Check(name=package, ok=False, detail=f"not installed: {command}", needed=needed)


def _hook(module: str) -> Check:
    """Report whether a module is patched; where it isn't, only of the one that is at fault, why."""
    package, name = module.partition(".")[0], f"hook {module}"
    if find_spec(package) is None:
        return Check(name=name, ok=False, detail=f"not installed: {package}", needed=package == "transformers")
    try:
        import_module(module)
    except Exception as error:  # of any version, while it is imported
        if module in plugin.failed or not plugin.failed:
            line = plugin.failed.get(module) or f"can't be imported: {first_line(error)}"
            return Check(name=name, ok=False, detail=line)
        return Check(name=name, ok=False, detail=f"waits for {', '.join(plugin.failed)}", needed=False)
    if module in plugin.failed:
        return Check(name=name, ok=False, detail=plugin.failed[module])
    return Check(name=name, ok=plugin.is_registered(), detail="in place")


def _private(row: Private) -> Check:
    """Report whether a name is there that its library doesn't promise, and what needs it."""
    found = row.is_present()
    here = {True: "there", None: f"not installed: {row.package}", False: f"absent, so {row.otherwise}"}[found]
    return Check(
        name=f"private {row}", ok=found is True, detail=f"{here}; for {row.need} (seen in {row.seen})",
        needed=row.vital,
    )  # fmt: skip


def _hub() -> Check:
    from hf_glu.checkpoint.hub import reachable

    ok = reachable()
    detail = "reachable" if ok else "can't be reached: local folders and the cache work"
    return Check(name="Hub", ok=ok, detail=detail, needed=False)
