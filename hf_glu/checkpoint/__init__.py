"""A model's files: loading, converting, streaming, where they come from, and whether two agree."""
