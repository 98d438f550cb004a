"""Tools that serve a model: many texts in one row, caches of their own, modules of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ecosystem import Make, ids, saved
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, ContinuousBatchingConfig, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PROMPTS = [ids(1, tokens, seed=tokens)[0].tolist() for tokens in (5, 9, 3)]
NEW = 6


def _alone(model: Any) -> dict[str, torch.Tensor]:
    """Return what each text goes on with, by itself."""
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return {
        str(number): model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
        for number, prompt in enumerate(PROMPTS)
    }


def continuous_batching(make: Make, folder: Path) -> tuple[Any, Any]:
    """``generate_batch``: all requests in one row, with a paged cache."""
    model = make()
    expected = _alone(model)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # else all the free memory
    model.set_attn_implementation("paged|eager")
    found = model.generate_batch(PROMPTS, config, small, progress_bar=False)
    if errors := [each.error for each in found.values() if each.error]:
        raise RuntimeError(errors[0])
    by_prompt = {tuple(each.prompt_ids): torch.tensor(each.generated_tokens) for each in found.values()}
    return {str(number): by_prompt[tuple(prompt)] for number, prompt in enumerate(PROMPTS)}, expected


class Row(nn.Module):
    """A linear layer as a server has one: its own class, which returns what it computes and nothing of a bias."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


def vllm(make: Make, folder: Path) -> tuple[Any, Any]:
    """vLLM's Transformers backend: the model is built of its config alone, its linear layers become the server's own,
    and each step is one row of all requests' new tokens, with positions, no mask, no cache, and the server's attention.
    """
    model = make()
    expected = _alone(model)
    source = saved(model, folder)
    config = AutoConfig.from_pretrained(source)
    config._attn_implementation = "vllm"  # as vLLM's backend sets it
    state: dict[str, Any] = {}

    def attention(module: nn.Module, query: Any, key: Any, value: Any, *_: Any, scaling: float, **__: Any) -> Any:
        out = torch.empty_like(query)
        for request, where in state["rows"].items():  # each request has keys and values of its own
            kept = state["cache"].setdefault((request, module.layer_idx), [])
            kept.append((key[:, :, where], value[:, :, where]))
            keys, values = (torch.cat(each, 2) for each in zip(*kept, strict=True))
            groups = query.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
            scores = query[:, :, where] @ keys.mT * scaling
            seen, new = keys.shape[2], scores.shape[2]
            scores = scores.masked_fill(torch.ones(new, seen).tril(seen - new) == 0, -torch.inf)
            out[:, :, where] = scores.softmax(-1) @ values
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["vllm"] = attention
    try:
        with torch.device("meta"):
            served = AutoModel.from_config(config)
        weights = {name.removeprefix(f"{model.base_model_prefix}."): w for name, w in model.state_dict().items()}
        served.load_state_dict({n: w for n, w in weights.items() if n in served.state_dict()}, assign=True)
        for module in served.modules():  # what is in no checkpoint, as vLLM makes it again
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_meta:
                    setattr(module, name, dict(model.base_model.named_buffers())[_path(served, module, name)])
        for name, module in list(served.named_modules()):
            if type(module) is nn.Linear:
                owner, _, attribute = name.rpartition(".")
                setattr(served.get_submodule(owner), attribute, Row(module))
        return _served(served.eval(), model.get_output_embeddings(), state), expected
    finally:
        del ALL_ATTENTION_FUNCTIONS["vllm"]


def _path(root: nn.Module, module: nn.Module, name: str) -> str:
    return next(f"{path}.{name}" if path else name for path, each in root.named_modules() if each is module)


@torch.no_grad()
def _served(model: Any, head: nn.Module, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    state["cache"] = {}
    texts = [list(prompt) for prompt in PROMPTS]
    fresh = [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW):
        row = [token for tokens in fresh for token in tokens]
        positions = [
            len(text) - len(new) + at for text, new in zip(texts, fresh, strict=True) for at in range(len(new))
        ]
        ends = torch.tensor([len(tokens) for tokens in fresh]).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        state["rows"] = {number: slice(*each) for number, each in enumerate(zip(starts, ends, strict=True))}
        hidden = model(
            input_ids=torch.tensor([row]), position_ids=torch.tensor([positions]), use_cache=False, return_dict=False
        )[0]
        chosen = head(hidden[0, [end - 1 for end in ends]]).argmax(-1).tolist()
        fresh = [[token] for token in chosen]
        texts = [[*text, token] for text, token in zip(texts, chosen, strict=True)]
    return {str(n): torch.tensor(text[len(p) :]) for n, (text, p) in enumerate(zip(texts, PROMPTS, strict=True))}
