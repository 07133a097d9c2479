"""E6: which products have the same bits. With one order of sums in all, a row's bits would depend on nothing else.

The candidate's order is that of kernels/triton/linear_few_rows.py: the tensor core's steps of 16 columns in ascending
order within a part, and the parts in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm3 import kernels
from internlm3.kernels.triton.linear_few_rows import parts as parts_of

from .. import candidates
from ..candidates.reference import sum_of
from ..candidates.settings import Ring
from ..cases import Inputs
from ..record import Part, Row
from .prompts import products

ROWS = 64  # of a launch of the ring
RING = Ring(4, 4, rows=128, columns=64, warps=8)
FEW = 16


def in_order(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T in the candidate's order of sums, for any number of rows."""
    ops = candidates.for_device(x.device)
    count = parts_of(*weight.shape)
    return torch.cat([sum_of(ops.partial_products(some, weight, count, RING), x.dtype) for some in x.split(ROWS)])


def share_of_equal(found: Tensor, expected: Tensor) -> float:
    """Percent of the elements that have the same value."""
    return 100 * float((found == expected).double().mean())


def orders(part: Part, make: Inputs, counts: Sequence[int]) -> Iterator[Row]:
    """For each of a layer's matrices: the ring against `_rows`, and cuBLAS by rows against the ring and itself."""
    most = max(counts)
    for name, (outputs, inputs) in products(make).items():
        x, weight = make.random(most, inputs), make.weight(outputs, inputs)
        ordered, all_rows = in_order(x, weight), F.linear(x, weight)
        few = kernels.linear(x[:FEW], weight, batch_invariant=True)

        def row(what: str, found: Tensor, expected: Tensor, equal: str, unequal: str) -> Row:
            share = share_of_equal(found, expected)
            decision = equal if share == 100 else unequal
            about = {"experiment": "E6", "op": name, "predicted": "unknown", "decision": decision}  # noqa: B023
            return part.figure(f"E6 {name}: {what}", [share], "% of equal bits", decision, **about)  # noqa: B023

        yield row(
            f"the ring against the kernel of several rows, {FEW} rows", ordered[:FEW], few,
            "one order: the ring may replace that kernel without changing bits",
            "two orders: the tensor core's steps differ, so the ring's record must come with new bits",
        )  # fmt: skip
        for rows in counts:
            found = F.linear(x[:rows], weight)
            yield row(
                f"cuBLAS at {rows} rows against the ring", found, ordered[:rows],
                "cuBLAS sums in this order here: prompts need no product of their own",
                "one order for prompts too needs a product of our own (goal: within 8% of cuBLAS)",
            )  # fmt: skip
            if rows < most:
                yield row(
                    f"cuBLAS at {rows} rows against the same rows at {most}", found, all_rows[:rows],
                    "the number of rows changes no bits here",
                    "the number of rows changes bits: ROW_COUNT_CHANGES_BITS stays",
                )  # fmt: skip
