"""Small datasets in the schema of every task, in the layout that they have on the Hub, and models that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from pico import FAMILIES, make_native
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_glu.tasks import SUITES, TASKS

GOOD, BAD = ("fine", "lovely", "great"), ("dull", "awful", "poor")
FILLER = ("film", "a", "the", "was", "it", "very")
NAMES = ("Anna", "Boston", "Carl")
WORDS = "the film was a fine, lovely or rather dull thing; nobody knew why.".split()
SPLITS = {"train": 16, "validation": 8, "validation_matched": 8, "validation_mismatched": 8}


def pick(generator, choices):
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


def make_texts(count: int = 40, seed: int = 0) -> list[str]:
    """Return short texts of a few words, for a language model."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, int(draw.integers(3, 40)))) for _ in range(count)]


def sentence(generator, label=0):
    words = [pick(generator, GOOD if label else BAD)] + [pick(generator, FILLER) for _ in range(5)]
    return " ".join(words)


def _copa(text, label, number, generator):
    return {"premise": text, "choice1": sentence(generator, 1 - label), "choice2": sentence(generator, label),
            "question": pick(generator, ("cause", "effect")), "label": label, "idx": number}  # fmt: skip


def _multirc(text, label, number, generator):
    idx = {"paragraph": number // 4, "question": number // 2, "answer": number}
    return {"paragraph": f"<b>Sent 1: </b>{text}<br>", "question": "was it", "answer": sentence(generator, label),
            "idx": idx, "label": label}  # fmt: skip


def _record(text, label, number, generator):
    return {
        "passage": f"{text} {' '.join(NAMES)}\n@highlight\nit was",
        "query": "the film was by @placeholder",
        "entities": [*NAMES, NAMES[0]],
        "answers": [NAMES[label]],
        "idx": {"passage": number, "query": number},
    }


def _wic(text, label, number, generator):
    return {"word": "film", "sentence1": "the film was", "sentence2": f"a film {text}", "start1": 4, "end1": 8,
            "start2": 2, "end2": 6, "label": label, "idx": number}  # fmt: skip


def _wsc(text, label, number, generator):
    return {"text": f"Anna was {text} it", "span1_index": 0, "span1_text": "Anna", "span2_index": 8,
            "span2_text": "it", "label": label, "idx": number}  # fmt: skip


def _brown_pos(text, label, number, generator):
    tags = TASKS["brown_pos"].labels
    return {"tokens": text.split(), "label": [tags[(label + at) % 2] for at in range(len(text.split()))]}


SPECIAL = {"brown_pos": _brown_pos, "copa": _copa, "multirc": _multirc, "record": _record, "wic": _wic, "wsc": _wsc}


def make_rows(name: str, count: int, *, labeled: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    task, generator = TASKS[name], torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        label = number % max(2, len(task.labels))
        text = sentence(generator, label % 2)
        if name in SPECIAL:
            row = SPECIAL[name](text, label, number, generator)
        else:
            row = {column: text if at == 0 else sentence(generator) for at, column in enumerate(task.columns)}
            row |= {"label": 2.5 * label + 0.2 * (number % 4) if task.form == "regression" else label, "idx": number}
        if not labeled:
            row |= {"label": -1.0 if task.form == "regression" else -1}
            if name == "record":
                row["answers"] = []
        made.append(row)
    return made


def write_dataset(folder: Path, name: str) -> Path:
    """Write the splits of a task as parquet files in ``folder/CONFIG``, as they are on the Hub."""
    task = TASKS[name]
    place = folder / task.config
    place.mkdir(parents=True, exist_ok=True)
    splits = {split: count for split, count in SPLITS.items() if split in (*task.validation, "train")}
    for seed, (split, count) in enumerate(({} if task.model_of else splits).items()):
        Dataset.from_list(make_rows(name, count, seed=seed)).to_parquet(place / f"{split}-00000-of-00001.parquet")
    for split in task.test:
        rows = make_rows(name, 6, labeled=False, seed=9)
        Dataset.from_list(rows).to_parquet(place / f"{split}-00000-of-00001.parquet")
    return folder


def vocabulary(*, every: bool = False) -> list[str]:
    """Return the words that the tests' tokenizer knows; those of the many classes of open_nlu only if ``every``."""
    words = {"[PAD]": None, "[EOS]": None, "[UNK]": None}
    for task in TASKS.values():
        if task.name in SUITES["open_nlu"] and not task.name.startswith("movie_") and not every:
            continue
        words |= dict.fromkeys([task.name, *(word for text in task.texts for word in text.split())])
    words |= dict.fromkeys([*GOOD, *BAD, *FILLER, *NAMES, "*", "#", "by", "sentence:", "sentence1:", "sentence2:"])
    words |= dict.fromkeys(f"{number / 5:.1f}" for number in range(26))
    return list(words)


def make_tokenizer(*, end: bool = False, every: bool = False) -> PreTrainedTokenizerFast:
    numbers = {word: number for number, word in enumerate(vocabulary(every=every))}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        inner.post_processor = processors.TemplateProcessing(
            single="$A [EOS]", pair="$A [EOS] $B [EOS]", special_tokens=[("[EOS]", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", model_max_length=64
    )


BASES = {
    "bert": "BertModel",
    "gpt2": "GPT2Model",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "gpt2_lm": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
}


def save_base(folder: Path, family: str = "bert", *, every: bool = False, **more: Any) -> str:
    """Save a pico base model with its tokenizer, which knows the labels of ``every`` task; return the folder."""
    tokenizer = make_tokenizer(end=family in ("t5", "bart"), every=every)
    size = len(tokenizer)
    if family.startswith("gpt2"):
        more = {"pad_token_id": None, "eos_token_id": 1, "bos_token_id": 1, **more}
    if family == "bart":
        more = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1, "forced_eos_token_id": 1, **more}
    if family == "llama":
        model = make_native("llama", vocab_size=size, pad_token_id=0, eos_token_id=2, **more)
    else:
        model = FAMILIES[family.removesuffix("_lm")].make(BASES[family], vocab_size=size, **more)
    model.save_pretrained(folder)
    if family.startswith("gpt2"):
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return str(folder)


ENTITIES = {"Anna": ("Carl", "PER"), "Boston": ("by", "LOC")}  # first word: second, kind


def several_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return texts with the classes that their words have, perhaps none."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        words = [pick(generator, GOOD)] * (number % 2) + [pick(generator, BAD)] * (number // 2 % 2)
        words += [pick(generator, FILLER) for _ in range(2 + number % 3)]
        classes = ["so good"] * (number % 2) + ["Bad"] * (number // 2 % 2)
        made.append({"text": " ".join(words), "label": classes})
    return made


def tagged_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return words with tags: names of two words are entities."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        words, tags = [], []
        for _ in range(2 + number % 4):
            word = pick(generator, (*ENTITIES, *FILLER))
            second, kind = ENTITIES.get(word, (None, None))
            words += [word, second] if second else [word]
            tags += [f"B-{kind}", f"I-{kind}"] if second else ["O"]
        made.append({"tokens": words, "tags": tags})
    return made


def written_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return texts, and for each another to write: whose film it was, by its first word."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        name = pick(generator, NAMES)
        words = [pick(generator, FILLER) for _ in range(2)]
        made.append({"source": " ".join([name, *words]), "target": f"a film by {name}"})
    return made


OWN_ROWS = {"multi": several_rows, "tokens": tagged_rows}
