"""Measurements of a model: they are given one ready to run, and know nothing of how it was quantized."""
