"""Dose and response of steering a language model by its gates, beside a prompt and the residual stream."""
