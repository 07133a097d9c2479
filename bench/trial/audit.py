"""Compile every launch of the trial's layers for sm_90, on a machine without a GPU, and audit those of the candidates.

    python -m bench.trial.audit [--quick]

Prints a row for each launch of a candidate, and what is wrong with it. The project's own kernels are compiled with the
settings that the trial gives them; of these only failures and spills are reported, since the rules of `bench.audit` are
for the settings in use. --quick: one layer of candidates. The exit code is 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

# Interpreted kernels would not be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import torch

from ..audit import CACHE, Facts, Finding, figures, print_table, violations
from ..cases import INTERNLM3_8B, Inputs
from ..machine_code.launches import Launch, compile_launches
from ..machine_code.reader import MachineCode, read
from ..machine_code.targets import TARGETS
from ..parts.trial import MORE_SHAPES, SHAPES
from .layers import Batch, weights
from .variants import Variant, variants

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
    """A variant at one shape."""

    batch: int
    context: int
    variant: Variant


def all_work(quick: bool) -> Iterator[Work]:
    for batch, context in SHAPES[1:2] if quick else SHAPES + MORE_SHAPES:
        for variant in variants(batch, context):
            yield Work(batch, context, variant)
            if quick and variant.of_candidates:
                return


def audit(work: Sequence[Work]) -> Iterator[Finding]:
    """The launches of each piece of work that no earlier one had."""
    CACHE.mkdir(exist_ok=True)
    seen = set()
    for batch, context, variant in work:
        shape = f"batch {batch}, context {context}: {variant.experiment} {variant.name}"
        try:
            inputs = partial(_inputs, batch, context)
            for launch in compile_launches(partial(layer_of, variant), inputs, TARGETS[TARGET]):
                if launch.compiled.asm["cubin"] in seen:
                    continue
                seen.add(launch.compiled.asm["cubin"])
                code = read(launch, TARGETS[TARGET], CACHE)
                if launch.kernel in FACTS:
                    wrong = wrong_with(launch, code)
                else:
                    wrong = [f"spills: {code.spilled} bytes"] * (code.spilled > 0)
                found = figures(launch, code, TARGETS[TARGET], FACTS.get(launch.kernel, Facts()))
                yield Finding(TARGET, variant.experiment, shape, launch.kernel, found, wrong)
        except Exception as error:  # whatever a launcher, the compiler or one of its tools raises is a finding
            wrong = [f"no machine code: {type(error).__name__}: {error}"]
            yield Finding(TARGET, variant.experiment, shape, "-", {}, wrong)


def _inputs(batch: int, context: int, device: torch.device) -> dict[str, Any]:
    make = Inputs(INTERNLM3_8B, torch.bfloat16, device)
    return {"batch": Batch(make, weights(make, 1), batch, context)}


def layer_of(variant: Variant, batch: Batch) -> None:
    """Two layers: the second of candidates begins with the sum of the first."""
    variant.layer(batch, 0, variant.layer(batch, 0, batch.x))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.trial.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer of candidates")
    options = parser.parse_args(arguments)
    findings = [*audit([*all_work(options.quick)])]
    print_table([found for found in findings if found.kernel in FACTS])
    failures = [(found, sentence) for found in findings for sentence in found.wrong]
    for found, sentence in failures:
        print(f"FAIL  {found.shape}, {found.kernel}: {sentence}")
    print(f"{len(findings)} launches compiled, {len(failures)} violations")
    return min(len(failures), 1)


if __name__ == "__main__":
    sys.exit(main())
