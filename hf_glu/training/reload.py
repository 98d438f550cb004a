"""Run as a module in a fresh process: the logits of a saved classifier on saved, tokenized data.

usage: python -m hf_glu.training.reload MODEL DATA OUTPUT
"""

from __future__ import annotations

import sys


def main(model_folder: str, data_folder: str, output: str) -> None:
    """Write the logits of the classifier in ``model_folder`` on the dataset in ``data_folder`` to ``output``."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import hf_glu  # noqa: F401  (registers)
    from hf_glu.training.loop import predict

    model = AutoModelForSequenceClassification.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    torch.save(predict(model, load_from_disk(data_folder), tokenizer), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
