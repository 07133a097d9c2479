"""What a part of bench/gpu.py finds: one row at a time, on disk as soon as it is known."""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """A check that passed or failed, or a figure: the median of its rounds; or why there is neither."""

    part: str
    name: str
    state: str  # "pass", "FAIL", "figure", or "not run"
    note: str = ""
    rounds: Sequence[float] = ()
    unit: str = ""
    about: dict[str, Any] = field(default_factory=dict)  # what a table sorts by: engine, context, rows, ...

    @property
    def value(self) -> float:
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        figure = ""
        if self.rounds:
            figure = f"{self.value:.4g} {self.unit} ({min(self.rounds):.4g} to {max(self.rounds):.4g})"
        return f"{self.state:8}{self.part:11}{self.name:58}{figure:>34}  {self.note}".rstrip()


def first_line(error: BaseException) -> str:
    """An exception in a row."""
    return f"{type(error).__name__}: {''.join(str(error).strip().splitlines()[:1])}"


class Part:
    """Makes the rows of one part."""

    def __init__(self, name: str):
        self.name = name

    def check(self, name: str, wrong: str | Callable[[], str], **about: Any) -> Row:
        """A check that says what is wrong, in words; an exception on the way is wrong too, and the next check runs."""
        try:
            found = wrong if isinstance(wrong, str) else wrong()
        except Exception as error:
            found = first_line(error)
        return Row(self.name, name, "FAIL" if found else "pass", found, about=about)

    def figure(self, name: str, rounds: Sequence[float], unit: str, note: str = "", **about: Any) -> Row:
        return Row(self.name, name, "figure", note, list(rounds), unit, about)

    def missing(self, name: str, why: str, **about: Any) -> Row:
        return Row(self.name, name, "not run", why, about=about)


def append(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> Iterator[Row]:
    """The rows on disk; of a part that was killed while it wrote one, those before it."""
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            yield Row(**json.loads(line))
        except ValueError:
            return
