"""Read a compiled kernel's machine code: what a thread holds, and which memory it touches how.

NVIDIA's is disassembled with the tools in Triton's wheel, and every global access traced to its argument. AMD's is read
from the assembly text that Triton keeps: counts only.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .launches import Launch
from .sass import TENSOR_CORE, Access, Flight, flight, fuses_16_bits, instructions, trace, way_out
from .targets import Target
from triton import knobs


class MachineCode(NamedTuple):
    registers: int  # a thread's
    spilled: int  # bytes of memory that a thread has for what its registers cannot hold
    tensor_core: Counter[str]  # instructions by name
    accesses: list[Access]
    instructions: Counter[str]  # how many, by the innermost loop that they are in; "": in none
    waits: bool = False  # for the predecessor in programmatic dependent launch
    exits_unwaited: bool = False  # on some way
    flight: Flight = Flight(0, 0, 0)
    way_out: Flight = Flight(0, 0, 0)  # the same of a thread that leaves at the first exit
    fused_16_bits: Sequence[str] = ()  # instructions that round a product and a sum once, to 16 bits


def read(launch: Launch, target: Target) -> MachineCode:
    return _read_nvidia(launch) if target.is_cuda else _read_amd(launch)


def _read_nvidia(launch: Launch) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.compiled.asm["cubin"])
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        text = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    held = {name: int(number) for name, number in re.findall(r"([A-Z]+)(?:\[0\])?:(\d+)", usage.split("Function")[1])}
    code = text[text.index(f"\n{launch.compiled.name}:") :]
    traced = trace(code, _pointer_offsets(launch, held["CONSTANT"]))
    listing = list(instructions(code))
    names = Counter(instruction.base for instruction in listing)
    return MachineCode(
        held["REG"],
        held["STACK"] + held["LOCAL"],
        Counter({name: count for name, count in names.items() if TENSOR_CORE.match(name)}),
        traced.accesses,
        traced.instructions,
        names["ACQBULK"] > 0,
        traced.exits_unwaited,
        flight(listing),
        flight(way_out(listing)),
        [str(instruction) for instruction in listing if fuses_16_bits(instruction)],
    )


def _pointer_offsets(launch: Launch, constant_bytes: int) -> dict[int, str]:
    """Where the pointer arguments lie in constant bank 0, which ends with the arguments."""
    ptx = launch.compiled.asm["ptx"]
    sizes = [int(bits) // 8 for bits in re.findall(r"^\s*\.param \.[a-z](\d+) ", ptx, re.MULTILINE)]
    # Triton appends two of its own.
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
            raise ValueError(f"the assembly of {launch.kernel} does not say its {name}")
        return int(found[1])

    widths = {"x4": 16, "x3": 12, "x2": 8, "": 4, "short": 2, "byte": 1}
    memory = r"^\s*((?:global|buffer|flat)_(load|store|atomic)_\w*?(x[234]|short|byte|)(?:_\w+)?)\s"
    found = re.findall(memory, text, re.MULTILINE)
    return MachineCode(
        field("vgpr_count"),
        field("private_segment_fixed_size"),
        Counter(re.findall(r"\bv_s?mfma\w*", text)),
        [Access(name, kind == "load", widths[width]) for name, kind, width in found],
        Counter(),
    )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
