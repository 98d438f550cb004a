"""Pico models of every family and head that the tests run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCAB, HIDDEN, WIDTH, LAYERS, HEADS = 61, 16, 40, 2, 2


@dataclass(frozen=True)
class Family:
    """One family: its config class and arguments, the config field of its activation, and its heads."""

    config: str
    arguments: dict[str, Any]
    field: str
    dense: str
    exact: str
    heads: tuple[str, ...]

    def make_config(self, **more: Any) -> Any:
        return getattr(transformers, self.config)(**{**self.arguments, "vocab_size": VOCAB, **more})

    def make(self, head: str | None = None, seed: int = 0, **more: Any) -> Any:
        torch.manual_seed(seed)
        model = getattr(transformers, head or self.heads[0])(self.make_config(**more)).eval()
        for parameter in model.parameters():  # biases and norms start at 0 and 1: move them, to see them handled
            if parameter.ndim == 1:
                parameter.data += 0.05 * torch.randn_like(parameter)
        return model


_BERT = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_T5 = {"d_model": HIDDEN, "d_ff": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "d_kv": 8, "pad_token_id": 0}
_T5["decoder_start_token_id"] = 0
_BART = {"d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS}
_BART |= {"decoder_attention_heads": HEADS, "encoder_ffn_dim": WIDTH, "decoder_ffn_dim": WIDTH}
_BART |= {"max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}
_OPT = {"hidden_size": HIDDEN, "ffn_dim": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_GPT2 = {"n_embd": HIDDEN, "n_inner": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _heads(prefix: str, *heads: str) -> tuple[str, ...]:
    return tuple(prefix + head for head in heads)


_CLASSIFY = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

FAMILIES = {
    "bert": Family(
        "BertConfig", _BERT | {"max_position_embeddings": 64}, "hidden_act", "gelu", "geglu",
        _heads("Bert", "ForMaskedLM", "Model", "ForPreTraining", "LMHeadModel", "ForNextSentencePrediction",
               "ForMultipleChoice", *_CLASSIFY),
    ),
    "gpt2": Family(
        "GPT2Config", _GPT2, "activation_function", "gelu_new", "geglu_new",
        _heads("GPT2", "LMHeadModel", "Model", "DoubleHeadsModel", *_CLASSIFY),
    ),
    "t5": Family(
        "T5Config", _T5, "feed_forward_proj", "relu", "reglu",
        _heads("T5", "ForConditionalGeneration", "Model", "EncoderModel", "ForSequenceClassification",
               "ForTokenClassification", "ForQuestionAnswering"),
    ),
    "roberta": Family(
        "RobertaConfig", _BERT | {"max_position_embeddings": 66}, "hidden_act", "gelu", "geglu",
        _heads("Roberta", "ForMaskedLM", "Model", "ForCausalLM", *_CLASSIFY),
    ),
    "distilbert": Family(
        "DistilBertConfig",
        {"dim": HIDDEN, "hidden_dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_position_embeddings": 64},
        "activation", "gelu", "geglu", _heads("DistilBert", "ForMaskedLM", "Model", *_CLASSIFY),
    ),
    "electra": Family(
        "ElectraConfig", _BERT | {"embedding_size": HIDDEN, "max_position_embeddings": 64}, "hidden_act", "gelu",
        "geglu", _heads("Electra", "ForMaskedLM", "Model", "ForPreTraining", *_CLASSIFY),
    ),
    "opt": Family(
        "OPTConfig", _OPT | {"max_position_embeddings": 64, "word_embed_proj_dim": HIDDEN}, "activation_function",
        "relu", "reglu", _heads("OPT", "ForCausalLM", "Model", "ForSequenceClassification", "ForQuestionAnswering"),
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig", _BERT | {"max_position_embeddings": 64}, "hidden_act", "gelu", "geglu",
        _heads("GPTNeoX", "ForCausalLM", "Model", *_CLASSIFY),
    ),
    "bart": Family(
        "BartConfig", _BART, "activation_function", "gelu", "geglu",
        _heads("Bart", "ForConditionalGeneration", "Model", "ForSequenceClassification", "ForQuestionAnswering",
               "ForCausalLM"),
    ),
}  # fmt: skip
HEADS_OF_ALL = [(family, head) for family, made in FAMILIES.items() for head in made.heads]

_T5_V1_1, _PADDED = _T5 | {"feed_forward_proj": "gated-gelu"}, _BERT | {"pad_token_id": 0}
_MIXTRAL = _BERT | {"num_key_value_heads": 2, "num_local_experts": 2}

# config class, its arguments, model class, activation field
NATIVE = {
    "llama": ("LlamaConfig", _BERT, "LlamaForCausalLM", "hidden_act"),
    "t5_v1_1": ("T5Config", _T5_V1_1, "T5ForConditionalGeneration", "feed_forward_proj"),
    "phi3": ("Phi3Config", _PADDED, "Phi3ForCausalLM", "hidden_act"),
    "modernbert": ("ModernBertConfig", _PADDED, "ModernBertForMaskedLM", "hidden_activation"),
    "mixtral": ("MixtralConfig", _MIXTRAL, "MixtralForCausalLM", "hidden_act"),
}


def make_native(name: str, **more: Any) -> Any:
    config, arguments, head, _ = NATIVE[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**{**arguments, "vocab_size": VOCAB, **more})
    return getattr(transformers, head)(made).eval()
