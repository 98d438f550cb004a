"""Model cards: true for every kind of checkpoint, valid for the Hub, and all numbers in them from result files."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markdown_it import MarkdownIt
from pico import FAMILIES, LAYERS, VOCAB, make_native
from taskdata import make_rows, save_base
from typed import untyped

import hf_glu
from hf_glu import cli
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.merge import merge_checkpoints
from hf_glu.checkpoint.provenance import CARD_FILE, REPORT_FILE, base_of, naming
from hf_glu.errors import CheckpointError, DataError, HfGluError, OptionError
from hf_glu.publishing.card.card import HEADS, describe, is_generated, render_card, write_card
from hf_glu.publishing.card.facts import read_facts
from hf_glu.publishing.card.known import Facts
from hf_glu.training import job as job_module
from hf_glu.training.baseline import finetune_and_report
from hf_glu.training.options import JobOptions, TrainingOptions

COMMITTED = Path(__file__).resolve().parents[2] / "model_cards"
BASE = {"name": "org/base", "repository": True, "license": "mit", "language": ["en", "de"]}
BASE_CARD = "---\nlicense: mit\nlanguage:\n- en\n- de\ndatasets:\n- theirs\n---\n# A dense model, 99.99% right\n"
LINK = "[org/base](https://huggingface.co/org/base)"
OPTIONS = TrainingOptions(
    max_steps=2, batch_size=4, lr=1e-3, max_length=32, precision="no", evaluate_every=0, eval_batch_size=8
)


def mamba():
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=LAYERS, state_size=4, vocab_size=VOCAB)
    return transformers.MambaForCausalLM(config).eval()


def bloom():
    torch.manual_seed(0)
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=16, n_layer=LAYERS, n_head=2, vocab_size=VOCAB)
    ).eval()


FFNS, NOT_TRAINED = "feed-forward networks", "It was not trained afterwards."
# kind -> model, target, options; what its conversion is called; what is said without a report
KINDS = {
    "gated": (lambda: FAMILIES["bert"].make(), "geglu", {},
              f"{FFNS} were converted from `gelu` to `geglu`", f"{FFNS} compute `geglu`"),
    "approximate": (lambda: FAMILIES["bert"].make("BertForSequenceClassification"), "swiglu", {},
                    f"{FFNS} were converted from `gelu` to `swiglu`", f"{FFNS} compute `swiglu`"),
    "layers": (lambda: FAMILIES["gpt2"].make(), "geglu_new", {"layers": "1"},
               f"{FFNS} were converted from `gelu_new` to `geglu_new` (layer 1)",
               f"{FFNS} compute `geglu_new` (layer 1)"),
    "by layer": (lambda: FAMILIES["bert"].make(), {"0": "geglu", "1": "swiglu"}, {},
                 f"{FFNS} were converted from `gelu` to `geglu` (layer 0) and `swiglu` (layer 1)",
                 f"{FFNS} compute `geglu` (layer 0) and `swiglu` (layer 1)"),
    "one stack": (lambda: FAMILIES["t5"].make(), {"encoder": "reglu"}, {},
                  f"{FFNS} were converted from `relu` to `reglu` (layers 0, 1 of the encoder)",
                  f"{FFNS} compute `reglu` (layers 0, 1 of the encoder)"),
    "experts": (lambda: FAMILIES["bert"].make("BertModel"), "geglu", {"experts": "gelu*2,geglu*2"},
                f"{FFNS}, `gelu` before, became mixtures of experts: `gelu*2,geglu*2`, 2 of them for each token",
                f"{FFNS} are mixtures of experts: `gelu*2,geglu*2`, 2 of them for each token"),
    "banks": (lambda: make_native("mixtral"), None, {"experts": "silu*1,relu*1"},
              "experts, all `silu` before, got activations of their own: `silu*1,relu*1`",
              "experts have activations of their own: `silu*1,relu*1`"),
    "learnable": (lambda: FAMILIES["gpt2"].make(), "learnable_swiglu", {},
                  f"{FFNS} were converted from `gelu_new` to `learnable_swiglu`", f"{FFNS} compute `learnable_swiglu`"),
    "adaptive": (lambda: FAMILIES["gpt2"].make(), "moa_swiglu", {},
                 f"{FFNS} were converted from `gelu_new` to `moa_swiglu`", f"{FFNS} compute `moa_swiglu`"),
    "stateful": (lambda: FAMILIES["gpt2"].make(), "stateful_geglu_new", {},
                 f"{FFNS} were converted from `gelu_new` to `stateful_geglu_new`",
                 f"{FFNS} compute `stateful_geglu_new`"),
    "modulated": (lambda: FAMILIES["bert"].make(), "modulated_geglu", {},
                  f"{FFNS} were converted from `gelu` to `modulated_geglu`", f"{FFNS} compute `modulated_geglu`"),
    "native": (lambda: make_native("llama"), "reglu", {},
               f"{FFNS} were converted from `silu` to `reglu`", None),
    "native stateful": (lambda: make_native("llama"), "stateful_swiglu", {},
                        f"{FFNS} were converted from `silu` to `stateful_silu`", f"{FFNS} compute `stateful_silu`"),
    "mixers": (mamba, "stateful_swiglu", {},
               "mixers' gates were converted from `silu` to `stateful_swiglu`",
               "mixers' gates compute `stateful_swiglu`"),
    "no field": (bloom, "geglu", {},
                 f"{FFNS} were converted from `gelu_fast` to `geglu`", f"{FFNS} compute `geglu`"),
}  # fmt: skip

BODY = re.compile(
    r"""
    \n\#\ (?P<title>[^\n]+)\n\n
    (?P<summary>[^\n]+\.)\n\n
    \#\#\ How\ to\ load\ it\n\n
    ```python\n(?P<code>(?:[^`\n]*\n)+)```\n\n
    (?P<without>(?:[^\n#]+\n)+(?:\n```python\n(?P<remote>(?:[^`\n]*\n)+)```\n)?)\n
    (?P<sentences>With\ sentence-transformers,\ after\ `import\ hf_glu`:\ `SentenceTransformer\("[^"]+"\)`\.\n\n)?
    (?:\#\#\ Activations?\n\n\|\ name\ \|\ value\ \|\ source\ \|\n\|---\|---\|---\|\n
       (?P<activations>(?:\|\ `\w+`\ \|\ `[^`|]+`\ \|\ [^|\n]+\ \|\n)+)\n(?P<traits>`g`[^\n]+)\n\n)?
    (?:\#\#\ Conversion\n\n\|\ \|\ \|\n\|---\|---\|\n
       (?P<conversion>(?:\|\ [^|\n]+\ \|\ (?:[^|\n]|\\\|)+\ \|\n)+)\n
       (?:Saved\ with\ Transformers\ [\d.]+\.\n\n)?)?
    (?:\#\#\ Results\n\n(?P<intro>[^\n]+)\n\n\|\ model\ \|\ before\ fine-tuning\ \|\ after\ \|\n\|---\|---\|---\|\n
       (?P<results>(?:\|\ [^|\n]+\ \|\ [^|\n]+\ \|\ [^|\n]+\ \|\n)+)\n(?P<training>Training:\ (?:[^\n]+\n)+)\n)?
    (?:\#\#\#\ (?P<count>\d+)\ seeds\n\n(?P<about>(?:[^\n|]+\n)+)\n\|\ variant\ [^\n]+\n(?:\|---){6}\|\n
       (?P<variants>(?:\|(?:\ [^|\n]+\ \|){6}\n)+)\n)?
    \#\#\ Limits\n\n(?P<limits>(?:-\ [^\n]+\.\n)+)
    \n<!--\ hf_glu\ [0-9a-f]{16}\ -->\n
    """,
    re.VERBOSE,
)


def parts_of(card: str) -> dict[str, str]:
    """Return the parts of a card's body, all of which is expected to match."""
    body = ModelCard(card).text
    found = BODY.fullmatch("\n" + body.lstrip("\n"))
    assert found, body
    return {key: value for key, value in found.groupdict().items() if value is not None}


def table(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.*) \|$", text, flags=re.MULTILINE))


TAGS = {head[1] for head in HEADS.values()} - {None} | {"sentence-similarity"}
TYPES = {
    "base_model": str, "base_model_relation": str, "library_name": str, "pipeline_tag": str, "tags": list,
    "language": (str, list), "license": str, "license_name": str, "license_link": str, "datasets": list,
    "metrics": list, "model-index": list,
}  # fmt: skip
RELATIONS = {"adapter", "merge", "quantized", "finetune"}


def check_schema(card: str) -> None:
    """Assert what the Hub's validation asks of the metadata, which huggingface_hub's needs the network for."""
    data = ModelCard(card).data.to_dict()
    assert data.keys() <= TYPES.keys()
    for key, value in data.items():
        assert isinstance(value, TYPES[key]), key
        assert value, key
        if isinstance(value, list) and key != "model-index":
            assert all(isinstance(item, str) for item in value)
            assert len(set(value)) == len(value)
    assert data["library_name"] == "transformers"
    assert data["tags"][0] == "hf_glu"
    assert data.get("pipeline_tag", "fill-mask") in TAGS
    assert data.get("base_model_relation", "finetune") in RELATIONS
    for name in [data.get("base_model", "a/b"), *data.get("datasets", [])]:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    for model in data.get("model-index", []):
        assert model.keys() == {"name", "results"}
        for result in model["results"]:
            assert result["task"].keys() == {"type"}
            assert {"name", "type"} <= result["dataset"].keys() <= {"name", "type", "config", "split", "revision"}
            for metric in result["metrics"]:
                assert metric.keys() == {"type", "value", "name"}
                assert isinstance(metric["value"], float)


def check_round_trip(card: str) -> None:
    """Assert that huggingface_hub's own classes read the card as it was meant, and write it again."""
    loaded = ModelCard(card)
    again = ModelCardData(**{key: value for key, value in vars(loaded.data).items() if value is not None})
    assert again.to_dict() == loaded.data.to_dict()
    assert ModelCard(str(loaded)).data.to_dict() == loaded.data.to_dict()
    assert ModelCard(str(loaded)).text == loaded.text
    assert all(isinstance(result, EvalResult) for result in loaded.data.eval_results or [])


def saved(folder, kind):
    """Convert a pico model of a kind and save it; return the report."""
    make, target, more, *_ = KINDS[kind]
    model = make()
    report = hf_glu.convert(model, target, **more)
    model.save_pretrained(folder)
    return report


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_of_every_kind(kind, tmp_path):
    folder = tmp_path / "model"
    report = saved(folder, kind)
    alone = parts_of(describe(folder))  # without a report: what the config says, and no number of a measurement
    architecture, what, without = (
        json.loads((folder / "config.json").read_text())["architectures"][0],
        *KINDS[kind][3:],
    )
    assert alone["summary"] == (f"A `{architecture}`, whose {without}." if without else f"A `{architecture}`.")
    assert alone.keys() & {"conversion", "results", "variants"} == set()
    assert "nothing is known of its quality" in alone["limits"]
    write_json(folder / REPORT_FILE, {**report.to_dict(), "base": BASE})
    card = describe(folder, repo_id="me/mine")
    check_schema(card)
    check_round_trip(card)
    parts, data = parts_of(card), ModelCard(card).data
    assert parts["title"] == "mine"
    assert parts["summary"] == f"{LINK}, whose {what}. {NOT_TRAINED}"
    rows = table(parts["conversion"])
    assert rows["promise"] == report.plan.promise
    assert rows["max abs difference of the outputs"] == f"{report.max_abs_difference:.1e}"
    after, active = report.plan.parameters_after, report.to_dict()["active_parameters_after"]
    uses = f", of which a token uses {active:,}" if active != after else ""
    assert rows["parameters"] == f"{report.plan.parameters_before:,} before, {after:,} after{uses}"
    assert (data.base_model, data.license, data.language) == ("org/base", "mit", ["en", "de"])
    assert "base_model_relation" not in data.to_dict()  # the Hub has no word for a conversion
    assert ("computes what the base model computes" in parts["limits"]) == (report.plan.promise != "approximate")
    stock = kind == "native"
    assert parts["code"].startswith("import hf_glu\n") != stock
    assert ("hf_glu is not needed" in parts["without"]) == stock
    exec_loading(parts["code"], folder)


def exec_loading(code, folder):
    """Run a card's code on the folder in the repository's place."""
    space = {}
    exec(code.replace('"me/mine"', repr(str(folder))), space)
    assert next(value for name, value in space.items() if name == "model").num_parameters()


def test_what_activations_do_is_said(tmp_path):
    said = {}
    for kind in ("learnable", "adaptive", "stateful", "modulated", "native stateful"):
        saved(tmp_path / kind, kind)
        card = describe(tmp_path / kind)
        said[kind] = parts_of(card)["traits"], set(ModelCard(card).data.tags)
    assert "mixes `gelu_new`, `silu` with trainable" in said["learnable"][0]
    assert "depends on the token" in said["adaptive"][0]
    assert "remembers" in said["stateful"][0]
    assert "context vector" in said["modulated"][0]
    assert said["native stateful"][0].startswith("`g` is the gate's input.")
    assert said["stateful"][1] == {"hf_glu", "stateful_geglu_new", "stateful", "gated"}
    assert said["adaptive"][1] == {"hf_glu", "moa_swiglu", "gated", "learnable", "adaptive"}


def test_why_it_needs_the_plugin_is_the_truth(tmp_path):
    saved(tmp_path / "gated", "gated")
    assert "doesn't know\nthe activation `geglu`." in parts_of(describe(tmp_path / "gated"))["without"]
    saved(tmp_path / "bloom", "no field")  # nothing in its config would stop stock Transformers
    assert "Don't load the model without it" in parts_of(describe(tmp_path / "bloom"))["without"]


def test_code_in_the_folder_is_an_alternative(tmp_path):
    saved(tmp_path, "gated")
    assert "remote" not in parts_of(describe(tmp_path))
    with_code = parts_of(
        describe(tmp_path, repo_id="me/mine", auto_map={"AutoModelForMaskedLM": "modeling_hf_glu.Model"})
    )
    assert 'from_pretrained("me/mine", trust_remote_code=True)' in with_code["remote"]
    assert "import hf_glu" not in with_code["remote"]
    assert "remote" not in parts_of(
        describe(tmp_path, auto_map={"AutoModel": "modeling_hf_glu.Model"})
    )  # of another class
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {**config, "auto_map": {"AutoModelForMaskedLM": "modeling_hf_glu.Model"}})
    assert "remote" in parts_of(describe(tmp_path))
    write_json(tmp_path / "config.json", {**config, "auto_map": {"AutoModelForMaskedLM": "somebodys.Model"}})
    assert "remote" not in parts_of(describe(tmp_path))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = Path(save_base(tmp_path_factory.mktemp("base"), "bert"))
    (folder / CARD_FILE).write_text(BASE_CARD)
    for name in ("results.json", "run.json"):  # what was measured on the base isn't true of what is made of it
        write_json(folder / name, {"metrics": {"accuracy": 0.9999}})
    return folder


@pytest.mark.parametrize("how", ["whole", "stream", "command"])
def test_the_bases_card_is_not_the_conversions(base, how, tmp_path, capsys):
    target = tmp_path / "converted"
    if how == "command":
        assert cli.run(["convert", str(base), str(target), "--to", "geglu", "--base-model", "org/base"]) == 0
        card = (target / CARD_FILE).read_text()
        assert is_generated(card)
    else:
        run = hf_glu.convert_checkpoint if how == "whole" else hf_glu.convert_stream
        run(base, target, "geglu", base_model="org/base")
        assert not (target / CARD_FILE).exists()
        card = write_card(target).read_text()
    assert not {path.name for path in target.iterdir()} & {"results.json", "run.json"}
    assert "99.99%" not in card
    data, parts = ModelCard(card).data, parts_of(card)
    assert (data.license, data.language, data.base_model) == ("mit", ["en", "de"], "org/base")
    assert data.datasets is None
    assert ("not measured" in parts["conversion"]) == ("not measured" in parts["limits"]) == (how == "stream")
    assert describe(target) == card  # made again of the same files, its own card among them


def test_a_card_of_the_base_in_the_folder_gives_its_license_only(tmp_path):
    saved(tmp_path, "gated")
    (tmp_path / CARD_FILE).write_text(BASE_CARD)
    card = describe(tmp_path)
    assert ModelCard(card).data.license == "mit"
    assert "99.99%" not in card
    (tmp_path / CARD_FILE).write_text("---\nlicense: [unclosed\n---\n")
    assert ModelCard(describe(tmp_path)).data.license is None


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("org/base", None, ("org/base", True)),
        ("org/base@main", None, ("org/base", True)),
        ("FOLDER", None, ("folder", False)),
        ("FOLDER", "org/base", ("org/base", True)),
        ("FOLDER", "mine", ("mine", False)),
        ("FOLDER", "/some/where/else", ("else", False)),
    ],
)
def test_the_name_of_the_base_has_no_path_in_it(source, name, expected, tmp_path):
    (tmp_path / "folder").mkdir()
    found = naming(source.replace("FOLDER", str(tmp_path / "folder")), name)
    assert (found["name"], found["repository"]) == expected


def test_the_base_of_what_is_only_converted_is_its_own_base(base, tmp_path):
    hf_glu.convert_checkpoint(base, tmp_path / "converted", "geglu", base_model="org/base")
    found = base_of(tmp_path / "converted")
    assert (found["name"], found["repository"], found["license"]) == ("org/base", True, "mit")
    assert found["conversion"]["target"] == "geglu"
    assert base_of(base)["name"] == base.name
    assert base_of(tmp_path / "converted", "me/other")["name"] == "me/other"


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    Dataset.from_list(make_rows("movie_reviews", 24)).to_csv(folder / "reviews.csv")
    job = JobOptions(
        model=str(base), base_model="org/base", dataset=str(folder / "reviews.csv"), to="geglu",
        output=str(folder / "geglu-seed0"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "reloads_equal", lambda *_: True)
        finetune_and_report(job, OPTIONS, baseline=True, finish=write_card)
    return folder / "geglu-seed0"


def test_a_runs_card(trained):
    card = (trained / CARD_FILE).read_text()
    check_schema(card)
    check_round_trip(card)
    parts, data = parts_of(card), ModelCard(card).data
    what = f"{FFNS} were converted from `gelu` to `geglu` and which was then fine-tuned on reviews"
    assert parts["summary"] == f"{LINK}, whose {what}."
    assert parts["code"].startswith("import hf_glu\n")
    results, report = (json.loads((trained / name).read_text()) for name in ("results.json", REPORT_FILE))
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", round(results["score"], 4))
    assert (result.dataset_type, result.dataset_split) == ("reviews", "validation")
    assert data.datasets is None  # a file of one's own is no dataset on the Hub
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("org/base", "finetune")
    assert (data.license, data.language) == ("mit", ["en", "de"])
    dense, ours = parts["results"].strip().splitlines()
    assert dense == f"| dense, fine-tuned the same way | - | accuracy {report['dense']['metrics']['accuracy']:.2%} |"
    assert f"accuracy {results['before']['accuracy']:.2%} | accuracy {results['metrics']['accuracy']:.2%} |" in ours
    run = json.loads((trained / "run.json").read_text())
    for expected in ("seed 0", "steps 2", run["hardware"], f"torch {run['versions']['torch']}", "bitwise the same"):
        assert expected in parts["training"]
    assert "One run, one seed" in parts["limits"]
    assert str(trained.parent) not in card
    assert describe(trained) == card


def test_a_dense_run_has_a_card_too(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for name in ("run.json", "results.json"):
        data = json.loads((trained / name).read_text())
        write_json(tmp_path / "run" / name, {**data, "activation": None, "conversion": None})
    config = json.loads((trained / "config.json").read_text())
    del config["hf_glu"]
    write_json(tmp_path / "run" / "config.json", {**config, "hidden_act": "gelu"})
    parts = parts_of(describe(tmp_path / "run"))
    assert parts["summary"] == f"{LINK}, fine-tuned on reviews."
    assert "hf_glu is not needed" in parts["without"]
    assert "conversion" not in parts


COMPARED = {
    "task": "reviews", "model": "/somewhere/base", "metric": "accuracy", "seeds": [0, 1, 2], "baseline": "dense",
    "variants": [
        {"name": "dense", "scores": [], "mean": 0.8125, "std": 0.0125, "difference": None, "p_value": None,
         "parameters": 1234, "active_parameters": 1234, "seconds": 1.0},
        {"name": "geglu", "scores": [], "mean": 0.8375, "std": None, "difference": 0.025, "p_value": 0.043,
         "parameters": 2345, "active_parameters": 2345, "seconds": 1.0},
    ],
}  # fmt: skip


def test_a_comparison_above_the_run_has_mean_and_deviation(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "geglu-seed0")
    write_json(tmp_path / "compare.json", COMPARED)
    parts = parts_of(describe(tmp_path / "geglu-seed0"))
    assert parts["count"] == "3"
    assert "seeds 0, 1, 2" in parts["about"]
    assert parts["variants"].splitlines() == [
        "| dense | 81.25% | 1.25% | - | - | 1,234 |",
        "| **geglu** | 83.75% | - | +2.50 points | 0.043 | 2,345 |",
    ]
    assert "few seeds" in parts["limits"]
    assert "/somewhere" not in describe(tmp_path / "geglu-seed0")
    for change in ({"task": "other"}, {"seeds": [1, 2]}, {"seeds": [0]}, {"variants": COMPARED["variants"][:1]}):
        write_json(tmp_path / "compare.json", {**COMPARED, **change})
        assert "variants" not in parts_of(describe(tmp_path / "geglu-seed0"))


def test_weights_drawn_at_random_are_no_conversion(trained):
    facts = read_facts(trained)
    facts["run"]["options"]["random"] = True
    parts = parts_of(render_card(facts))
    assert "were replaced by randomly initialised ones with `geglu`" in parts["summary"]
    assert table(parts["conversion"])["promise"] == "none"
    assert "began at random" in parts["limits"]


def test_datasets_and_splits_of_the_hub(trained):
    facts = read_facts(trained)
    dataset = {"repository": "nyu-mll/glue", "config": "mnli", "revision": "abc"}
    facts["run"] |= {"task": "mnli", "datasets": {"mnli": dataset}}
    facts["results"]["metrics"] = {"validation_matched/accuracy": 0.5, "validation_mismatched/accuracy": 0.25}
    card = render_card(facts)
    check_schema(card)
    data = ModelCard(card).data
    assert data.datasets == ["nyu-mll/glue"]
    assert [(r.dataset_config, r.dataset_split, r.metric_value) for r in data.eval_results] == [
        ("mnli", "validation_matched", 0.5),
        ("mnli", "validation_mismatched", 0.25),
    ]


def leaves(data, path=()):
    """Yield the path of every number in plain data."""
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*path, key))
    elif isinstance(data, (int, float)) and not isinstance(data, bool):
        yield path


def changed(data, path):
    """Return plain data with another number at ``path``."""
    data = copy.deepcopy(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 2 * place[path[-1]] + 3
    return data


def test_every_number_comes_from_a_file(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "geglu-seed0")
    write_json(tmp_path / "compare.json", COMPARED)
    facts = read_facts(tmp_path / "geglu-seed0")
    assert not untyped(facts, Facts)
    card = render_card(facts)
    numbers = [path for path in leaves(facts) if path[0] != "config"]
    seen = {path for path in numbers if render_card(changed(facts, path)) != card}
    assert ("results", "metrics", "accuracy") in seen
    assert len(seen) > 25
    unseen = {path[-1] for path in numbers} - {path[-1] for path in seen}
    # the steps are shown, epochs where they weren't what was asked for, and tokens of language models
    assert unseen == {"epochs", "max_steps", "tokens"}
    # no number without a file: with all of them taken away, none is left
    bare = {**facts, **dict.fromkeys(("run", "results", "dense", "comparison", "conversion"))}
    body = parts_of(render_card(bare))
    assert not re.search(r"\d", body["summary"] + body["limits"] + body["without"])


@pytest.mark.parametrize("name", ["results.json", "run.json", REPORT_FILE])
def test_a_number_changed_in_the_file_changes_the_card(trained, name, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shown = {
        "results.json": ("metrics", "accuracy"),
        "run.json": ("options", "seed"),
        REPORT_FILE: ("dense", "metrics", "accuracy"),
    }
    before = describe(tmp_path / "run")
    write_json(tmp_path / "run" / name, changed(json.loads((trained / name).read_text()), shown[name]))
    assert describe(tmp_path / "run") != before


def test_who_wrote_a_card_is_known(tmp_path):
    saved(tmp_path, "gated")
    card = write_card(tmp_path).read_text()
    assert is_generated(card)
    assert not is_generated(card.replace("Limits", "Limitations"))
    assert not is_generated(BASE_CARD)
    assert not is_generated("")


def test_bad_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        describe(tmp_path)
    saved(tmp_path, "gated")
    (tmp_path / REPORT_FILE).write_text("{")
    with pytest.raises(DataError, match="line 1: broken JSON"):
        describe(tmp_path)
    write_json(tmp_path / REPORT_FILE, {"promise": "exact"})
    with pytest.raises(DataError, match="lacks 'parameters_before'"):
        describe(tmp_path)
    write_json(tmp_path / REPORT_FILE, {})
    write_json(tmp_path / "results.json", {"score": 1.0})
    with pytest.raises(DataError, match=r"results\.json lacks 'metrics'"):
        describe(tmp_path)
    (tmp_path / "results.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {**config, "hf_glu": {"version": 99}})
    with pytest.raises(OptionError, match="upgrade"):
        describe(tmp_path)


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_the_projects_cards_are_what_their_results_say(path):
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert card == render_card(json.loads(path.read_text(encoding="utf-8")))
    check_schema(card)
    check_round_trip(card)
    parts_of(card)
    assert path.stat().st_size < 10_000


def test_the_project_has_cards_and_none_without_results():
    names = {path.stem for path in COMMITTED.glob("*.json")}
    assert len(names) >= 3
    assert {path.stem for path in COMMITTED.glob("*.md")} == names | {"README"}
    assert all(f"`{name}`" in (COMMITTED / "README.md").read_text() for name in names)


HOSTILE = (
    "x\n\n# H\n\n- i\n\n<script>alert(1)</script>![i](http://e.example/x.png)[l](javascript:alert(1))[m][n]|`c`|"
    "``d``| http://e.example www.e.example me@e.example "
    "<http://e.example>\r\n---\n```\n<!-- \0\x1b[31m\u202e\u200b\ud800 \\"
)


def texts(data, path=()):
    """Yield the path of each text in plain data, and of each key."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(data, dict):
            yield (*path, key), True
        if isinstance(value, (dict, list)):
            yield from texts(value, (*path, key))
        elif isinstance(value, str):
            yield (*path, key), False


def spoiled(facts, path, is_key, text):
    found = copy.deepcopy(facts)
    inside = found
    for key in path[:-1]:
        inside = inside[key]
    if is_key:
        inside[path[-1] + text] = inside.pop(path[-1])
    else:
        inside[path[-1]] = text if inside[path[-1]] is None else inside[path[-1]] + text
    return found


def shape_of(card):
    """Return what a card's Markdown is made of, but for its words."""
    body = card.partition("\n---\n")[2].rpartition("\n\n<!--")[0]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inner = [token for each in tokens for token in each.children or ()]
    rows = Counter(token.type for token in tokens)
    return {
        "blocks": {
            kind: rows[kind] for kind in ("heading_open", "tr_open", "td_open", "fence", "hr", "list_item_open")
        },
        "markup": [token.type for token in (*tokens, *inner) if "html" in token.type or token.type == "image"],
        "links": {token.attrGet("href") for token in inner if token.type == "link_open"},
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_nothing_in_others_files_is_more_than_words(path):
    facts = json.loads(path.read_text(encoding="utf-8"))
    expected = shape_of(render_card(facts))
    assert not expected["markup"]
    shown = 0
    for place, is_key in list(texts(facts)):
        try:
            card = render_card(spoiled(facts, place, is_key, HOSTILE))
        except (HfGluError, AttributeError, KeyError, TypeError, ValueError):
            continue  # refused: `describe` makes one line of it
        found = shape_of(card)
        assert not found["markup"], place
        assert found["links"] <= expected["links"], place
        same = {kind: count for kind, count in found["blocks"].items() if count != expected["blocks"][kind]}
        assert not same or place[0] in ("config", "run", "conversion", "comparison"), (place, same)
        assert found["blocks"]["hr"] == 0
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e\u200b\ud800]", card)
        assert not re.search(r"://e\.|\bwww\.|<script|javascript:|!\[|me@e", card), place
        assert ModelCard(card).data.to_dict()
        shown += "alert(1)" in card
    assert shown > 5, "the words should be there"


def test_a_base_that_is_no_repository_is_no_link_and_its_license_must_be_one(tmp_path):
    report = saved(tmp_path, "gated").to_dict()
    base = {
        "name": "me/x](javascript:alert(1))",
        "repository": True,
        "license": "mit\n---\n# H",
        "language": ["en", 3],
        "license_link": "javascript:alert(1)",
        "license_name": "my-own",
    }
    write_json(tmp_path / REPORT_FILE, {**report, "base": base})
    card = describe(tmp_path)
    assert "](javascript" not in card
    assert not shape_of(card)["links"]
    data = ModelCard(card).data
    assert (data.base_model, data.license, data.language, data.license_name) == (None, None, None, "my-own")
    assert "license_link" not in data.to_dict()


@pytest.mark.parametrize("name", ["X; import os", "X\nimport os", "", 3, ["X"], None])
def test_the_code_to_copy_imports_a_class(name, tmp_path):
    saved(tmp_path, "gated")
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {**config, "architectures": [name]})
    assert "from transformers import AutoModel\n" in describe(tmp_path)


def test_result_files_of_another_kind_are_one_line(tmp_path):
    report = saved(tmp_path, "gated").to_dict()
    for entries in ({"sites": 3}, {"sites": [3]}, {"parameters_before": "many"}, {"base": [1]}):
        write_json(tmp_path / REPORT_FILE, {**report, **entries})
        with pytest.raises(DataError, match="no card can be made") as raised:
            describe(tmp_path)
        assert "\n" not in str(raised.value)


def _trained(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)


def _sparse(model):
    hf_glu.sparsify(model, torch.arange(600).view(30, 20) % model.config.vocab_size, keep=0.7)


@pytest.mark.parametrize("change", [_trained, _sparse])
def test_what_was_measured_is_not_claimed_of_other_weights(base, change, tmp_path):
    folder = tmp_path / "converted"
    hf_glu.convert_checkpoint(base, folder, "geglu", base_model="org/base")
    assert "It was not trained afterwards" in (text := describe(folder))
    assert "computes what the base model computes" in text
    model = transformers.BertModel.from_pretrained(folder)
    model.save_pretrained(folder)
    assert describe(folder) == text
    change(model)
    model.save_pretrained(folder)
    text = describe(folder)
    assert "Its weights or options have been changed since" in text
    for claim in ("not trained", "computes what the base", "0.0e+00", "was not measured"):
        assert claim not in text
    assert base_of(folder)["name"] == "converted"


def test_a_mixture_has_the_license_of_all_of_its_models(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for seed, (folder, license) in enumerate(zip(folders, ("mit", "mit", "cc-by-nc-4.0"), strict=True)):
        FAMILIES["bert"].make(seed=seed).save_pretrained(folder)
        (folder / "README.md").write_text(f"---\nlicense: {license}\nlanguage: en\n---\n")
    others = {"license": "other", "license_name": "mit-and-cc-by-nc-4.0", "language": "en"}
    for count, wanted in ((2, {"license": "mit", "language": "en"}), (3, others)):
        merged = tmp_path / f"merged{count}"
        merged.mkdir()
        merge_checkpoints(folders[:count], merged)
        data = ModelCard(describe(merged)).data.to_dict()
        assert {key: data[key] for key in data if key.startswith(("license", "language"))} == wanted
