"""Quantising a checkpoint: rounding, activation scaling, and writing it as compressed-tensors."""
