"""Kernels in the common form: the Definition, Workload, Solution and Trace of FlashInfer-Bench and SOL-ExecBench.

`python -m bench.common_form run` checks and times a solution, `export` writes InternLM3-8B's ops as definitions.
"""
