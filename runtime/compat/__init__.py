"""transformers' two classes with their `forward`, `generate` and `from_pretrained`, over this runtime's engine."""
