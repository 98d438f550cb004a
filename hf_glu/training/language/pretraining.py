"""Training a language model, and measuring one: what ``hf-glu pretrain`` and ``hf-glu perplexity`` do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from hf_glu.activation import registry
from hf_glu.checkpoint.provenance import base_of
from hf_glu.training.baseline import report_run
from hf_glu.training.language.blocks import BYTES, IDS, Cutter
from hf_glu.training.language.examples import BlockExamples, check_predicted, measure
from hf_glu.training.language.job import LanguageRun
from hf_glu.training.language.models import block_length, load_language_model
from hf_glu.training.language.options import LanguageOptions, language_options
from hf_glu.training.language.reading import read_documents
from hf_glu.training.options import TrainingOptions, check_seed
from hf_glu.training.results import JobReport

_log = logging.getLogger(__name__)


class TextMeasure(TypedDict):
    """What a language model makes of a text.

    Keys:
        metrics: loss in nats a token, perplexity, and of a causal model bits per byte.
        blocks, tokens, bytes: how much text it was measured on.
        seconds: it took.
    """

    model: str
    objective: str
    metrics: dict[str, float]
    blocks: int
    tokens: int
    bytes: int
    seconds: float


def pretrain(
    model: str = "",
    data: str | Sequence[str] = (),
    *,
    output: str | None = None,
    resume: bool = False,
    **options: object,
) -> JobReport:
    """Train a language model on text: go on with a pretrained one, converted first if ``to`` is given, or a new one.

    >>> hf_glu.pretrain("gpt2", "texts/*.txt", to="geglu", output="runs/geglu", max_steps=1000)

    Args:
        model: local folder or Hub id; left out where ``config`` says what to build.
        data: files (.txt, .jsonl, .csv, .parquet), folders, patterns, or one data set of the Hub.
        output: a new folder for model, tokenizer, log and results.
        resume: whether the run in ``output`` goes on.
        options: those of `LanguageOptions` and `LanguageTraining`, by name.

    Returns:
        The report, as plain data: ``outcome["metrics"]`` has loss and perplexity on the validation text.

    Raises:
        HfGluError: bad input, before anything is trained; a loss that is NaN; Ctrl-C.
    """
    data = [data] if isinstance(data, str) else [str(name) for name in data]
    values = {"model": str(model), "data": data, "output": None if output is None else str(output), **options}
    return run_language(*language_options(values), resume=resume)


def run_language(
    job: LanguageOptions,
    options: TrainingOptions,
    *,
    resume: bool = False,
    finish: Callable[[Path], object] | None = None,
) -> JobReport:
    """Do a run of language modelling; return its report.

    ``job.output`` holds the model, its tokenizer, log, results and ``hf_glu_report.json``. In the end ``finish`` is
    given the folder: `hf_glu.publishing.card.card.write_card` adds the model card.

    Raises:
        HfGluError: bad input, before anything is trained; a loss that is NaN; Ctrl-C.
    """
    start = time.perf_counter()
    job.check()
    if job.to:
        registry[job.to]
    base = base_of(job.model, job.base_model) if job.model else None
    ours = LanguageRun(job, options, resume=resume)
    if not job.output and ours.main:
        _log.warning("without an output folder the model is trained and evaluated, and not kept")
    return report_run(ours, ours.run(), base, begun=start, finish=finish)


def perplexity(
    model: str,
    data: str | Sequence[str],
    *,
    objective: str = "auto",
    text_column: str | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    blocks: int | None = None,
    seed: int = 0,
) -> TextMeasure:
    """Measure a language model on text, in blocks that don't overlap.

    Args:
        model: local folder, Hub id or GGUF file.
        data: as of `pretrain`.
        objective: clm, mlm (its masks are those of the seed) or span; auto: by the model's class.
        text_column: the text's.
        max_length: tokens of a block; None: as many as the model reads, 1024 at most.
        batch_size: blocks of one forward pass.
        blocks: at most so many, from the first on.
        seed: of masks.

    Raises:
        CheckpointError, DataError, OptionError: model or text can't be had, or don't go together.
    """
    names = [data] if isinstance(data, str) else [str(name) for name in data]
    options = LanguageOptions(model=str(model), data=names, objective=objective, text_column=text_column)
    options.check()
    check_seed("seed", seed)
    documents = read_documents(names, column=text_column)
    found, tokenizer, kind = load_language_model(options, seed, whole=True)
    length = block_length(max_length, kind, tokenizer, found.config)
    cut = Cutter(tokenizer=tokenizer, length=length, framed=kind.framed).cut(documents)
    cut = cut.select(range(min(blocks or len(cut), len(cut))))
    examples = BlockExamples(cut, kind, tokenizer, seed)
    check_predicted(examples)
    start = time.perf_counter()
    metrics = measure(found, examples, batch_size=batch_size)
    return {
        "model": str(model),
        "objective": kind.name,
        "metrics": metrics,
        "blocks": len(cut),
        "tokens": sum(map(len, cut[IDS])),
        "bytes": round(sum(cut[BYTES])),
        "seconds": time.perf_counter() - start,
    }
