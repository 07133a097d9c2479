"""InternLM3's conformance folder: a small checkpoint, inputs, and the logits that every runtime must compute from them.

`python -m bench.conformance write` makes the folder, `check` compares a runtime's logits with the expected ones.
"""
