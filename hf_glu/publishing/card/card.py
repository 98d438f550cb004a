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
from hf_glu.publishing.card.known import Facts
from hf_glu.publishing.card.plain import fitting, plain
from hf_glu.publishing.card.rows import comparison_values, conversion_rows, healing_values, result_values
from hf_glu.publishing.training import material

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
        conversion=conversion_rows(facts),
        healing=healing_values(facts),
        results=result_values(facts) if facts["run"] else None,
        comparison=comparison_values(facts["comparison"]) if facts["comparison"] else None,
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
    bases = [each["name"] for each in facts.get("merged") or [base] if each and wording.is_repository(each)]
    known: JsonObject = {
        "base_model": (bases if len(bases) > 1 else bases[0]) if bases else None,
        "library_name": "transformers",
        "pipeline_tag": "sentence-similarity" if facts["sentence_transformers"] else task,
        "tags": list(dict.fromkeys(tags)),
        **facts["carried"],
    }
    if known["base_model"] and run:  # the Hub has no word for a conversion: neither quantized, nor adapted, nor merged
        known["base_model_relation"] = "finetune"
    elif known["base_model"] and facts.get("merged"):
        known["base_model_relation"] = "merge"
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
        called = material(name, run["options"])
        dataset: JsonObject = {**run["datasets"].get(name, {})}
        made.append(
            EvalResult(
                task_type=task,
                dataset_type=dataset.get("repository", called),
                dataset_name=called,
                dataset_config=dataset.get("config"),
                dataset_revision=dataset.get("revision"),
                dataset_split=split,
                metric_type=metric,
                metric_name=key,
                metric_value=round(value, 4),
            )
        )
    return made
