"""Writing model cards; whatever they say comes from the files beside the checkpoint."""

from __future__ import annotations

from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hf_glu.checkpoint.config_file import first_line
from hf_glu.checkpoint.files import CARD_FILE
from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.checkpoint.writing import write_text
from hf_glu.config.registry import GATED
from hf_glu.errors import DataError, HfGluError
from hf_glu.plugin.configs import is_remote_code
from hf_glu.publishing.card import wording
from hf_glu.publishing.card.facts import read_facts
from hf_glu.publishing.card.known import ComparisonFacts, Facts
from hf_glu.publishing.card.plain import cell, fitting, plain

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

TEMPLATE = files("hf_glu.publishing.card") / "model_card.md"
SEQ2SEQ = "text2text-generation"

# end of the architecture's name -> Auto class, the Hub's task (None: it has none)
HEADS = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForMultipleChoice": ("AutoModelForMultipleChoice", "multiple-choice"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "text-generation"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForPreTraining": ("AutoModelForPreTraining", None),
    "ForNextSentencePrediction": ("AutoModelForNextSentencePrediction", None),
    "EncoderModel": ("AutoModelForTextEncoding", "feature-extraction"),
    "DoubleHeadsModel": (None, None),
    "Model": ("AutoModel", "feature-extraction"),
}


def describe(folder: Path, *, repo_id: str | None = None, auto_map: JsonObject | None = None) -> str:
    """Make the card of the checkpoint in ``folder`` from the result files that are there; return it as Markdown.

    Args:
        folder: a fine-tuning run, a conversion, or nothing but a model.
        repo_id: the repository that it goes to; None: the folder's name stands for it.
        auto_map: the classes of the code that goes there with it; None: what the folder's config says.

    Raises:
        CheckpointError, DataError: no config, or a file that can't be read, or isn't what hf_glu writes.
    """
    try:
        facts = read_facts(folder)
        if auto_map is not None:
            facts["config"]["auto_map"] = dict(auto_map)
        return render_card(facts, repo_id=repo_id)
    except HfGluError:
        raise
    except Exception as error:  # of values of other kinds anywhere in the files
        raise DataError(
            f"the files in {folder} aren't what hf_glu writes: no card can be made of them ({first_line(error)})"
        ) from error


def write_card(folder: Path, *, repo_id: str | None = None) -> Path:
    """Write the card that `describe` makes into ``folder`` as its ``README.md``; return the path."""
    path = folder / CARD_FILE
    write_text(path, describe(folder, repo_id=repo_id))
    return path


def render_card(facts: Facts, *, repo_id: str | None = None) -> str:
    """Make the card of a checkpoint from its facts (see `hf_glu.publishing.card.facts.read_facts`).

    They come from others' files: all that they say is made `plain`, here and once.
    """
    from huggingface_hub import ModelCard

    facts = cast(Facts, {**plain(facts), "carried": fitting(facts["carried"])})
    repo_id = repo_id or facts["name"]
    architecture = wording.architecture(facts)
    auto_class = _head(facts)[0] or architecture or "AutoModel"
    card = ModelCard.from_template(
        _metadata(facts, repo_id.rpartition("/")[2]),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        auto_class=auto_class,
        plugin=wording.needs_plugin(facts),
        remote_code=is_remote_code((facts["config"].get("auto_map") or {}).get(auto_class)),
        refused=wording.refused_name(facts),
        summary=wording.summary(facts),
        traits=wording.traits(facts),
        activations=wording.activations(facts),
        gated=any(GATED in entry.flags for entry in wording.activations(facts)),
        limits=wording.limits(facts),
        facts=facts,
        conversion=_conversion_rows(facts),
        results=_results(facts) if facts["run"] else None,
        comparison=_comparison(facts["comparison"]) if facts["comparison"] else None,
    )
    text = str(card).rstrip().encode("utf-8", "backslashreplace").decode() + "\n"  # of folders that aren't UTF-8
    return f"{text}\n{_mark(text)}\n"


def is_generated(card: str) -> bool:
    """Return whether a card was written by hf_glu and not changed since, so that it may be written anew."""
    text, _, mark = card.rstrip("\n").rpartition("\n\n")
    return mark == _mark(text + "\n")


def _mark(text: str) -> str:
    """Return the invisible comment at a card's end, with a checksum of the card."""
    return f"<!-- hf_glu {sha256(text.encode()).hexdigest()[:16]} -->"


def _head(facts: Facts) -> tuple[str | None, str | None]:
    architecture = wording.architecture(facts)
    return next((head for end, head in HEADS.items() if architecture.endswith(end)), (None, None))


def _metadata(facts: Facts, title: str) -> ModelCardData:
    """Return the card's metadata, which the Hub reads."""
    from huggingface_hub import ModelCardData

    auto_class, task = _head(facts)
    run, base, names = facts["run"], facts["base"], wording.activations(facts)
    tags = ["hf_glu", *(entry.name for entry in names), *sorted({flag for entry in names for flag in entry.flags})]
    tags += ["moe"] if wording.options_of(facts).experts else []
    tags += [SEQ2SEQ] if auto_class == "AutoModelForSeq2SeqLM" else []
    tags += ["sentence-transformers"] if facts["sentence_transformers"] else []
    known: JsonObject = {
        "base_model": base["name"] if base and wording.is_repository(base) else None,
        "library_name": "transformers",
        "pipeline_tag": "sentence-similarity" if facts["sentence_transformers"] else task,
        "tags": list(dict.fromkeys(tags)),
        **facts["carried"],
    }
    if known["base_model"] and run:  # the Hub has no word for a conversion: neither quantized, nor adapted, nor merged
        known["base_model_relation"] = "finetune"
    if run:
        datasets = dict.fromkeys(entry["repository"] for entry in run["datasets"].values())
        results = _eval_results(facts)
        known |= {
            "datasets": list(datasets) or None,
            "metrics": facts["results"]["main"] if facts["results"] else None,
            "model_name": title,
        }
        known |= {"eval_results": results}
    return ModelCardData(**known)


def _eval_results(facts: Facts) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    run, results = facts["run"], facts["results"]
    assert run is not None
    assert results is not None
    task = SEQ2SEQ if _head(facts)[0] == "AutoModelForSeq2SeqLM" else _head(facts)[1] or "other"
    made = []
    for key, value in results["metrics"].items():  # [[task/]split/]metric
        *places, metric = key.split("/")
        splits = [split for split in results["examples"] if split != "train"]
        split = places[-1] if places else splits[0]
        name = places[0] if len(places) > 1 else run["task"]
        dataset: JsonObject = {**run["datasets"].get(name, {})}
        made.append(
            EvalResult(
                task_type=task,
                dataset_type=dataset.get("repository", name),
                dataset_name=name,
                dataset_config=dataset.get("config"),
                dataset_revision=dataset.get("revision"),
                dataset_split=split,
                metric_type=metric,
                metric_name=key,
                metric_value=round(value, 4),
            )
        )
    return made


def _conversion_rows(facts: Facts) -> list[tuple[str, str]]:
    """Return the rows of the card's table on the conversion."""
    conversion = facts["conversion"]
    if not conversion or not conversion.get("changes", True):
        return []
    random = facts["run"]["options"].get("random") if facts["run"] else None
    difference, fit = conversion.get("max_abs_difference"), conversion.get("fit")
    measured = "not measured" if difference is None else f"{difference:.1e}"
    after = _parameters(conversion["parameters_after"], conversion.get("active_parameters_after"), " after")
    rows = [
        ("feed-forward networks" if not conversion["mixers"] else "mixers", f"{conversion['sites']:,} converted"),
        ("route", "random initialisation" if random else "; ".join(conversion["routes"])),
        ("promise", "none" if random else conversion["promise"]),
        ("to know", "" if random else "; ".join(conversion["notes"])),
        ("max abs difference of the outputs", "" if random else measured),
        (
            "relative error of a network's output, held-out tokens, mean",
            f"{fit['before']:.2%} -> {fit['after']:.2%} by the fit" if fit else "",
        ),
        ("parameters", f"{conversion['parameters_before']:,} before, {after}"),
    ]
    return [(name, cell(value)) for name, value in rows if value]


def _results(facts: Facts) -> JsonObject:
    """Return the values of the card's section on results."""
    run, results, dense = facts["run"], facts["results"], facts["dense"]
    assert run is not None
    assert results is not None
    options, training = run["options"], results["training"]
    counts = {split: count for split, count in results["examples"].items() if split != "train"}
    rows = [("dense, fine-tuned the same way", dense)] if dense else []
    rows.append(("this model", results))
    settings = {
        "epochs": options.get("epochs") if "max_steps" not in options else None,
        "steps": training.get("steps"),
        "batch size": options.get("batch_size"),
        "learning rate": options.get("lr"),
        "weight decay": options.get("weight_decay"),
        "precision": options.get("mixed_precision"),
        "seed": options.get("seed"),
    }
    peft = {"lora": ", LoRA, merged", "gates": ", gates and norms only"}.get(options.get("peft", ""), "")
    return {
        "examples": ", ".join(f"{count:,} ({split})" for split, count in counts.items()),
        "train": f"{results['examples']['train']:,}",
        "rows": [(name, cell(_metrics(row.get("before"))), cell(_metrics(row["metrics"]))) for name, row in rows],
        "settings": ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None) + peft,
        "seconds": f"{training['seconds']:,.0f}",
        "hardware": run["hardware"],
        "versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()),
        "reloaded": results.get("reloaded_equal"),
    }


def _comparison(comparison: ComparisonFacts) -> JsonObject:
    """Return the values of the card's section on several seeds."""
    rows = []
    for row in comparison["variants"]:
        name, spread, difference, p = row["name"], row.get("std"), row.get("difference"), row.get("p_value")
        rows.append(
            (
                cell(f"**{name}**" if name == comparison["mine"] else name),
                f"{row['mean']:.2%}",
                "-" if spread is None else f"{spread:.2%}",
                "-" if difference is None else f"{100 * difference:+.2f} points",
                "-" if p is None else f"{p:.2g}",
                _parameters(row["parameters"], row.get("active_parameters")),
            )
        )
    seeds = comparison["seeds"]
    return {**comparison, "count": len(seeds), "seeds": ", ".join(map(str, seeds)), "rows": rows}


def _parameters(count: int, active: int | None, when: str = "") -> str:
    return f"{count:,}{when}" + (f", of which a token uses {active:,}" if active and active != count else "")


def _metrics(values: dict[str, float] | None) -> str:
    return ", ".join(f"{name} {value:.2%}" for name, value in values.items()) if values else "-"
