"""TRL's trainers on a decoder whose FFNs have become experts: supervised fine-tuning, and DPO with ``--dpo``.

python recipes/sft.py --model MODEL --data TEXTS.jsonl [--experts "swiglu*4"] [--dpo]

A line of the data is {"messages": [...]} (the tokenizer has a chat template) or {"text": "..."}, for DPO {"prompt":
"...", "chosen": "...", "rejected": "..."}. TRL adds the balance loss, with the config's
``router_aux_loss_coef`` (0: none).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_glu
from hf_glu.config.extras import need
from hf_glu.errors import DataError

COLUMNS = {False: (("messages",), ("text",)), True: (("prompt", "chosen", "rejected"),)}


def read_rows(path: str, *, dpo: bool) -> list[dict[str, Any]]:
    """Return the rows of a ``.jsonl`` file, with the columns that are trained on.

    Raises:
        DataError: there is no such file, or a line lacks a column.
    """
    if not Path(path).is_file():
        raise DataError(f"{path} is no file: give one with a line of JSON for each example")
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(f"{path} has a line that is no JSON: {error}") from error
    for columns in COLUMNS[dpo]:
        if rows and all(isinstance(row, dict) and row.keys() >= set(columns) for row in rows):
            return [{name: row[name] for name in columns} for row in rows]
    wanted = " or ".join(", ".join(columns) for columns in COLUMNS[dpo])
    raise DataError(f"{path}: each line must have {wanted}")


def make_trainer(model: Any, tokenizer: Any, rows: list[dict[str, Any]], *, dpo: bool = False, **options: Any) -> Any:
    """Return TRL's trainer of ``model``; ``options`` are its config's.

    Raises:
        MissingPackageError: trl isn't installed.
    """
    need("trl", "datasets", what="recipes/sft.py")
    import trl
    from datasets import Dataset

    trainer, config = (trl.DPOTrainer, trl.DPOConfig) if dpo else (trl.SFTTrainer, trl.SFTConfig)
    # TRL would load the reference by the name of a checkpoint, which a model that was just converted has none of
    more = {"ref_model": copy.deepcopy(model)} if dpo else {}
    defaults = {"report_to": [], "use_cpu": not torch.cuda.is_available(), "bf16": torch.cuda.is_available()}
    arguments = config(**{**defaults, **options})
    return trainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **more)


def main(
    model: Annotated[str, typer.Option(help="Pretrained decoder: local folder or Hub id.")],
    data: Annotated[str, typer.Option(help="A .jsonl file.")],
    to: str = "swiglu",
    experts: str = "4",
    top_k: int = 2,
    dpo: bool = False,
    output: str = "runs/sft",
    steps: int = 50,
    batch_size: int = 8,
    accumulate: int = 1,
    lr: float = 2e-5,
    max_length: int = 512,
) -> None:
    """Convert, train with TRL, and save."""
    need("trl", "datasets", what="recipes/sft.py")
    rows = read_rows(data, dpo=dpo)
    decoder, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    report = hf_glu.convert(decoder, to, experts=experts, top_k=top_k)
    print(f"{experts} experts: max |difference| to the dense model {report.max_abs_difference:.1e}")
    trainer = make_trainer(
        decoder, tokenizer, rows, dpo=dpo, output_dir=output, max_steps=steps, learning_rate=lr, max_length=max_length,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    print(f"training loss {trainer.train().training_loss:.4f}")
    trainer.save_model(output)


if __name__ == "__main__":
    typer.run(main)
