"""Steering: shifting a model's gates, by hand (`by_hand`) or along what tells two kinds of text apart (`fitting`)."""

METHODS = ("diffmean", "pca", "probe", "learned")  # of fitting
