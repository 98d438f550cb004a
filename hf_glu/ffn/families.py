"""Which families have which FFN sites, as data. A new layout is a new row, a new family usually needs none.

A row names, relative to the module that holds them all (the site), where the parts of the FFN live. A site is a module
below which every path of the row leads to a module (or, in an expert bank, a 3-D parameter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["dense", "gated", "packed", "experts", "mixer"]


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """Where the parts of one FFN layout live.

    Attributes:
        layout: the row's name.
        kind: ``dense`` out(act(in(x))), which hf_glu can gate; ``gated`` out(act(gate(x)) * up(x)); ``packed`` the same
            with gate and up in one in-projection; ``experts`` a bank of 3-D parameters; ``mixer`` a state-space mixer,
            scan(x) * act(gate). All but the first are native.
        in_proj, act, out_proj: paths of the in-projection (the up-projection, if ``gate`` is given), activation and
            out-projection.
        gate: path of a separate gate projection.
        families: model types that are known to have this layout (others may).
        absent: a child that such a site never has.
        exclusive: whether only ``families`` have it: names that say nothing.
    """

    layout: str
    kind: Kind
    in_proj: str
    act: str
    out_proj: str
    gate: str | None = None
    families: tuple[str, ...] = ()
    absent: str | None = None
    exclusive: bool = False


def _row(
    layout: str, kind: Kind, paths: str, families: str, *, absent: str | None = None, exclusive: bool = False
) -> SiteRow:
    *gate, in_proj, act, out_proj = paths.split()
    return SiteRow(
        layout=layout,
        kind=kind,
        in_proj=in_proj,
        act=act,
        out_proj=out_proj,
        gate=gate[0] if gate else None,
        families=tuple(families.split()),
        absent=absent,
        exclusive=exclusive,
    )


def _bert(layout: str, modules: str, families: str) -> SiteRow:
    inner, outer = modules.split()
    return _row(layout, "dense", f"{inner}.dense {inner}.intermediate_act_fn {outer}.dense", families)


SITE_TABLE = (
    _row(
        "llama", "gated", "gate_proj up_proj act_fn down_proj", "llama mistral qwen2 qwen3 gemma gemma2 olmo2 smollm3"
    ),
    _row("llama4", "gated", "gate_proj up_proj activation_fn down_proj", "llama4"),
    _row("t5_v1_1", "gated", "wi_0 wi_1 act wo", "t5 mt5 umt5 longt5"),
    _row("cpmant", "gated", "w_in.w_0 w_in.w_1 w_in.act w_out", "cpmant"),
    _row("xlstm", "gated", "proj_up_gate proj_up act_fn proj_down", "xlstm"),
    _row("phi3", "packed", "gate_up_proj activation_fn down_proj", "phi3 glm glm4"),
    _row("zamba2", "packed", "gate_up_proj act_fn down_proj", "zamba2"),
    _row("modernbert", "packed", "Wi act Wo", "modernbert modernbert-decoder"),
    _row("granitemoe", "packed", "input_linear activation output_linear", "granitemoeshared granitemoehybrid"),
    _row("moshi", "packed", "fc1 activation_fn fc2", "moshi kyutai_speech_to_text", exclusive=True),
    _row("mixtral", "experts", "gate_up_proj act_fn down_proj", "mixtral qwen2_moe qwen3_moe olmoe"),
    _row("jetmoe", "experts", "input_linear.weight activation output_linear.weight", "jetmoe"),
    _bert("bert", "intermediate output", "bert roberta electra xlm-roberta camembert ernie layoutlm mpnet"),
    _bert("lilt", "layout_intermediate layout_output", "lilt"),
    _bert("lxmert", "lang_inter lang_output", "lxmert"),
    _bert("lxmert visual", "visn_inter visn_output", "lxmert"),
    _bert("q-former", "intermediate_query output_query", "blip_2_qformer instructblip_qformer"),
    _row("gpt2", "dense", "c_fc act c_proj", "gpt2 gpt_bigcode gpt_neo starcoder2 openai-gpt"),
    _row("t5", "dense", "wi act wo", "t5 mt5 umt5 longt5"),
    _row("distilbert", "dense", "lin1 activation lin2", "distilbert"),
    _row("xlm", "dense", "lin1 act lin2", "xlm flaubert"),
    _row("bart", "dense", "fc1 activation_fn fc2", "bart mbart marian pegasus opt xglm phi"),
    _row("nllb", "dense", "fc1 act fc2", "nllb-moe seamless_m4t"),
    _row("glmasr", "dense", "fc1 act_fn fc2", "glmasr"),
    _row("gpt_neox", "dense", "dense_h_to_4h act dense_4h_to_h", "gpt_neox falcon persimmon"),
    _row("bloom", "dense", "dense_h_to_4h gelu_impl dense_4h_to_h", "bloom"),
    _row("ctrl", "dense", "0 1 2", "ctrl", exclusive=True),
    _row("gptj", "dense", "fc_in act fc_out", "gptj codegen"),
    _row("albert", "dense", "ffn activation ffn_output", "albert"),
    _row("xlnet", "dense", "layer_1 activation_function layer_2", "xlnet"),
    _row("funnel", "dense", "linear_1 activation_function linear_2", "funnel"),
    _row("perceiver", "dense", "dense1 intermediate_act_fn dense2", "perceiver"),
    _row("prophetnet", "dense", "intermediate activation_fn output", "prophetnet"),
    _row("reformer", "dense", "dense.dense dense.act_fn output.dense", "reformer"),
    _row("nemotron", "dense", "up_proj act_fn down_proj", "nemotron", absent="gate_proj"),
    _row("mpt", "dense", "up_proj act down_proj", "mpt", absent="gate_proj"),
)

# The gate of a state-space mixer, in families without FFNs.
MIXER = _row("mamba", "mixer", "in_proj act out_proj", "mamba falcon_mamba mamba2")

# A bank of experts that may have no module for its activation (gpt-oss).
BANK = _row("bank", "experts", "gate_up_proj act_fn down_proj", "")

# Experts of ours, in an FFN's place.
OURS = _row("hf_glu", "experts", "banks.0.in_proj banks.0.acts.0 banks.0.out_proj", "")

# Modules that look like an FFN and are none: routers, gates and embeddings of patches.
NO_FFN = frozenset({"AXK2GateMLP", "ZayaRouterMLP", "NeoMMEPatchEmbeddings", "VoxtralRealtimeTextAdaRmsNorm"})

# Attributes in which modules other than FFNs (mixers, gated norms) keep the name that the config's field had.
NAME_ATTRIBUTES = ("activation", "hidden_act")

# Modules that look their activation up by the config's name in their forward: they get a config with a dense one.
LOOK_UP_IN_FORWARD = frozenset(
    f"{family}ClassificationHead" for family in ("BigBird", "ConvBert", "Mra", "Nystromformer", "RoFormer", "Yoso")
)

# The config fields that name an FFN's activation, in the order in which they are looked for; a family whose config has
# several, of which an earlier one is not the FFN's, has a row of its own.
ACTIVATION_FIELDS = (
    "feed_forward_proj",
    "hidden_activation",
    "hidden_act",
    "mlp_hidden_act",
    "activation_function",
    "ff_activation",
    "activation",
)

# The config fields that hold an FFN's width.
WIDTH_FIELDS = ("intermediate_size", "d_ff", "n_inner", "ffn_dim", "hidden_dim")

# Fields that Transformers derives from another one in ``__post_init__`` only, and so leaves stale when it is assigned.
DERIVED_FIELDS = {"feed_forward_proj": ("dense_act_fn", "is_gated_act")}
