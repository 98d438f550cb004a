"""Converting a tiny model of every text family by an exact route, and comparing it before, after and reloaded."""

from __future__ import annotations

import logging
import multiprocessing
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hf_glu.checkpoint.writing import scratch_folder
from hf_glu.conversion import convert
from hf_glu.conversion.routes import exact_targets
from hf_glu.errors import HfGluError
from hf_glu.ffn.identify import source_activation
from hf_glu.ffn.sites import Site, convertible_sites, find_banks
from hf_glu.instruments.equality import align
from hf_glu.instruments.probe import max_abs_difference, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-6
BLEND = "learnable_swiglu"  # exact from any activation, and for natively gated families

# Families without an FFN that could be gated, or that can't be built here: why.
REASONS = {
    "rwkv": "its FFN squares a ReLU in its forward: there is no activation module to replace",
    "esm": "its FFN calls GELU in its forward: there is no activation module to replace",
    "ibert": "its FFN's activation is an integer approximation that takes a scale",
    "squeezebert": "its FFN is grouped 1x1 convolutions",
    "lfm2": "its gate calls SiLU in its forward: there is no activation module to replace",
    "lfm2_moe": "its gates call SiLU in their forward: there is no activation module to replace",
    "lfm3": "its gate calls SiLU in its forward: there is no activation module to replace",
    "hy_v4": "its experts call their activation in their forward",
    "minimax_m3_vl_text": "its gates call their activation in their forward",
    "dbrx": "its bank of experts is a 2-D parameter",
    "neomme": "its config admits hidden_act='relu2' only",
    "qwen4_exp": "its config admits only activations that its linear attention's output gate has, too",
    "qwen4_exp_text": "its config admits only activations that its linear attention's output gate has, too",
    "zamba": "it ties its shared layers' tensors as parameters, which the mix's annealing state isn't",
    "inkling2_text": "its experts' activation takes gate and up",
}


INTRODUCTION = """# Coverage

Made by `hf-glu coverage --markdown FILE`: a tiny random model of each model type under Transformers' causal-LM,
masked-LM, seq2seq-LM and sequence-classification mappings, converted by an exact route (its own gate; the learnable
blend, which natively gated families have too, `learnable_swiglu`, or `learnable_relu*4` for the experts of gpt-oss; a
state in the gate of Mamba's mixers), compared, saved, loaded again and compared bitwise.
"""


@dataclass(frozen=True, kw_only=True)
class CoverageRow:
    """The result of one model type.

    Attributes:
        model_type, model_class: what was built.
        sites: number of FFN sites.
        target, route: what it was converted to, and how.
        max_abs_difference: of the outputs, before and after.
        seconds: all of it took.
        reason: why it didn't pass; None: it did.
    """

    model_type: str
    model_class: str
    sites: int = 0
    target: str | None = None
    route: str | None = None
    max_abs_difference: float | None = None
    seconds: float = 0.0
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The results of all model types."""

    rows: tuple[CoverageRow, ...]
    seconds: float

    @property
    def summary(self) -> str:
        """The line that sums the rows up."""
        exact = sum(row.reason is None for row in self.rows)
        return f"{exact} of {len(self.rows)} exact, {len(self.rows) - exact} not; {self.seconds:.0f} s"

    def to_dict(self) -> dict[str, Any]:
        """Return the rows as plain data."""
        return {"summary": self.summary, "rows": [asdict(row) for row in self.rows], "seconds": self.seconds}

    def markdown(self) -> str:
        """Return the rows as the table that is kept beside the README."""
        lines = ["| model type | class | FFN sites | converted to | max difference | |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            difference = "" if row.max_abs_difference is None else f"{row.max_abs_difference:.1e}"
            verdict = "exact" if row.reason is None else row.reason
            cells = (f"`{row.model_type}`", row.model_class, str(row.sites), row.target or "", difference, verdict)
            lines.append(f"| {' | '.join(cells)} |")
        exact = sum(row.reason is None for row in self.rows)
        return f"{INTRODUCTION}\n{exact} of {len(self.rows)} exact.\n\n" + "\n".join(lines) + "\n"


def survey(only: list[str] | None = None) -> Iterator[CoverageRow]:
    """Try each model type (or those of ``only``) in a worker process, which may crash; yield a row for each."""
    from hf_glu.bench.coverage import tiny

    pool = _pool()
    for model_type, model_class in tiny.model_types().items():
        if only and model_type not in only:
            continue
        try:
            yield pool.submit(examine, model_type, model_class).result()
        except BrokenProcessPool:
            pool = _pool()
            yield CoverageRow(model_type=model_type, model_class=model_class, reason="the process crashed")
    pool.shutdown()


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_quiet)


def _quiet() -> None:
    import torch
    import transformers

    import hf_glu  # noqa: F401  (registers)

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def examine(model_type: str, model_class: str) -> CoverageRow:
    """Build, convert, compare, save and reload a tiny model of one type; return its row."""
    from hf_glu.bench.coverage import tiny

    start = time.perf_counter()
    row: dict[str, Any] = {}
    reason = tiny.UNBUILDABLE.get(model_type)
    if reason is None:
        try:
            reason = _convert_and_compare(tiny.tiny_model(model_type, model_class), row)
        except HfGluError as error:
            reason = str(error)
        except Exception as error:  # whatever Transformers raises belongs in the table
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    if reason is not None:
        reason = REASONS.get(model_type, reason)
    seconds = time.perf_counter() - start
    return CoverageRow(model_type=model_type, model_class=model_class, seconds=seconds, reason=reason, **row)


def _convert_and_compare(model: PreTrainedModel, row: dict[str, Any]) -> str | None:
    """Convert a model and compare its outputs; fill ``row``, and return why it doesn't pass, or None."""
    from hf_glu.bench.coverage import tiny

    sites, banks = convertible_sites(model), find_banks(model)
    row["sites"] = len(sites or banks)
    if not sites and not banks:
        return "no FFN that the table of sites knows"
    inputs = tiny.tiny_inputs(model)
    before = run(model, inputs)
    if sites:
        row["target"] = _exact_target(model, sites)
        report = convert(model, row["target"], check=False)
    else:  # gpt-oss
        row["target"] = f"learnable_relu*{len(banks[0].anchor.get_parameter('down_proj'))}"
        report = convert(model, experts=row["target"], check=False)
    row["route"] = "; ".join(sorted({step.route.name for step in report.plan.steps}))
    after = run(model, inputs)
    difference = max(max_abs_difference(before, after).values())
    row["max_abs_difference"] = difference
    if not difference <= TOLERANCE:
        return f"the outputs differ by {difference:.1e}"
    with scratch_folder() as folder:
        model.save_pretrained(folder)
        again, info = type(model).from_pretrained(folder, output_loading_info=True)
        if bad := {key: sorted(map(str, value))[:2] for key, value in info.items() if value}:
            return f"reloading: {bad}"
        align(again)
        if any(value for value in max_abs_difference(run(again.eval(), inputs), after).values()):
            return "the reloaded model differs"
    return None


def _exact_target(model: PreTrainedModel, sites: list[Site]) -> str:
    """Return an activation that all sites convert to exactly: a plain gate, else the blend."""
    sources = {source_activation(model, site) for site in sites}
    if sites[0].kind == "mixer":
        return f"stateful_{exact_targets(sources.pop())[0]}"
    if len(sources) == 1 and not any(site.native for site in sites):
        return exact_targets(sources.pop())[0]
    return BLEND
