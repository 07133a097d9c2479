"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from internlm3.runtime.standin import standin_checkpoint


@pytest.fixture(scope="session")
def standin() -> Path:
    """The folder of the stand-in checkpoint: a real small chat model in InternLM3's format, converted once a machine."""
    return standin_checkpoint(progress=False)
