"""What the trial tries at each batch size and context length: predictions, and the decision that a gain makes.

Predictions are those of design/gpu-round-two.md, computed or simulated without a GPU. `predicted` says so in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from internlm3.kernels.triton.linear_few_rows import parts as parts_of

from ..candidates.settings import Ring
from .layers import (
    Attention,
    Rings,
    as_built,
    with_attention,
    with_few_rows,
    with_interleaved,
    with_late_weights,
    with_rings,
)

Layer = Callable[[Any, int, Any], Any]  # of a batch, a layer's number and the state before it: the state after it


class Variant(NamedTuple):
    experiment: str
    name: str
    layer: Layer
    predicted: str
    adopt: str  # what to do if it gains at least `bar`
    bar: float = 0.5  # microseconds of a layer; 24 of a step
    same_values: bool = True  # as the layer as built, but for rounding

    @property
    def of_candidates(self) -> bool:
        """Whether it launches kernels of bench/candidates."""
        return isinstance(self.layer, partial) and self.layer.func is with_rings

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
        yield from _rings(batch)
    yield from _attention(batch, context)


def one_of_each(tried: Iterable[Variant]) -> Iterable[Variant]:
    """One variant of each experiment and kind of layer, whose values are right."""
    right = [variant for variant in tried if variant.same_values]
    return {(each.experiment, getattr(each.layer, "func", each.layer)): each for each in right}.values()


def _interleaved(batch: int) -> Iterator[Variant]:
    if batch <= 16:
        adopt = "the loader stores gate and up rows 8 apart, and rms_norm_swiglu passes half=8"
        yield Variant("E1", "gate and up rows 8 apart", with_interleaved, "a gain of 3.3 to 4 us", adopt)


# Chunks of W and of x in the rings, parts of o's and down's sums, and the predicted microseconds of a layer.
_FEW = {  # for 1 and 4 rows
    (5, 4, 4): ("76.0", "79.0"), (5, 4, 2): ("80.3", "83.3"), (3, 3, 4): ("77.8", "79.9"),
    (4, 3, 4): ("76.8", "79.9"), (10, 4, 1): ("80.3", "85.1"), (6, 6, 4): ("no prediction", "no prediction"),
}  # fmt: skip


def _rings(batch: int) -> Iterator[Variant]:
    """Predictions are of layers whose products rotate q and k themselves."""

    def variant(name: str, rings: Rings, predicted: str, rotated: bool = True) -> Variant:
        adopt = "the ring moves into kernels/ for this batch size, launched like this"
        if batch == 1:
            adopt += "; batch_invariant then costs nothing"
        if rings.parts != parts_of(4096, 4096):
            adopt += f"; o and down are then summed in {rings.parts} parts everywhere"
        layer = partial(with_rings, rings=rings, rotated=rotated)
        predicted = predicted if predicted.startswith("no") else f"{predicted} us a layer"
        return Variant("E3", f"ring {name}", layer, predicted, adopt, 0.0 if batch == 1 else 1.0, rotated)

    def plain(w: int, x: int, parts: int, predicted: str) -> Variant:
        ring = Ring(w, x)
        return variant(f"of {w} and {x} chunks, o and down in {parts} parts", Rings(ring, ring, ring, parts), predicted)

    if batch <= 4:
        for (w, x, parts), by_batch in _FEW.items():
            yield plain(w, x, parts, by_batch[batch > 1])
    elif batch <= 16:
        yield plain(5, 4, 4, "80.7")
        yield plain(5, 4, 2, "85.6")
    elif batch <= 32:
        yield plain(5, 3, 4, "88")
        yield plain(5, 3, 2, "no prediction")
    else:
        wide = Ring(4, 4, rows=128, columns=64, warps=8)
        rings = Rings(Ring(4, 3), wide, wide, 4)  # qkv has too few rows for programs of 128
        yield variant("of 4 and 4 chunks of 128 rows and 64 columns", rings, "100")
    if batch <= 16:
        mixed = Rings(Ring(5, 4), Ring(5, 4), Ring(4, 3), 4)
        predicted = {1: "75.3", 4: "78.3", 16: "80.0"}[batch]
        yield variant("of 5 and 4 chunks, gate and up of 4 and 3", mixed, predicted)
        yield variant("of 5 and 4 chunks, gate and up of 4 and 3, no rotation", mixed, predicted, rotated=False)
    else:
        adopt = "more than 16 rows use cuBLAS: FEW_ROWS = 16"
        predicted = "about 125 us a layer" if batch <= 32 else "no prediction"
        yield Variant("E3", "cuBLAS for more than 16 rows", partial(with_few_rows, limit=16), predicted, adopt)
    if batch > 1:
        # 8 stages were measured with up to 16 rows.
        layer, stages = partial(with_late_weights, stages=8 if batch <= 16 else None), ", 8 stages" * (batch <= 16)
        adopt = f"kernels of several rows load nothing of W before the wait{stages}: `early` goes"
        yield Variant("E3", f"nothing of W before the wait{stages}", layer, "no prediction", adopt)


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
        for stages in (2, 3, 4):  # one, two and three tiles of keys in flight
            predicted = {2: "-4 us", 3: "-7 to -9 us"}.get(stages, "no prediction") if batch == 1 else "no prediction"
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
