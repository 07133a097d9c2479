"""Steps and time that speculation saves by workload, at a model's shapes: see `bench.speculation`."""

from __future__ import annotations

from collections.abc import Iterator

from .. import speculation
from ..record import Part, Row
from .bare_step import random_model


def rows(small: bool, name: str) -> Iterator[Row]:
    model = random_model(small, name)
    return speculation.rows(Part("speculation"), model, *((1, 12) if small else (3,)))
