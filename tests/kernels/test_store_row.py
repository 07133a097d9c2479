"""store_row, by both backends and the reference, against a copy word by word in Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import kernels
from internlm3.tests.kernels.support import DEVICE, MODULES, assert_same, embedded, generator, run, seeds


def make(seed, sizes, batch, index):
    """The op's arguments by name, and what `rows` must become."""
    rng = generator(seed)
    starts = [sum(sizes[:field]) for field in range(len(sizes) + 1)]

    def words(count):
        return torch.randint(-(2**31), 2**31, (count,), generator=rng).to(torch.int32)

    row, rows = words(starts[-1]), words(batch * starts[-1])
    expected = rows.tolist()
    for start, size in zip(starts, sizes, strict=False):
        for word in range(size):
            expected[batch * start + index * size + word] = int(row[start + word])
    given = {"row": row, "rows": rows}
    given |= {"starts": torch.tensor(starts, dtype=torch.int32), "index": torch.tensor([index], dtype=torch.int32)}
    arguments = {name: embedded(x.to(DEVICE)) for name, x in given.items()}
    return arguments, torch.tensor(expected, dtype=torch.int32, device=DEVICE)


@pytest.mark.op(name="store_row")
@settings(max_examples=60)
@given(
    seeds,
    st.lists(st.sampled_from([1, 2, 3]) | st.integers(1, 2500), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(0, 4),
)
def test_store_row(seed, sizes, batch, index):
    for backend in MODULES:
        arguments, expected = make(seed, sizes, batch, index % batch)
        run(backend, "store_row", **arguments, writes=[arguments["rows"]])
        assert_same(expected, **{f"{backend}'s rows": arguments["rows"]})


def test_a_field_of_several_blocks_for_each_program():
    for backend in MODULES:
        arguments, expected = make(1, [3, 70_001, 2], 2, 1)
        run(backend, "store_row", **arguments, writes=[arguments["rows"]])
        assert_same(expected, **{f"{backend}'s rows": arguments["rows"]})


@pytest.mark.xdist_group("gigabytes")
@pytest.mark.parametrize(("starts", "index"), [([0, 2**16], 2**15), ([0, 2**16, 2**16 + 1], 0)])
def test_fields_far_from_the_first(starts, index):
    """The last word is written 2^31 words or more after the first: 32 bits do not hold its place."""
    row = torch.arange(starts[-1], dtype=torch.int32, device=DEVICE)
    rows = torch.empty((2**15 + 1) * starts[-1], dtype=torch.int32, device=DEVICE)
    numbers = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (starts, [index]))
    kernels.store_row(row, rows, *numbers)
    size = starts[-1] - starts[-2]
    place = (2**15 + 1) * starts[-2] + index * size
    assert place >= 2**31
    assert_same(row[starts[-2] :], rows=rows[place : place + size])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"row": torch.zeros(6)}, TypeError, "row is torch.float32, must be torch.int32"),
        ({"rows": torch.zeros(13, dtype=torch.int32)}, ValueError, r"rows has shape \[13\], must have \[12\]"),
        ({"starts": torch.zeros(3, dtype=torch.int64)}, TypeError, "starts is torch.int64"),
        ({"index": torch.zeros(2, dtype=torch.int32)}, ValueError, r"index has shape \[2\], must have \[1\]"),
        ({"index": torch.zeros(1, dtype=torch.int32, device="meta")}, ValueError, "index is on meta"),
    ],
)
def test_bad_input(bad, error, message):
    good, _ = make(1, [4, 2], 2, 1)
    bad = {name: x if x.is_meta else x.to(DEVICE) for name, x in bad.items()}
    with pytest.raises(error, match=message):
        kernels.store_row(**{**good, **bad})
