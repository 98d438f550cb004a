"""Comparing variants of a model, each with several seeds: classifiers on a task, language models on a text."""
