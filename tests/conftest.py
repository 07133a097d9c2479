"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch
from internlm3.runtime.standin import standin_checkpoint

# pytest-xdist's workers share the cores: more threads than cores make every one of them many times slower.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(scope="session")
def standin() -> Path:
    """The stand-in checkpoint's folder: a real small chat model in InternLM3's format, converted once a machine."""
    return standin_checkpoint(progress=False)
