"""How many replicas there are."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Count:
    """From `least` to `most` replicas, as the requests under way ask for. Both are at least 1."""

    least: int
    most: int

    @classmethod
    def read(cls, text: str) -> Count:
        """Reads "4", or "1-4". Raises ValueError."""
        found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text, re.ASCII)
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most:
            raise ValueError(f"expected a number of replicas (4), or the fewest and the most (1-4), not {text!r}")
        return cls(least, most)

    def __str__(self) -> str:
        if self.least < self.most:
            return f"{self.least} to {self.most} replicas"
        return "1 replica" if self.most == 1 else f"{self.most} replicas"
