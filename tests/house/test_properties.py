"""Random cases against independent answers: a bounded run of `recipes/fuzz`, the same cases each time.

``make fuzz`` runs the same pieces at length.
"""

from __future__ import annotations

import pytest
import torch
from fuzz import __main__ as everything
from fuzz import activations, conversions, decoding, formulas, models, networks, oddities, running
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import hf_glu
from hf_glu.activation.stock import elementwise_names
from hf_glu.errors import ConversionError

pytestmark = pytest.mark.filterwarnings("ignore")  # such as torch's about its own forward mode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("piece", "count"),
    [(activations, 250), (oddities, 40), (networks, 60), (decoding, 60)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_random_cases(piece, count):
    total = running.run(piece.__name__.rpartition(".")[2], piece.draw, piece.check, count)
    assert total.comparisons > count
    assert not total.bad


@pytest.mark.slow
def test_random_conversions_keep_their_promises_and_load():
    shelf = conversions.Shelf()
    total = running.run(
        "conversions", conversions.draw, lambda case: conversions.check(case, shelf), 70, finish=shelf.finish
    )
    assert 0 < total.refused < 50
    assert not total.bad


@pytest.mark.slow
# hypothesis makes the choices, and where a case is bad, the simplest one that is
@settings(max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_the_simplest_activations_are_their_formulas(random):
    case = activations.draw(random)
    note(repr(case))
    assert not bad(activations, case)


def test_the_formulas_are_of_all_names():
    assert set(formulas.ELEMENTWISE) >= set(elementwise_names())
    registered = {entry.name: entry.gate for entry in hf_glu.activations().entries if "gated" in entry.flags}
    assert registered == {**formulas.GATES, **dict.fromkeys(formulas.FORMULAS)}
    assert set(formulas.KINKS) - set(formulas.FORMULAS) <= set(formulas.ELEMENTWISE)
    if lacking := set(formulas.ELEMENTWISE) - set(elementwise_names()):
        pytest.skip(f"this Transformers has no {', '.join(sorted(lacking))}")


SEED = {"seed": 3, "dtype": torch.float32}
ACTIVATION = activations.Case(
    name=formulas.Name("swiglu"),
    options={},
    width=8,
    lead=(2, 5),
    layout="contiguous",
    origin="leaf",
    companion="",
    tool="first",
    training=True,
    autocast=False,
    **SEED,
)
NETWORK = networks.Case(
    family="gpt2",
    name=formulas.Name("swiglu"),
    options={},
    switch="nothing",
    between="nothing",
    lead=(2, 5),
    tool="first",
    training=True,
    frozen=False,
    **SEED,
)
CONVERSION = conversions.Case(
    source=models.Source("pico", "bert"),
    target=formulas.Name("own"),
    options={},
    calibrated=False,
    frozen=False,
    tied=False,
    **SEED,
)
DECODING = decoding.Case(
    source=models.Source("pico", "gpt2"),
    name=formulas.Name("own", ("stateful_",)),
    options={},
    way="rows",
    batch=2,
    length=6,
    **SEED,
)


def bad(piece, case):
    return running.attempt(piece.check, case).bad


def test_another_function_is_found(monkeypatch):
    assert not bad(activations, ACTIVATION)
    monkeypatch.setitem(formulas.ELEMENTWISE, "silu", formulas.ELEMENTWISE["gelu"])
    assert any("value" in line for line in bad(activations, ACTIVATION))


class Doubled(torch.autograd.Function):
    """The identity, with a gradient that is twice too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return 2 * d


def test_a_wrong_gradient_and_an_overwritten_input_are_found(monkeypatch):
    build = activations.build

    def wrong(case):
        act = build(case)
        act.register_forward_hook(lambda module, inputs, y: Doubled.apply(y))
        return act

    monkeypatch.setattr(activations, "build", wrong)
    assert any("gradient of the input" in line for line in bad(activations, ACTIVATION))

    def overwrites(case):
        act = build(case)
        act.register_forward_hook(lambda module, inputs, y: (inputs[0].data.add_(1), y)[1])
        return act

    monkeypatch.setattr(activations, "build", overwrites)
    assert any("the input afterwards" in line for line in bad(activations, ACTIVATION))


def test_wrong_ffns_are_found(monkeypatch):
    assert not bad(networks, NETWORK)
    monkeypatch.setitem(networks.BETWEEN, "nothing", networks.BETWEEN["after the out-projection"])
    wrong = networks.Between(networks.BETWEEN["nothing"].put)  # doubles what comes out, and doesn't say so
    monkeypatch.setitem(networks.BETWEEN, "nothing", wrong)
    assert any("value" in line for line in bad(networks, NETWORK))


def test_broken_promises_and_half_refusals_are_found(monkeypatch):
    assert not bad(conversions, CONVERSION)
    convert = hf_glu.convert

    def off(model, *args, **more):
        report = convert(model, *args, **more)
        model.get_input_embeddings().weight.data.mul_(1.1)
        return report

    monkeypatch.setattr(hf_glu, "convert", off)
    assert any("promised exact" in line for line in bad(conversions, CONVERSION))

    def refused(model, *args, **more):
        convert(model, *args, **more)
        raise ConversionError("too late")

    monkeypatch.setattr(hf_glu, "convert", refused)
    assert any("refused (too late), but changed" in line for line in bad(conversions, CONVERSION))


def test_models_that_load_or_revert_otherwise_are_found(monkeypatch):
    kind = type(models.make(CONVERSION.source))
    load, revert = kind.from_pretrained, hf_glu.revert

    def other(folder, **more):
        found = load(folder, **more)
        if isinstance(found, tuple):  # the converted one; the stock model, which is asked, too, loads as it should
            found[0].get_input_embeddings().weight.data[:, 0] += 1e-3
        return found

    monkeypatch.setattr(kind, "from_pretrained", other)
    assert any("loaded, tensors differ" in line for line in bad(conversions, CONVERSION))
    monkeypatch.undo()

    def half(model):
        revert(model)
        model.get_input_embeddings().weight.data.mul_(1.01)

    monkeypatch.setattr(hf_glu, "revert", half)
    assert any("revert: outputs are off" in line for line in bad(conversions, CONVERSION))


@pytest.mark.slow
def test_a_shelf_finds_what_loads_otherwise(tmp_path):
    shelf, source = conversions.Shelf(), models.Source("pico", "gpt2")
    for changes in (False, True):
        model = models.make(source)
        inputs, folder = models.inputs_of(model), tmp_path / str(changes)
        model.save_pretrained(folder)
        right = {key: value + changes for key, value in models.outputs(model, inputs).items()}
        shelf.put(folder, type(model).__name__, inputs, right, f"changed: {changes}")
    assert [line.rpartition(": ")[2] for line in shelf.finish().bad] == ["True"]


def test_answers_that_differ_count_unless_the_stock_model_gives_them_too(monkeypatch):
    assert not bad(decoding, DECODING)

    def differs(model, tokens, random):
        reads = any(name.endswith(("alpha", "threshold")) for name in model.state_dict())
        return torch.tensor(float(reads)), torch.tensor(0.0)

    monkeypatch.setitem(decoding.WAYS, "rows", differs)
    assert bad(decoding, DECODING)
    monkeypatch.setitem(decoding.WAYS, "rows", lambda model, tokens, random: (torch.ones(1), torch.zeros(1)))
    found = decoding.check(DECODING)
    assert not found.bad
    assert found.undecided == 1


def test_a_run_says_what_was_bad_and_exits_with_1(capsys, monkeypatch):
    def check(case):
        found = running.Tally()
        found.same("the answer", torch.tensor(float(case == 3)), torch.tensor(0.0))
        if case == 4:
            raise ValueError("unforeseen")
        return found

    numbers = iter(range(6))
    monkeypatch.setattr("sys.argv", ["piece", "--count", "6", "--seed", "10"])
    with pytest.raises(SystemExit) as stopped:
        running.main("piece", lambda random: next(numbers), check, 100)
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "BAD piece --seed 13 --count 1" in said
    assert "the answer: off by 1 of 1" in said
    assert "ValueError: unforeseen" in said
    assert "piece: 6 cases, 6 comparisons, 0 undecided, 0 refused, 2 bad" in said


def test_all_pieces_run_and_one_bad_one_is_told(monkeypatch, capsys):
    asked = []

    class Done:
        returncode = 0

    def run(command, check):
        asked.append(command[-5:])
        done = Done()
        done.returncode = int("fuzz.networks" in command)
        return done

    monkeypatch.setattr(everything.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["fuzz", "--scale", "0.01", "--seed", "7"])
    assert everything.main() == 1
    assert "bad: networks" in capsys.readouterr().out
    assert ["fuzz.activations", "--seed", "7", "--count", "60"] in asked
    monkeypatch.setattr("sys.argv", ["fuzz", "nothing"])
    with pytest.raises(SystemExit):
        everything.main()
