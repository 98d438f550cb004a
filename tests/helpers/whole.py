"""What there is of a model that a conversion could leave changed; families whose FFNs add the residual themselves."""

import transformers

RESIDUAL = {
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=61)
    ),
    "mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=61, max_seq_len=64)
    ),
}


def structure(model):
    """Everything of a model that a conversion could leave changed."""
    hooks = {
        name: [len(vars(module)[key]) for key in sorted(vars(module)) if key.endswith("_hooks")]
        for name, module in model.named_modules()
    }
    modules = {name: (type(module), id(module), module.training) for name, module in model.named_modules()}
    kept = {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters(remove_duplicate=False)}
    attributes = {name: set(vars(module)) - {"_hf_glu_paths"} for name, module in model.named_modules()}
    configs = {name: m.config.to_dict() for name, m in model.named_modules() if hasattr(m, "config")}
    names = model.name_or_path, model.config.name_or_path
    return hooks, modules, kept, attributes, configs, names
