"""transformers' two classes with their `forward` and `generate`, for code that was written for them."""
