"""What a conversion on disk leaves as it is: tensors that the model's class has no place for, and each one's dtype."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.pico import FAMILIES
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, GPT2LMHeadModel

import hf_glu
from hf_glu.checkpoint.beside import main_dtype
from hf_glu.checkpoint.merge import merge_checkpoints
from hf_glu.errors import ConversionError


def _save(model, folder, *, architectures=None, **more):
    """Save a model whose config names another class, or none."""
    model.save_pretrained(folder, **more)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": architectures}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _tensors(folder):
    return {key: each for path in sorted(folder.glob("*.safetensors")) for key, each in load_file(path).items()}


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key


@pytest.fixture
def bert(tmp_path):
    """A checkpoint as BERT's authors published it: a masked language model, with pooler and another head beside it."""
    model = FAMILIES["bert"].make("BertForPreTraining")
    return _save(model, tmp_path / "bert", architectures=["BertForMaskedLM"])


def test_tensors_without_a_place_come_along_as_when_streamed(bert, tmp_path):
    hf_glu.convert_checkpoint(bert, tmp_path / "whole", "geglu")
    hf_glu.convert_stream(bert, tmp_path / "streamed", "geglu")
    _assert_same(_tensors(tmp_path / "whole"), _tensors(tmp_path / "streamed"))
    before, after = (BertForSequenceClassification.from_pretrained(path) for path in (bert, tmp_path / "whole"))
    assert torch.equal(before.bert.pooler.dense.weight, after.bert.pooler.dense.weight)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors_under_old_names_come_along(zipped, tmp_path):
    model, folder = FAMILIES["bert"].make("BertForPreTraining"), tmp_path / "bert"
    folder.mkdir()
    old = {key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): each
           for key, each in model.state_dict().items()}  # fmt: skip
    torch.save(old, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "architectures": ["BertModel"]}))
    hf_glu.convert_checkpoint(folder, tmp_path / "whole", "geglu")
    found = BertForPreTraining.from_pretrained(tmp_path / "whole").state_dict()
    for key, tensor in model.state_dict().items():
        assert "intermediate" in key or torch.equal(found[key], tensor), key


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_head_that_no_class_is_named_for_comes_along(size, tmp_path, monkeypatch):
    model = FAMILIES["gpt2"].make("GPT2LMHeadModel", tie_word_embeddings=False)
    folder = _save(model, tmp_path / "gpt2", max_shard_size=size)
    save = type(model).save_pretrained
    monkeypatch.setattr(type(model).__mro__[1], "save_pretrained", lambda *a, **k: save(*a, **k, max_shard_size=size))
    hf_glu.convert_checkpoint(folder, tmp_path / "whole", "geglu_new")
    assert (len(list((tmp_path / "whole").glob("*.safetensors"))) > 1) == (size == "20KB")
    assert (tmp_path / "whole" / "generation_config.json").is_file()
    ids = torch.arange(10)[None]
    torch.testing.assert_close(
        GPT2LMHeadModel.from_pretrained(tmp_path / "whole")(ids).logits, model.eval()(ids).logits
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_each_tensor_keeps_its_dtype(dtype, tmp_path):
    folder = _save(
        FAMILIES["gpt2"].make("GPT2LMHeadModel", tie_word_embeddings=False),
        tmp_path / "gpt2",
        architectures=["GPT2LMHeadModel"],
    )
    tensors = {key: each if ".ln_" in key else each.bfloat16() for key, each in _tensors(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    assert main_dtype(folder) == torch.bfloat16
    hf_glu.convert_checkpoint(folder, tmp_path / "whole", "geglu_new")
    hf_glu.convert_stream(folder, tmp_path / "streamed", "geglu_new")
    _assert_same(_tensors(tmp_path / "whole"), _tensors(tmp_path / "streamed"))


def test_trained_weights_are_not_taken_back(bert, tmp_path):
    def heal(model):
        with torch.no_grad():
            model.bert.embeddings.LayerNorm.weight.add_(1)
        return {"steps": 1}

    hf_glu.convert_checkpoint(bert, tmp_path / "healed", "geglu", heal=heal)
    name = "bert.embeddings.LayerNorm.weight"
    torch.testing.assert_close(_tensors(tmp_path / "healed")[name], _tensors(bert)[name] + 1)


def test_merged_checkpoints_have_what_lies_beside_the_first(bert, tmp_path):
    other = _save(
        FAMILIES["bert"].make("BertForPreTraining", seed=1), tmp_path / "b", architectures=["BertForMaskedLM"]
    )
    (tmp_path / "merged").mkdir()
    merge_checkpoints([bert, other], tmp_path / "merged")
    found, first = _tensors(tmp_path / "merged"), _tensors(bert)
    for name in first.keys() - FAMILIES["bert"].make().state_dict().keys():
        assert torch.equal(found[name], first[name])


def test_an_adapter_beside_a_checkpoint_is_refused(tmp_path):
    folder = tmp_path / "bert"
    FAMILIES["bert"].make().save_pretrained(folder)
    adapted = get_peft_model(BertForMaskedLM.from_pretrained(folder), LoraConfig(target_modules=["query"]))
    adapted.save_pretrained(folder)
    with pytest.raises(ConversionError, match="merge the adapter first"):
        hf_glu.convert_checkpoint(folder, tmp_path / "gated", "geglu")
    assert not (tmp_path / "gated").exists()
