"""Coverage: a tiny model of each of Transformers' text families, converted, saved and loaded again."""
