"""How many replicas there are, as people write it."""

import pytest

from internlm3.runtime.replicas.count import Count


@pytest.mark.parametrize(
    ("text", "least", "most", "shown"),
    [("1", 1, 1, "1 replica"), ("12", 12, 12, "12 replicas"), ("1-4", 1, 4, "1 to 4 replicas")],
)
def test_counts(text, least, most, shown):
    count = Count.read(text)
    assert (count.least, count.most, str(count)) == (least, most, shown)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1-", "-4", "4-1", "0-2", "two", "1.5", "1-2-3", " 1", "٣", "1000000000"]
)
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ValueError, match="expected a number of replicas"):
        Count.read(text)
