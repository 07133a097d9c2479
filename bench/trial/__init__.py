"""The trial: kernels and settings that only a GPU can decide on, timed next to the project's own in one harness.

`python -m bench.gpu --part trial` runs it. Layers of InternLM3-8B, each with weights and a cache of its own, run in one
CUDA graph, as a decode step runs them; a row is the time of a layer. Nothing here changes the runtime: a person reads
the rows and decides.
"""
