"""Which of Transformers' text families convert: a tiny model of each, converted, saved and loaded again."""
