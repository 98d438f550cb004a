"""What other libraries don't promise is touched in one place, by rows of a table, and found when it is used."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils._pytree

from hf_glu.compat.of_torch import PYTREE_CONSTANT
from hf_glu.compat.private import Private
from hf_glu.compat.table import missing_in, rows
from hf_glu.errors import IncompatibleTransformersError

PACKAGE = Path(__file__).resolve().parents[2] / "hf_glu"
COMPAT = PACKAGE / "compat"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if COMPAT not in path.parents)
LIBRARIES = (
    "torch", "transformers", "accelerate", "peft", "evaluate", "datasets", "torchao", "onnxruntime", "kernels",
    "liger_kernel",
)  # fmt: skip
# modules without an underscore that are nobody's public ones either
UNPROMISED = (
    "torch.ops", "torch.nn.modules.module", "transformers.cli", "transformers.core_model_loading",
    "transformers.exporters", "transformers.integrations", "transformers.loss", "transformers.models.auto.auto_factory",
    "accelerate.state", "peft.utils.other",
)  # fmt: skip
# modules that the plugin hooks are named where it says so, and a class that overrides a name has to name it
EXCEPT = {
    ("plugin/__init__.py", "transformers.activations"),
    ("plugin/__init__.py", "transformers.cli.serving.utils"),
    ("plugin/standalone.py", "_finalize_model_loading"),
    ("plugin/standalone.py", "_can_set_attn_implementation"),
    ("plugin/standalone.py", "_can_set_experts_implementation"),
    ("checkpoint/stopping.py", "_exit"),  # of Python's own os
    ("cli/quiet.py", "torch.utils._pytree"),  # a logger's name
    ("training/loop/accelerating.py", "accelerate.state"),  # the class itself is documented
}
NAMES = {row.name for row in rows() if "ops.aten" not in row.where}  # whose names are everybody's
ATTRIBUTES = ("getattr", "hasattr", "setattr", "delattr")


@functools.cache
def trees():
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in FILES}


@functools.cache
def our_names():
    return own_names(trees())


def own_names(parsed):
    """Names that hf_glu itself defines: functions, classes, variables, and attributes of ``self``."""
    found = set()
    for node in (node for tree in parsed.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "ctx", "act"):
                found.add(node.attr)
    return found - NAMES


def is_private(name):
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


def unpromised(module):
    """Whether a dotted name is in a module that isn't public."""
    library, *parts = module.split(".")
    known = any(module == other or module.startswith(f"{other}.") for other in UNPROMISED)
    return library in LIBRARIES and (known or any(is_private(part) for part in parts))


def touched(tree, own):
    """Yield (line, name) of each unpromised name that a module touches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            if unpromised(node.module):
                yield node.lineno, node.module
            yield from ((node.lineno, a.name) for a in node.names if is_private(a.name) or a.name in NAMES)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if unpromised(alias.name))
        elif isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            if unpromised(path) and not path.startswith("torch.ops.hf_glu") and path != "torch.ops":
                yield node.lineno, path
            elif node.attr in NAMES or (is_private(node.attr) and node.attr not in own):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ClassDef):
            methods = (each for each in node.body if isinstance(each, ast.FunctionDef))
            yield from ((each.lineno, each.name) for each in methods if each.name in NAMES)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if (node.value in NAMES and is_private(node.value)) or unpromised(node.value):
                yield node.lineno, node.value
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ATTRIBUTES
            and isinstance(node.args[1], ast.Constant)
        ):
            name = node.args[1].value
            if is_private(name) and name not in own:
                yield node.lineno, name


def test_nothing_but_compat_touches_what_is_private():
    found = {(path, name): line for path, tree in trees().items() for line, name in touched(tree, our_names())}
    assert not {key: line for key, line in found.items() if key not in EXCEPT}
    assert not [key for key in EXCEPT if key not in found and key[1] != "transformers.activations"], "out of date"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from transformers.integrations.moe import _grouped_linear", "_grouped_linear"),
        ("from transformers.integrations.moe import ExpertsInterface", "transformers.integrations.moe"),
        ("from torch.nn.functional import grouped_mm", "grouped_mm"),
        ("import torch._dynamo", "torch._dynamo"),
        ("x = torch._C._current_graph_task_id()", "torch._C._current_graph_task_id"),
        ("y = torch.ops.aten.gelu(x)", "torch.ops.aten.gelu"),
        ("functional.grouped_mm(x, w)", "grouped_mm"),
        ("hooks = module._forward_hooks", "_forward_hooks"),
        ("module._never_heard_of = 3", "_never_heard_of"),
        ("getattr(model, '_tp_plan', None)", "_tp_plan"),
        ("hasattr(model, '_never_heard_of')", "_never_heard_of"),
        ("vars(module).get('_gradient_checkpointing_func')", "_gradient_checkpointing_func"),
        ("import_module('transformers.exporters.auto')", "transformers.exporters.auto"),
        ("class A(B):\n def _init_weights(self): ...", "_init_weights"),
    ],
)
def test_the_check_can_fail(line, name):
    assert name in [found for _, found in touched(ast.parse(line), our_names())]


def test_the_check_lets_ours_and_public_names_pass():
    code = (
        "self._own = 1\nx = self._own\ntorch.ops.hf_glu.stateful(x)\nfrom torch.nn import functional\nactivate('_glu')"
    )
    assert not list(touched(ast.parse(code), own_names({"x.py": ast.parse(code)})))


def test_the_room_imports_nothing_of_ours_but_errors():
    for path in COMPAT.glob("*.py"):
        modules = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not [
            name for name in modules if name and name.startswith("hf_glu") and not name.startswith("hf_glu.compat")
            and name != "hf_glu.errors"
        ]  # fmt: skip


def test_rows_are_told_apart_and_say_what_they_are_for():
    table = rows()
    assert len({str(row) for row in table}) == len(table) > 60
    for row in table:
        assert row.package in LIBRARIES, row
        assert row.need, row
        assert row.otherwise, row
        assert re.fullmatch(r"\d[\d.]*( to \d[\d.]*)?", row.seen), row


@pytest.mark.parametrize("row", rows(), ids=str)
def test_the_installed_versions_have_it_where_they_were_seen(row):
    from packaging.version import Version

    from hf_glu.compat.private import version

    if row.is_present() is None:
        pytest.skip(f"{row.package} isn't installed")
    first, _, last = row.seen.partition(" to ")
    now = Version(version(row.package)).release[:2]
    within = Version(first).release[:2] <= now <= Version(last or first).release[:2]
    assert row.is_present() is within or not (within or row.is_present())


def test_a_missing_name_is_one_line_that_says_what_needs_it():
    row = Private(where="torch.nn:Module()", name="_nothing_like_it", seen="9.9", need="making tea")
    assert row.is_present() is False
    for ask in (row.find, lambda: row.of(object())):
        with pytest.raises(IncompatibleTransformersError, match=r"making tea: this needs torch.*9\.9") as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert row.of(object(), None) is None
    assert row.find_or(7) == 7


def test_an_error_that_hides_what_is_missing_is_explained():
    from hf_glu.checkpoint.config_file import first_line

    def hidden() -> None:
        try:
            getattr(torch.utils._pytree, row.name)
        except AttributeError as error:
            raise ModuleNotFoundError("Could not import module 'BertModel'") from error

    row = PYTREE_CONSTANT
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.utils._pytree, row.name, raising=False)
        with pytest.raises(ModuleNotFoundError) as caught:
            hidden()
    assert missing_in(caught.value) is row
    assert first_line(caught.value) == str(row.missing())
    assert "torchao 0.16" in str(row.missing())
    assert missing_in(AttributeError("x", name=row.name, obj=torch)) is None
    assert missing_in(ValueError("x")) is None
    assert first_line(ValueError("x")) == "x"


def test_looking_for_a_name_never_raises():
    assert Private(where="no_such_package.x", name="y", seen="1", need="z").is_present() is None
    assert Private(where="torch.no_such_module", name="y", seen="1", need="z").is_present() is False
    assert Private(where="torch.nn:Linear()", name="y", seen="1", need="z").is_present() is False


def fresh(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


WITHOUT_EXPERTS = """
import torch
import transformers.models.mixtral.modeling_mixtral  # whose own use of them has been bound
from transformers.integrations import moe
for name in [name for name in vars(moe) if name.startswith("_") and not name.startswith("__")]:
    delattr(moe, name)
import hf_glu
from transformers import BertConfig, BertModel, MixtralConfig, MixtralForCausalLM
small = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
config = BertConfig(hidden_act="swiglu", **small)
out = BertModel(config)(torch.ones(1, 4, dtype=torch.long)).last_hidden_state
assert out.shape == (1, 4, 16) and out.isfinite().all()
dense = BertModel(BertConfig(**small))
assert hf_glu.convert(dense, "geglu")
mixtral = MixtralForCausalLM(MixtralConfig(**small, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1))
mixtral.set_experts_implementation("eager")
hf_glu.convert(mixtral, experts="silu*1,relu*1")
assert mixtral(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()
"""


@pytest.mark.slow
def test_bert_builds_whatever_the_experts_internals_are_called():
    done = fresh(WITHOUT_EXPERTS)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_doctor_lists_every_row_and_survives_what_is_missing():
    code = """
import json, torch
from torch.nn import functional
vars(functional).pop("grouped_mm", None)
from hf_glu.plugin.doctor import examine
print(json.dumps(examine().to_dict()))
"""
    done = fresh(code)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert found["healthy"]
    assert {f"private {row}" for row in rows()} <= set(checks)
    missing = checks["private torch.nn.functional.grouped_mm"]
    assert not missing["ok"]
    assert "experts are a loop" in missing["detail"]


@pytest.mark.slow
def test_the_doctor_blames_the_hook_that_fails_and_not_those_that_import_it():
    code = """
import json, wrapt
def rename(module):
    del module.PreTrainedModel._finalize_model_loading
wrapt.register_post_import_hook(rename, "transformers.modeling_utils")
from hf_glu.plugin.doctor import examine
print(json.dumps(examine().to_dict()))
"""
    done = fresh(code)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert not found["healthy"]
    assert "_finalize_model_loading" in checks["hook transformers.modeling_utils"]["detail"]
    assert not checks["hook transformers.modeling_utils"]["ok"]
    assert checks["hook transformers.activations"]["ok"]
    assert "_finalize_model_loading" not in checks["hook transformers.trainer"]["detail"]
