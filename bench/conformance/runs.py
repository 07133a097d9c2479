"""The runs of the folder: which rotary base is right at each place, and how runtimes are known to go wrong."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint import LENGTH, PLACES, WINDOW, token_ids
from .reference import base, logits


class Fault(NamedTuple):
    """A known way to be wrong.

    sentence: what the runtime does. window: of dynamic NTK. base_of: the rule in place of the run's own; arguments and
    result as in RUNS. stretch, pairs: as in `reference.logits`.
    """

    sentence: str
    window: int = WINDOW
    base_of: Callable[[int, int], float | Tensor] | None = None
    stretch: float = 1.0
    pairs: bool = False


def fixed(place: int, window: int) -> float:
    """A sequence keeps the base that its prompt of at most WINDOW tokens gave it."""
    return base(min(place + 1, WINDOW), window)


def rederived(place: int, window: int) -> Tensor:
    """Every token's query and key have the base of the sequence up to it."""
    return torch.tensor([base(length, window) for length in range(1, place + 2)], dtype=torch.float64)


# (place, window of dynamic NTK) -> the base of a sequence that ends at the place; or the bases of its tokens.
RUNS: dict[str, Callable[[int, int], float | Tensor]] = {
    "prompts": lambda place, window: base(place + 1, window),
    "decode": fixed,
    "decode-rederived": rederived,
}
FAULTS = {
    "doubled": Fault("positions are doubled", stretch=2),
    "pairs": Fault("dimensions 2j and 2j + 1 of a head are rotated together, instead of j and j + half", pairs=True),
    "window": Fault("dynamic NTK begins one token early, above 32767 instead of 32768", window=WINDOW - 1),
    "rederived": Fault(
        "the rotary base is derived again for every token, and cached keys keep their rotation; where that is meant, "
        "as in transformers, the run is decode-rederived",
        base_of=rederived,
    ),
    "plain": Fault("the rotary base does not grow beyond the trained window", base_of=fixed),
    "whole": Fault("all places have the base of 40001 tokens, as in one prompt", base_of=lambda *_: base(LENGTH)),
    "static": Fault("every sequence has the base of six windows", base_of=lambda *_: base(6 * WINDOW)),
}
NONE = Fault("")


def faults_of(run: str) -> dict[str, Fault]:
    """The faults that change this run; the rule of another run is one, and its own is none."""
    return {name: fault for name, fault in FAULTS.items() if fault.base_of is None or fault.base_of is not RUNS[run]}


def computed(run: str, fault: Fault = NONE, places: Sequence[int] = PLACES) -> Tensor:
    """The logits [len(places), VOCAB] of a run, by the reference."""
    ids, rule = token_ids(), fault.base_of or RUNS[run]
    return torch.stack(
        [
            logits(ids[: place + 1], rule(place, fault.window), stretch=fault.stretch, pairs=fault.pairs)
            for place in places
        ]
    )
