"""Python functions as tools of a chat: every kind of type hint and docstring that transformers takes, and some bad."""

from enum import Enum
from typing import Any, Literal, Optional, Union


class Unit(Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


class Level(Enum):
    ONE = 1
    NAMED = "named"


def weather(city: str, days: int = 1, unit: Literal["celsius", "kelvin"] = "celsius") -> str:
    """Forecasts the weather.

    It knows cities only.

    Args:
        city: The name of the city,
            in English: "New York", not NYC.

        days: How many days (choices: [1, 3, 7])
        unit: Of the temperature (choices: [" celsius ", "kelvin"])

    Returns:
        A sentence, for example:
            Sunny.

    Raises:
        KeyError: no such city.
    """
    return city


class Shop:
    def buy(self, item: str, count: Optional[int] = None) -> "Shop":  # noqa: UP045
        """Buys something

        Args:
            item: What to buy
            count: How many; None for one
        """
        return self

    @classmethod
    def close(cls) -> None:
        """Closes the shop."""


def hints(
    a: list, b: list[int], c: tuple[int, str], d: dict[str, float], e: dict, f: Any, g: Union[int, str, None], h: bool,  # noqa: UP007
    i: int | list[str], j: Unit, k: Level | None, ll: Literal[1, "a", None, True], m: tuple, n: int | float, o: None,
    p: "list[Unit]", q: list | tuple, r: float | None = None, *more: str,
):  # fmt: skip
    """Every hint.

    Args:
        a: A
        b: B with: a colon
        c:
            C on the next line
        d: D
        e: E
        f: F
        g: G
        h: H
        i: I
        j: J
        k: K
        ll: L
        m: M
        n: N
        o: O
        p: P
        q: Q
        r: R
        more: The rest
        another: which it does not have
    Example:
        hints()
    """


def nothing():
    """Only a sentence."""


def only_returns() -> dict[str, int]:
    """
    A sentence
    in two lines.
    Returns: on the same line
    """
    return {}


GOOD = (weather, Shop().buy, Shop.buy, Shop.close, hints, nothing, only_returns)


def undocumented(a: int): ...


def undescribed(a: int, b: int):
    """Adds.

    Args:
        a: the first
    """


def unhinted(a):
    """Adds.

    Args:
        a: the first
    """


def custom(a: Shop):
    """Adds.

    Args:
        a: the first
    """


def one_of_a_tuple(a: tuple[int]):
    """Adds.

    Args:
        a: the first
    """


def any_number(a: tuple[int, ...]):
    """Adds.

    Args:
        a: the first
    """


def a_literal_of_bytes(a: Literal[b"x"]):
    """Adds.

    Args:
        a: the first
    """


def bad_choices(a: str):
    """Adds.

    Args:
        a: the first (choices: ["x", )
    """


def unknown_name(a: "Nowhere"):  # type: ignore[name-defined]  # noqa: F821
    """Adds.

    Args:
        a: the first
    """


BAD = (
    undocumented, undescribed, unhinted, custom, one_of_a_tuple, any_number, a_literal_of_bytes, bad_choices,
    unknown_name,
)  # fmt: skip
