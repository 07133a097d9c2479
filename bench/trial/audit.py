"""Compile every launch of the trial for sm_90, on a machine without a GPU, and audit those of the candidates.

    python -m bench.trial.audit [--quick]

Prints a row for each launch of a candidate, and what is wrong with it. The project's own kernels are compiled with the
settings that the trial gives them; of these only failures and spills are reported, since the rules of `bench.audit` are
for the settings in use. --quick: one layer of candidates. The exit code is 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

# Interpreted kernels would not be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor

from internlm3.kernels.triton.linear_few_rows import parts as parts_of

from .. import candidates
from ..audit import CACHE, Facts, Finding, figures, print_table, violations
from ..candidates import check
from ..cases import INTERNLM3_8B, Inputs
from ..machine_code.launches import Launch, compile_launches
from ..machine_code.reader import MachineCode, read
from ..machine_code.targets import TARGETS
from ..parts.trial import MORE_SHAPES, SHAPES
from .layers import Batch, weights
from .prompts import products
from .sums import ROWS, in_order
from .variants import Layer, variants

TARGET = "sm_90"
FACTS = {
    "_ring": Facts(
        ["w_ptr"], streams=["w_ptr", "x_ptr"], tensor_cores=True, bulk=["w_ptr"], most_slots=0.9, most_trips=2
    ),
    "_sum_and_norm": Facts(["norm_ptr"], early=["norm_ptr"], streams=["parts_ptr", "norm_ptr"], most_trips=2),
}  # fmt: skip


def bytes_before_wait(launch: Launch, code: MachineCode) -> int:
    """Bytes of W that a program of the ring has asked for before it waits for its predecessor."""
    early = [x.bytes for x in code.accesses if not x.may_have_waited and x.pointers == {"w_ptr"}]
    return sum(early) * 32 * launch.compiled.metadata.num_warps


def wrong_with(launch: Launch, code: MachineCode) -> list[str]:
    """What is wrong with a candidate's machine code, one sentence each."""
    wrong = violations(launch, code, TARGETS[TARGET], FACTS[launch.kernel])
    if launch.kernel == "_ring":
        made = launch.constants
        chunks = min(made["WS"], made["C"] // made["PARTS"] // made["BC"])
        asked, expected = bytes_before_wait(launch, code), 2 * chunks * made["BO"] * made["BC"]
        if asked != expected:
            wrong.append(f"asks for {asked} bytes of W before the wait, must ask for {expected}")
    return wrong


class Work(NamedTuple):
    """Something that the trial runs."""

    experiment: str
    shape: str
    run: Callable[[torch.device], object]


def all_work() -> Iterator[Work]:
    for batch, context in SHAPES + MORE_SHAPES:
        for variant in variants(batch, context):
            shape = f"batch {batch}, context {context}: {variant.name}"
            yield Work(variant.experiment, shape, partial(_two_layers, variant.layer, batch, context))
    for rows in check.ROWS:
        for name in products(Inputs(INTERNLM3_8B, torch.bfloat16, torch.device("meta"))):
            yield Work("check", f"{name}, {rows} rows", partial(_checked, name, rows))
    for name in products(Inputs(INTERNLM3_8B, torch.bfloat16, torch.device("meta"))):
        yield Work("E6", name, partial(_in_order, name))


def quick_work() -> Iterator[Work]:
    """One layer of candidates."""
    variant = next(variant for variant in variants(4, 1024) if variant.of_candidates)
    yield Work(variant.experiment, variant.name, partial(_two_layers, variant.layer, 4, 1024))


def _two_layers(layer: Layer, batch: int, context: int, device: torch.device) -> None:
    """The second one of candidates begins with the sum of the first."""
    make = Inputs(INTERNLM3_8B, torch.bfloat16, device)
    inputs = Batch(make, weights(make, 1), batch, context)
    layer(inputs, 0, layer(inputs, 0, inputs.x))


def _factors(name: str, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    make = Inputs(INTERNLM3_8B, torch.bfloat16, device)
    outputs, inputs = products(make)[name]
    return make.random(rows, inputs), make.weight(outputs, inputs)


def _checked(name: str, rows: int, device: torch.device) -> None:
    x, weight = _factors(name, rows, device)
    ops, ring = candidates.for_device(device), check.ring_of(rows)
    if name == "gate_up":
        ops.linear_swiglu(x, weight, ring)
    elif name == "qkv":
        ops.linear(x, weight, ring)
    else:
        ops.partial_products(x, weight, parts_of(*weight.shape), ring)


def _in_order(name: str, device: torch.device) -> None:
    in_order(*_factors(name, ROWS, device))


def audit(work: Iterable[Work]) -> Iterator[Finding]:
    """The launches of each piece of work that no earlier one had."""
    CACHE.mkdir(exist_ok=True)
    target, seen = TARGETS[TARGET], set()
    for experiment, shape, run in work:
        try:
            for launch in compile_launches(run, lambda device: {"device": device}, target):
                if launch.compiled.asm["cubin"] in seen:
                    continue
                seen.add(launch.compiled.asm["cubin"])
                code = read(launch, target, CACHE)
                if launch.kernel in FACTS:
                    wrong = wrong_with(launch, code)
                else:
                    wrong = [f"spills: {code.spilled} bytes"] * (code.spilled > 0)
                found = figures(launch, code, target, FACTS.get(launch.kernel, Facts()))
                yield Finding(TARGET, experiment, shape, launch.kernel, found, wrong)
        except Exception as error:  # whatever a launcher, the compiler or one of its tools raises is a finding
            yield Finding(TARGET, experiment, shape, "-", {}, [f"no machine code: {type(error).__name__}: {error}"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.trial.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer of candidates")
    options = parser.parse_args(arguments)
    findings = [*audit(quick_work() if options.quick else all_work())]
    print_table([found for found in findings if found.kernel in FACTS])
    failures = [(found, sentence) for found in findings for sentence in found.wrong]
    for found, sentence in failures:
        print(f"FAIL  {found.op} {found.shape}, {found.kernel}: {sentence}")
    print(f"{len(findings)} launches compiled, {len(failures)} violations")
    return min(len(failures), 1)


if __name__ == "__main__":
    sys.exit(main())
