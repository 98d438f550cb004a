"""FFN sites: where a model's feed-forward networks live, and how one is widened to ``[gate | up]``.

Nothing is imported here: Transformers' configurations are hooked while its activations are still being imported.
"""
