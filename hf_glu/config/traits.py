"""What a config says of its model's text, whatever the family calls it: None where it says nothing.

Families differ in which attributes they have at all (XLNet's positions are -1, Funnel has no end-of-sequence token),
and composite models (Gemma 3) keep them in the config of their text part.
"""

from __future__ import annotations

from typing import Any

_POSITIONS = ("max_position_embeddings", "n_positions")
# whose first token is at the position after the padding token's id, so that as many of the table's rows are never read
_AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
_RELATIVE = "relative_attention_num_buckets"  # T5's: its n_positions is no limit


def text_config(config: Any) -> Any:
    """Return the config of a model's text part: its own, where there is no such part, or there are several."""
    try:
        return config.get_text_config()
    except ValueError:
        return config


def vocabulary(config: Any) -> int | None:
    """Return how many token ids there are."""
    return _number(text_config(config), "vocab_size")


def longest_text(config: Any) -> int | None:
    """Return how many tokens the model's positions are made for; None: any number."""
    text = text_config(config)
    if getattr(text, _RELATIVE, None):
        return None
    rows = next((found for name in _POSITIONS if (found := _number(text, name))), None)
    if rows and getattr(text, "model_type", None) in _AFTER_PADDING:
        padding = token_id(text, "pad_token_id")
        return rows - (1 if padding is None else padding) - 1
    return rows


def cut_at(config: Any, tokenizer: Any, most: int) -> int:
    """Return after how many tokens a text is cut: what the model and its tokenizer read, ``most`` at most."""
    return min(most, tokenizer.model_max_length, longest_text(config) or most)


def token_id(config: Any, name: str) -> int | None:
    """Return a special token's id, such as of ``pad_token_id``: the config's own, else its text part's."""
    for each in (config, text_config(config)):
        value = getattr(each, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if type(value) is int and value >= 0:
            return value
    return None


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if type(value) is int and value > 0 else None
