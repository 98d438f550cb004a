"""Streaming gives what converting in memory gives, and leaves nothing where it can't."""

import contextlib
import json
import struct

import pytest
import torch
from comparing import assert_same, outputs
from covering import covering
from hub_client import contents
from pico import FAMILIES, make_native
from safetensors.torch import load_file, save_file

import hf_glu
from hf_glu import cli
from hf_glu.checkpoint import shards, streaming
from hf_glu.conversion.changes.gate import Gate
from hf_glu.errors import CheckpointError, ConversionError


def load_all(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


@pytest.mark.parametrize(("family", "sharded"), covering(FAMILIES, [False, True]))
def test_the_same_as_in_memory(family, sharded, tmp_path):
    made = FAMILIES[family]
    model = made.make()
    model.save_pretrained(tmp_path / "dense", **({"max_shard_size": "4KB"} if sharded else {}))
    (tmp_path / "dense" / "vocab.txt").write_text("a\n")
    report = hf_glu.convert_stream(tmp_path / "dense", tmp_path / "streamed", made.exact)
    hf_glu.convert_checkpoint(tmp_path / "dense", tmp_path / "memory", made.exact)
    assert_same(load_all(tmp_path / "streamed"), load_all(tmp_path / "memory"), "bitwise")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "memory")]
    assert configs[0] == configs[1]
    assert (tmp_path / "streamed" / "vocab.txt").is_file()
    shards = [sorted(p.name for p in (tmp_path / n).glob("*.safetensors")) for n in ("dense", "streamed")]
    assert shards[0] == shards[1]
    again, info = type(model).from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "exact")
    assert report.to_dict()["parameters_after"] == again.num_parameters()


@pytest.mark.parametrize(("family", "target"), [("bert", "swiglu"), ("gpt2", "glu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_approximate_routes_and_dtypes(family, target, dtype, tmp_path):
    FAMILIES[family].make().to(dtype).save_pretrained(tmp_path / "dense")
    hf_glu.convert_stream(tmp_path / "dense", tmp_path / "streamed", target, layers="1")
    hf_glu.convert_checkpoint(tmp_path / "dense", tmp_path / "memory", target, layers="1", check=False)
    assert_same(load_all(tmp_path / "streamed"), load_all(tmp_path / "memory"), "bitwise")


def name_architecture(folder, name):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))


def test_other_prefixes_and_a_native_family(tmp_path):
    FAMILIES["gpt2"].make("GPT2Model").save_pretrained(tmp_path / "base")
    name_architecture(tmp_path / "base", "GPT2LMHeadModel")  # its head is the embedding
    hf_glu.convert_stream(tmp_path / "base", tmp_path / "out", "geglu_new")
    assert load_all(tmp_path / "out")["h.0.mlp.c_fc.weight"].shape == (16, 80)
    assert hf_glu.verify(tmp_path / "base", tmp_path / "out").same
    FAMILIES["bert"].make("BertForMaskedLM").save_pretrained(tmp_path / "head")
    name_architecture(tmp_path / "head", "BertModel")
    with pytest.raises(CheckpointError, match=r"lacks weights of BertModel, such as pooler\.dense"):
        hf_glu.convert_stream(tmp_path / "head", tmp_path / "bert", "geglu")
    make_native("llama").save_pretrained(tmp_path / "llama")
    hf_glu.convert_stream(tmp_path / "llama", tmp_path / "relu", "reglu")
    assert_same(load_all(tmp_path / "relu"), load_all(tmp_path / "llama"), "bitwise")
    assert json.loads((tmp_path / "relu" / "config.json").read_text())["hidden_act"] == "relu"


def test_every_dtype_goes_along_and_parts_are_whole(tmp_path, monkeypatch):
    FAMILIES["gpt2"].make().save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    more = {
        "flag": torch.tensor([True, False, True]),
        "one": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.zeros(0, 3),
        "int": torch.arange(7),
        "f8": torch.ones(5).to(torch.float8_e4m3fn),
        "complex": torch.randn(3, 2, dtype=torch.complex64),
        "bf16": torch.randn(33, 7).bfloat16(),
    }
    save_file(tensors | more, tmp_path / "dense" / "model.safetensors")
    monkeypatch.setattr(shards, "CHUNK", 100)
    hf_glu.convert_stream(tmp_path / "dense", tmp_path / "out", "geglu_new")
    written = load_all(tmp_path / "out")
    assert_same(
        {key: written[key].float() for key in ("bf16", "f8")},
        {key: more[key].float() for key in ("bf16", "f8")},
        "bitwise",
    )
    for key in ("flag", "one", "none", "int", "complex"):
        torch.testing.assert_close(written[key], more[key], rtol=0, atol=0)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in written.values())


@pytest.fixture
def sharded(tmp_path):
    FAMILIES["gpt2"].make().save_pretrained(tmp_path / "dense", max_shard_size="4KB")
    return tmp_path / "dense"


def shard_of(folder):
    return sorted(folder.glob("*.safetensors"))[1]


def rewrite(folder, change, shard=None):
    """Write a shard with ``change`` applied to its header, by hand: the library would refuse to write it."""
    path = shard or shard_of(folder)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    new, body = change(header, data[8 + length :]), data[8 + length :]
    if isinstance(new, tuple):
        new, body = new
    encoded = new if isinstance(new, bytes) else json.dumps(new).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)


def first(header, **entries):
    """Change the first tensor of a header."""
    key = next(iter(header))
    return header | {key: header[key] | entries}


def in_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = change(index["weight_map"])
    path.write_text(json.dumps(index))


def renamed(folder, name):
    """Name another file in the index, where it may be found, or written."""
    shard = shard_of(folder)
    in_index(folder, lambda named: {key: name if value == shard.name else value for key, value in named.items()})
    target = folder / name
    if "\0" not in name and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shard.rename(target)


def resized(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def without_one(folder):
    tensors = load_file(shard_of(folder))
    tensors.popitem()
    save_file(tensors or {"other": torch.zeros(1)}, shard_of(folder))


def twice(folder):
    key, tensor = next(iter(load_file(shard_of(folder)).items()))
    other = sorted(folder.glob("*.safetensors"))[2]
    save_file(load_file(other) | {key: tensor}, other)


def pickled(folder):
    tensors = {key: tensor.clone() for key, tensor in load_file(shard_of(folder)).items()}
    torch.save(tensors, shard_of(folder))


OVERLAPPING = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BROKEN = {
    "missing shard": (lambda folder: shard_of(folder).unlink(), "is missing"),
    "truncated": (lambda folder: shard_of(folder).write_bytes(shard_of(folder).read_bytes()[:-100]), "truncated"),
    "longer": (lambda folder: shard_of(folder).write_bytes(shard_of(folder).read_bytes() + b"0" * 8), "truncated"),
    "no header": (lambda folder: shard_of(folder).write_bytes(b"x"), "truncated"),
    "empty": (lambda folder: shard_of(folder).write_bytes(b""), "truncated"),
    "huge header": (lambda folder: shard_of(folder).write_bytes(struct.pack("<Q", 2**62) + b"{}"), "truncated"),
    "pickle": (pickled, "no safetensors file"),
    "overlap": (lambda f: rewrite(f, lambda h, b: h | {"more": OVERLAPPING}), "truncated"),
    "negative": (lambda f: rewrite(f, lambda h, b: first(h, data_offsets=[-8, 0])), "truncated"),
    "backwards": (lambda f: rewrite(f, lambda h, b: first(h, data_offsets=[8, 0])), "truncated"),
    "beyond": (lambda f: rewrite(f, lambda h, b: first(h, data_offsets=[0, 2**50])), "truncated"),
    "shape": (lambda f: rewrite(f, lambda h, b: first(h, shape=[3])), "truncated"),
    "huge shape": (lambda f: rewrite(f, lambda h, b: first(h, shape=[2**40, 2**40])), "truncated"),
    "dtype": (lambda f: rewrite(f, lambda h, b: first(h, dtype="F64")), "truncated"),
    "no dtype": (lambda f: rewrite(f, lambda h, b: first(h, dtype="X7")), "truncated"),
    "hole": (lambda f: rewrite(f, lambda h, b: (h, b + b"0" * 4)), "truncated"),
    "header of lists": (lambda f: rewrite(f, lambda h, b: b"[]"), "truncated"),
    "tensor missing": (without_one, "lacks"),
    "tensor twice": (twice, "is in 2 shards"),
    "not in the index": (lambda f: in_index(f, lambda m: dict(list(m.items())[1:])), "the index lacks"),
    "a shard not in the index": (
        lambda f: in_index(f, lambda m: {k: v for k, v in m.items() if v != shard_of(f).name}),
        "lacks weights",
    ),
    "single and index": (
        lambda f: save_file({"other": torch.zeros(1)}, f / "model.safetensors"),
        "has both model.safetensors and",
    ),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "no index"),
    "index of lists": (lambda f: in_index(f, list), "no index"),
    "empty index": (lambda f: in_index(f, lambda m: {}), "no index"),
    "a number as a name": (lambda f: in_index(f, lambda m: m | {next(iter(m)): 3}), "names 3"),
    "no weights": (lambda f: (f / "model.safetensors.index.json").unlink(), "safetensors only"),
    "more layers": (lambda f: resized(f, n_layer=3), r"lacks weights of \w+, such as .*h\.2\."),
    "wider": (lambda f: resized(f, n_inner=44), "where its config says"),
    "other vocabulary": (lambda f: resized(f, vocab_size=9), "wte.weight of shape"),
    "other weights": (lambda f: resized(f, transformers_weights="other.safetensors"), "other.safetensors"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_checkpoints_leave_nothing(how, sharded, tmp_path):
    spoil, match = BROKEN[how]
    spoil(sharded)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=match):
        hf_glu.convert_stream(sharded, tmp_path / "out", "geglu_new")
    assert contents(tmp_path) == before


LEAVING = (
    "../outside.safetensors",
    "sub/x.safetensors",
    "./x.safetensors",
    "{tmp}/outside.safetensors",
    ".x.safetensors",
    "..\\x.safetensors",
    "C:\\x.safetensors",
    "a\0.safetensors",
    "x.safetensors/../../y.safetensors",
    "x.bin",
    "..",
    "",
    "config.json",
    "a\n.safetensors",
    "x" * 300 + "/y.safetensors",
)


@pytest.mark.parametrize("name", LEAVING)
def test_names_that_leave_the_folder_are_refused(name, sharded, tmp_path):
    name = name.format(tmp=tmp_path)
    with contextlib.suppress(OSError):
        renamed(sharded, name)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="a shard's name is one such as"):
        hf_glu.convert_stream(sharded, tmp_path / "out", "geglu_new")
    assert contents(tmp_path) == before


def test_what_was_written_is_loaded_before_it_has_its_name(sharded, tmp_path, monkeypatch):
    plain = shards.write_shard

    def loses(path, outputs):
        plain(path, dict(list(outputs.items())[1:]))

    monkeypatch.setattr(streaming, "write_shard", loses)
    with pytest.raises(CheckpointError, match="can't be read back as it was written"):
        hf_glu.convert_stream(sharded, tmp_path / "out", "geglu_new")
    monkeypatch.setattr(streaming, "write_shard", plain)
    monkeypatch.setattr(Gate, "entries", lambda *given: [])
    with pytest.raises(CheckpointError, match="where its config says"):
        hf_glu.convert_stream(sharded, tmp_path / "out", "geglu_new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_linked_shards_are_read_and_stay(sharded, tmp_path):
    (tmp_path / "blobs").mkdir()
    for path in sharded.glob("*.safetensors"):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    before = contents(tmp_path / "blobs")
    hf_glu.convert_stream(sharded, tmp_path / "out", "geglu_new")
    assert contents(tmp_path / "blobs") == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert hf_glu.verify(sharded, tmp_path / "out").same


def test_what_cannot_be_streamed(sharded, tmp_path):
    with pytest.raises(CheckpointError, match="parameters of its own"):
        hf_glu.convert_stream(sharded, tmp_path / "out", "learnable_swiglu")
    for target in ("stateful_geglu_new", "modulated_geglu_new", "stateful_gelu_new"):
        with pytest.raises(CheckpointError, match="parameters of its own"):
            hf_glu.convert_stream(sharded, tmp_path / "out", target)
    with pytest.raises(ConversionError, match="no route"):
        hf_glu.convert_stream(sharded, tmp_path / "out", "reglu")
    with pytest.raises(CheckpointError, match="exists already"):
        hf_glu.convert_stream(sharded, sharded, "geglu_new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_command(sharded, tmp_path, capsys):
    assert cli.run(["convert", str(sharded), str(tmp_path / "out"), "--to", "geglu_new", "--stream", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["promise"] == "exact"
    assert hf_glu.verify(sharded, tmp_path / "out").same
