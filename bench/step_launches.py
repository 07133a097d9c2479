"""The launches of a decode step of InternLM3-8B, and what their programs need, read from their machine code."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch

from internlm3 import kernels
from internlm3.kernels.triton.sample_search import PASSES, TOP_K, TOP_P, TYPICAL_P
from internlm3.runtime.engine.draft_rows import MOST_SEQUENCES

from .audit import CACHE, FACTS, Facts, digest, kernel_name
from .cases import DENSE, PAGE, Arguments, Case, cases
from .cases import INTERNLM3_8B as SIZE
from .machine_code.launches import Launch, compile_launches
from .machine_code.reader import MachineCode, cached, read
from .machine_code.sass import Access
from .machine_code.targets import TARGETS
from .roofline import nbytes
from .simulation import Programs, Work

LAYERS = 48
TARGET = TARGETS["sm_90"]
# Bytes between two rows of W that a program reads, from which on they count as scattered. Keys and values do.
FAR = 1 << 20


class Search(NamedTuple):
    """What the sampling kernels search with the settings of a request."""

    candidates: int  # tokens that may be at a filter's threshold
    filters: tuple[int, ...]  # filters that are used; programs of the others exit at once


SEARCHES = {
    "greedy": Search(0, ()),
    "recommended": Search(128, (TOP_K.value, TOP_P.value)),
    "top_p only": Search(8192, (TOP_P.value,)),
    "typical_p only": Search(SIZE.vocabulary, (TYPICAL_P.value,)),
}


class StepLaunch(NamedTuple):
    """A launch of a step; `per_layer` if each of the 48 layers has one."""

    op: str
    kernel: str
    per_layer: bool
    programs: Programs


class Shape(NamedTuple):
    batch: int
    context: int
    sampling: str = "recommended"
    weights: str = DENSE  # how those of the layers are stored; if they are quantised, lm_head's is int8


def from_memory(x: Arguments, launch: Launch, shape: Shape) -> int:
    """Bytes that the launch must load from memory, because a step leaves them in no cache."""
    if launch.kernel in ("_linear_few_rows", "_linear_quantised"):
        return nbytes(x["weight"])
    if launch.kernel == "_attend":
        return shape.batch * shape.context * 2 * SIZE.kv_heads * SIZE.head_dim * x["k_cache"].element_size()
    if launch.kernel == "_embed":
        return x["token_ids"].numel() * SIZE.hidden * 2
    if launch.kernel == "_penalize":
        return sum(x[name].numel() * 4 for name in ("prompt_counts", "output_counts", "logit_bias") if name in x)
    return 0


def programs(case: Case, launch: Launch, code: MachineCode, shape: Shape, splits: int) -> Programs:
    """What the programs of a launch need. splits: of the attention before it."""
    facts = FACTS.get(kernel_name(launch), Facts())
    arguments = case.arguments(torch.device("meta"))
    constants, metadata, count = launch.constants, launch.compiled.metadata, launch.programs
    search, threads = SEARCHES[shape.sampling], 32 * metadata.num_warps
    room = (metadata.num_warps, code.registers, metadata.shared)
    if launch.kernel in ("_narrow", "_weigh"):  # programs with nothing to search exit
        if constants.get("SEARCH", TYPICAL_P.value) not in search.filters:
            return Programs(count, *room, after=Work(code.first_exit.round_trips))
        count = count * -(-search.candidates // constants["CHUNK"]) // -(-SIZE.vocabulary // constants["CHUNK"])

    loads = [access for access in code.accesses if access.is_load]
    memory = from_memory(arguments, launch, shape) / count
    bulk = [x for x in loads if memory and x.pointers & set(facts.bulk)]
    early = min(sum(x.bytes for x in bulk if not x.may_have_waited) * threads, memory)
    late = memory - early
    # The loop that streams the late bytes: its iterations, and how many of them are requested before the first.
    loop = next((x.loop for x in bulk if x.may_have_waited and x.loop), "") if late else ""
    streamed = sum(x.bytes for x in bulk if x.loop == loop)
    ahead = sum(x.bytes for x in bulk if x.loop != loop and "LDGSTS" in x.instruction)
    tiles = max(round(late / threads / streamed), 1) if loop else 1
    outstanding = max(round(ahead / streamed), 1) if loop else 1

    def runs(label: str) -> float:
        """How often the instructions of another loop run."""
        if launch.kernel == "_narrow_few" and label:
            # An outer loop, and one over all chunks but the first; none run for candidates that fit one chunk.
            chunks = -(-search.candidates // constants["CHUNK"])
            inner = any(x.loop == label and x.pointers & set(facts.bulk) for x in loads)
            return 0 if chunks == 1 else PASSES * (chunks - 1 if inner else 1)
        if launch.kernel == "_combine" and label:
            return max(splits / constants.get("BS", splits), 1)
        # The loop of the late bytes is counted for each tile; without late bytes it does not run.
        return 0 if label and (label == loop or launch.kernel == "_attend") else 1

    def total(numbers: Counter[str]) -> float:
        """Of all instructions but those of the tiles."""
        return sum(number * runs(label) for label, number in numbers.items())

    def share(x: Access) -> float:
        """The share of its bytes that a load takes from the L2 cache, in all programs."""
        if launch.kernel == "_combine":  # splits that do not exist are not read
            return min(splits / constants.get("BS", 1), 1)
        if "LDGSTS" in x.instruction:  # rows of a tile of x beyond the batch are not read
            return len(arguments["x"]) / constants["BR"] if x.pointers == {"x_ptr"} else 1
        return min(TARGET.multiprocessors / count, 1)  # one program of a multiprocessor; the others hit L1

    others = [x for x in loads if x not in bulk and x.may_have_waited]
    from_l2 = sum(x.bytes * threads * share(x) * (tiles if x.loop == loop else runs(x.loop)) for x in others)
    matrix = code.chains if launch.kernel == "_linear_quantised" else code.matrix
    # Waits in sequence: before the wait for the predecessor, after it until the late bytes are requested, and others.
    before = min((x.waits for x in bulk if not x.may_have_waited), default=0)
    first = min((x.waits for x in loads if x.may_have_waited), default=0)
    addressed = min((x.waits for x in bulk if x.may_have_waited), default=first) - first
    # A loop without outstanding copies waits in every iteration.
    serial = {x.loop for x in loads if x.loop not in ("", loop) and "LDGSTS" not in x.instruction}
    waits = code.flight.round_trips - first + sum(runs(label) - 1 for label in serial)
    if loop:
        waits -= addressed + 1  # these are of the tiles
    elif launch.kernel == "_attend":  # no second tile
        waits = min((x.waits for x in loads if "LDGSTS" in x.instruction), default=first) - first
    return Programs(
        count,
        *room,
        early,
        min(constants["BO"] * constants["AHEAD"] * 128, late) if late and "AHEAD" in constants else 0,
        late,
        from_l2,
        tiles,
        outstanding,
        Work(before, 0, code.instructions_unwaited) if before else Work(),
        addressed if late else 0,
        Work(
            max(waits, 0),
            total(code.barriers),
            total(code.instructions) - code.instructions_unwaited,
            total(matrix),
        ),
        Work(0, code.barriers[loop], code.instructions[loop], matrix[loop]) if loop else Work(),
        # Attention of a single tile may trigger on a path of its own.
        "loads" if launch.kernel == "_attend" and early and not late else trigger(code),
        launch.kernel == "_attend" or 2 * constants.get("HALF", 0) * constants.get("W_STRIDE", 0) >= FAR,
    )


def trigger(code: MachineCode) -> str:
    """After what the programs let their successor start."""
    untriggered = [x for x in code.accesses if not x.triggered]
    if any(x.may_have_waited for x in untriggered):
        return "end"
    if untriggered:
        return "loads"
    return "start" if code.triggers_unwaited else "wait"


def step(shape: Shape) -> Iterator[tuple[Case, bool]]:
    """The ops of a step in order, and whether each layer has one.

    The block table has a page more than the context fills, as that of a sequence that goes on.
    """
    ops = {
        "embed": False,
        "rms_norm_qkv_rope_cache": True,
        "paged_attention": True,
        "linear_add, o_proj": True,
        "rms_norm_swiglu": True,
        "linear_add, down_proj": True,
        "rms_norm_linear": False,
        f"sample, {shape.sampling}": False,
        "advance": False,
        **({"draft": False} if shape.batch <= MOST_SEQUENCES else {}),
    }
    known = [*cases(SIZE, batches=[shape.batch], chunks=[], contexts=[shape.context + PAGE])]
    quantised = shape.weights != DENSE
    for name, per_layer in ops.items():
        op, _, part = name.partition(", ")
        stored = DENSE
        if op == "rms_norm_linear":
            stored = "int8" if quantised else DENSE
        elif op in ("rms_norm_qkv_rope_cache", "linear_add", "rms_norm_swiglu"):
            stored = shape.weights
        parts = {"", part if stored == DENSE or not part else f"{part} {stored}"}
        found = (case for case in known if case.op == op and case.stored == stored)
        yield next(case for case in found if parts <= {"", *case.shape.split(", ")}), per_layer


def launches(shape: Shape) -> list[StepLaunch]:
    """The launches of a step in order, those of a layer once; none if cuBLAS has a part in it, which is not read.

    Kept in the audit's cache: compiling takes a minute.
    """
    sources = [Path(__file__).with_name(name).read_text("utf-8") for name in ("step_launches.py", "simulation.py")]
    name = hashlib.sha256("\0".join([digest(), *sources, repr(shape)]).encode()).hexdigest()
    return cached(CACHE / f"{name}.pickle", lambda: compiled(shape, step(shape)))


def compiled(shape: Shape, ops: Iterable[tuple[Case, bool]]) -> list[StepLaunch]:
    """What these ops of a step launch; nothing if cuBLAS has a part in it."""
    found, splits = [], 1
    for case, per_layer in ops:
        launched = compile_launches(getattr(kernels, case.op), case.arguments, TARGET)
        of_rows = ("_linear_few_rows", "_linear_quantised")
        if "linear" in case.op and not any(launch.kernel in of_rows for launch in launched):
            return []
        for launch in launched:
            if launch.kernel == "_attend":
                splits = launch.programs // (shape.batch * SIZE.kv_heads)
            needs = programs(case, launch, read(launch, TARGET, CACHE), shape, splits)
            found.append(StepLaunch(case.op, launch.kernel, per_layer, needs))
    return found
