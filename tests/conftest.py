"""Fixtures that several test files share."""

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import torch

import bench  # noqa: F401  sets PYTHONPATH, so that processes which tests start import this checkout too

# Kernels run natively on a GPU, else in Triton's interpreter, which must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint

# The same random cases for everybody, and no verdict by the clock: tests/fuzz.py draws new ones, by the other profile.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile("fuzz", hypothesis.settings.get_profile("fixed"), derandomize=False)
hypothesis.settings.load_profile("fixed")

# Small tensors gain nothing from a second thread, which on a busy machine waits for its turn thousands of times.
torch.set_num_threads(1)

# transformers knows InternLM3 from 5.23 on, which needs Python 3.11: below it, what compares with it is left out.
ORACLE = (
    "checkpoint/test_load.py", "checkpoint/test_gguf_convert.py", "compat/test_generate.py",
    "compat/test_generate_demo_model.py", "compat/test_generate_options.py", "compat/test_logits_processors.py",
    "model/test_config.py", "model/test_model.py", "tokenization/test_tools.py",
)  # fmt: skip
collect_ignore = [] if sys.version_info >= (3, 11) else list(ORACLE)


def pytest_report_header() -> list[str]:
    """Whether kernels run natively, and on which Triton: `make test TRITON=...` chooses."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: kernels run in the interpreter"
    left_out = f"left out, as transformers 5.23 needs Python 3.11: {', '.join(collect_ignore)}"
    triton = version("triton") if find_spec("triton") else "not installed"
    return [f"triton {triton}, {device}", *([left_out] if collect_ignore else [])]


@pytest.fixture(autouse=True)
def torch_seed() -> None:
    """A test's draws from torch's own generator do not depend on the tests that ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the demo model's checkpoint: a small chat model in InternLM3's format, converted only once."""
    return demo_model_checkpoint(progress=False)
