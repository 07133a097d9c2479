"""Values in error messages: in one line of limited length, whatever a file or a caller has put there."""

import reprlib
from itertools import islice
from typing import Any

_MOST = 70  # characters


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, _MOST, _MOST
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 20

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write integers of more than 4300 digits.
        return repr(x) if x.bit_length() < 200 else f"an integer of {x.bit_length()} bits"

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:  # reprlib's own sorts the keys
        if level <= 0:
            return "{...}"
        pairs = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in islice(x, self.maxdict)]
        return "{" + ", ".join([*pairs, "..."] if len(x) > self.maxdict else pairs) + "}"


_short = _Short()


def shown(value: object) -> str:
    """`repr(value)`, shortened: a megabyte of text and a list in a list 5,000 deep fit into one line.

    >>> shown(10**400)
    'an integer of 1329 bits'
    """
    try:
        return one_line(_short.repr(value), _MOST)
    except Exception:  # a caller's object may have a repr that fails
        return f"a {type(value).__name__}"


def one_line(text: str, most: int = 200) -> str:
    """`text` with spaces for line breaks, and its end replaced by "..." if it has more than `most` characters."""
    text = " ".join(text[: 2 * most].split("\n"))
    return text if len(text) <= most else text[: most - 3] + "..."
