"""Every tensor that the product makes names its dtype and device: torch.set_default_dtype changes no result."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def unnamed(source: str) -> list[str]:
    """The calls of torch's factories without dtype and device, as "line: call"."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"{call.lineno}: {ast.unparse(call)}"
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "torch"
        and call.func.attr in FACTORIES
        and not {"dtype", "device"} <= {keyword.arg for keyword in call.keywords}
        and not any(keyword.arg is None for keyword in call.keywords)  # **factory has both
    ]


@pytest.mark.parametrize("floor", ["kernels", "runtime"])
def test_every_tensor_names_its_dtype_and_device(floor):
    for path in sorted((ROOT / floor).rglob("*.py")):
        assert not unnamed(path.read_text(encoding="utf-8")), path.relative_to(ROOT)


def test_a_call_without_either_is_found():
    source = "torch.zeros(3)\ntorch.ones(3, dtype=x)\ntorch.full((2,), 1, dtype=x, device=y)\ntorch.empty(3, **factory)"
    assert unnamed(source) == ["1: torch.zeros(3)", "2: torch.ones(3, dtype=x)"]
