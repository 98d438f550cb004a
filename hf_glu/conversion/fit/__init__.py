"""Fitting the weights that a conversion can't copy, on calibration texts."""
