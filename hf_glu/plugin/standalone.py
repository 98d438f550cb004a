"""Models with our activations where there is no plugin: the base of the classes in a checkpoint's own code.

With what it imports, this module travels with a checkpoint (:mod:`hf_glu.publishing.hub.flat`). It changes nothing of
Transformers: a stock constructor finds the dense activation in its config and builds a dense model, whose configs then
say again what they said, and whose FFNs are built as the plugin builds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_glu.activation import registry
from hf_glu.compat.of_models import CAN_SET_ATTENTION, CAN_SET_EXPERTS, FINALIZE_LOADING, INITIALIZED
from hf_glu.config.glu import GluConfig
from hf_glu.ffn.build import build_ffns
from hf_glu.ffn.completeness import refuse_losses
from hf_glu.ffn.config_fields import (
    activation_fields,
    activation_of,
    configs_of,
    field_default,
    plain_name,
    sync_derived,
    write_field,
)
from hf_glu.ffn.identify import governing_configs
from hf_glu.ffn.pretrained import initialize
from hf_glu.ffn.sites import convertible_sites
from hf_glu.ffn.tensor_parallel import replicate
from hf_glu.instruments.equality import align

OWED = "_hf_glu_owed"  # in a config that says dense for now, and in copies of it: our activation in each field


class GluModel(PreTrainedModel):
    """Stands before a stock class: ``class BertModel(GluModel, transformers.BertModel)``.

    Args:
        config: of the model; what it says of hf_glu is validated.
        args, kwargs: of the stock class.
    """

    _constructed = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        try:
            say_dense(config)
            super().__init__(config, *args, **kwargs)
        finally:
            say_ours(config)
        for module in self.modules():
            for value in vars(module).values():
                if isinstance(value, PreTrainedConfig):
                    say_ours(value)  # T5's stacks have copies
        self._constructed = True
        self.post_init()

    def post_init(self) -> None:
        """Build the FFNs, the innermost models first; in the midst of the constructor, do nothing yet."""
        if not self._constructed:
            return
        for model in reversed([module for module in self.modules() if isinstance(module, PreTrainedModel)]):
            place_activations(model)
            built = build_ffns(model, model.config)
            for site in built:
                for linear in (site.in_proj, site.out_proj):  # a stock model inside has initialised what they were
                    INITIALIZED.put(linear, False)
            if model is self:
                super().post_init()
            replicate(model, built)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise our modules, also those in stock models inside, and leave the others to the stock class."""
        for module in self.modules():
            initialize(module)
        super().initialize_weights()

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        refuse_losses(model, load_config, loading_info)
        info = FINALIZE_LOADING.of(PreTrainedModel)(model, load_config, loading_info)
        align(model)
        return info

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: checkpoints name and pack the weights as the stock class does, and are read as its own are."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(CAN_SET_ATTENTION.of(_stock(cls))())  # which reads the source of the class's module

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(CAN_SET_EXPERTS.of(_stock(cls))())


def _stock(model_class: type[nn.Module]) -> Any:
    return next(base for base in model_class.__mro__ if base.__module__.startswith("transformers."))


def place_activations(model: nn.Module) -> None:
    """Put our activations, as yet unconfigured, where the plugin's stock constructors would have put them."""
    for site in convertible_sites(model):
        name = activation_of(governing_configs(model, site)[0], site.stack)
        if site.activation is None and registry.find(name):
            site.set_act(registry[str(name)].factory())


def say_dense(config: Any) -> None:
    """Make a config name the dense activation wherever it names one of ours, until `say_ours`."""
    for part in configs_of(config):
        sync_derived(part)
        fields = {field: plain_name(getattr(part, field)) for field in activation_fields(part)}
        owed = {field: name for field, name in fields.items() if registry.find(name)}
        if owed:
            part.__dict__[OWED] = owed
        for field in owed:
            write_field(part, field, GluConfig.of(part).dense_act or field_default(part, field))


def say_ours(config: Any) -> None:
    """Make a config, or a copy that was made meanwhile, name our activation again."""
    for part in configs_of(config):
        for field, name in part.__dict__.pop(OWED, {}).items():
            write_field(part, field, name)
