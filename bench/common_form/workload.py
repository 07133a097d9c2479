"""A workload: the sizes of a definition's variable axes, and where its inputs come from."""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cases import Arguments
from .definition import Definition, Reference, Spec, Unable
from .fields import Fields, parse

COPIES = 8  # of all inputs and outputs: what the check holds at once, about
INTEGERS = {torch.int8: 128}  # random integers are from -128 to 127, wider ones from -1024 to 1023


class Workload(NamedTuple):
    """content: the workload as it is in its file, for the trace. axes: all, by name."""

    file: str
    content: dict[str, Any]
    axes: dict[str, int]
    inputs: dict[str, Fields]

    @property
    def name(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.content["axes"].items()) or self.content["uuid"]


def read(line: str, file: str, definition: Definition) -> Workload:
    """A line of a file of workloads: a workload, or a trace that has one. file: the file and the line's number.

    Raises ValueError, which names the file and the field.
    """
    whole = parse(line, file)
    if "workload" in whole.content:
        of = whole.get("definition", str)
        if of != definition.name:
            raise whole.error("definition", f"is {of!r}, and {definition.file} defines {definition.name!r}")
        whole = whole.inner("workload")
    whole.get("uuid", str)
    axes, inputs = whole.inner("axes"), whole.inner("inputs")
    variable = [name for name, x in definition.axes.items() if x is None]
    for name in axes.content:
        if name not in variable:
            raise axes.error(name, f"is no variable axis of {definition.file}: it has {', '.join(variable) or 'none'}")
    given = {name: axes.get(name, int) for name in variable}
    for name, size in given.items():
        if size < 1:
            raise axes.error(name, f"is {size}, and must be at least 1")
    for name in inputs.content:
        if name not in definition.inputs:
            raise inputs.error(name, f"is no input of {definition.file}")
    sources = {name: inputs.inner(name) for name in definition.inputs}
    for name, source in sources.items():
        _check(source, definition, definition.inputs[name].shape is None)
    customs = {source.content["type"] == "custom" for source in sources.values()}
    if len(customs) > 1:
        raise whole.error("inputs", "either all or none may be of type custom")
    return Workload(file, whole.content, definition.sizes(given), sources)


def _check(source: Fields, definition: Definition, number: bool) -> None:
    kind = source.get("type", str)
    if kind == "scalar":
        if not isinstance(source.content.get("value"), (bool, int, float)):
            raise source.error("value", "must be a number, true or false")
    elif kind == "safetensors":
        source.get("path", str), source.get("tensor_key", str)
    elif kind == "custom":
        if not definition.custom_inputs:
            raise source.error("type", f"is custom, and {definition.file} has no custom_inputs_entrypoint")
    elif kind != "random":
        raise source.error("type", f"is {kind!r}: there are random, scalar, safetensors and custom")
    if kind != "custom" and number != (kind == "scalar"):
        raise source.error("type", f"is {kind}, and {definition.file} says {'scalar' if number else 'tensor'}")


def draw(workload: Workload, definition: Definition, reference: Reference, device: torch.device) -> Arguments:
    """New inputs, by name; those of safetensors files are the same each time. Raises Unable."""
    if any(source.content["type"] == "custom" for source in workload.inputs.values()):
        return _custom(workload, definition, reference, device)
    made: Arguments = {}
    for name, source in workload.inputs.items():
        spec, kind = definition.inputs[name], source.content["type"]
        if kind == "scalar":
            made[name] = source.content["value"]
        elif kind == "random":
            made[name] = _random(spec, workload.axes, device)
        else:
            made[name] = _stored(source).to(device, copy=True)
            _compare(source.file, name, made[name], spec, workload.axes)
    return made


def _random(spec: Spec, axes: dict[str, int], device: torch.device) -> Tensor:
    size = spec.sizes(axes)
    if spec.dtype.is_floating_point:
        return torch.randn(size, dtype=spec.dtype, device=device)
    if spec.dtype == torch.bool:
        return torch.randint(0, 2, size, dtype=spec.dtype, device=device)
    most = INTEGERS.get(spec.dtype, 1024)
    return torch.randint(-most, most, size, dtype=spec.dtype, device=device)


def _custom(workload: Workload, definition: Definition, reference: Reference, device: torch.device) -> Arguments:
    place = f"{definition.file}: custom_inputs_entrypoint"
    assert reference.custom_inputs is not None  # read() refuses such a workload
    try:
        made = reference.custom_inputs({**workload.axes}, device)
        inputs = {name: made[name] for name in definition.inputs}
    except Exception as error:
        raise Unable(f"{place}: {type(error).__name__}: {error}") from None
    for name, spec in definition.inputs.items():
        if spec.shape is not None:
            _compare(place, name, inputs[name], spec, workload.axes)
    return inputs


def _compare(place: str, name: str, x: Any, spec: Spec, axes: dict[str, int]) -> None:
    if not isinstance(x, Tensor) or [*x.shape] != spec.sizes(axes) or x.dtype != spec.dtype:
        found = f"{x.dtype} {[*x.shape]}" if isinstance(x, Tensor) else type(x).__name__
        raise Unable(f"{place}: the input {name} is {found}, must be {spec.dtype} {spec.sizes(axes)}")


def _stored(source: Fields) -> Tensor:
    """A tensor of a safetensors file, whose path is absolute, or relative to a folder that the workloads are in."""
    start = Path(source.file.rpartition(":")[0]).absolute()
    path = next((f for f in (folder / source.content["path"] for folder in start.parents) if f.is_file()), None)
    if path is None:
        raise Unable(f"{source.file}: {source.place}.path: there is no file {source.content['path']}")
    return _loaded(path, source.content["tensor_key"])


@functools.lru_cache(maxsize=16)
def _loaded(path: Path, key: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(key)
    except SafetensorError as error:
        raise Unable(f"{path}: {error}") from None


def check_memory(workload: Workload, definition: Definition, device: torch.device) -> None:
    """Raises Unable if the check would need more memory than is free."""
    specs = (*definition.inputs.values(), *definition.outputs.values())
    needed = COPIES * sum(math.prod(spec.sizes(workload.axes)) * spec.dtype.itemsize for spec in specs)
    free = _free(device)
    if needed > free:
        raise Unable(f"{workload.file}: the check needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def _free(device: torch.device) -> float:
    """Bytes; infinity where the system does not say it as Linux does."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)
