"""Read a compiled kernel's machine code: registers, instructions, and how it accesses memory.

NVIDIA's code is disassembled with the tools of Triton's wheel, and each global access is traced to the argument that
its address comes from. AMD's is read from the assembly that Triton keeps, which gives counts only.
"""

import hashlib
import os
import pickle
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from triton import knobs

from .launches import Launch
from .sass import (
    TENSOR_CORE,
    Access,
    Flight,
    flight,
    fuses_16_bits,
    instructions,
    trace,
    triggers_unwaited,
    until_first_exit,
)
from .targets import Target

T = TypeVar("T")
SOURCES = [Path(__file__).with_name(name).read_bytes() for name in ("reader.py", "sass.py")]  # what a result depends on


class MachineCode(NamedTuple):
    registers: int  # of a thread
    spilled: int  # bytes of local memory of a thread
    tensor_core: Counter[str]  # tensor-core instructions by name and shape, as HGMMA.64x16x16
    accesses: list[Access]
    instructions: Counter[str]  # how many, by the innermost loop around them; "": outside of loops
    barriers: Counter[str]  # the same
    matrix: Counter[str]  # the same: tensor-core instructions that a warp waits for
    chains: Counter[str]  # of these, in each loop, the longest sequence in which each adds to the sum of the one before
    conversions: Counter[str]  # the same: conversions of numbers, and moves of their bytes
    waits: bool = False  # for the predecessor in programmatic dependent launch
    exits_unwaited: bool = False  # on some path
    triggers_unwaited: bool = False  # lets its successor start before the wait, on some path
    flight: Flight = Flight(0, 0, 0)
    first_exit: Flight = Flight(0, 0, 0)  # the same for a thread that leaves at the first exit
    fused_16_bits: Sequence[str] = ()  # instructions that round a product and a sum once, to 16 bits
    instructions_unwaited: int = 0  # before the wait for the predecessor, outside of loops


def read(launch: Launch, target: Target, cache: Path | None = None) -> MachineCode:
    """What a launch's machine code does. Disassembling takes a second: `cache` is a folder for results."""
    if not target.is_cuda:
        return _read_amd(launch)
    if cache is None:
        return _read_nvidia(launch)
    tools = (knobs.nvidia.cuobjdump.path, knobs.nvidia.nvdisasm.path)
    depends_on = [*SOURCES, *(tool.encode() for tool in tools), launch.compiled.asm["cubin"]]
    depends_on += [launch.compiled.asm["ptx"].encode(), repr(launch.arguments).encode()]
    file = cache / f"{hashlib.sha256(b''.join(depends_on)).hexdigest()}.pickle"
    return cached(file, partial(_read_nvidia, launch))


def cached(file: Path, make: Callable[[], T]) -> T:
    """What `make` returns, kept in a file."""
    try:
        known: T = pickle.loads(file.read_bytes())
        return known
    except (OSError, EOFError, pickle.UnpicklingError):
        pass
    made = make()
    file.parent.mkdir(exist_ok=True)
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_bytes(pickle.dumps(made))
    draft.replace(file)
    return made


def _read_nvidia(launch: Launch) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.compiled.asm["cubin"])
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        text = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    used = {name: int(number) for name, number in re.findall(r"([A-Z]+)(?:\[0\])?:(\d+)", usage.split("Function")[1])}
    code = text[text.index(f"\n{launch.compiled.name}:") :]
    traced = trace(code, _pointer_offsets(launch, used["CONSTANT"]))
    listing = list(instructions(code))
    names = Counter(instruction.base for instruction in listing)
    tensor_core = [instruction for instruction in listing if TENSOR_CORE.match(instruction.base)]
    return MachineCode(
        used["REG"],
        used["STACK"] + used["LOCAL"],
        Counter(instruction.shaped for instruction in tensor_core),
        traced.accesses,
        traced.instructions,
        traced.barriers,
        traced.matrix,
        traced.chains,
        traced.conversions,
        names["ACQBULK"] > 0,
        traced.exits_unwaited,
        triggers_unwaited(code),
        flight(listing),
        flight(until_first_exit(listing)),
        [str(instruction) for instruction in listing if fuses_16_bits(instruction)],
        traced.instructions_unwaited,
    )


def _pointer_offsets(launch: Launch, constant_bytes: int) -> dict[int, str]:
    """The offsets of the pointer arguments in constant bank 0, whose last bytes are the arguments."""
    ptx = launch.compiled.asm["ptx"]
    sizes = [int(bits) // 8 for bits in re.findall(r"^\s*\.param \.[a-z](\d+) ", ptx, re.MULTILINE)]
    # Triton appends two arguments of its own.
    if len(sizes) != len(launch.arguments) + 2:
        raise NotImplementedError(f"{launch.kernel} has {len(sizes)} parameters for {launch.arguments}")
    end, offsets = 0, []
    for size in sizes:
        offsets.append(-(-end // size) * size)
        end = offsets[-1] + size
    kinds = launch.compiled.src.signature
    named = zip(offsets, launch.arguments, strict=False)
    return {constant_bytes - end + offset: name for offset, name in named if str(kinds[name]).startswith("*")}


def _read_amd(launch: Launch) -> MachineCode:
    text = launch.compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"^\s*-?\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
        if not found:
            raise ValueError(f"the assembly of {launch.kernel} has no {name}")
        return int(found[1])

    widths = {"x4": 16, "x3": 12, "x2": 8, "": 4, "short": 2, "byte": 1}
    memory = r"^\s*((?:global|buffer|flat)_(load|store|atomic)_\w*?(x[234]|short|byte|)(?:_\w+)?)\s"
    found = re.findall(memory, text, re.MULTILINE)
    return MachineCode(
        field("vgpr_count"),
        field("private_segment_fixed_size"),
        Counter(re.findall(r"\bv_s?mfma\w*", text)),
        [Access(name, kind == "load", widths[width]) for name, kind, width in found],
        *(Counter() for _ in range(5)),
    )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
