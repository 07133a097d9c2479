"""Kernels with planted faults for the audit. Run by test_audit.py in a process without Triton's interpreter:

    python -m tests.support.faulty_kernels TARGET...

prints as JSON what the audit finds for each fault on each target. Faults that are found without reading machine code
are planted on sm_90 only, and faults of dependent launch on targets that have it.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl

from bench.audit import Facts, violations
from bench.machine_code.launches import compile_launches
from bench.machine_code.reader import read
from bench.machine_code.targets import TARGETS

ROWS, COLUMNS = 512, 4096
FAULTS: dict[str, dict[str, Any]] = {  # name -> launch options
    "none": {},
    "late trigger": {},
    "no trigger": {},
    "early trigger": {},
    "early activation": {},
    "early store": {},
    "no wait": {},
    "wait on one path": {},
    "exit before the wait": {},
    "late weight": {},
    "narrow weight": {},
    "untraceable load": {},
    "launched without": {"launch_pdl": False},
    "spills": {"maxnreg": 24},
    "no tensor core": {},
    "too much shared memory": {"num_stages": 6},
    "may contract": {"enable_fp_fusion": True},
    "fuses in 16 bits": {},
    "slow": {},
    "serial": {},
    "idle": {},
    "attention": {},
    "early query": {},
    "early newest key": {},
    "late older keys": {},
    "matrix": {},
    "early x": {},
    "no early chunk": {},
    "other steps": {},
    "another instruction": {},
    "converts one by one": {},
    "trigger before the last keys": {},
    "trigger on one path": {},
}
OF_ATTENTION = {
    *("attention", "early query", "early newest key", "late older keys"),
    *("trigger before the last keys", "trigger on one path"),
}
OF_MATRICES = {
    *("matrix", "early x", "no early chunk", "other steps", "too much shared memory", "another instruction"),
    "converts one by one",
}
OF_DEPENDENT_LAUNCH = {
    *("late trigger", "no trigger", "early activation", "early store", "no wait", "wait on one path"),
    *("exit before the wait", "late weight", "serial", "launched without", "early trigger"),
    *("matrix", "early x", "no early chunk", "another instruction"),
    *OF_ATTENTION,
}


@triton.jit
def dot_product(x_ptr, w_ptr, y_ptr, address, stride, C: tl.constexpr, FAULT: tl.constexpr, PDL: tl.constexpr):
    """y[row] = w[row] . x, which loads weights before the wait for the predecessor and activations after it."""
    row = tl.program_id(0)
    columns = tl.arange(0, C)
    if PDL and FAULT != "late trigger" and FAULT != "no trigger":
        tl.extra.cuda.gdc_launch_dependents()
    if FAULT == "exit before the wait":  # noqa: SIM102 - the outer one is decided at compile time
        if stride > 12345:
            return
    if FAULT == "early activation":
        x = tl.load(x_ptr + columns)
    if FAULT == "early store":
        tl.store(y_ptr + row, 0.0)
    if FAULT != "late weight":
        w = tl.load(w_ptr + row * stride + columns)
    if PDL and FAULT == "late trigger":
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        if FAULT == "wait on one path":
            if stride > 12345:
                tl.extra.cuda.gdc_wait()
        elif FAULT != "no wait":
            tl.extra.cuda.gdc_wait()
    if FAULT == "late weight":
        w = tl.load(w_ptr + row * stride + columns)
    if FAULT != "early activation":
        x = tl.load(x_ptr + columns)
    if FAULT == "fuses in 16 bits":
        x = tl.fma(x, w, x)
    if FAULT == "serial":  # loads in sequence that could have been issued together
        for i in tl.static_range(2):
            x += tl.load(x_ptr + columns + (i + 1) * C + (tl.sum(x.to(tl.float32), 0) > 1e30))
    products = x.to(tl.float32) * w.to(tl.float32)
    if FAULT == "slow":
        for _ in tl.static_range(128):
            products = tl.fma(products, products, products)
    y = tl.sum(products, 0)
    if FAULT == "spills":  # everything loaded is used again
        y = tl.sum((x.to(tl.float32) + w.to(tl.float32)) * y, 0)
    if FAULT == "untraceable load":
        y += tl.load(address.to(tl.pointer_type(tl.float32)))
    tl.store(y_ptr + row, y)


@triton.jit
def largest_score(
    q_ptr, k_ptr, new_k_ptr, lens_ptr, y_ptr, N: tl.constexpr, C: tl.constexpr, FAULT: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """y = the largest k . q of all keys, in tiles of N. All keys but the newest are older than the step.

    It loads the first tile before the wait, and lets its successor start when it has loaded the last.
    """
    columns, tokens = tl.arange(0, C), tl.arange(0, N)
    length = tl.load(lens_ptr)
    newest = length - 1
    keys = k_ptr + tokens[:, None] * C + columns[None, :]
    new_key = new_k_ptr + newest * C + columns
    if FAULT != "late older keys":
        k = tl.load(keys, mask=(tokens < newest)[:, None], other=0.0)
    if PDL and FAULT == "trigger before the last keys":
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:  # noqa: SIM102 - decided at compile time
        if length <= N:
            tl.extra.cuda.gdc_launch_dependents()
    if FAULT == "early query":
        q = tl.load(q_ptr + columns)
    if FAULT == "early newest key":
        new_k = tl.load(new_key)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if FAULT == "late older keys":
        k = tl.load(keys, mask=(tokens < newest)[:, None], other=0.0)
    if FAULT != "early query":
        q = tl.load(q_ptr + columns)
    if FAULT != "early newest key":
        new_k = tl.load(new_key)
    k = tl.where((tokens == newest)[:, None], new_k[None, :], k)
    best = tl.max(tl.sum(k.to(tl.float32) * q.to(tl.float32)[None, :], 1), 0)
    for first in range(N, length, N):
        k = tl.load(keys + first * C, mask=(first + tokens < length)[:, None], other=0.0)
        best = tl.maximum(best, tl.max(tl.sum(k.to(tl.float32) * q.to(tl.float32)[None, :], 1), 0))
    if PDL and FAULT != "trigger on one path":
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(y_ptr, best)


@triton.jit
def matrix_product(
    x_ptr, w_ptr, y_ptr, N: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, FAULT: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """y = w x^T, in a software pipeline of num_stages stages. The last chunk of w is loaded before the wait."""
    rows = tl.arange(0, N)
    last = rows[:, None] * C + (C - BC + tl.arange(0, BC))[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if FAULT != "no early chunk":
        w_last = tl.load(w_ptr + last)
    if FAULT == "early x":
        x_last = tl.load(x_ptr + last)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if FAULT == "no early chunk":
        w_last = tl.load(w_ptr + last)
    if FAULT != "early x":
        x_last = tl.load(x_ptr + last)
    y = tl.zeros((N, N), tl.float32)
    for c in range(0, C - BC, BC):
        columns = c + tl.arange(0, BC)
        w = tl.load(w_ptr + rows[:, None] * C + columns[None, :])
        x = tl.load(x_ptr + rows[:, None] * C + columns[None, :])
        y = tl.dot(w.to(x.dtype), x.trans(), y)
    y = tl.dot(w_last.to(x_last.dtype), x_last.trans(), y)
    tl.store(y_ptr + rows[:, None] * N + rows[None, :], y)


def launch(x: torch.Tensor, w: torch.Tensor, fault: str) -> None:
    pdl = torch.cuda.get_device_capability() >= (9, 0)
    options = {"PDL": pdl, "launch_pdl": pdl, "enable_fp_fusion": False, **FAULTS[fault]}
    y = torch.empty((ROWS, ROWS), dtype=torch.float32, device=x.device)
    if fault in OF_ATTENTION:
        lens = torch.empty(1, dtype=torch.int32, device=x.device)
        largest_score[(1,)](x, w, w, lens, y, 16, COLUMNS // 8, fault, **options)
    elif fault in OF_MATRICES:
        if fault == "other steps":  # TF32, of which an instruction adds 8 columns
            x, w = x.float(), w.float()
        elif fault == "converts one by one":
            w = w.to(torch.int8)
        matrix_product[(1,)](x, w, y, 64, COLUMNS, 256 if fault == "too much shared memory" else 64, fault, **options)
    else:
        stride = w.stride(0) + (fault == "narrow weight")
        dot_product[(1 if fault == "idle" else ROWS,)](x, w, y, 2**40, stride, COLUMNS, fault, **options)


def targets_of(fault: str) -> set[str]:
    if fault in ("launched without", "too much shared memory", "may contract", "idle"):
        return {"sm_90"}
    if fault == "other steps":
        return {name for name, target in TARGETS.items() if target.is_cuda and target.capability < (10, 0)}
    if fault in OF_DEPENDENT_LAUNCH:
        return {name for name, target in TARGETS.items() if target.is_cuda and target.capability >= (9, 0)}
    return {*TARGETS}


def main(targets: Iterable[str]) -> None:
    found = {}
    for name in targets:
        for fault in [fault for fault in FAULTS if name in targets_of(fault)]:
            facts = Facts(
                ["w_ptr"], early=["w_ptr"], streams=["w_ptr"], tensor_cores=fault == "no tensor core",
                bulk=["w_ptr"], most_slots=2.5, most_trips=3, least_programs=2, begins_step=fault == "early trigger",
            )  # fmt: skip
            if fault in OF_ATTENTION:
                facts = Facts(older=["lens_ptr", "k_ptr"], early=["lens_ptr"], triggers_last=True)
            if fault in OF_MATRICES:
                facts = Facts(["w_ptr"], streams=["w_ptr", "x_ptr"], tensor_cores=True, step=16, bulk=["w_ptr"])
                facts = facts._replace(most_conversions=2)
                if fault in OF_DEPENDENT_LAUNCH:
                    facts = facts._replace(begun=["w_ptr"])
                if fault == "another instruction":
                    facts = facts._replace(instruction="HMMA")
                if fault == "converts one by one":
                    facts = facts._replace(streams=["x_ptr"])  # loads of w are narrow as well

            def arguments(device: torch.device, fault: str = fault) -> dict:
                x = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
                return {"x": x, "w": torch.empty_like(x), "fault": fault}

            (compiled,) = compile_launches(launch, arguments, TARGETS[name])
            found[f"{fault} on {name}"] = violations(compiled, read(compiled, TARGETS[name]), TARGETS[name], facts)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
