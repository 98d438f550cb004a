"""The recipe with TRL's trainers, and what they train against the losses written out; needs `pip install trl`."""

import json

import pytest
import sft
import torch
from routed import ROWS, gradients, made
from taskdata import make_tokenizer, save_base
from torch.nn import functional
from transformers import TrainerCallback
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from typer.testing import CliRunner

from hf_glu.errors import DataError, MissingPackageError
from hf_glu.ffn.experts import find_experts

Z, BALANCE = 0.1, 0.5


class Note(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        self.found = gradients(model)


def trained(model, rows, tmp_path, parts, **options):
    trainer = sft.make_trainer(
        model, make_tokenizer(), rows, output_dir=str(tmp_path), max_steps=1, gradient_accumulation_steps=parts,
        per_device_train_batch_size=len(rows) // parts, max_grad_norm=0, learning_rate=0.0, save_strategy="no",
        disable_tqdm=True, train_sampling_strategy="sequential", **{"gradient_checkpointing": False, **options},
    )  # fmt: skip
    trainer.add_callback(note := Note())
    trainer.train()
    return note.found


def routers_losses(output, coefficient, rows):
    """Return what the routers' losses of one micro-batch are, of the model in evaluation, which injects none."""
    z = Z * sum(logits.logsumexp(-1).square().mean() for logits in output.router_logits)
    own = sum(own_balance(logits) for logits in output.router_logits) if coefficient is None else 0
    aux = load_balancing_loss_func(output.router_logits, 4, 2, torch.ones_like(rows))
    return z + BALANCE * own + (coefficient or 0) * aux


def own_balance(logits):
    scores = logits.softmax(-1)
    used = functional.one_hot(scores.topk(2).indices, 4).sum(1).float().mean(0)
    return 4 * (used * scores.mean(0)).sum()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("coefficient", [None, 0.0, 0.25])
def test_sft_trains_every_loss_once(coefficient, parts, checkpointing, tmp_path):
    pytest.importorskip("trl")
    model = made("llama", balance=BALANCE, z=Z).eval()
    expected = BALANCE if coefficient is None else coefficient  # the config's, unless TRL is told another
    for rows in ROWS.chunk(parts):
        output = model(input_ids=rows, output_router_logits=True)
        logits = output.logits[:, :-1].flatten(0, 1)
        main = functional.cross_entropy(logits, rows[:, 1:].flatten())
        ((main + routers_losses(output, expected, rows)) / parts).backward()
    wanted = gradients(model)
    model.zero_grad()
    rows = [{"input_ids": row.tolist()} for row in ROWS]
    found = trained(
        model.train(), rows, tmp_path, parts, router_aux_loss_coef=coefficient,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_dpo_trains_every_loss_once(coefficient, parts, tmp_path):
    pytest.importorskip("trl")
    model, tokenizer = made("llama", balance=BALANCE, z=Z).eval(), make_tokenizer()
    words = [word for word in tokenizer.get_vocab() if 3 < tokenizer.get_vocab()[word] < 50 and ":" not in word]
    rows = [
        {"prompt": " ".join(words[i : i + 3]), "chosen": " " + " ".join(words[i + 4 : i + 8]),
         "rejected": " " + " ".join(words[i + 9 : i + 13])} for i in range(4)
    ]  # fmt: skip
    for part in range(parts):
        mine = rows[part * 4 // parts : (part + 1) * 4 // parts]
        texts = [row["prompt"] + row[kind] for kind in ("chosen", "rejected") for row in mine]
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts])
        output = model(input_ids=ids, output_router_logits=True)
        each = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 2:, 0].sum(1)
        chosen, rejected = (each - each.detach()).chunk(2)
        main = -functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        expected = BALANCE if coefficient is None else coefficient
        ((main + routers_losses(output, expected, ids)) / parts).backward()
    wanted = gradients(model)
    model.zero_grad()
    found = trained(model.train(), rows, tmp_path, parts, dpo=True, router_aux_loss_coef=coefficient)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dpo", [False, True])
def test_the_recipe_converts_trains_and_saves(dpo, tmp_path):
    pytest.importorskip("trl")
    base = save_base(tmp_path / "base", "llama")
    row = {"prompt": "a good", "chosen": " film", "rejected": " dull"} if dpo else {"text": "a good film"}
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join([json.dumps(row)] * 8))
    import typer

    app = typer.Typer()
    app.command()(sft.main)
    told = ["--model", base, "--data", str(data), "--output", str(tmp_path / "out"), "--steps", "2", "--experts"]
    result = CliRunner().invoke(app, [*told, "swiglu*4", *(["--dpo"] if dpo else [])])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "training loss" in result.output
    saved = sft.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(find_experts(saved)) == 2
    assert saved.config.router_aux_loss_coef == 0.01


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_glu.config.extras.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'pip install "hf_glu\[trl,train\]"'):
        sft.make_trainer(None, None, [])
    with pytest.raises(DataError, match="no file"):
        sft.read_rows(str(tmp_path / "none"), dpo=False)
    (tmp_path / "rows").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="messages or text"):
        sft.read_rows(str(tmp_path / "rows"), dpo=False)
    (tmp_path / "rows").write_text("a\n")
    with pytest.raises(DataError, match="no JSON"):
        sft.read_rows(str(tmp_path / "rows"), dpo=True)
