"""Fine-tuning: parameter groups, data, the loop, and the whole job."""

import json

import pytest
import torch
from comparing import assert_same
from datasets import Dataset
from pico import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import hf_glu
from hf_glu.checkpoint import REPORT_FILE
from hf_glu.errors import CheckpointError, DataError, OptionError
from hf_glu.report import finetune_and_report
from hf_glu.training.data import load_files, load_task
from hf_glu.training.job import fresh_logits
from hf_glu.training.loop import TrainingOptions, finetune, predict, tokenize
from hf_glu.training.metrics import Accuracy

GOOD, BAD = ("fine", "lovely", "great"), ("dull", "awful", "poor")


def rows(count=80):
    generator = torch.Generator().manual_seed(0)
    pick = lambda n: int(torch.randint(n, (1,), generator=generator))  # noqa: E731
    made = []
    for _ in range(count):
        label = pick(2)
        words = [(GOOD if label else BAD)[pick(3)]] + [("film", "a", "the")[pick(3)] for _ in range(pick(6))]
        made.append({"text": " ".join(words), "label": label})
    return made


@pytest.fixture
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", *GOOD, *BAD, "film", "a", "the"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    FAMILIES["bert"].make("BertModel").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def files(tmp_path):
    Dataset.from_list(rows()).to_csv(tmp_path / "data.csv")
    return tmp_path / "data.csv"


OPTIONS = TrainingOptions(epochs=8, batch_size=8, lr=5e-3, precision="no")


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_groups(family):
    model = FAMILIES[family].make()
    hf_glu.convert(model, FAMILIES[family].exact)
    groups = hf_glu.parameter_groups(model, 1e-3, 0.1)
    by_decay = {group["weight_decay"]: {id(p) for p in group["params"]} for group in groups}
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted({id(p) for p in model.parameters()})
    for site in hf_glu.find_sites(model):
        assert id(site.in_proj.bias) in by_decay[0.0]
        assert id(site.in_proj.weight) in by_decay[0.1]
    assert all(id(p) in by_decay[0.0] for p in model.parameters() if p.ndim == 1)
    assert all(group["lr"] == 1e-3 for group in groups)


def test_parameter_groups_spare_scalars_of_activations_and_frozen_parameters():
    model = FAMILIES["gpt2"].make(activation_function="prelu_glu")
    model.transformer.wte.weight.requires_grad_(False)
    groups = {group["name"]: {id(p) for p in group["params"]} for group in hf_glu.parameter_groups(model, 1.0, 0.1)}
    for site in hf_glu.find_sites(model):
        assert id(site.act.phi.weight) in groups["no_decay"]
    assert id(model.transformer.wte.weight) not in groups["decay"] | groups["no_decay"]


def test_decay_leaves_the_up_bias_alone():
    model = FAMILIES["t5"].make()
    hf_glu.convert(model, "reglu")
    optimizer = torch.optim.AdamW(hf_glu.parameter_groups(model, 0.1, 0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for site in hf_glu.find_sites(model):
        assert_same(site.in_proj.bias[site.width :].detach(), torch.ones(site.width), "bitwise")
        assert site.in_proj.weight.abs().sum() > 0


def test_trainer_takes_the_groups(tmp_path, tokenizer):
    model = FAMILIES["bert"].make("BertForSequenceClassification")
    hf_glu.convert(model, "geglu")
    data = tokenize(Dataset.from_list(rows(16)), tokenizer, 16)
    optimizer = torch.optim.AdamW(hf_glu.parameter_groups(model, 1e-3, 0.1))
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    Trainer(model, arguments, train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, None)).train()
    assert len(optimizer.param_groups) == 2
    Trainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()


def test_the_loop_learns_and_repeats_itself(tokenizer):
    data = tokenize(Dataset.from_list(rows()), tokenizer, 16)

    def train():
        model = FAMILIES["bert"].make("BertForSequenceClassification", hidden_act="swiglu")
        result = finetune(model, data, tokenizer, OPTIONS)
        return model, result, predict(model, data, tokenizer)

    model, result, logits = train()
    assert result.steps == 80
    accuracy = Accuracy().compute(predictions=logits.argmax(-1).tolist(), references=data["labels"])["accuracy"]
    assert accuracy > 0.95
    _, again, repeated = train()
    assert_same(repeated, logits, "bitwise")
    assert again.loss == result.loss
    assert not predict(model, data, tokenizer).requires_grad


def test_predictions_are_in_order_and_bf16_training_leaves_a_full_precision_model(tokenizer):
    model = FAMILIES["bert"].make("BertForSequenceClassification", hidden_act="geglu")
    data = tokenize(Dataset.from_list(rows(20)), tokenizer, 16)
    finetune(model, data, tokenizer, TrainingOptions(epochs=0.4, batch_size=4, precision="bf16"))
    together = predict(model, data, tokenizer, batch_size=7)
    alone = torch.cat([predict(model, data.select([i]), tokenizer) for i in range(len(data))])
    assert_same(together, alone, "exact")


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_other_families_train(family, tokenizer):
    head = {"gpt2": "GPT2ForSequenceClassification", "t5": "T5ForSequenceClassification"}[family]
    model = FAMILIES[family].make(head)
    hf_glu.convert(model, FAMILIES[family].exact)
    data = tokenize(Dataset.from_list([{**row, "text": row["text"]} for row in rows(16)]), tokenizer, 16)
    if family == "t5":  # its classification head reads the end-of-sequence token, 1 here
        data = data.map(lambda row: {k: [*v, 1] for k, v in row.items() if isinstance(v, list)})
    result = finetune(model, data, tokenizer, TrainingOptions(epochs=1, batch_size=4, precision="no"))
    assert result.steps == 4
    assert torch.isfinite(torch.tensor(result.loss))


def test_the_whole_job(checkpoint, files, tmp_path):
    output = tmp_path / "tuned"
    result = finetune_and_report(
        str(checkpoint), load_files(files), OPTIONS, dataset="toy", to="geglu", output=output, baseline=True
    )
    assert [row["model"] for row in result["rows"]] == ["dense, fine-tuned", "geglu, converted", "geglu, fine-tuned"]
    assert result["outcome"]["reloaded_equal"] is True
    assert result["outcome"]["accuracy"] > 0.9
    assert result["dense"]["accuracy_before"] == result["outcome"]["accuracy_before"]
    assert result["outcome"]["conversion"]["max_abs_difference"] <= 1e-6
    assert json.loads((output / REPORT_FILE).read_text()) == json.loads(json.dumps(result))
    card = (output / "README.md").read_text()
    assert f"{result['outcome']['accuracy']:.2%}" in card
    assert card.split("```python\n")[1].startswith("import hf_glu\n")
    from huggingface_hub import ModelCard

    data = ModelCard(card).data
    assert data.eval_results[0].metric_value == round(result["outcome"]["accuracy"], 4)
    assert "geglu" in data.tags


def test_the_check_of_the_reload_can_fail(tokenizer, tmp_path):
    data = tokenize(Dataset.from_list(rows(8)), tokenizer, 16)
    model = FAMILIES["bert"].make("BertForSequenceClassification", hidden_act="geglu")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model.classifier.bias.data += 1e-3
    assert not torch.equal(fresh_logits(tmp_path / "model", data), predict(model, data, tokenizer))
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="can't be loaded again"):
        fresh_logits(tmp_path / "model", data)


def test_data_files(tmp_path):
    data = Dataset.from_list(rows(20))
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        {"csv": data.to_csv, "jsonl": data.to_json, "parquet": data.to_parquet}[name.split(".")[1]](tmp_path / name)
        examples = load_files(tmp_path / name)
        assert (len(examples.train), len(examples.validation)) == (18, 2)
        assert examples.labels == ("0", "1")
    data.to_csv(tmp_path / "b.tsv", sep="\t")
    assert len(load_files(tmp_path / "b.tsv", validation=tmp_path / "b.tsv").validation) == 20
    folder = tmp_path / "folder"
    folder.mkdir()
    pairs = [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("yes", "no", "yes")]
    Dataset.from_list(pairs).to_json(folder / "train.jsonl")
    Dataset.from_list(pairs[:1]).to_json(folder / "dev.jsonl")
    examples = load_files(folder)
    assert examples.labels == ("no", "yes")
    assert examples.validation[0] == {"text": "a", "pair": "b", "label": 1}


def _write(path, made):
    Dataset.from_list(made).to_json(path)
    return path


BAD_DATA = {
    "no text": ([{"words": "a", "label": 1}, {"words": "b", "label": 0}], "call the text"),
    "no label": ([{"text": "a"}, {"text": "b"}], "no column 'label'"),
    "one label": ([{"text": str(i), "label": 1} for i in range(4)], "one label only"),
    "empty text": ([{"text": None if i else "a", "label": i % 2} for i in range(20)], "empty text"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case, tmp_path):
    made, match = BAD_DATA[case]
    with pytest.raises(DataError, match=match):
        load_files(_write(tmp_path / "x.jsonl", made))


def test_more_bad_data(tmp_path):
    good = _write(tmp_path / "good.jsonl", rows(8))
    other = _write(tmp_path / "other.jsonl", [{"text": "a", "label": 5}])
    with pytest.raises(DataError, match="label 5"):
        load_files(good, validation=other)
    for path, match in ((tmp_path / "no.csv", "no file"), (tmp_path, "no train file")):
        with pytest.raises(DataError, match=match):
            load_files(path)
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(DataError, match="one kind"):
        load_files(tmp_path / "x.txt")
    (tmp_path / "broken.json").write_text("{ this is no json")
    with pytest.raises(DataError, match="can't be read as json"):
        load_files(tmp_path / "broken.json")
    with pytest.raises(DataError, match="can't be reached"):
        load_task("sst2")
    with pytest.raises(DataError, match="sst2"):
        load_task("sst")


@pytest.mark.parametrize(
    ("option", "value"),
    [("epochs", -1), ("lr", float("nan")), ("batch_size", 0), ("warmup", 1.5), ("precision", "int8")],
)
def test_bad_training_options(option, value):
    with pytest.raises(OptionError, match=option):
        TrainingOptions(**{option: value})


def test_metric():
    assert Accuracy().compute(predictions=[1, 0, 2], references=[1, 1, 2])["accuracy"] == pytest.approx(2 / 3)


def test_a_classifier_that_cannot_be_loaded(tmp_path, files):
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match="classifier"):
        finetune_and_report(str(tmp_path / "none"), load_files(files), OPTIONS, dataset="toy")
