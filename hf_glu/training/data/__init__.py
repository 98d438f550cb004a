"""A job's data and models: features, heads, sources, predictions."""
