"""Whether drafts pay for a request: what they gained, and what the steps that verified them cost."""

from __future__ import annotations

from dataclasses import dataclass

# After this many steps with drafts, drafts are switched off for a request if they gained less than they cost. They are
# tried again after PAUSE steps.
WINDOW = 32
PAUSE = 64


@dataclass
class Gain:
    """The account of one request.

    Attributes:
        steps, balance: of the present window: its steps with drafts; the tokens that they gained, less their costs.
        pause: how many steps to wait before drafts are tried again.
    """

    steps: int = 0
    balance: float = 0.0
    pause: int = 0

    def verified(self, accepted: int, cost: float) -> None:
        """Counts a step with drafts: `accepted` of them were right, and it took the time of `cost` more tokens."""
        self.steps += 1
        self.balance += accepted - cost
        if self.steps == WINDOW:
            self.pause = PAUSE if self.balance < 0 else 0
            self.steps, self.balance = 0, 0.0

    def passed(self) -> None:
        """Counts a step without drafts."""
        self.pause = max(self.pause - 1, 0)
