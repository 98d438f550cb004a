"""Training a tokenizer on the data: byte-level BPE, with the special tokens that an objective needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hf_glu.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES = 256
SENTINELS = 100
# objective -> what its special tokens are called
SPECIAL: dict[str, dict[str, str]] = {
    "clm": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
    "mlm": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "span": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}
SPECIAL["hidden"] = SPECIAL["mlm"]  # an encoder's


def train_tokenizer(texts: Iterable[str], size: int, objective: str) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer (GPT-2's kind: it writes any text back as it was).

    Args:
        texts: to train on.
        size: tokens, all special ones included.
        objective: ``clm``, ``mlm`` or ``span``.

    Raises:
        OptionError: too few tokens for the bytes and the special ones.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = SPECIAL[objective]
    extra = [f"<extra_id_{number}>" for number in range(SENTINELS)] if objective == "span" else []
    special = list(dict.fromkeys([*names.values(), *extra]))
    if size < BYTES + len(special):
        raise OptionError(f"train_tokenizer={size} is too few: bytes and special tokens are {BYTES + len(special)}")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    frame = {"mlm": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"), "span": ("$A </s>", "$A </s> $B </s>")}
    frame["hidden"] = frame["mlm"]
    if objective in frame:
        single, pair = frame[objective]
        around = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]", "</s>") if name in special]
        made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False, extra_special_tokens=extra, **names
    )
