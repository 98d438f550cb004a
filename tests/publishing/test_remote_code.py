"""The code beside a checkpoint: it loads where hf_glu isn't installed, and the plugin takes its place."""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from comparing import assert_same, fresh_process, outputs
from contexts import make, target_of
from covering import few
from pico import FAMILIES, make_native
from transformers.activations import ACT2FN

import hf_glu
from hf_glu.activation import register_activation
from hf_glu.activation.module import GatedActivation, OwnedModule
from hf_glu.config.registry import Activation, registry
from hf_glu.errors import CheckpointError
from hf_glu.instruments.probe import probe_inputs
from hf_glu.publishing.hub.flat import flat_code, write_code

KINDS = {
    "plain": "{base}", "stateful": "stateful_{base}", "modulated": "modulated_{base}",
    "learnable": "learnable_{base}", "moa": "moa_{base}", "all": "modulated_stateful_moa_{base}", "experts": "{base}",
    "experts+all": "modulated_stateful_learnable_{base}", "one layer": "stateful_{base}",
    "canon": "canon_{base}", "smear": "smear_{base}", "canon_smear": "canon_smear_{base}",
    "experts+canon_smear": "canon_smear_{base}", "experts+kappa": "kappa_{base}", "experts, grown": "{base}",
    "experts+kappa+all": "modulated_stateful_kappa_learnable_{base}",
}  # fmt: skip
EXPERTS = {
    "bert": "gelu*2,geglu*2", "gpt2": "gelu_new,geglu_new", "t5": "relu,reglu", "llama": "swiglu*4",
    "distilbert": "gelu*2,geglu*2", "opt": "relu*2,reglu*2", "bart": "gelu*2,geglu*2",
    "mixtral": "silu,relu",
}  # fmt: skip
NAMED = ("experts", "experts, grown")
NAMES = (*EXPERTS, "t5_v1_1", "phi3", "modernbert", "Mamba")
NATIVE = ("llama", "t5_v1_1", "phi3", "modernbert", "mixtral", "Mamba")  # stock does the plain ones
GRID = [
    (name, kind)
    for name in NAMES
    for kind in KINDS
    if not (kind == "plain" and name in NATIVE) and not ("experts" in kind and name not in EXPERTS)
    and not (name == "mixtral" and kind not in ("learnable", *NAMED, "experts+kappa"))
]  # fmt: skip
CODE = "modeling_hf_glu.py"
TEXTS = ("input_ids", "attention_mask", "decoder_input_ids")

# a process without hf_glu: loads folders by their own code, and writes what they compute beside them
_WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_glu":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import transformers
from transformers.activations import ACT2FN
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
stock = type(ACT2FN), tuple(ACT2FN), dict(vars(transformers.PreTrainedModel)), dict(vars(transformers.PreTrainedConfig))
for folder, auto, again in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    asked = torch.load(folder + "/asked.pt")
    model, info = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        given = {k: v for k, v in model(**asked["inputs"]).items() if torch.is_tensor(v) and v.is_floating_point()}
    found = {"info": {key: sorted(map(str, value)) for key, value in info.items()}, "outputs": given}
    if asked["generate"]:
        found["generated"] = model.generate(**asked["inputs"], **asked["generate"])
    torch.save(found, folder + "/found.pt")
    if again:
        model.save_pretrained(again)
assert "hf_glu" not in sys.modules
now = type(ACT2FN), tuple(ACT2FN), dict(vars(transformers.PreTrainedModel)), dict(vars(transformers.PreTrainedConfig))
assert now == stock, "Transformers was changed"
"""


def converted(name: str, kind: str, **more: Any) -> Any:
    """Return a converted model of which each part that is ours has something to say."""
    model = make(name)
    if kind.startswith("experts") and (name, kind) != ("mixtral", "experts+kappa"):
        more["experts"] = EXPERTS[name] if kind in NAMED else 3
    if kind == "one layer":
        more["layers"] = [1]
    target = None if name == "mixtral" and kind in NAMED else KINDS[kind].format(base=target_of(name))
    hf_glu.convert(model, target, check=False, **more)
    if kind.endswith("grown"):
        hf_glu.grow_experts(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, OwnedModule):
                for parameter in module.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
    return model.eval()


def asked(model: Any) -> dict[str, Any]:
    """Return what a model is to be asked in both environments."""
    inputs = {key: value for key, value in probe_inputs(model).items() if key in TEXTS}
    generates = model.can_generate() and not type(model).__name__.endswith("MaskedLM")
    return {"inputs": inputs, "generate": {"max_new_tokens": 4, "do_sample": False} if generates else None}


def publish(model: Any, folder: Path) -> Path:
    """Save a model with its code and what it is to be asked."""
    model.save_pretrained(folder)
    assert write_code(folder)
    torch.save(asked(model), folder / "asked.pt")
    return folder


def auto_of(folder: Path, model: Any) -> str:
    """Return the Auto class that serves a model's own class."""
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    return next(auto for auto, name in auto_map.items() if name.endswith(f".{type(model).__name__}"))


def load_without(jobs: list[tuple[Path, str, str]], tmp_path: Path) -> dict[Path, Any]:
    """Load folders (with an Auto class, and where to save them again) in one process where hf_glu can't be imported."""
    done = fresh_process(
        _WITHOUT, *(str(part) for job in jobs for part in job), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"),
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {folder: torch.load(folder / "found.pt") for folder, *_ in jobs}


def assert_found(found: dict[str, Any], model: Any) -> None:
    """Assert that a process found all weights, and computed and generated what ``model`` does."""
    assert not any(found["info"].values()), found["info"]
    question = asked(model)
    assert_same(found["outputs"], outputs(model, **question["inputs"]), "bitwise")
    if question["generate"]:
        assert torch.equal(found["generated"], model.generate(**question["inputs"], **question["generate"]))


def edit(folder: Path, file: str, old: str, new: str) -> None:
    """Sabotage a file of the code."""
    code = (folder / file).read_text()
    assert code.count(old) == 1, (file, old)
    (folder / file).write_text(code.replace(old, new))


@pytest.mark.slow
def test_it_computes_the_same_and_a_broken_one_would_be_seen(tmp_path):
    models = {kind: converted("bert", kind) for kind in ("all", "experts")}
    folders = {kind: publish(model, tmp_path / kind) for kind, model in models.items()}
    garbage = shutil.copytree(folders["all"], tmp_path / "garbage")  # a buffer that a load leaves undefined
    edit(
        garbage, CODE, "        self.formula = entry.formula\n",
        '        self.formula = entry.formula\n        self.register_buffer("one", torch.ones(()), persistent=False)\n',
    )  # fmt: skip
    edit(garbage, CODE, "return gated(x, self.phi, contiguous=contiguous)", "return gated(x, self.phi) * self.one")
    overwritten = shutil.copytree(folders["all"], tmp_path / "overwritten")  # a start value written over a loaded one
    edit(
        overwritten, CODE, "init.constant_(self.alpha, self.options.alpha)",
        "self.alpha.data.fill_(self.options.alpha)",
    )  # fmt: skip
    jobs = [(folder, "AutoModelForMaskedLM", "") for folder in (*folders.values(), garbage, overwritten)]
    found = load_without(jobs, tmp_path)
    for kind, model in models.items():
        assert_found(found[folders[kind]], model)
    for broken in (garbage, overwritten):
        assert not any(found[broken]["info"].values()), "it would be seen without a comparison"
        with pytest.raises(AssertionError, match=r"not close|not equal"):
            assert_found(found[broken], models["all"])


@pytest.mark.slow
def test_saved_again_without_the_plugin_it_keeps_its_code(tmp_path):
    model, folder, again = converted("gpt2", "all"), tmp_path / "first", tmp_path / "again"
    publish(model, folder)
    load_without([(folder, "AutoModelForCausalLM", str(again))], tmp_path)
    assert json.loads((again / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    assert {path.name: path.read_text() for path in again.glob("*.py")} == {
        path.name: path.read_text() for path in folder.glob("*.py")
    }
    shutil.copy(folder / "asked.pt", again)
    assert_found(load_without([(again, "AutoModelForCausalLM", "")], tmp_path)[again], model)
    plugin = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    assert type(plugin) is transformers.GPT2LMHeadModel
    assert_same(outputs(plugin), outputs(model), "bitwise")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    hf_glu.register()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("grid")
    models = {cell: converted(*cell) for cell in GRID}
    folders = {(name, kind): publish(model, root / kind / name) for (name, kind), model in models.items()}
    jobs = [(folder, auto_of(folder, models[cell]), "") for cell, folder in folders.items()]
    found = load_without(jobs, root)
    return {cell: (found[folder], models[cell]) for cell, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), GRID)
def test_every_family_and_kind(name, kind, grid):
    assert_found(*grid[name, kind])


@pytest.mark.slow
def test_every_auto_class(tmp_path):
    jobs, models = [], {}
    for family in ("bert", "gpt2", "t5", "roberta", "electra", "gpt_neox"):
        for head in FAMILIES[family].heads:
            model = FAMILIES[family].make(head)
            hf_glu.convert(model, f"stateful_{FAMILIES[family].exact}", check=False)
            model.save_pretrained(folder := tmp_path / head)
            write_code(folder)
            torch.save({**asked(model), "generate": None}, folder / "asked.pt")
            served = json.loads((folder / "config.json").read_text())["auto_map"].values()
            if f"modeling_hf_glu.{head}" in served:
                jobs.append((folder, auto_of(folder, model), ""))
                models[folder] = model
    assert len(jobs) > 30, "what Transformers' Auto classes don't know, such as GPT2DoubleHeadsModel"
    for folder, found in load_without(jobs, tmp_path).items():
        assert not any(found["info"].values()), (folder, found["info"])
        assert_same(found["outputs"], outputs(models[folder], **asked(models[folder])["inputs"]), "bitwise")


_ALONE = """
import sys
sys.modules["hf_glu"] = None
import torch
import transformers
transformers.logging.set_verbosity_error()
bert, dense = sys.argv[1:]
auto = transformers.AutoModelForMaskedLM
try:
    auto.from_pretrained(bert)
except KeyError as error:
    assert error.args == ("stateful_geglu",), error
else:
    raise SystemExit("it was loaded without its code")
config = transformers.AutoConfig.from_pretrained(bert)
before = config.to_dict()
made = auto.from_config(config, trust_remote_code=True)
assert config.to_dict() == made.config.to_dict() == before
found = {name: float(tensor.std()) for name, tensor in made.named_parameters() if tensor.numel() > 1}
wide = made.bert.encoder.layer[0].intermediate.dense
assert wide.weight.shape[0] == 80 and 0.01 < wide.weight.std() < 0.03 and not wide.bias.any()
assert made.bert.encoder.layer[0].intermediate.intermediate_act_fn.phi.shift.decay.std() > 0.1
try:
    auto.from_pretrained(dense, config=config, trust_remote_code=True, ignore_mismatched_sizes=True)
except OSError as error:
    assert "hf-glu convert" in str(error), error
else:
    raise SystemExit("its FFNs are random")
mixed = transformers.AutoConfig.from_pretrained(bert, hidden_act="stateful_moa_geglu")
more, info = auto.from_pretrained(bert, config=mixed, trust_remote_code=True, output_loading_info=True)
new = {name: tensor for name, tensor in more.state_dict().items() if name in info["missing_keys"]}
assert {name.rpartition(".")[2] for name in new} == {"mix", "annealed", "choice"} and len(new) == 6, info
for name, tensor in new.items():
    assert tensor.tolist() == [1, 0, 0, 0] if name.endswith(".mix") else not tensor.any(), (name, tensor)
config.hf_glu = {"version": 1, "laters": [0]}
try:
    auto.from_config(config, trust_remote_code=True)
except KeyError as error:
    assert "did you mean 'layers'" in str(error), error
else:
    raise SystemExit("an unknown option was taken")
assert config.hidden_act == "stateful_geglu" and "_hf_glu_owed" not in vars(config)
"""


@pytest.mark.slow
def test_without_the_plugin_nothing_is_silent(tmp_path):
    model = FAMILIES["bert"].make()
    model.save_pretrained(tmp_path / "dense")
    hf_glu.convert(model, "stateful_geglu", check=False)
    model.save_pretrained(tmp_path / "bert")
    write_code(tmp_path / "bert")
    mixed = FAMILIES["bert"].make(hidden_act="stateful_moa_geglu")  # whose code has what the other's needs, and mixes
    mixed.save_pretrained(tmp_path / "mixed")
    write_code(tmp_path / "mixed")
    for folder in ("bert", "dense"):
        shutil.copy(tmp_path / "mixed" / CODE, tmp_path / folder)
    done = fresh_process(
        _ALONE, str(tmp_path / "bert"), str(tmp_path / "dense"), HF_MODULES_CACHE=str(tmp_path / "modules")
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_plugin_takes_its_place(tmp_path):
    model, folder, again = converted("bert", "all"), str(tmp_path / "bert"), tmp_path / "again"
    publish(model, tmp_path / "bert")
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    transformers.BertTokenizer(vocab={**words, **{f"w{n}": n for n in range(5, 61)}}).save_pretrained(folder)
    for path in (tmp_path / "bert").glob("*.py"):
        path.write_text("raise RuntimeError('code of the checkpoint was executed')\n")
    before = {name for name in sys.modules if name.startswith("transformers_modules")}
    auto, pipeline = transformers.AutoModelForMaskedLM, transformers.pipeline
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    loaded = [
        auto.from_pretrained(folder, trust_remote_code=True),
        auto.from_pretrained(folder),
        auto.from_pretrained(folder, config=config, trust_remote_code=True),
        transformers.BertForMaskedLM.from_pretrained(folder),
        pipeline("fill-mask", model=folder, trust_remote_code=True).model,
        pipeline("fill-mask", model=folder).model,
    ]
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    transformers.AutoModel.from_config(config, trust_remote_code=True)
    assert {name for name in sys.modules if name.startswith("transformers_modules")} == before
    for found in loaded:
        assert type(found) is transformers.BertForMaskedLM
        assert not hasattr(found.config, "auto_map")
        assert_same(outputs(found), outputs(model), "bitwise")
    loaded[0].save_pretrained(again)
    assert "auto_map" not in json.loads((again / "config.json").read_text())
    assert_same(outputs(auto.from_pretrained(again, trust_remote_code=True)), outputs(model), "bitwise")


def test_only_our_classes_are_dropped_from_a_config():
    entries = {
        "AutoModel": "modeling_hf_glu.BertModel", "AutoModelForMaskedLM": "me/bert--modeling_hf_glu.BertForMaskedLM",
        "AutoModelForCausalLM": "modeling_mine.Bert", "AutoTokenizer": ["tokenizing_mine.Slow", None],
    }  # fmt: skip
    config = transformers.BertConfig(auto_map=entries)
    assert list(config.auto_map) == ["AutoModelForCausalLM", "AutoTokenizer"]
    assert list(transformers.BertConfig.from_dict({"auto_map": entries}).auto_map) == list(config.auto_map)
    hf_glu.unregister()
    assert transformers.BertConfig(auto_map=entries).auto_map == entries


def test_the_code_is_flat_and_needs_nothing_but_torch_and_transformers():
    for model in (converted("bert", "plain"), converted("bert", "experts+all"), converted("Mamba", "all")):
        check_flat({CODE: flat_code(model)})


def check_flat(files: dict[str, str]) -> None:
    """Assert that files of code may stand beside a checkpoint, each of which needs no others."""
    for name, code in files.items():
        assert code.startswith(f"# Generated from hf_glu {hf_glu.__version__} (Apache-2.0)"), name
        compile(code, name, "exec")
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert f"{node.module}.py" in files, (name, node.module)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                for package in {module.partition(".")[0] for module in named}:
                    assert package in (*sys.stdlib_module_names, "torch", "transformers"), (name, package)
        # Transformers finds imports by this expression, and the same in text would be a file that isn't there
        found = re.findall(r"^\s*from\s+\.(\S+)\s+import", code, flags=re.MULTILINE)
        assert {f"{module}.py" for module in found} <= files.keys(), name
        assert "hf_glu::" not in code, f"{name} has an operator that each copy would define"
        assert "ops.hf_glu." not in code
        assert "import_module" not in code
        assert "Private(" not in code, "what the doctor says of other libraries' names"
        assert "trait=" not in code
        assert "curves=" not in code
    left = files.keys() - {"hf_glu_plugin_standalone.py"}  # which does without the plugin
    assert not any("plugin" in name or "conversion" in name or "training" in name for name in left)


SIZES = {
    "plain": ("bert", "gpt2", 800), "stateful": ("bert", "llama", 2000), "moa": ("bert", "gpt2", 1500),
    "modulated": ("bert", "llama", 2000), "experts with states": ("bert", "gpt2", 2700),
    "canon": ("bert", "llama", 2000), "smear": ("bert", "llama", 2000),
    "experts": ("bert", "gpt2", 2100), "experts+kappa": ("bert", "mixtral", 2300),
}  # fmt: skip


@pytest.mark.parametrize("kind", few(SIZES, 4))
def test_the_code_is_as_small_as_what_the_model_has(kind, tmp_path):
    *names, most = SIZES[kind]
    for name in names:
        if kind == "experts with states":
            model = make(name)
            hf_glu.convert(model, f"stateful_{target_of(name)}", experts=4, check=False)
        else:
            model = converted(name, kind)
        model.save_pretrained(tmp_path / name)
        written = write_code(tmp_path / name)
        assert written == [CODE]
        lines = (tmp_path / name / CODE).read_text().splitlines()
        assert most / 2 < len(lines) < most, (name, len(lines))


def executed(model: Any, monkeypatch) -> ModuleType:
    """Return a model's code as a module."""
    code = ModuleType("code_of_a_checkpoint")
    monkeypatch.setitem(sys.modules, code.__name__, code)
    exec(compile(flat_code(model), CODE, "exec"), vars(code))
    return code


SECTIONS = {
    "context": {"size": 3}, "canon": {"kernel": 3, "direction": "both"}, "smear": {"open": 0.2, "direction": "both"},
    "state": {"alpha": 0.5, "direction": "both"},
}  # fmt: skip


def test_code_reads_the_options_of_each_kind_and_lets_none_look_ahead(monkeypatch):
    assert SECTIONS.keys() == registry.sections.keys()
    model = converted("bert", "plain")
    hf_glu.convert(model, "modulated_canon_smear_stateful_geglu", check=False, **SECTIONS)
    assert {key: model.config.hf_glu[key] for key in SECTIONS} == SECTIONS
    code = executed(model, monkeypatch)
    assert set(code.registry.sections) == set(SECTIONS)
    made = code.BertForMaskedLM(copy.deepcopy(model.config)).eval()
    made.load_state_dict(model.state_dict())
    assert_same(outputs(made), outputs(model), "bitwise")
    for key, entry in SECTIONS.items():
        config = copy.deepcopy(model.config)
        config.is_decoder = True
        config.hf_glu = {**config.hf_glu, **{other: {} for other in SECTIONS if other != key}}
        if entry.get("direction") == "both":
            with pytest.raises(ValueError, match=f"{key} in both directions would let BertModel see later tokens"):
                code.BertLMHeadModel(config)
        else:
            code.BertLMHeadModel(config)


@pytest.mark.parametrize("key", SECTIONS)
def test_options_of_a_kind_that_a_model_no_longer_has_do_no_harm(key, monkeypatch):
    model = converted("bert", "plain")
    model.config.hf_glu = {"version": 1, key: SECTIONS[key]}
    made = executed(model, monkeypatch).BertForMaskedLM(copy.deepcopy(model.config)).eval()
    made.load_state_dict(model.state_dict())
    assert_same(outputs(made), outputs(model), "bitwise")


def test_code_without_a_kind_says_so_when_it_is_asked_for(monkeypatch):
    source = flat_code(converted("bert", "plain"))
    for absent in ("Memory", "Recent", "Kind", "Bank", "LearnableMix", "MixedBank", "GatedMixer"):
        assert f"class {absent}" not in source
    code = executed(converted("bert", "plain"), monkeypatch)
    config = FAMILIES["bert"].make().config
    config.hidden_act, config.hf_glu = "geglu", {"version": 1, "experts": {"groups": "gelu*2"}}
    with pytest.raises(ValueError, match="no experts: install hf_glu"):
        code.BertModel(config)
    config.hf_glu = {"version": 1, "layers": [0]}
    with pytest.raises(ValueError, match="all layers: install hf_glu"):
        code.BertModel(config)
    config.hf_glu = {"version": 1, "canon": {"kernel": 3}}
    with pytest.raises(KeyError, match=r"unknown key 'canon' in config\.hf_glu"):
        code.BertModel(config)


def test_what_needs_no_code_gets_none_and_what_has_foreign_parts_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        write_code(tmp_path)
    FAMILIES["bert"].make().save_pretrained(tmp_path / "dense")
    make_native("llama", hidden_act="gelu").save_pretrained(tmp_path / "llama")  # GeGLU, as stock itself has it
    for name in ("dense", "llama"):
        before = (tmp_path / name / "config.json").read_text()
        assert write_code(tmp_path / name) == []
        assert (tmp_path / name / "config.json").read_text() == before
    ids = torch.randint(3, 60, (40, 16))
    for name, model in {
        "sparse": make_native("llama"),
        "gated": FAMILIES["gpt2"].make(activation_function="geglu_new"),
    }.items():
        hf_glu.sparsify(model, ids)
        model.save_pretrained(tmp_path / name)
    assert write_code(tmp_path / "sparse") == []  # stock loads it with dense FFNs
    with pytest.raises(CheckpointError, match=r"leave small entries out.*--no-code"):
        write_code(tmp_path / "gated")
    register_activation(
        Activation(
            name="my_glu_of_mine", equation="?", paper="?", gate="gelu", flags=frozenset({"gated"}), factory=Mine
        )
    )
    try:
        FAMILIES["bert"].make(hidden_act="my_glu_of_mine").save_pretrained(tmp_path / "mine")
        with pytest.raises(CheckpointError, match=r"lack test_remote_code\.Mine"):
            write_code(tmp_path / "mine")
        assert "auto_map" not in (tmp_path / "mine" / "config.json").read_text()
    finally:
        registry.remove("my_glu_of_mine")


class Mine(GatedActivation):
    """An activation that only this process has."""

    def __init__(self) -> None:
        super().__init__("geglu")
        self.name = "my_glu_of_mine"


def test_config_json_is_written_at_once_and_keeps_what_it_had(tmp_path, monkeypatch):
    model = FAMILIES["bert"].make(hidden_act="geglu")
    model.config.auto_map = {"AutoTokenizer": ["tokenizing_mine.Slow", None]}
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()

    def fail(self, target):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="no space left"):
        patch.setattr(Path, "replace", fail)
        write_code(tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    assert not list(tmp_path.glob(".*"))
    names = write_code(tmp_path)
    assert write_code(tmp_path) == names
    after = json.loads((tmp_path / "config.json").read_text())
    assert after["auto_map"]["AutoModelForMaskedLM"] == "modeling_hf_glu.BertForMaskedLM"
    assert after.pop("auto_map")["AutoTokenizer"] == ["tokenizing_mine.Slow", None]
    assert after == {key: value for key, value in json.loads(before).items() if key != "auto_map"}
    assert sorted(path.name for path in tmp_path.glob("*.py")) == names
    assert "geglu" in ACT2FN
