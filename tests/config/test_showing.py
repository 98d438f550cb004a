"""What a prompt and a notebook show; and reports hold numbers, not the model that they are of."""

import gc
import pickle
import weakref
from html.parser import HTMLParser

import pytest
from pico import FAMILIES

import hf_glu
from hf_glu.config.showing import FIRST, LAST, MOST_ROWS, ShownTable
from hf_glu.errors import ConversionError, NoSiteError, OptionError, UnknownNameError, nearest


class Cells(HTMLParser):
    """The text of a page's cells, and whatever tags it has."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.cells = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def numbered(count, **more):
    return ShownTable(title="Rows", columns=("name", "#n"), rows=[(f"r{i}", str(10**i)) for i in range(count)], **more)


def test_a_table_as_text_is_aligned():
    assert numbered(2, notes=("in all 2",)).text() == "Rows\nname   n\nr0     1\nr1    10\nin all 2"


def test_a_long_table_shows_its_ends_unless_it_is_to_be_whole():
    assert len(numbered(MOST_ROWS).shown) == MOST_ROWS
    shown = numbered(MOST_ROWS + 1).shown
    assert len(shown) == FIRST + 1 + LAST
    assert shown[FIRST][0] == f"... {MOST_ROWS + 1 - FIRST - LAST} more"
    assert shown[-1][0] == f"r{MOST_ROWS}"
    assert len(numbered(MOST_ROWS + 1, whole=True).shown) == MOST_ROWS + 1


def test_html_is_escaped_and_complete():
    nasty = "<script>alert('&')</script>"
    html = ShownTable(title=nasty, columns=(nasty, "#b"), rows=[(nasty, '"1"')], notes=(nasty,)).html()
    page = Cells(html)
    assert "script" not in page.tags
    assert page.cells[:3] == [nasty, "b", nasty]
    assert html.count("text-align: right") == 2


def bert():
    return FAMILIES["bert"].make("BertForSequenceClassification")


def test_plans_sites_reports_and_listings_are_tables():
    model = bert()
    name = "bert.encoder.layer.1"
    shown = [hf_glu.find_sites(model), hf_glu.plan(model, "geglu"), hf_glu.convert(model, "geglu")]
    for thing in shown:
        assert name in repr(thing)
        assert name in Cells(thing._repr_html_()).cells
        assert len(repr(thing).splitlines()) < 8
    plan, report = shown[1:]
    assert "up = 1" in repr(plan)
    assert "up = 1" in repr(plan.steps[1])
    assert "max |difference|" in repr(report)
    assert repr(report.sites[1]).splitlines()[-1].startswith(name)
    assert repr(hf_glu.find_sites(model)[1]) == f"Site({name!r}, layout='bert', kind='dense')"
    assert "already converted" in repr(hf_glu.convert(model, "geglu"))
    listing = hf_glu.activations()
    assert "silu(g) * u" in repr(listing)
    assert "swiglu" in Cells(listing._repr_html_()).cells


@pytest.mark.parametrize("more", [{}, {"experts": "gelu*2,geglu*2"}], ids=["plain", "experts"])
def test_a_kept_report_holds_numbers_only(more):
    model = bert()
    report = hf_glu.convert(model, "geglu", **more)
    kept = [weakref.ref(model), *(weakref.ref(module) for module in model.bert.encoder.layer.modules())]
    data, size = report.to_dict(), sum(p.numel() * p.element_size() for p in model.parameters())
    del model
    gc.collect()
    assert not [ref for ref in kept if ref() is not None]
    pickled = pickle.dumps(report)
    assert len(pickled) < min(20_000, size)
    assert pickle.loads(pickled).to_dict() == data
    with pytest.raises(NoSiteError, match="find_sites"):
        report.sites[0].step.site.in_proj  # noqa: B018


def test_the_check_of_what_is_kept_can_fail():
    model = bert()
    kept, sites = weakref.ref(model.bert.encoder.layer[0]), hf_glu.find_sites(model)
    del model
    gc.collect()
    assert kept() is not None
    assert sites


@pytest.mark.parametrize(("name", "hint"), [("SwiGLU", "did you mean 'swiglu'?"), ("GeGLU", "did you mean 'geglu'?")])
def test_capitals_are_understood(name, hint):
    with pytest.raises(UnknownNameError) as error:
        hf_glu.convert(bert(), name)
    assert str(error.value).endswith(hint)


def test_the_nearest_name_is_given_as_it_is_written():
    assert nearest("bertmodel", ["BertModel", "BertLayer"]) == "did you mean 'BertModel'?"
    assert nearest("top-k", ["top_k", "drop"]) == "did you mean 'top_k'?"
    assert nearest("nothing", ["A", "b"]) == "valid: A, b"


def test_what_was_recorded_is_a_table():
    model = bert()
    hf_glu.convert(model, "stateful_geglu", experts=None)
    with hf_glu.record_gates(model) as gates:
        assert len(repr(gates).splitlines()) == 2  # nothing yet
        model(**model.dummy_inputs)
    assert repr(gates).splitlines()[0] == "2 gates"
    assert repr(gates).splitlines()[-1].split()[:3] == ["encoder.layers.1", "bert.encoder.layer.1", "stateful_geglu"]
    assert "openness" in Cells(gates._repr_html_()).cells
    with hf_glu.record_gates(model) as gates:
        for count in (1, 2):
            model(**{key: value[:1].repeat(count, 1) for key, value in model.dummy_inputs.items()})
    assert "can't be appended" in repr(gates)
    model = bert()
    hf_glu.convert(model, "geglu", experts="gelu*2,geglu*2")
    with hf_glu.expert_statistics(model) as statistics:
        model(**model.dummy_inputs)
    row = repr(statistics).splitlines()[-1].split()
    assert row[:3] == ["bert.encoder.layer.1.intermediate.dense", "all", str(model.dummy_inputs["input_ids"].numel())]
    assert len(Cells(statistics._repr_html_()).cells) == 18


def test_a_name_that_is_spelled_wrong_behind_a_prefix_is_understood():
    for name, meant in (("learnabel_swiglu", "learnable_swiglu"), ("Swi_Glu", "swiglu"), ("mish_gul", "mish_glu")):
        with pytest.raises(UnknownNameError, match=f"did you mean '{meant}'"):
            hf_glu.convert(bert(), name)


def test_sites_are_of_a_model():
    with pytest.raises(OptionError, match=r"got the str 'folder'.*hf-glu sites"):
        hf_glu.find_sites("folder")


@pytest.mark.parametrize("verb", [hf_glu.convert, hf_glu.plan])
def test_a_folder_is_not_a_model(verb, tmp_path):
    for source in ("folder", tmp_path):
        with pytest.raises(ConversionError, match="convert_checkpoint"):
            verb(source, "geglu")
