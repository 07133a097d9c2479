"""How a candidate is launched."""

from typing import NamedTuple


class Ring(NamedTuple):
    """The tile of a program, its warps, and the chunks that its rings hold."""

    w_slots: int = 5
    x_slots: int = 4
    rows: int = 64  # of W
    columns: int = 128
    warps: int = 4
