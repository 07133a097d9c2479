"""Speculation without a draft model: which steps verify drafts, and whether that pays.

What follows in a text has often occurred in it before. So after each step the op `draft` looks for the longest earlier
match of a sequence's end, and a step can run the tokens that followed there as further rows of the batch. The random
number of a token depends on seed and position alone: a draft is right exactly if it is what the row before it samples.
The text is the same with and without.
"""

from __future__ import annotations

from collections.abc import Sequence

from .draft_rows import MOST_SEQUENCES, DraftRows
from .graphs import Report
from .state import DecodeState, Slot

# What a step with drafts costs, in tokens of each sequence, until `costs` has a measurement: 16 rows of InternLM3-8B at
# a context of 1k tokens take 1.21 of the time of one row on an H200.
USUAL_COST = 0.21
# By default, drafts are used where they cost at most this.
MOST_COST = 0.3


class Speculation:
    """Chooses the steps that verify drafts.

    A step does if a slot has drafts that pay for its request (see `Gain`). Each of B slots has ROWS // B rows, and with
    more than MOST_SEQUENCES no step does. After a change of slots one step runs without, since the drafts of the last
    one were for others.

    Args:
        most_cost: batch sizes at which drafts cost more run without.

    Attributes:
        rows: where drafts are.
        costs: by batch size, the share of a step's time by which it takes longer with drafts, where that was measured.
    """

    def __init__(self, state: DecodeState, most_cost: float):
        self.rows = DraftRows.like(state)
        self.costs: dict[int, float] = {}
        self._state, self._most_cost = state, most_cost
        # The slots of the last step, whose drafts the device has; and those that the rows are loaded for.
        self._drafted: list[Slot | None] = []
        self._loaded: list[Slot | None] = []

    def prepare(self, slots: Sequence[Slot | None]) -> bool:
        """Whether the next step, of these slots, verifies drafts; makes the rows ready for it if so."""
        same, self._drafted = self._drafted == list(slots), list(slots)
        drafts = any(slot is not None and slot.drafts and not slot.gain.pause for slot in slots)
        count = len(slots)
        if not (same and drafts and count <= MOST_SEQUENCES and self._cost(count) <= self._most_cost):
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
        cost = self._cost(len(reports)) * len(reports) / max(len(paying), 1)
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

    def _cost(self, slots: int) -> float:
        return self.costs.get(slots, USUAL_COST)
