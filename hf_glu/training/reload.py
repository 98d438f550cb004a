"""A program for a fresh process: it predicts saved, tokenized data by a saved model.

usage: python -m hf_glu.training.reload FOLDER  (with order.json and data in it)
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

# what the process that asks writes, and what it reads afterwards
ORDER_FILE, DATA_FOLDER = "order.json", "data"
WEIGHTS_FILE, LOGITS_FILE, TEXTS_FILE = "weights.json", "logits.npy", "texts.json"


def main(scratch: str) -> None:
    """Write ``logits.npy``, or ``texts.json`` for a text-to-text model, as ``order.json`` asks."""
    import numpy as np
    import torch
    import transformers
    from datasets import load_from_disk

    import hf_glu  # noqa: F401  (registers)
    from hf_glu.checkpoint.jsonio import write_json
    from hf_glu.instruments.equality import align, checksums
    from hf_glu.tasks.table import MOVIES
    from hf_glu.training.data.features import Features
    from hf_glu.training.data.prediction import predict

    place = Path(scratch)
    order = json.loads((place / ORDER_FILE).read_text(encoding="utf-8"))
    torch.set_num_threads(order["threads"])
    model = getattr(transformers, order["auto_class"]).from_pretrained(order["folder"])
    write_json(place / WEIGHTS_FILE, checksums(model))
    align(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(order["folder"], trust_remote_code=False)
    data = load_from_disk(str(place / DATA_FOLDER))
    how = {key: order[key] for key in ("text", "joined", "new_tokens", "side")}
    task = replace(MOVIES, form=order["form"])
    features = Features(task=task, raw=None, data=data, owners=list(range(len(data))), **how)
    found = predict(model, features, tokenizer, batch_size=order["batch_size"])
    if order["text"]:
        (place / TEXTS_FILE).write_text(json.dumps(found), encoding="utf-8")
    else:
        np.save(place / LOGITS_FILE, found)


if __name__ == "__main__":
    main(sys.argv[1])
