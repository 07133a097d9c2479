"""StopStrings next to brute force, and what a text costs when there are very many."""

import random

from hypothesis import given
from hypothesis import strategies as st

from internlm3.runtime.tokenization.stop_strings import StopStrings

FEW_LETTERS = st.text("ab书", min_size=1, max_size=6)


def ends(text, stops, begin, may_stop):
    """The first end after `begin` of a stop string in `text`, and the longest that ends there."""
    for end in range(begin + 1, len(text) + 1 if may_stop else 0):
        if whole := [stop for stop in stops if text[:end].endswith(stop)]:
            return end, max(whole, key=len)
    return None


def pending(text, stops):
    """The length of the longest end of `text` that a stop string begins with and goes on after."""
    return max(
        (n for n in range(len(text) + 1) for stop in stops if n < len(stop) and text.endswith(stop[:n])), default=0
    )


@given(stops=st.lists(FEW_LETTERS, max_size=6), parts=st.lists(st.tuples(FEW_LETTERS | st.just(""), st.booleans())))
def test_as_brute_force(stops, parts):
    matcher, text = StopStrings(stops), ""
    for part, may_stop in parts:
        begin, text = len(text), text + part
        found = matcher.push(part, may_stop)
        assert (found and (begin + found[0], found[1])) == ends(text, stops, begin, may_stop)
        if found:
            break
        assert matcher.pending == pending(text, stops)


def test_many_nested_stop_strings():
    """Every beginning depends on all shorter ones, which are made without recursion."""
    stops = [letters + "b" for letters in map("a".__mul__, range(1, 2500))]
    matcher = StopStrings(stops)
    assert matcher.push("a" * 3000) is None and matcher.pending == 2499
    assert matcher.push("cab") == (3, "ab")


class Counted(str):
    reads = 0

    def __getitem__(self, index):
        Counted.reads += 1
        return super().__getitem__(index)


def test_a_text_does_not_cost_more_with_a_hundred_thousand():
    dice = random.Random(0)
    words = {"".join(dice.choices("abcdefghij", k=dice.randint(9, 30))) for _ in range(100_000)}
    text = "".join(dice.choices("abcdefghij", k=2000))
    matcher = StopStrings(map(Counted, words))
    assert [matcher.push(text[at : at + 5]) for at in range(0, 2000, 5)] == [None] * 400
    assert not any(word in text for word in words)
    assert Counted.reads < 400 * 1000  # one look at every word for every part would be 40 million
    stop = min(words)
    assert matcher.push(f"-{stop}-") == (len(stop) + 1, stop)
