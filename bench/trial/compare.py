"""Times variants of a layer in turn with the layer as built, after a look at their values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from statistics import median
from typing import Any

from torch import Tensor

from internlm3 import kernels

from ..candidates.reference import interleaved
from ..cases import Inputs
from ..harness import difference
from ..record import Part, Row, first_line
from ..timing import Call, replayed, rounds_of
from .layers import EPS, Batch, Unsummed, swiglu_of_interleaved
from .variants import AS_BUILT, PREDICTED_AS_BUILT, Layer, Variant

MOST_OFF = 1e-2  # of a layer's result, relative to its norm: sums in another order are off by a tenth of it


def compared(part: Part, batch: Batch, tried: Iterable[Variant], rounds: int) -> Iterator[Row]:
    """A row for the layer as built and one for each variant, in microseconds of a layer.

    A variant's gain is the difference of medians over rounds that alternate with rounds as built.
    """
    built = Chain(batch, AS_BUILT.layer)
    times = list(islice(rounds_of(built.run, len(batch.layers)), rounds))
    predicted = PREDICTED_AS_BUILT.get((batch.sequences, batch.context), "no prediction")
    about: dict[str, Any] = {"tokens": batch.sequences, "context": batch.context}
    yield part.figure(
        f"{AS_BUILT.name}, {batch.shape}", times, "us", f"a layer; predicted: {predicted}",
        experiment=AS_BUILT.experiment, predicted=predicted, **about,
    )  # fmt: skip
    for variant in tried:
        name = f"{variant.experiment} {variant.name}, {batch.shape}"
        about["experiment"] = variant.experiment
        try:
            chain = Chain(batch, variant.layer)
            off = relative_error(chain.first, built.first)
            if variant.same_values and not off < MOST_OFF:
                yield part.check(name, f"a layer's result is off by {off:.1e}, so it is not timed", **about)
                continue
            ours, theirs = (rounds_of(each.run, len(batch.layers)) for each in (built, chain))
            pairs = [(next(ours), next(theirs)) for _ in range(rounds)]
            if error := chain.error():
                yield part.check(name, error, **about)
                continue
        except Exception as error:  # such as a kernel that does not compile: the other variants stand alone
            yield part.check(name, first_line(error), **about)
            continue
        gain = median(before for before, _ in pairs) - median(after for _, after in pairs)
        decision = variant.decision(gain)
        note = f"gains {gain:.2f} a layer (predicted: {variant.predicted}): {decision}"
        yield part.figure(
            name, [after for _, after in pairs], "us", note,
            predicted=variant.predicted, gain=gain, decision=decision, off=off, **about,
        )  # fmt: skip


class Chain:
    """All layers, one after the other. `run` replays them as a CUDA graph; on a CPU it calls them.

    `first` is the result of the first layer, by itself.
    """

    def __init__(self, batch: Batch, layer: Layer):
        self.first = hidden(layer(batch, 0, batch.x))

        def run() -> None:
            state: Any = batch.x
            for number in range(len(batch.layers)):
                state = layer(batch, number, state)
            self._state = state

        self._launch = run
        self.run: Call = replayed([run]) if batch.x.is_cuda else run

    def error(self) -> str:
        """What is wrong with the result of the last run; "" if it has the bits of the same launches outside a graph.

        Those follow one another more slowly, so a launch that does not wait for what it reads is found here.
        """
        found = hidden(self._state).clone()
        self._launch()
        return difference("a replay's result", found, hidden(self._state))


def hidden(state: Any) -> Tensor:
    """The hidden states after a layer."""
    return state.summed() if isinstance(state, Unsummed) else state


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def values_of_interleaved(part: Part, make: Inputs) -> Iterator[Row]:
    """Whether gate and up rows 8 apart give the bits of gate rows in front, by batch size."""
    size = make.size
    norm, gate_up = make.random(size.hidden), make.weight(2 * size.intermediate, size.hidden)
    for rows in (1, 16):
        x = make.random(rows, size.hidden)
        expected = kernels.rms_norm_swiglu(x, norm, EPS, gate_up)
        found = swiglu_of_interleaved(x, norm, interleaved(gate_up))
        yield part.check(f"E1 gate and up rows 8 apart: bits at batch {rows}", difference("y", found, expected))
