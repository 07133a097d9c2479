"""What the trial tries at each batch size and context length: predictions, and the decision that a gain makes.

Predictions are those of design/gpu-round-two.md, computed or simulated without a GPU. `predicted` says so in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from .layers import Attention, as_built, with_attention, with_interleaved

Layer = Callable[[Any, int, Any], Any]  # of a batch, a layer's number and the state before it: the state after it


class Variant(NamedTuple):
    experiment: str
    name: str
    layer: Layer
    predicted: str
    adopt: str  # what to do if it gains at least `bar`
    bar: float = 0.5  # microseconds of a layer; 24 of a step

    def decision(self, gain: float) -> str:
        if gain >= self.bar:
            return self.adopt
        return f"no change: it would have to gain {self.bar:g} us"


AS_BUILT = Variant("baseline", "as built", as_built, "", "")
# Microseconds of a layer as built at 1k tokens, by batch size: the H200's record of 2026-11-27 less what loading older
# keys early is predicted to gain. (32k tokens: 97.4 less 6 to 8.)
PREDICTED_AS_BUILT = {(1, 1024): "83.5", (4, 1024): "95.9", (16, 1024): "101.2 to 102.2", (1, 32768): "89.4 to 91.4"}


def variants(batch: int, context: int) -> Iterator[Variant]:
    """In the order in which they decide most."""
    if context <= 8192:
        yield from _interleaved(batch)
    yield from _attention(batch, context)


def one_of_each(tried: Iterable[Variant]) -> Iterable[Variant]:
    """One variant of each experiment."""
    return {variant.experiment: variant for variant in tried}.values()


def _interleaved(batch: int) -> Iterator[Variant]:
    if batch <= 16:
        adopt = "the loader stores gate and up rows 8 apart, and rms_norm_swiglu passes half=8"
        yield Variant("E1", "gate and up rows 8 apart", with_interleaved, "a gain of 3.3 to 4 us", adopt)


def _attention(batch: int, context: int) -> Iterator[Variant]:
    long = context > 8192

    def variant(name: str, predicted: str, adopt: str, **settings: Any) -> Variant:
        layer = partial(with_attention, settings=Attention(**settings))
        return Variant("E2", f"attention: {name}", layer, predicted, adopt)

    gained = {1: "a loss of 3.3 us", 4: "a loss of 3 us", 16: "a loss of 2 to 3 us"}.get(batch, "no prediction")
    yield variant(
        "nothing loaded before the wait", "no prediction" if long else gained,
        "call attention with decode_step=False at this shape", early=False,
    )  # fmt: skip
    if long:
        for stages in (3, 5, 7):
            predicted = {3: "-4 us", 5: "-7 to -9 us"}.get(stages, "no prediction") if batch == 1 else "no prediction"
            for trigger in (1, 2):
                yield variant(
                    f"stages {stages}, trigger {trigger}", f"{predicted} against the record's kernel",
                    f"use {stages} stages and trigger {trigger} at this shape", stages=stages, trigger=trigger,
                )  # fmt: skip
        return
    for trigger in (0, 1, 2):
        yield variant(
            f"trigger {trigger}", "within 1 us of the other triggers",
            f"set _TRIGGER to {trigger} at this shape", trigger=trigger,
        )  # fmt: skip
    for keys, warps in ((32, 4), (64, 4), (64, 8), (128, 8)):
        if (keys, warps) == ((64, 4) if batch == 1 else (128, 8)):
            continue
        yield variant(
            f"{keys} keys, {warps} warps", "no prediction" if batch == 1 else "-2 to -4 us for the best tile",
            f"use tiles of {keys} keys and {warps} warps at this shape", keys=keys, warps=warps,
        )  # fmt: skip
