"""The error of each FFN on the inputs that it really gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.conversion.routes import APPROXIMATE
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.forward import ffn_output, is_alone
from hf_glu.ffn.sites import Site
from hf_glu.instruments.probe import max_abs_difference, probe_inputs, run, try_run
from hf_glu.instruments.recorder import Kept, Watch, watching

TOKENS = 256
# What counts as the same by the dtype of the weights, relative to the largest output: GEMMs of another shape add in
# another order, through all layers.
SAME = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2}
SAME_IN_LESS = 1e-1
REPORT = "report"  # what `check` is where a difference above the promise is only reported


class SiteProbe:
    """Records the inputs of FFNs during a forward pass, and compares the FFNs on them before and after a change."""

    def __init__(self, sites: list[Site]) -> None:
        self._sites = [site for site in sites if is_alone(site)]
        self._kept = {site.name: Kept(TOKENS) for site in self._sites}
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record the first tokens that each FFN is given, at most `TOKENS`, without padding."""
        with watching(model, [Watch(module=site.in_proj, see=self._kept[site.name].see) for site in self._sites]):
            yield
        self._inputs = {name: kept.tensor() for name, kept in self._kept.items() if kept.parts}

    @torch.no_grad()
    def reference(self) -> None:
        """Remember what the FFNs compute now."""
        for site in self._sites:
            if site.name in self._inputs:
                self._outputs[site.name] = ffn_output(site, self._inputs[site.name])

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """Return |now - then| / |then| (Frobenius norms) for each FFN that was run."""
        errors = {}
        for site in self._sites:
            if site.name in self._outputs:
                then = self._outputs[site.name].double()
                now = ffn_output(site, self._inputs[site.name]).double()
                errors[site.name] = float((now - then).norm() / then.norm().clamp_min(1e-30))
        return errors


class Comparison:
    """A model's outputs before a conversion, to be compared with those after it."""

    def __init__(
        self, model: Any, sites: list[Site], inputs: Mapping[str, Any] | None, *, check: bool | str = True
    ) -> None:
        if check not in (True, REPORT):
            raise OptionError(f"check must be True, False or {REPORT!r}, got {check!r}")
        self._model, self._strict = model, check != REPORT
        self._inputs = probe_inputs(model) if inputs is None else dict(inputs)
        self._probe = SiteProbe(sites)
        with self._probe.recording(model):
            self._before = try_run(model, self._inputs)
        self._probe.reference()

    def finish(self, promise: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return max |after - before| of each output, and the relative error of each FFN by itself.

        Raises:
            ConversionError: they are above what ``promise`` says.
        """
        differences, errors = max_abs_difference(self._before, run(self._model, self._inputs)), self._probe.errors()
        if self._strict and promise != APPROXIMATE:
            self._keep(promise, differences, errors)
        return differences, errors

    def _keep(self, promise: str, differences: Mapping[str, float], errors: Mapping[str, float]) -> None:
        dtypes = {parameter.dtype for parameter in self._model.parameters()}
        allowed = max(SAME.get(dtype, SAME_IN_LESS) for dtype in dtypes)
        measured = {key: value / _largest(self._before[key]) for key, value in differences.items()}
        for where, value in {**measured, **errors}.items():
            if not value <= allowed:
                raise ConversionError(
                    f"the conversion promises to be {promise}, but {where} differs by {value:.2g} of its size (at most "
                    f"{allowed:g} is rounding): check={REPORT!r} (--lenient) converts, and reports it"
                )


def _largest(output: Tensor) -> float:
    """Return the largest finite value of an output, 1 where there is none."""
    finite = output[output.isfinite()].abs()
    return float(finite.max()) or 1.0 if finite.numel() else 1.0
