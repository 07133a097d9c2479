"""Steps and time that speculation saves by workload, at the 8B's shapes: see `bench.speculation`."""

from __future__ import annotations

from collections.abc import Iterator

from .. import speculation
from ..record import Part, Row
from .bare_step import random_model


def rows(small: bool) -> Iterator[Row]:
    model = random_model(small)
    return speculation.rows(Part("speculation"), model, *((1, 12) if small else (3,)))
