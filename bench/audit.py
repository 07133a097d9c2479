"""Audit the kernels' machine code for several GPUs, on a machine that needs none of them.

    python -m bench.audit [--target sm_90 ...] [--kernel NAME ...]

Compiles everything that each op launches at InternLM3-8B's shapes, and prints a row for each launch and below the table
what is wrong with it. The exit code is 1 if something is; violations on AMD are printed but don't count.

.audit_cache/ keeps the findings as long as kernels/, the audit, Triton and its tools stay the same, and what was read
from the machine code by the hash of that code, so that after a change only the kernels that changed are read again.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from typing import NamedTuple

# Interpreted kernels would not be compiled.
os.environ.pop("TRITON_INTERPRET", None)

from triton import __version__ as triton_version
from triton import knobs

from internlm3 import kernels

from . import ROOT
from .cases import DENSE, Case, cases
from .machine_code.launches import Launch, compile_launches
from .machine_code.reader import MachineCode, read
from .machine_code.sass import Access
from .machine_code.targets import TARGETS, Target
from .options import one_of

CACHE = ROOT / ".audit_cache"


class Facts(NamedTuple):
    """What a kernel's machine code must look like."""

    # Pointer arguments that nothing writes during a step: they may be read before the predecessor has finished.
    constants: Sequence[str] = ()
    # Pointer arguments of what is older than the step: it was written before the step's first launch. Each may be read
    # before the predecessor has finished, and before the trigger, and something of each is.
    older: Sequence[str] = ()
    # Pointer arguments whose loads are all issued before the wait for the predecessor.
    early: Sequence[str] = ()
    # Pointer arguments of which some loads are issued before the wait.
    begun: Sequence[str] = ()
    # Pointer arguments that are streamed: each of their loads is 16 bytes wide.
    streams: Sequence[str] = ()
    tensor_cores: bool = False
    # Whether its fused 16-bit operations are exact: tests/kernels/test_fields.py computes all of them.
    exact_fma: bool = False
    # The columns that one tensor-core instruction adds to a sum, if their order must be the same in every launch.
    step: int = 0
    # The one tensor-core instruction of NVIDIA's GPUs that it may have, if tiles must give the same bits.
    instruction: str = ""
    # Pointer arguments whose bytes take most of the launch's time, and the share of the issue slots that the threads
    # may use while memory delivers those bytes.
    bulk: Sequence[str] = ()
    most_slots: float = math.inf
    # Instructions per 16 of these bytes that convert numbers or move their bytes: I2F, F2F, PRMT and the like.
    most_conversions: float = math.inf
    # Waits for memory, each for something requested after the previous one.
    most_trips: float = math.inf
    # Programs per multiprocessor, over the whole launch.
    least_programs: float = 0
    # Whether it lets its successor start only after its own loads, on a path through it: the successor's would precede
    # them in memory's queue. On another, where it has few to issue, the successor may start earlier.
    triggers_last: bool = False
    # Whether it waits for its predecessor before it lets its successor start. The first launch of a step must: what is
    # older than the step is read without a further wait.
    begins_step: bool = False


FACTS = {
    "_embed": Facts(
        constants=["table_ptr"], streams=["table_ptr"], bulk=["table_ptr"], most_trips=2, begins_step=True
    ),
    "_rms_norm": Facts(
        ["weight_ptr"], early=["weight_ptr"], streams=["x_ptr", "weight_ptr"], bulk=["x_ptr"], most_trips=1
    ),
    "_swiglu": Facts(streams=["gate_up_ptr"], bulk=["gate_up_ptr"], most_trips=1),
    "_rope_and_cache": Facts(bulk=["qkv_ptr"], most_trips=2),
    "_linear_few_rows, one row": Facts(
        ["w_ptr", "norm_ptr", "bias_ptr"], early=["w_ptr", "norm_ptr"], streams=["w_ptr", "norm_ptr", "x_ptr"],
        # Two rows of W per program are faster than four on an H200, though qkv takes 77% of its issue slots, 106% of a
        # B200's: see bench/predictions.md.
        bulk=["w_ptr"], most_slots=1.1, most_trips=3, least_programs=2,
    ),
    "_linear_few_rows": Facts(
        ["w_ptr", "bias_ptr"], begun=["w_ptr"], streams=["w_ptr", "x_ptr"], tensor_cores=True, step=16,
        # Half of an H200's multiprocessors can stream W: 64 programs of 64 rows took half the time of 128 of 32.
        bulk=["w_ptr"], most_slots=0.9, most_trips=3, least_programs=0.4,
    ),
    "_linear_quantised": Facts(
        ["w_ptr", "scale_ptr", "bias_ptr"], streams=["w_ptr", "x_ptr"], tensor_cores=True, step=16, exact_fma=True,
        # See `tile_of` in linear_quantised.py.
        instruction="HMMA",
        # For a number of 4 bits 2.0 to 2.5 instructions: 65 to 78% of an H200's issue slots, 88 to 105% of a B200's.
        bulk=["w_ptr"], most_slots=1.1, most_trips=4, least_programs=0.8,
        # Those of the integer zero points of groups: 1.5. One for each number would be 16 or 32.
        most_conversions=2,
    ),
    # For groups of 32 columns or fewer, as in GGUF files: what a slice needs beside its numbers takes half of the time.
    "_linear_quantised, short slices": Facts(
        ["w_ptr", "scale_ptr", "minimum_ptr", "bias_ptr"], streams=["w_ptr"], tensor_cores=True, step=16,
        exact_fma=True, instruction="HMMA", bulk=["w_ptr"], most_slots=2.5, most_trips=4, least_programs=0.4,
    ),
    "_dequantise": Facts(
        ["w_ptr", "scale_ptr", "minimum_ptr"], early=["w_ptr", "scale_ptr"], streams=["w_ptr"], most_trips=2,
        exact_fma=True,
    ),
    "_slice_sums": Facts(streams=["x_ptr"], most_trips=1),
    # new_k_ptr and new_v_ptr are the caches again: the newest token's key and value are not older than the step. Of the
    # waits the first two, for the length and the pages, are before that for the predecessor; three are of the loop over
    # further tiles.
    "_attend, decode step": Facts(
        older=["lens_ptr", "pages_ptr", "k_ptr", "v_ptr"], early=["lens_ptr"],
        streams=["k_ptr", "v_ptr", "new_k_ptr", "new_v_ptr"], tensor_cores=True, bulk=["k_ptr", "v_ptr"],
        most_slots=0.9, most_trips=7, triggers_last=True,
    ),
    "_attend": Facts(streams=["k_ptr", "v_ptr"], tensor_cores=True, bulk=["k_ptr", "v_ptr"]),
    "_combine, decode step": Facts(older=["lens_ptr"], early=["lens_ptr"], bulk=["partial_ptr"], most_trips=3),
    "_combine": Facts(bulk=["partial_ptr"], most_trips=3),
    "_penalize": Facts(
        streams=["logits_ptr", "bias_ptr", "prompt_counts_ptr", "output_counts_ptr"], bulk=["logits_ptr"], most_trips=2
    ),
    # The other waits are of the loop over the drafts before a row, four at a time.
    "_penalize, drafts": Facts(
        streams=["logits_ptr", "bias_ptr", "prompt_counts_ptr", "output_counts_ptr"], bulk=["logits_ptr"], most_trips=7
    ),
    # Two to three of the waits are of the loop over the maxima of blocks, which are in L1 by then.
    "_collect": Facts(streams=["x_ptr"], bulk=["x_ptr"], most_trips=6),
    "_weigh": Facts(bulk=["candidate_ptr"], most_trips=5),
    # 3 or 4 with Triton 3.7.1; with 3.8.0 and 3.9.0 ptxas loads the candidates of a top-k a few at a time.
    "_narrow": Facts(bulk=["candidate_ptr"], most_trips=6),
    "_narrow_few": Facts(bulk=["candidate_ptr"], most_trips=6),
    "_add_up": Facts(streams=["x_ptr"], bulk=["x_ptr"], most_trips=4),
    "_pick": Facts(most_trips=4),
    # The third is of the loop over further tokens of a match.
    "_match": Facts(bulk=["history_ptr"], most_trips=3),
    "_draft": Facts(most_trips=2),
    "_advance": Facts(most_trips=4),
    "_count_prompt": Facts(bulk=["request_ptr"], most_trips=3),
    "_store_row": Facts(bulk=["row_ptr"], most_trips=3),
}  # fmt: skip


def kernel_name(launch: Launch) -> str:
    """The kernel's name in FACTS, which has some variants of a kernel separately."""
    if launch.kernel == "_linear_few_rows" and launch.constants["BR"] == 1:
        return "_linear_few_rows, one row"
    if launch.kernel in ("_attend", "_combine") and launch.constants["EARLY"]:
        return f"{launch.kernel}, decode step"
    if launch.kernel == "_linear_quantised" and launch.constants["L"] < 64:
        return "_linear_quantised, short slices"
    if launch.kernel == "_penalize" and "drafts_ptr" in launch.arguments:
        return "_penalize, drafts"
    return launch.kernel


def per_16_bytes(counted: Mapping[str, int], code: MachineCode, pointers: Sequence[str]) -> float:
    """Of instructions of a thread, counted by loop: those per 16 streamed bytes.

    In the loop that streams the most, or outside of loops.
    """
    loaded = Counter[str]()
    for access in code.accesses:
        if access.is_load and access.pointers & set(pointers):
            loaded[access.loop] += access.bytes
    loop = max(loaded, key=lambda loop: (loop != "", loaded[loop]), default="")
    return 16 * counted[loop] / loaded[loop] if loaded else 0.0


def columns_of(tensor_core: str) -> int | None:
    """The columns that a tensor-core instruction adds: HGMMA.64x16x16, HMMA.16816, v_mfma_f32_16x16x16_bf16: 16.

    None if its name does not say, as UTCHMMA.
    """
    found = re.search(r"\d+x\d+x(\d+)|HMMA\.168(\d+)", tensor_core)
    return int(found[1] or found[2]) if found else None


def violations(launch: Launch, code: MachineCode, target: Target, facts: Facts) -> list[str]:
    """What is wrong with the machine code of a launch, one sentence each."""
    wrong = []
    shared = launch.compiled.metadata.shared
    if code.spilled:
        wrong.append(f"spills: {code.spilled} bytes of local memory per thread")
    if shared > target.block_shared:
        wrong.append(f"takes {shared} bytes of shared memory; a block may have {target.block_shared}")
    if facts.tensor_cores and not code.tensor_core:
        wrong.append("has no tensor-core instruction, but should")
    other = {name: step for name in code.tensor_core if (step := columns_of(name)) not in (None, facts.step)}
    if facts.step and other:
        wrong.append(f"adds columns to a sum in other steps than {facts.step}: {', '.join(other)}")
    # The order of roundings is part of an op's definition.
    if launch.compiled.metadata.enable_fp_fusion:
        wrong.append("is launched with enable_fp_fusion: a product and a sum would be rounded once")
    if code.fused_16_bits and not facts.exact_fma:
        wrong.append(f"fused 16-bit operations: {len(code.fused_16_bits)}, as {code.fused_16_bits[0]}")
    if not target.is_cuda:
        return wrong

    def expect_none(what: str, accesses: Iterable[Access]) -> None:
        found = list(accesses)
        if found:
            names = ", ".join(sorted(frozenset().union(*(access.pointers for access in found))))
            wrong.append(f"{what}: {len(found)} of {names or 'no argument'}, as {found[0].instruction}")

    if facts.instruction and (kinds := {name for name in code.tensor_core if name.split(".")[0] != facts.instruction}):
        wrong.append(f"has other tensor-core instructions than {facts.instruction}: {', '.join(sorted(kinds))}")
    executed = per_16_bytes(code.instructions, code, facts.bulk)
    if executed > facts.most_slots * target.instructions_per_16_bytes:
        wrong.append(f"slower than memory: {executed:.0f} instructions of a thread per 16 streamed bytes")
    conversions = per_16_bytes(code.conversions, code, facts.bulk)
    if conversions > facts.most_conversions:
        wrong.append(f"converts one by one: {conversions:.1f} conversions of a thread per 16 streamed bytes")
    if launch.programs < facts.least_programs * target.multiprocessors:
        wrong.append(f"leaves multiprocessors idle: {launch.programs} programs for {target.multiprocessors}")
    loads = [access for access in code.accesses if access.is_load]
    stores = [access for access in code.accesses if not access.is_load]
    expect_none("accesses of unknown origin", (x for x in code.accesses if not x.pointers))
    expect_none("narrow loads in a stream", (x for x in loads if x.bytes < 16 and x.pointers & set(facts.streams)))
    if target.capability < (9, 0):
        return wrong

    if code.flight.round_trips > facts.most_trips:
        wrong.append(f"waits for memory in sequence: {code.flight.round_trips}, at most {facts.most_trips}")
    # Programmatic dependent launch: trigger the successor, load constants, wait for the predecessor, then the rest.
    if not launch.compiled.metadata.launch_pdl:
        wrong.append("is launched without programmatic dependent launch, which this target supports")
    if code.exits_unwaited:
        wrong.append("a path through it ends without waiting for its predecessor")
    if facts.begins_step and code.triggers_unwaited:
        wrong.append("lets its successor start before it has waited for its predecessor")
    older = set(facts.older)
    expect_none(
        "accesses before the successor may start",
        (
            x
            for x in code.accesses
            if not x.triggered and not (x.is_load and (facts.triggers_last or x.pointers <= older))
        ),
    )
    if facts.triggers_last:
        expect_none("loads after the successor may start", (x for x in loads if x.triggered))
    expect_none("stores before the wait", (x for x in stores if not x.waited))
    expect_none(
        "loads of a predecessor's work before the wait",
        (x for x in loads if not x.waited and not x.pointers <= older.union(facts.constants)),
    )
    if unbegun := set(facts.begun).difference(*(x.pointers for x in loads if not x.may_have_waited)):
        wrong.append(f"nothing of it is loaded before the wait: {', '.join(sorted(unbegun))}")
    if late := older.difference(*(x.pointers for x in loads if not x.may_have_waited)):
        wrong.append(f"older than the step, but not loaded before the wait: {', '.join(sorted(late))}")
    expect_none(
        "loads after the wait that belong before it",
        (x for x in loads if x.may_have_waited and x.pointers & set(facts.early)),
    )
    return wrong


class Finding(NamedTuple):
    """The machine code of a launch at one shape: a row of the table, and what is wrong with it."""

    target: str
    op: str
    shape: str
    kernel: str
    figures: dict[str, str]
    wrong: list[str]


def figures(launch: Launch, code: MachineCode, target: Target, facts: Facts) -> dict[str, str]:
    metadata = launch.compiled.metadata
    executed = per_16_bytes(code.instructions, code, facts.bulk)
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
        # Programs, as a multiple of those that the GPU runs at once; below 1, part of it is idle.
        "waves": f"{launch.programs / max(resident * target.multiprocessors, 1):.2f}",
        # Per multiprocessor.
        "KB in flight": f"{code.flight.bytes * threads * together / 1024:.0f}" if target.is_cuda else "-",
        # Of a program: loads issued before it waits for the first, and waits in sequence.
        "loads, waits": f"{code.flight.ahead}, {code.flight.round_trips}" if target.is_cuda else "-",
        # Of a thread, and the share of its issue slots while memory delivers these bytes at full speed.
        "instructions/16 B": f"{executed:.0f}" if executed else "-",
        "slots": f"{executed / target.instructions_per_16_bytes:.0%}" if executed else "-",
        "16-byte loads": f"{wide} of {len(loads)}",
        "before wait": f"{early} of {len(loads)}" if code.waits else "-",
        "tensor": ", ".join(f"{count} {name}" for name, count in code.tensor_core.items()) or "-",
    }


def repeats(case: Case) -> bool:
    """Whether other cases of a quantised weight compile to the same code, but for the lengths of its loops.

    Chunks of up to 64 tokens have the tile of batch 1 or of 16, and o_proj that of down_proj; `_dequantise` is the same
    for all ops.
    """
    if case.stored == DENSE:
        return False
    return "o_proj" in case.shape or ("chunk" in case.shape and (case.tokens <= 64 or case.op != "linear_add"))


def audit_cases(chosen: Sequence[Case], target_name: str) -> list[list[Finding]]:
    """The findings of each case, in a worker process that audits one op: its shapes share most of their code."""
    return [audit_case(case, target_name) for case in chosen]


def audit_case(case: Case, target_name: str) -> list[Finding]:
    """Compiles, reads and judges what an op launches at one shape for one target."""
    target = TARGETS[target_name]
    findings = []
    try:
        for launch in compile_launches(getattr(kernels, case.op), case.arguments, target):
            code = read(launch, target, CACHE)
            name = kernel_name(launch)
            facts = FACTS.get(name, Facts())
            wrong = violations(launch, code, target, facts)
            if name not in FACTS:
                wrong.append("is not in FACTS, which states what its machine code must look like")
            findings.append(
                Finding(target_name, case.op, case.shape, name, figures(launch, code, target, facts), wrong)
            )
    except Exception as error:  # whatever a launcher, the compiler or one of its tools raises is a finding
        findings.append(
            Finding(target_name, case.op, case.shape, "-", {}, [f"no machine code: {type(error).__name__}: {error}"])
        )
    return findings


def digest() -> str:
    """A hash of everything that the findings depend on."""
    mine = ("kernels/**/*.py", "bench/machine_code/*.py", "bench/audit.py", "bench/cases.py")
    sources = [path for pattern in mine for path in sorted(ROOT.glob(pattern))]
    tools = [triton_version, knobs.nvidia.ptxas.path, knobs.nvidia.cuobjdump.path, knobs.nvidia.nvdisasm.path]
    return hashlib.sha256("\0".join([*(path.read_text("utf-8") for path in sources), *tools]).encode()).hexdigest()


def audit(work: Sequence[tuple[Case, str]]) -> list[Finding]:
    """The findings of every case on its target, from the cache if nothing has changed."""
    file = CACHE / "findings.json"
    CACHE.mkdir(exist_ok=True)
    try:
        cached = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        cached = {}
    now = digest()
    known = cached["findings"] if cached.get("digest") == now else {}
    names = ["|".join((target, case.op, case.shape)) for case, target in work]
    new: dict[tuple[str, str], dict[str, Case]] = {}  # by op and target
    for name, (case, target) in zip(names, work, strict=True):
        if name not in known:
            new.setdefault((case.op, target), {})[name] = case
    if new:
        order = sorted(new, key=lambda key: key[0] != "sample")  # the longest first
        few = len(order) < 4  # starting processes would take longer
        with nullcontext() if few else ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            found = (pool.map if pool else map)(
                audit_cases, [[*new[key].values()] for key in order], [target for _, target in order]
            )
            for key, findings in zip(order, found, strict=True):
                known.update(zip(new[key], findings, strict=True))
        # Violations are not cached: the machine may have been at fault.
        sound = {name: found for name, found in known.items() if not any(Finding(*each).wrong for each in found)}
        if sound:
            draft = file.with_name(f"{os.getpid()}.json")
            draft.write_text(json.dumps({"digest": now, "findings": sound}), "utf-8")
            draft.replace(file)
    return [Finding(*found) for name in names for found in known[name]]


def print_table(findings: Sequence[Finding]) -> None:
    """Prints a row for each launch; shapes with the same figures share a row."""
    shapes: dict[tuple[str, ...], list[str]] = {}
    for found in findings:
        shapes.setdefault((found.target, found.op, found.kernel, *found.figures.values()), []).append(found.shape)
    columns = ("target", "op", "kernel", *next((found.figures for found in findings if found.figures), {}), "shapes")
    table = [columns, *((*key, *[""] * (len(columns) - 1 - len(key)), "; ".join(of)) for key, of in shapes.items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append", type=one_of("target", TARGETS), help="default: all")
    parser.add_argument(
        "--kernel", action="append", type=one_of("op", kernels.__all__), help="an op's name; default: all"
    )
    options = parser.parse_args(arguments)
    chosen = [case for case in cases() if case.op in (options.kernel or kernels.__all__) and not repeats(case)]
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
        print(f"FAIL  {op}: nothing of it was audited: it has no case in bench/cases.py, or launches nothing there")
    return min(failures + len(idle), 1)


if __name__ == "__main__":
    sys.exit(main())
