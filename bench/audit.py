"""Audit the kernels' machine code for real GPUs, on a machine that need not have one.

    python bench/audit.py [--target sm_90 ...] [--kernel NAME ...]

Compiles everything that every op launches at InternLM3-8B's shapes, prints a row for each launch, and under the table
what is wrong. The exit code is 1 where something is; what is wrong for AMD is noted but fails nobody. What has been
judged is kept in .audit_cache/ until a file of kernels/ or of the audit, Triton or one of its tools is another.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

# What the interpreter is given is never compiled.
os.environ.pop("TRITON_INTERPRET", None)

from .cases import Case, cases
from internlm3 import kernels
from .machine_code.launches import Launch, compile_launches
from .machine_code.reader import MachineCode, read
from .machine_code.sass import Access
from .machine_code.targets import TARGETS, Target
from .options import one_of
from triton import __version__ as triton_version
from triton import knobs

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".audit_cache" / "findings.json"


class Facts(NamedTuple):
    """What a kernel's machine code is meant to be, where the code cannot say it."""

    # Pointer arguments that nobody writes while a step runs: they may be read before the predecessor is done.
    constants: Sequence[str] = ()
    # Pointer arguments whose loads are all on their way before the wait.
    early: Sequence[str] = ()
    # Pointer arguments that are streamed: every load of theirs is of 16 bytes.
    streams: Sequence[str] = ()
    tensor_cores: bool = False
    # Pointer arguments whose bytes are the launch's time; and how much of what the threads can issue while memory
    # brings those bytes they may use.
    bulk: Sequence[str] = ()
    most_slots: float = math.inf
    # Waits for memory, one behind another.
    most_trips: float = math.inf
    # Programs for each multiprocessor, over all that the launch has.
    least_programs: float = 0


FACTS = {
    "_embed": Facts(constants=["table_ptr"], streams=["table_ptr"], bulk=["table_ptr"], most_trips=2),
    "_rms_norm": Facts(["weight_ptr"], ["weight_ptr"], ["x_ptr", "weight_ptr"], bulk=["x_ptr"], most_trips=1),
    "_swiglu": Facts(streams=["gate_up_ptr"], bulk=["gate_up_ptr"], most_trips=1),
    "_rope_and_cache": Facts(bulk=["qkv_ptr"], most_trips=2),
    "_skinny, one row": Facts(
        ["w_ptr", "norm_ptr", "bias_ptr"], ["w_ptr", "norm_ptr"], ["w_ptr", "norm_ptr", "x_ptr"],
        # Two rows of W for one norm of x beat four on an H200, of whose issue slots qkv takes 77%; of a B200's 106%.
        bulk=["w_ptr"], most_slots=1.1, most_trips=3, least_programs=2,
    ),
    "_skinny": Facts(
        ["w_ptr", "bias_ptr"], streams=["w_ptr", "x_ptr"], tensor_cores=True,
        # Half of an H200's multiprocessors can bring W: 64 programs of 64 rows took half the time of 128 of 32.
        bulk=["w_ptr"], most_slots=0.9, most_trips=3, least_programs=0.4,
    ),
    "_attend, one token": Facts(
        streams=["k_ptr", "v_ptr"], tensor_cores=True, bulk=["k_ptr", "v_ptr"], most_slots=0.9, most_trips=4
    ),
    "_attend": Facts(streams=["k_ptr", "v_ptr"], tensor_cores=True, bulk=["k_ptr", "v_ptr"]),
    "_combine": Facts(bulk=["partial_ptr"], most_trips=3),
    "_penalize": Facts(
        streams=["logits_ptr", "bias_ptr", "prompt_counts_ptr", "output_counts_ptr"], bulk=["logits_ptr"], most_trips=2
    ),
    "_collect": Facts(streams=["x_ptr"], bulk=["x_ptr"], most_trips=3),
    "_weigh": Facts(bulk=["candidate_ptr"], most_trips=5),
    # 3 or 4 on Triton 3.7.1; on 3.8.0 and 3.9.0 ptxas asks for the candidates of a top-k a few at a time.
    "_narrow": Facts(bulk=["candidate_ptr"], most_trips=6),
    "_narrow_few": Facts(bulk=["candidate_ptr"], most_trips=6),
    "_add_up": Facts(streams=["x_ptr"], bulk=["x_ptr"], most_trips=4),
    "_pick": Facts(most_trips=4),
    "_advance": Facts(most_trips=4),
}  # fmt: skip


def kernel_name(launch: Launch) -> str:
    """The kernel's name in FACTS: one row of a linear layer, or token of attention, is another kernel than several."""
    if launch.kernel == "_skinny" and launch.constants["BR"] == 1:
        return "_skinny, one row"
    if launch.kernel == "_attend" and launch.constants["BM"] == 16:
        return "_attend, one token"
    return launch.kernel


def instructions_per_16_bytes(code: MachineCode, pointers: Sequence[str]) -> float:
    """Of a thread, where it streams: in the loop that brings the most, or else in all that no loop holds."""
    loaded = Counter[str]()
    for access in code.accesses:
        if access.is_load and access.pointers & set(pointers):
            loaded[access.loop] += access.bytes
    loop = max(loaded, key=lambda loop: (loop != "", loaded[loop]), default="")
    return 16 * code.instructions[loop] / loaded[loop] if loaded else 0.0


def violations(launch: Launch, code: MachineCode, target: Target, facts: Facts) -> list[str]:
    """What is wrong with the machine code of a launch, a sentence each."""
    wrong = []
    shared = launch.compiled.metadata.shared
    if code.spilled:
        wrong.append(f"spills: {code.spilled} bytes of local memory a thread")
    if shared > target.block_shared:
        wrong.append(f"takes {shared} bytes of shared memory; a block may have {target.block_shared}")
    if facts.tensor_cores and not code.tensor_core:
        wrong.append("has no tensor-core instruction, though it is meant to")
    # The order of rounding is part of an op's meaning.
    if launch.compiled.metadata.enable_fp_fusion:
        wrong.append("is launched so that the compiler may contract a product and a sum, which are rounded once then")
    if code.fused_16_bits:
        wrong.append(f"fused 16-bit operations: {len(code.fused_16_bits)}, as {code.fused_16_bits[0]}")
    if not target.is_cuda:
        return wrong

    def expect_none(what: str, accesses: Iterable[Access]) -> None:
        found = list(accesses)
        if found:
            names = ", ".join(sorted(frozenset().union(*(access.pointers for access in found))))
            wrong.append(f"{what}: {len(found)} of {names or 'unknown origin'}, as {found[0].instruction}")

    per_16_bytes = instructions_per_16_bytes(code, facts.bulk)
    if per_16_bytes > facts.most_slots * target.instructions_per_16_bytes:
        wrong.append(f"slower than memory: {per_16_bytes:.0f} instructions of a thread for 16 bytes that it streams")
    if launch.programs < facts.least_programs * target.multiprocessors:
        wrong.append(f"leaves multiprocessors idle: {launch.programs} programs for {target.multiprocessors}")
    loads = [access for access in code.accesses if access.is_load]
    stores = [access for access in code.accesses if not access.is_load]
    expect_none("accesses without an argument behind them", (x for x in code.accesses if not x.pointers))
    expect_none("narrow loads in a stream", (x for x in loads if x.bytes < 16 and x.pointers & set(facts.streams)))
    if target.capability < (9, 0):
        return wrong

    if code.flight.round_trips > facts.most_trips:
        wrong.append(f"waits for memory one behind another: {code.flight.round_trips}, at most {facts.most_trips}")
    # Programmatic dependent launch: trigger, read constants, wait; then everything else.
    if not launch.compiled.metadata.launch_pdl:
        wrong.append("is launched without programmatic dependent launch, which this target has")
    if code.exits_unwaited:
        wrong.append("a way through it ends without waiting for its predecessor")
    expect_none("accesses before the successor may start", (x for x in code.accesses if not x.triggered))
    expect_none("stores before the wait", (x for x in stores if not x.waited))
    expect_none(
        "loads of a predecessor's work before the wait",
        (x for x in loads if not x.waited and not x.pointers <= set(facts.constants)),
    )
    expect_none(
        "loads after the wait that belong before it",
        (x for x in loads if x.may_have_waited and x.pointers & set(facts.early)),
    )
    return wrong


class Finding(NamedTuple):
    """What a launch at one shape turned into, a row of the table, and what is wrong with it."""

    target: str
    op: str
    shape: str
    kernel: str
    figures: dict[str, str]
    wrong: list[str]


def _figures(launch: Launch, code: MachineCode, target: Target, facts: Facts) -> dict[str, str]:
    metadata = launch.compiled.metadata
    per_16_bytes = instructions_per_16_bytes(code, facts.bulk)
    loads = [access for access in code.accesses if access.is_load]
    wide = sum(access.bytes >= 16 for access in loads)
    early = sum(not access.may_have_waited for access in loads)
    threads = metadata.num_warps * target.gpu.warp_size
    resident = target.resident_blocks(metadata.num_warps, code.registers, metadata.shared)
    together = min(resident, launch.programs / target.multiprocessors)
    return {
        "warps": str(metadata.num_warps),
        "regs": str(code.registers),
        "spill": str(code.spilled),
        "shared": str(metadata.shared),
        "CTAs/SM": str(resident),
        # How often all of them fill the GPU that the target is named for; under 1, part of it has nothing to do.
        "waves": f"{launch.programs / max(resident * target.multiprocessors, 1):.2f}",
        # On a multiprocessor, whatever is loaded.
        "KB in flight": f"{code.flight.bytes * threads * together / 1024:.0f}" if target.is_cuda else "-",
        # Of a program: loads on their way before it waits for the first, and waits one behind another.
        "loads, waits": f"{code.flight.ahead}, {code.flight.round_trips}" if target.is_cuda else "-",
        # Of a thread, and the share of what it may issue while memory brings them at its full speed.
        "instructions/16 B": f"{per_16_bytes:.0f}" if per_16_bytes else "-",
        "slots": f"{per_16_bytes / target.instructions_per_16_bytes:.0%}" if per_16_bytes else "-",
        "16-byte loads": f"{wide} of {len(loads)}",
        "before wait": f"{early} of {len(loads)}" if code.waits else "-",
        "tensor": ", ".join(f"{count} {name}" for name, count in code.tensor_core.items()) or "-",
    }


def audit_case(case: Case, target_name: str) -> list[Finding]:
    """Compile, read and judge what an op launches at one shape for one target."""
    target = TARGETS[target_name]
    findings = []
    try:
        for launch in compile_launches(getattr(kernels, case.op), case.arguments, target):
            code = read(launch, target)
            name = kernel_name(launch)
            facts = FACTS.get(name, Facts())
            wrong = violations(launch, code, target, facts)
            if name not in FACTS:
                wrong.append("is not in FACTS, which says what its machine code is meant to be")
            findings.append(
                Finding(target_name, case.op, case.shape, name, _figures(launch, code, target, facts), wrong)
            )
    except Exception as error:  # whatever a launcher, the compiler or a tool of it raises is a finding
        findings.append(
            Finding(target_name, case.op, case.shape, "-", {}, [f"no machine code: {type(error).__name__}: {error}"])
        )
    return findings


def digest() -> str:
    """Of all that a finding follows from."""
    mine = ("kernels/*.py", "bench/machine_code/*.py", "bench/audit.py", "bench/cases.py")
    sources = [path for pattern in mine for path in sorted(ROOT.glob(pattern))]
    tools = [triton_version, knobs.nvidia.ptxas.path, knobs.nvidia.cuobjdump.path, knobs.nvidia.nvdisasm.path]
    return hashlib.sha256("\0".join([*(path.read_text("utf-8") for path in sources), *tools]).encode()).hexdigest()


def audit(work: Sequence[tuple[Case, str]]) -> list[Finding]:
    """The findings of every case on its target, from the cache where nothing has changed."""
    try:
        cached = json.loads(CACHE.read_text("utf-8"))
    except (OSError, ValueError):
        cached = {}
    now = digest()
    known = cached["findings"] if cached.get("digest") == now else {}
    names = ["|".join((target, case.op, case.shape)) for case, target in work]
    new = [(name, *each) for name, each in zip(names, work, strict=True) if name not in known]
    if new:
        fresh, *work = zip(*new, strict=True)
        with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
            known |= zip(fresh, pool.map(audit_case, *work), strict=True)
        # What is wrong is looked at again: it may be the machine's fault.
        sound = {name: found for name, found in known.items() if not any(Finding(*each).wrong for each in found)}
        CACHE.parent.mkdir(exist_ok=True)
        draft = CACHE.with_name(f"{os.getpid()}.json")
        draft.write_text(json.dumps({"digest": now, "findings": sound}), "utf-8")
        draft.replace(CACHE)
    return [Finding(*found) for name in names for found in known[name]]


def print_table(findings: Sequence[Finding]) -> None:
    """A row for each launch, those of several shapes that turned into the same together."""
    shapes: dict[tuple[str, ...], list[str]] = {}
    for found in findings:
        shapes.setdefault((found.target, found.op, found.kernel, *found.figures.values()), []).append(found.shape)
    columns = ("target", "op", "kernel", *next((found.figures for found in findings if found.figures), {}), "shapes")
    table = [columns, *((*key, *[""] * (len(columns) - 1 - len(key)), "; ".join(of)) for key, of in shapes.items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", type=one_of("target", TARGETS), help="default: all")
    parser.add_argument(
        "--kernel", action="append", type=one_of("op", kernels.__all__), help="an op's name; default: all"
    )
    options = parser.parse_args(arguments)
    chosen = [case for case in cases() if case.op in (options.kernel or kernels.__all__)]
    work = [(case, target) for target in options.target or TARGETS for case in chosen]
    findings = audit(work)
    print_table(findings)
    failures = 0
    for found in findings:
        for sentence in found.wrong:
            fails = TARGETS[found.target].is_cuda
            failures += fails
            where = f"{found.target} {found.op} ({found.shape}) {found.kernel}"
            print(f"{'FAIL' if fails else 'note'}  {where}: {sentence}")
    print(f"{len(findings)} launches audited, {failures} violations")
    idle = [op for op in options.kernel or kernels.__all__ if op not in {found.op for found in findings}]
    for op in idle:
        print(f"FAIL  {op}: nothing of it was audited; it has no case in bench/cases.py, or launches nothing there")
    return min(failures + len(idle), 1)


if __name__ == "__main__":
    sys.exit(main())
