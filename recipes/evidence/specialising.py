"""How far experts divide newsgroups among them: the mutual information of expert and newsgroup.

With n(e, g) the tokens of newsgroup g that an expert e of one layer is chosen for, p = n / sum n, and H entropies:

    I = sum p(e, g) log(p(e, g) / (p(e) p(g)))        2 I / (H(e) + H(g)), the mean of the layers

0 is no division, 1 that each knows the other. What chance gives is subtracted: the same with the newsgroups dealt
anew to the texts, since a text's tokens go to few experts whatever it is of.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import torch

from hf_glu.ffn.modes import keeping_modes
from hf_glu.instruments.routing import expert_statistics
from hf_glu.tasks.loading import load_task
from hf_glu.tasks.table import find_task
from hf_glu.training.comparing.trials import TrialRun
from hf_glu.training.run import Findings
from recipes.evidence.presets import BLOCK
from recipes.evidence.readers import Row

TEXTS, DEALS = 400, 20
Counts = np.ndarray[Any, np.dtype[np.float64]]


class ExpertTrial(TrialRun):
    """A run whose results say how far its experts divide newsgroups among them."""

    def facts(self) -> Findings:
        """Return what the run found, and `division` of the validation split of the newsgroups beside the text."""
        found: Any = super().facts()
        if found["experts"]:
            rows = load_task(find_task("newsgroups"), Path(self.job.data[0]).parents[1])["validation"]
            found["newsgroups"] = division(self.model, self.tokenizer, list(rows))
        return found  # type: ignore[no-any-return]


def division(model: Any, tokenizer: Any, rows: list[Row], *, texts: int = TEXTS, seed: int = 0) -> dict[str, float]:
    """Return the normalised mutual information of expert and label, ``found`` and what ``chance`` gives.

    Args:
        model: with experts of ours.
        tokenizer: its own; the first `BLOCK` tokens of each text are read.
        rows: with ``text`` and ``label``.
        texts: how many of them, chosen at random.
        seed: of that choice and of the deals.
    """
    random = Random(seed)
    chosen = random.sample(rows, min(texts, len(rows)))
    counts = choices(model, tokenizer, [str(row["text"]) for row in chosen])
    labels = [str(row["label"]) for row in chosen]
    dealt = [by_label(counts, random.sample(labels, len(labels))) for _ in range(DEALS)]
    found, chance = mean_information(by_label(counts, labels)), fmean(mean_information(each) for each in dealt)
    return {"found": found, "chance": chance, "above chance": found - chance}


@torch.no_grad()
def choices(model: Any, tokenizer: Any, texts: list[str]) -> Counts:
    """Return how many tokens of each text each expert of each layer is chosen for: ``[layers, texts, experts]``."""
    device = next(model.parameters()).device
    with keeping_modes(model, training=False), expert_statistics(model) as statistics:
        for number, text in enumerate(texts):
            statistics.label = str(number)
            ids = tokenizer(text, truncation=True, max_length=BLOCK, return_tensors="pt")["input_ids"].to(device)
            if ids.shape[1]:
                model(input_ids=ids)
    found = statistics.to_dict()["rows"]
    layers = list(dict.fromkeys(row["layer"] for row in found))
    counts = np.zeros((len(layers), len(texts), len(found[0]["load"])))
    for row in found:
        counts[layers.index(row["layer"]), int(row["label"])] = np.asarray(row["load"]) * row["tokens"]
    return counts


def by_label(counts: Counts, labels: list[str]) -> Counts:
    """Return the sums over the texts of each label: ``[layers, labels, experts]``."""
    known = sorted(set(labels))
    belongs = np.asarray([[label == each for label in labels] for each in known], dtype=np.float64)
    return np.einsum("gt,lte->lge", belongs, counts)


def mean_information(counts: Counts) -> float:
    """Return the normalised mutual information of label and expert, the mean of the layers."""
    return fmean(information(layer) for layer in counts)


def information(counts: Counts) -> float:
    """Return the normalised mutual information of rows and columns of a table of counts."""
    from scipy.stats import entropy  # in nats

    p = counts / counts.sum()
    rows, columns = p.sum(1), p.sum(0)
    both = float(entropy(rows) + entropy(columns))
    return 2 * (both - float(entropy(p.ravel()))) / both if both else 0.0
