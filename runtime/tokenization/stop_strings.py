"""Finds stop strings in a text that arrives in parts, at a cost per character that does not depend on their number."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable


class _Node:
    """A text that at least one stop string begins with.

    Attributes:
        low, high: the range of the sorted stop strings that begin with it.
        length: the number of its characters.
        shorter: the longest other node that this text ends with.
        stop: the longest stop string that this text ends with, None if there is none.
        next: character -> the longest node that this text and the character end with, as far as it was asked for.
    """

    def __init__(self, low: int, high: int, length: int):
        self.low, self.high, self.length = low, high, length
        self.shorter: _Node | None = None
        self.stop: str | None = None
        self.next: dict[str, _Node] = {}


class StopStrings:
    """An Aho-Corasick automaton, whose nodes are made when a text first reaches them.

    Making all of them at once would take seconds and much memory for a hundred thousand stop strings.

    Attributes:
        pending: the length of the text's longest end that may still become a stop string.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = sorted(set(stops))
        self._root = self._node = _Node(0, len(self._stops), 0)
        self.pending = 0

    def push(self, text: str, may_stop: bool = True) -> tuple[int, str] | None:
        """Adds `text`. Returns the first stop string that is complete in it, with the index of its end in `text`.

        Of several that are complete at the same character that is the longest. `may_stop` False: none counts that is
        complete in `text`.
        """
        if not self._stops:
            return None
        node = self._node
        for index, character in enumerate(text):
            node = node.next.get(character) or self._follow(node, character)
            if may_stop and node.stop is not None:
                return index + 1, node.stop
        # A stop string that is no beginning of a longer one cannot go on.
        while node.shorter is not None and node.high - node.low == 1 and len(self._stops[node.low]) == node.length:
            node = node.shorter
        self._node, self.pending = node, node.length
        return None

    def _follow(self, node: _Node, character: str) -> _Node:
        """The node after `node` and a character, which are made if necessary, and those that they depend on."""
        waiting: list[_Node] = []
        at: _Node | None = node
        while at is not None and character not in at.next:
            waiting.append(at)
            at = at.shorter
        found = self._root if at is None else at.next[character]
        for at in reversed(waiting):
            found = at.next[character] = self._child(at, character, found) or found
        return found

    def _child(self, node: _Node, character: str, shorter: _Node) -> _Node | None:
        """The node whose text is that of `node` and a character; None if no stop string begins with that."""

        def following(stop: str) -> str:
            return stop[node.length : node.length + 1]

        low = bisect_left(self._stops, character, node.low, node.high, key=following)
        high = bisect_right(self._stops, character, low, node.high, key=following)
        if low == high:
            return None
        child = _Node(low, high, node.length + 1)
        child.shorter = shorter
        child.stop = self._stops[low] if len(self._stops[low]) == child.length else shorter.stop
        return child
