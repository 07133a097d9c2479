"""Write a model's ops in the common form: definitions, workloads and solutions that call ours."""

import inspect
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from internlm3.kernels import reference

from ..cases import DENSE, INTERNLM3_8B, Case, Size, cases
from ..timing import name_of

AUTHOR = "internlm3"
TOKENS = (1, 16)  # of decode steps; and of chunks of a prompt:
CHUNKS = (4, 32, 64, 512)

NORM = """
def norm_of(x, weight, eps):
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    # Rounding before the weight multiplies is InternLM3's order.
    return (wide * scale).to(x.dtype) * weight
"""
LINEAR = """
def linear(x, weight):
    return (x.float() @ weight.float().mT).to(x.dtype)
"""
GATED = """
def gated(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return (wide / (1 + torch.exp(-wide))).to(gate.dtype) * up
"""


class Op(NamedTuple):
    """An op whose arguments are tensors and numbers, and which returns one tensor.

    op_type: the common form's name of the kind, or ours. axes: of each argument in order, and of the result.
    """

    op_type: str
    meaning: str
    axes: dict[str, tuple[str, ...] | None]
    result: tuple[str, ...]
    helpers: str
    body: str


# Of a definition's name, such as gemm_n4096_k4096.
LETTERS = {"hidden": "h", "inputs": "k", "outputs": "n", "gate_and_up": "n", "intermediate": "i"}
ROWS, WEIGHT = ("tokens", "inputs"), ("outputs", "inputs")
OPS = {
    "rms_norm": Op(
        "rmsnorm",
        "RMSNorm: x / sqrt(mean(x^2) + eps) in float32, rounded, then times weight.",
        {"x": ("tokens", "hidden"), "weight": ("hidden",), "eps": None},
        ("tokens", "hidden"),
        NORM,
        "norm_of(x, weight, eps)",
    ),
    "swiglu": Op(
        "swiglu",
        "silu(gate) * up, silu in float32, rounded. The gate half comes first.",
        {"gate_up": ("tokens", "gate_and_up")},
        ("tokens", "intermediate"),
        GATED,
        "gated(gate_up)",
    ),
    "linear": Op(
        "gemm",
        "x @ weight^T, accumulated in float32.",
        {"x": ROWS, "weight": WEIGHT},
        ("tokens", "outputs"),
        LINEAR,
        "linear(x, weight)",
    ),
    "linear_add": Op(
        "linear_add",
        "residual + x @ weight^T; the product is accumulated in float32 and rounded before the sum.",
        {"x": ROWS, "weight": WEIGHT, "residual": ("tokens", "outputs")},
        ("tokens", "outputs"),
        LINEAR,
        "residual + linear(x, weight)",
    ),
    "rms_norm_linear": Op(
        "rms_norm_linear",
        "RMSNorm of x, rounded, then the product with weight^T.",
        {"x": ROWS, "norm": ("inputs",), "eps": None, "weight": WEIGHT},
        ("tokens", "outputs"),
        NORM + "\n" + LINEAR,
        "linear(norm_of(x, norm, eps), weight)",
    ),
    "rms_norm_swiglu": Op(
        "rms_norm_swiglu",
        "The first half of an MLP: RMSNorm of x, the product with weight^T, whose gate rows come first, then SwiGLU.",
        {"x": ROWS, "norm": ("inputs",), "eps": None, "weight": ("gate_and_up", "inputs")},
        ("tokens", "intermediate"),
        NORM + "\n" + LINEAR + "\n" + GATED,
        "gated(linear(norm_of(x, norm, eps), weight))",
    ),
}


def _code(op: Op) -> str:
    return f"import torch\n\n{op.helpers}\n\ndef run({', '.join(op.axes)}):\n    return {op.body}\n"


def export(folder: Path, size: Size = INTERNLM3_8B, model: str = "internlm3-8b") -> list[Path]:
    """Writes the folders definitions, workloads and solutions; returns the files, three for each definition."""
    files: dict[str, list[Path]] = {}
    lines: dict[str, list[str]] = {}
    for case in cases(size, batches=TOKENS, chunks=CHUNKS, contexts=(max(CHUNKS),)):
        if case.op not in OPS or case.stored != DENSE:
            continue
        arguments = case.arguments(torch.device("meta"))
        definition = _definition(case, arguments, model)
        name, op_type = definition["name"], definition["op_type"]
        if name not in files:
            files[name] = [
                folder / "definitions" / op_type / f"{name}.json",
                folder / "workloads" / op_type / f"{name}.jsonl",
                folder / "solutions" / AUTHOR / op_type / name / f"{AUTHOR}_{name}.json",
            ]
            for path in files[name]:
                path.parent.mkdir(parents=True, exist_ok=True)
            files[name][0].write_text(json.dumps(definition, indent=2) + "\n", "utf-8")
            files[name][2].write_text(json.dumps(_solution(case.op, name), indent=2) + "\n", "utf-8")
        lines.setdefault(name, []).append(_workload(case, arguments, name))
    for name, (_, workloads, _) in files.items():
        workloads.write_text("".join(f"{line}\n" for line in dict.fromkeys(lines[name])), "utf-8")
    return [path for paths in files.values() for path in paths]


def _axes(op: Op, arguments: dict[str, Any], result: Tensor) -> Iterator[tuple[str, int]]:
    shapes = [(axes, arguments[name].shape) for name, axes in op.axes.items() if axes]
    for axes, shape in [*shapes, (op.result, result.shape)]:
        yield from zip(axes, shape, strict=True)


def _definition(case: Case, arguments: dict[str, Any], model: str) -> dict[str, Any]:
    op, dtype = OPS[case.op], name_of(case.dtype)
    sizes = dict(_axes(op, arguments, getattr(reference, case.op)(**arguments)))
    constants = {axis: size for axis, size in sizes.items() if axis != "tokens"}
    short = "_".join(sorted((f"{LETTERS[axis]}{size}" for axis, size in constants.items()), reverse=True))

    def tensor(axes: Sequence[str] | None, what: str) -> dict[str, Any]:
        return {"shape": axes and list(axes), "dtype": dtype if axes else "float32", "description": what}

    return {
        "name": f"{op.op_type}_{short}",
        "op_type": op.op_type,
        "description": op.meaning,
        "tags": [f"model:{model}", *["fused"] * ("_" in op.op_type)],
        "axes": {
            "tokens": {"type": "var", "description": "Tokens of all sequences of a launch."},
            **{axis: {"type": "const", "value": n, "description": f"{axis} size"} for axis, n in constants.items()},
        },
        "inputs": {name: tensor(axes, f"{name} of {case.op}") for name, axes in op.axes.items()},
        "outputs": {"y": tensor(op.result, f"the result of {case.op}")},
        "reference": _code(op),
    }


def _workload(case: Case, arguments: dict[str, Any], name: str) -> str:
    inputs = {
        key: {"type": "random"} if axes else {"type": "scalar", "value": arguments[key]}
        for key, axes in OPS[case.op].axes.items()
    }
    key = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name}/{case.tokens}"))
    workload = {"uuid": key, "axes": {"tokens": case.tokens}, "inputs": inputs}
    return json.dumps({"definition": name, "workload": workload, "solution": None, "evaluation": None})


def _solution(op: str, name: str) -> dict[str, Any]:
    inputs = [*OPS[op].axes]
    wanted = [*inspect.signature(getattr(reference, op)).parameters][: len(inputs)]
    assert inputs == wanted, f"the inputs of {op} are {wanted}"
    call = f"kernels.for_device({inputs[0]}.device).{op}({', '.join(inputs)})"
    code = f"from internlm3 import kernels\n\n\ndef run({', '.join(inputs)}):\n    return {call}\n"
    return {
        "name": f"{AUTHOR}_{name}",
        "definition": name,
        "author": AUTHOR,
        "description": f"This project's {op}: Triton on a GPU, PyTorch on a CPU.",
        "spec": {
            "language": "triton",
            "target_hardware": ["NVIDIA_H100", "NVIDIA_H200", "LOCAL"],
            "entry_point": "main.py::run",
            "dependencies": ["torch", "triton", "internlm3"],
            "destination_passing_style": False,
        },
        "sources": [{"path": "main.py", "content": code}],
    }
