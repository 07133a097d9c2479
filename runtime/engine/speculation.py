"""Speculation without a draft model: which steps verify drafts, and whether that pays.

What follows in a text has often occurred in it before. So after each step the op `draft` looks for the longest earlier
match of a sequence's end, and a step can run the tokens that followed there as further rows of the batch. The random
number of a token depends on seed and position alone: a draft is right exactly if it is what the row before it samples.
The text is the same with and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .draft_rows import MOST_SEQUENCES, DraftRows
from .graphs import Report
from .state import DecodeState, Slot

# By default, drafts are used where they cost at most this.
MOST_COST = 0.3


class Cost(NamedTuple):
    """The share of a step's time by which it takes longer with drafts: it grows with the context, by so much a token.

    It is also the number of tokens that each sequence must gain for the step to pay.
    """

    short: float
    per_token: float

    def at(self, context: int) -> float:
        return self.short + self.per_token * context


# Until it is measured: on an H200, 16 rows of InternLM3-8B at a context of 1k tokens take 1.21 of the time of one.
USUAL_COST = Cost(0.21, 0.0)


class Speculation:
    """Chooses the steps that verify drafts.

    A step does if a slot has drafts that pay for its request (see `Gain`). Each of B slots has ROWS // B rows, and with
    more than MOST_SEQUENCES no step does. After a change of slots one step runs without, since the drafts of the last
    one were for others.

    Args:
        most_cost: batch sizes at which drafts cost more run without.

    Attributes:
        rows: where drafts are.
        costs: by the number of slots, where it was measured.
    """

    def __init__(self, state: DecodeState, most_cost: float):
        self.rows = DraftRows.like(state)
        self.costs: dict[int, Cost] = {}
        self._state, self._most_cost = state, most_cost
        # The slots of the last step, whose drafts the device has; and those that the rows are loaded for.
        self._drafted: list[Slot | None] = []
        self._loaded: list[Slot | None] = []

    def prepare(self, slots: Sequence[Slot | None]) -> bool:
        """Whether the next step, of these slots, verifies drafts; makes the rows ready for it if so."""
        same, self._drafted = self._drafted == list(slots), list(slots)
        active, count = [slot for slot in slots if slot is not None], len(slots)
        drafts = any(slot.drafts and not slot.gain.pause for slot in active)
        if not (same and drafts and count <= MOST_SEQUENCES and self._cost(active) <= self._most_cost):
            return False
        if self._loaded != self._drafted:
            self.rows.of(count).load(self._state.slots(0, count))
            self._loaded = self._drafted
        return True

    def drop_drafts(self) -> None:
        """Forgets the device's drafts: slots have moved on by a step that made none."""
        self._drafted = []

    def account(self, verified: bool, reports: Sequence[tuple[Slot, Report]]) -> None:
        """Takes account of a step's reports, and of whether it verified drafts."""
        paying = [slot for slot, _ in reports if verified and slot.drafts and not slot.gain.pause]
        cost = self._cost([slot for slot, _ in reports]) * len(reports) / len(paying) if paying else 0.0
        for slot, report in reports:
            accepted = len(report.tokens) - 1
            if verified:
                slot.request.drafted += slot.drafts
                slot.request.accepted += accepted
            if slot in paying:
                slot.gain.verified(accepted, cost)
            else:
                slot.gain.passed()
            slot.drafts = report.drafts

    def _cost(self, slots: Sequence[Slot]) -> float:
        context = max(len(slot.request.prompt_ids) + len(slot.request.token_ids) for slot in slots)
        return self.costs.get(len(slots), USUAL_COST).at(context)
