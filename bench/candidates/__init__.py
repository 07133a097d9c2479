"""Candidates for kernels/ that are written in Gluon, which has no interpreter: only a GPU can show their values.

Tests run the ring's source on a CPU, with a stand-in for Gluon, and audit what it compiles to. It moves into kernels/
together with a record of the trial (`python -m bench.gpu --part trial`) in which it is right and faster. Until then
nothing of the runtime uses it. `reference` says what the candidates compute.
"""

from typing import Any

import torch

from . import reference


def for_device(device: torch.device) -> Any:
    """The candidates on a GPU; anywhere else what they compute, in PyTorch. Gluon is imported only if it is used."""
    if device.type != "cuda":
        return reference
    from . import ring

    return ring
