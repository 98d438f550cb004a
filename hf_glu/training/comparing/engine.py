"""Comparing variants, each with several seeds: what is finished is kept, what isn't is run, all in one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from statistics import fmean, stdev

from accelerate import PartialState

from hf_glu.checkpoint.files import COMPARISON_FILE, RUN_FILE
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.writing import check_folder
from hf_glu.errors import OptionError
from hf_glu.training.comparing.kinds import Compared, PlannedRun, Search
from hf_glu.training.comparing.statistics import holm, interval, paired_p
from hf_glu.training.comparing.variants import Variant
from hf_glu.training.options import OF_VARIANTS, check_seed
from hf_glu.training.record import FREE, check_same
from hf_glu.training.results import ComparisonRow, ComparisonTable, Results
from hf_glu.training.saving import known_results

Tell = Callable[[str], object]
Rates = dict[str, dict[float, float]]  # variant -> learning rate -> value on the seed of the search


def compare(
    kind: Compared,
    variants: Sequence[str],
    seeds: Sequence[int],
    *,
    search: Search | None = None,
    on_run: Tell | None = None,
    pool: Executor | None = None,
) -> ComparisonTable:
    """Train each variant with each seed; return the table that ``compare.json`` holds.

    What is finished in the output folder is not run again; where that is made of another model, data or options,
    nothing is run. The first variant is the baseline.

    Args:
        kind: what is compared.
        variants: as users write them.
        seeds: of each variant.
        search: the learning rates of which each variant's best is chosen first; None: all have that of the options.
        on_run: is told of each run as it begins, by a line such as ``run 3 of 9: geglu, seed 1``; with a pool, as its
            results are waited for.
        pool: what carries runs out, several at once, in other processes; None: this one, one after the other. What it
            hasn't begun with when something fails is its owner's to cancel.

    Raises:
        HfGluError: bad input, before anything is trained; a loss that is NaN; Ctrl-C.
    """
    chosen = [kind.read(text) for text in variants]
    _check_chosen(kind, chosen, seeds, search)
    check_folder(kind.folder)
    kind.prepare(chosen)
    runner = Runner(kind, len(chosen) * (len(seeds) + (len(search.lrs) if search else 0)), on_run, pool)
    rates = _search(runner, chosen, search) if search else {}
    best = {name: min(tried, key=lambda lr: tried[lr]) for name, tried in rates.items()}
    runs = {variant.name: [kind.planned(variant, seed, lr=best.get(variant.name)) for seed in seeds]
            for variant in chosen}  # fmt: skip
    runner.plan(run for of_seed in zip(*runs.values(), strict=True) for run in of_seed)
    found: dict[str, list[Results]] = {variant.name: [] for variant in chosen}
    for number, seed in enumerate(seeds):  # seed by seed: what is interrupted has compared all variants so far
        for name, each in runs.items():
            found[name].append(runner.results(each[number], f"{name}, seed {seed}"))
        table = _table(kind, runs, found, seeds[: number + 1], search, rates)
        if PartialState().is_main_process:
            write_json(kind.folder / COMPARISON_FILE, table)
    return table


class Runner:
    """Carries out runs, those apart that are finished.

    Args:
        kind: what is compared.
        total: how many runs there are.
        tell: is told of each.
        pool: as of `compare`.
    """

    def __init__(self, kind: Compared, total: int, tell: Tell | None, pool: Executor | None) -> None:
        self.kind, self.total, self._tell, self.pool = kind, total, tell, pool
        self.number, self.known, self.begun = 0, dict[str, Results](), dict[str, Future[Results]]()

    def plan(self, runs: Iterable[PlannedRun]) -> None:
        """Read the results of the runs that are finished; a pool begins with the others, in their order.

        Raises:
            CheckpointError: a run in the folder, one of these or another, is made of something else.
            OptionError: a run can't be.
        """
        runs = list(runs)
        for run in runs:
            run.job.check()
        for run in runs:
            if (results := known_results(run.folder, run.made_of)) is not None:
                self.known[str(run.folder)] = results
        for path in sorted(self.kind.folder.glob(f"*/{RUN_FILE}")):
            check_same(path.parent, self.kind.record, FREE | self.kind.free)
        if self.pool:
            self.begun |= {folder: self.pool.submit(self.kind.carry_out, run)
                           for run in runs if (folder := str(run.folder)) not in self.known}  # fmt: skip

    def results(self, run: PlannedRun, name: str) -> Results:
        """Return a run's results: what is known of it, else what comes of it now."""
        self.number += 1
        known, begun = self.known.get(str(run.folder)), self.begun.get(str(run.folder))
        self.tell(f"run {self.number} of {self.total}: {name}{' is finished already' if known else ''}")
        return known or (begun.result() if begun else self.kind.carry_out(run))

    def tell(self, line: str) -> None:
        """Pass a line on, from one of the processes."""
        if self._tell and PartialState().is_main_process:
            self._tell(line)


def _check_chosen(kind: Compared, chosen: Sequence[Variant], seeds: Sequence[int], search: Search | None) -> None:
    """Raise OptionError if a variant, seed or rate is given twice, too few are, or an option would be ignored."""
    if not chosen or not seeds:
        raise OptionError("a comparison needs variants and seeds")
    if len(seeds) < kind.least:
        raise OptionError(f"{len(seeds)} seed tells no difference from chance: give {kind.least} at least")
    given = {**kind.job.to_dict(), **kind.options.to_dict()}
    defaults = {**type(kind.job)().to_dict(), **type(kind.options)().to_dict()}
    for key in OF_VARIANTS:
        if given[key] != defaults[key]:
            raise OptionError(f"{key}={given[key]!r} does nothing in a comparison, whose variants and seeds say it")
    for seed in [*seeds, *([search.seed] if search else [])]:
        check_seed("a seed", seed)
    if twice := [seed for seed in seeds if list(seeds).count(seed) > 1]:
        raise OptionError(f"the seed {twice[0]} is given twice: its runs would be the same")
    meant: dict[object, str] = {}
    for variant in chosen:
        meaning = kind.meaning(variant)
        if meaning in meant:
            raise OptionError(f"the variants {meant[meaning]} and {variant.name} are the same")
        meant[meaning] = variant.name
    if search:
        _check_search(search, seeds)


def _check_search(search: Search, seeds: Sequence[int]) -> None:
    names = [f"{lr:g}" for lr in search.lrs]
    if wrong := [lr for lr in search.lrs if not (lr > 0 and math.isfinite(lr))]:
        raise OptionError(f"a learning rate is more than 0, got {wrong[0]:g}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise OptionError(f"the learning rate {twice[0]} is given twice")
    if len(names) < 2:
        raise OptionError("one learning rate is nothing to choose from: give it with lr, or give several")
    if search.seed in seeds:
        raise OptionError(f"the learning rates' seed {search.seed} is one of the result's: give another")


def _search(runner: Runner, chosen: Sequence[Variant], search: Search) -> Rates:
    """Try each learning rate with each variant; one at which training diverges is infinitely bad.

    Raises:
        OptionError: all of a variant's are such.
    """
    runs = {(each.name, lr): runner.kind.planned(each, search.seed, lr=lr, tried=True)
            for each in chosen for lr in search.lrs}  # fmt: skip
    runner.plan(runs.values())
    rates: Rates = {variant.name: {} for variant in chosen}
    for (name, lr), run in runs.items():
        rates[name][lr] = runner.kind.value(runner.results(run, f"{name}, lr {lr:g}, seed {search.seed}"))
    for name, tried in rates.items():
        if math.inf == min(tried.values()):
            raise OptionError(f"{name} diverges at all of the learning rates: give lower ones")
        best = min(tried, key=lambda lr: tried[lr])
        edge = {min(tried): "lowest", max(tried): "highest"}.get(best)
        runner.tell(f"{name}: lr {best:g}" + (f", the {edge} that was tried: another may be better" if edge else ""))
    return rates


def _table(
    kind: Compared,
    runs: Mapping[str, Sequence[PlannedRun]],
    found: Mapping[str, list[Results]],
    seeds: Sequence[int],
    search: Search | None,
    rates: Rates,
) -> ComparisonTable:
    baseline, first = next(iter(found.items()))
    reference = [kind.value(each) for each in first]
    rows = [_row(name, [kind.value(each) for each in results], reference, results, apart=name != baseline)
            for name, results in found.items()]  # fmt: skip
    for row, p in zip(rows, holm([row["p_value"] for row in rows], len(rows) - 1), strict=True):
        row["p_holm"] = p
        if row["name"] in rates:
            row["lr"] = runs[row["name"]][0].options.lr
            row["rates"] = {f"{lr:g}": value if math.isfinite(value) else None
                            for lr, value in rates[row["name"]].items()}  # fmt: skip
    table: ComparisonTable = {
        "task": kind.task,
        "model": kind.title,
        "metric": " and ".join(first[0]["main"]),
        "seeds": list(seeds),
        "baseline": baseline,
        "variants": rows,
    }
    if search:
        table["lr_seed"] = search.seed
    kind.complete(table, runs, found)
    return table


def _row(
    name: str, values: list[float], reference: list[float], results: list[Results], *, apart: bool
) -> ComparisonRow:
    """Return a variant's row; ``apart``: it isn't the baseline. Seeds that diverged are in its scores alone."""
    pairs = [pair for pair in zip(values, reference, strict=True) if all(map(math.isfinite, pair))] if apart else []
    differences = [mine - other for mine, other in pairs]
    known = [value for value in values if math.isfinite(value)]  # the others diverged, which the scores say
    ended = [each for each in results if "training" in each]
    return {
        "name": name,
        "scores": values,
        "mean": fmean(known) if known else math.nan,
        "std": stdev(known) if len(known) > 1 else None,
        "interval": interval(known),
        "difference": fmean(differences) if differences else None,
        "difference_interval": interval(differences),
        "p_value": paired_p(*zip(*pairs, strict=True)) if pairs else None,
        "p_holm": None,
        "parameters": results[0]["parameters"],
        "active_parameters": results[0]["active_parameters"],
        "seconds": fmean(each["training"]["seconds"] for each in ended) if ended else math.nan,
    }
