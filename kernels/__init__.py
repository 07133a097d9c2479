"""Floor 1: tensors in, tensors out. The ops in Triton; `reference.py` says the same names in plain PyTorch."""
