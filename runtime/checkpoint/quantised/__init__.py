"""Quantised checkpoints: what their files contain, and the weights that they stand for."""
