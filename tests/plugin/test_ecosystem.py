"""No silent cell: under every tool a model computes the same as without, or the tool is refused in so many words."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import ecosystem
import ecosystem_cells
import ecosystem_processes
import ecosystem_swaps
import pytest
import torch
import versions
from ecosystem import answers, gradients, make
from ecosystem_cells import ELSEWHERE, KINDS, TOOLS
from pico import make_native
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_glu
from hf_glu.errors import ConversionError
from hf_glu.ffn.experts.losses import with_router_losses

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = tuple(tool.where.partition(".")[2] for tool in TOOLS if tool.where.startswith("processes."))
CELLS = [
    pytest.param(tool, kind, id=f"{tool.where}-{kind}", marks=[] if tool.fast else [pytest.mark.slow])
    for tool in TOOLS
    for kind in tool.measured
]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the tools


@cache
def in_processes() -> dict[str, dict[str, Any]]:
    """Return the outcomes of all tools of several processes, which start once."""
    return ecosystem_processes.outcomes(list(PROCESSES))


def outcome(tool: Any, kind: str, folder: Path) -> Any:
    """Return how far numbers are from those without the tool, or what was said."""
    module, _, name = tool.where.partition(".")
    if module == "processes":
        return in_processes()[name][kind]
    run = getattr(importlib.import_module(f"ecosystem_{module}"), name)
    try:
        return ecosystem_processes.distance(*run(partial(make, kind), folder))
    except AssertionError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def check(tool: Any, kind: str, found: Any) -> None:
    if kind in tool.refused:
        assert isinstance(found, str), f"silently {found} away"
        with pytest.raises(RuntimeError, match=tool.refused[kind]):
            raise RuntimeError(found)
    else:
        assert not isinstance(found, str), found
        assert found <= tool.close


@pytest.mark.parametrize(("tool", "kind"), CELLS)
def test_the_same_numbers_or_one_clear_error(tool, kind, tmp_path):
    for package in tool.needs:
        if find_spec(package) is None:
            pytest.skip(f"pip install {package}")
    check(tool, kind, outcome(tool, kind, tmp_path))


def test_a_silent_cell_is_found(tmp_path):
    hf_glu.unregister()  # so that nothing keeps the kernels away
    try:
        found = outcome(TOOLS[1], "learnable", tmp_path)
    finally:
        hf_glu.register()
    assert found > 0.01
    with pytest.raises(AssertionError):
        check(TOOLS[1], "learnable", found)
    with pytest.raises(AssertionError, match="silently"):
        check(replace(TOOLS[1], refused={"learnable": "a word"}), "learnable", found)


def test_every_kind_does_something():
    """Each model computes something else than the plain one, else no tool could be caught."""
    plain = answers(make_native("llama"))
    assert set(KINDS) == set(ecosystem.KINDS)
    for kind in KINDS:
        found = answers(model := make(kind))
        assert any((found[key] - plain[key]).abs().max() > 0.05 for key in plain)
        swapped = model.base_model.layers[0].mlp
        if kind != "experts":
            ffn = getattr(swapped, "experts", swapped)
            ffn.forward = MethodType(ecosystem_swaps.hard_coded, ffn)
            assert any((answers(model)[key] - found[key]).abs().max() > 0.01 for key in plain), kind


def test_what_is_computed_by_a_kernel_already_isnt_converted():
    model = make_native("llama")
    ffn = model.model.layers[1].mlp
    ffn.forward = MethodType(ecosystem_swaps.hard_coded, ffn)
    with pytest.raises(ConversionError, match=r"model\.layers\.1\.mlp is computed by ecosystem_swaps\.hard_coded"):
        hf_glu.convert(model, "reglu")
    del ffn.forward

    def careful(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    ffn.forward = MethodType(careful, ffn)  # somebody's own, which uses what the model has
    hf_glu.convert(model, "reglu")


class DividesItself(Trainer):
    """A trainer like TRL's GRPO: it makes its inputs of a list, and divides its loss by the accumulation itself."""

    loss_is_scaled_for_ga = True

    def _prepare_inputs(self, inputs):
        return {"input_ids": torch.stack([torch.tensor(row["input_ids"]) for row in inputs])}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).logits.square().mean() / self.current_gradient_accumulation_steps


def test_a_trainer_that_divides_its_loss_itself(tmp_path):
    versions.needs_trainers_parts()
    rows = [{"input_ids": row.tolist()} for row in ecosystem.ids(4, 6)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=2,
        max_grad_norm=0.0, learning_rate=0.0, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    found: dict[str, Any] = {}

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **more):
            found.update(gradients(model))

    trainer = DividesItself(
        make("experts").train(), arguments, data_collator=list, train_dataset=rows, callbacks=[Note()]
    )
    trainer.train()
    alone = make("experts").train()
    for part in ecosystem.ids(4, 6).chunk(2):
        with_router_losses(alone(input_ids=part).logits.square().mean() / 2, alone, 1 / 2).backward()
    torch.testing.assert_close(found, gradients(alone), rtol=1e-4, atol=1e-6)


def test_the_page_is_the_table():
    assert (ROOT / "docs" / "results" / "ecosystem.md").read_text() == ecosystem_cells.markdown()
    assert all((ROOT / where).is_file() for where in ELSEWHERE.values())
