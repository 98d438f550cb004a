"""The coverage of Transformers' text families: a few families in the fast tests, all of them in the slow one."""

import json
from pathlib import Path

import pytest
from covering import few

from hf_glu import cli
from hf_glu.bench.coverage import tiny
from hf_glu.bench.coverage.survey import REASONS, Coverage, CoverageRow, examine

ROOT = Path(__file__).resolve().parents[2]
EXACT = ("albert", "aria_text", "bamba", "bart", "big_bird", "bloom", "ctrl", "deberta-v2", "flaubert", "git", "jetmoe")
EXACT += ("lilt", "mixtral", "mpt", "openai-gpt", "reformer", "roformer", "t5gemma", "xlnet", "zamba2", "apertus")


@pytest.mark.parametrize("model_type", few(EXACT, 2))
def test_exact(model_type):
    row = examine(model_type, tiny.model_types()[model_type])
    assert row.reason is None
    assert row.sites > 0
    assert row.max_abs_difference <= 1e-6


@pytest.mark.parametrize("model_type", ["rwkv", "ibert", "dbrx", "gemma3n"])
def test_every_other_has_a_specific_reason(model_type):
    row = examine(model_type, tiny.model_types()[model_type])
    assert row.reason
    assert row.reason == (REASONS.get(model_type) or tiny.UNBUILDABLE[model_type])


def test_a_difference_is_seen(monkeypatch):
    from hf_glu.bench.coverage import survey

    monkeypatch.setattr(survey, "_exact_target", lambda model, sites: "swiglu")
    monkeypatch.setattr(survey, "TOLERANCE", 1e-12)
    row = examine("bert", tiny.model_types()["bert"])
    assert "differ" in row.reason


def test_summary():
    rows = (CoverageRow(model_type="a", model_class="A"), CoverageRow(model_type="b", model_class="B", reason="no FFN"))
    result = Coverage(rows=rows, seconds=1.0)
    assert result.summary.startswith("1 of 2 exact")
    assert "no FFN" in result.markdown()


@pytest.mark.slow
def test_command(capsys, tmp_path):
    assert (
        cli.run(["coverage", "--only", "gpt2", "--only", "rwkv", "--json", "--markdown", str(tmp_path / "t.md")]) == 0
    )
    data = json.loads(capsys.readouterr().out)
    assert data["summary"].startswith("1 of 2 exact")
    assert "gpt2" in (tmp_path / "t.md").read_text()
    assert cli.run(["coverage", "--only", "gpt3"]) == 2
    assert "gpt2" in capsys.readouterr().err


@pytest.mark.slow
def test_all_families(capsys):
    assert cli.run(["coverage", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    failing = {row["model_type"]: row["reason"] for row in rows if row["reason"]}
    assert len(rows) - len(failing) >= 225
    assert set(failing) <= set(REASONS) | set(tiny.UNBUILDABLE), failing
    table = (ROOT / "COVERAGE.md").read_text()
    assert all(f"| `{row['model_type']}` |" in table for row in rows)
