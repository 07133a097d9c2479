"""Every op has, by the same name and signature, a Triton side, a reference side and a test."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from internlm3 import kernels
from internlm3.kernels import reference


def test_the_names_are_the_same():
    functions = {name for name, _ in inspect.getmembers(reference, inspect.isfunction) if not name.startswith("_")}
    assert functions == set(kernels.__all__)


@pytest.mark.parametrize("name", kernels.__all__)
def test_the_signatures_are_the_same(name):
    triton, plain = (inspect.signature(getattr(side, name)).parameters.values() for side in (kernels, reference))
    assert [(p.name, p.kind, p.default) for p in triton] == [(p.name, p.kind, p.default) for p in plain]


@pytest.mark.parametrize("name", kernels.__all__)
def test_the_op_is_tested(name):
    """By random cases that say whose they are, so that tests/fuzz.py finds them."""
    tests = (path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    random = rf'^@pytest.mark.op\(name="{name}"\)\n(@.*\n)*@settings'
    assert any(re.search(random, text, re.MULTILINE) for text in tests), f"no file here tests {name} at random"


def test_no_file_hides_an_op():
    """Importing kernels/<op>.py would bind the module where the op should be."""
    files = {path.stem for path in Path(reference.__file__).parent.glob("*.py")}
    assert not files & set(kernels.__all__)


def test_the_reference_needs_no_triton():
    program = "import sys; from internlm3.kernels import reference; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_one_place_chooses_the_backend():
    assert kernels.for_device(torch.device("cpu")) is reference
    assert kernels.for_device(torch.device("cuda", 1)) is kernels
    with pytest.raises(ValueError, match="no ops for device 'meta': move the model to 'cpu' or 'cuda'"):
        kernels.for_device(torch.device("meta"))


def test_unknown_ops_are_named():
    with pytest.raises(AttributeError, match="no attribute 'conv'; its ops are advance, embed"):
        kernels.conv  # noqa: B018
