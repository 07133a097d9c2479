"""embed against kernels.reference: a copy, so every bit counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import kernels
from internlm3.kernels import reference
from internlm3.tests.kernels.support import DEVICE, assert_same, call, dtypes, embedded, generator, normal, seeds

widths = st.one_of(st.sampled_from([1, 64, 1024, 1032, 2048]), st.integers(1, 150).map(lambda n: 8 * n))


@pytest.mark.op(name="embed")
@settings(max_examples=200)
@given(seeds, dtypes, st.integers(0, 5), st.integers(1, 40), widths, st.sampled_from([0, 8, 3]))
def test_embed(seed, dtype, rows, vocab, width, padding):
    rng = generator(seed)
    table = embedded(normal(rng, vocab, width, dtype=dtype), padding)
    # Both ends of the table are always among the ids.
    ids = torch.cat((torch.tensor([0, vocab - 1]), torch.randint(vocab, (rows,), generator=rng))).to(DEVICE)
    assert_same(reference.embed(ids, table), found=call(kernels.embed, ids, table))


def test_no_rows():
    ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert call(kernels.embed, ids, torch.zeros(3, 8, device=DEVICE)).shape == (0, 8)


def test_ids_outside_the_table_read_nothing():
    table = embedded(torch.ones(4, 16, device=DEVICE))
    ids = torch.tensor([-1, 3, 4, 2**40], device=DEVICE)
    assert call(kernels.embed, ids, table).sum(-1).tolist() == [0, 16, 0, 0]


@pytest.mark.parametrize(
    ("token_ids", "table", "error", "message"),
    [
        (torch.zeros(2).int(), torch.zeros(4, 8), TypeError, "token_ids is torch.int32, must be torch.int64"),
        (torch.zeros(1, 2).long(), torch.zeros(4, 8), ValueError, r"token_ids has shape \[1, 2\], must have \[any\]"),
        (torch.zeros(2).long(), torch.zeros(8), ValueError, r"table has shape \[8\], must have \[any, any\]"),
        (torch.zeros(2).long(), torch.zeros(8, 4).t(), ValueError, "last dimension must be contiguous"),
    ],
)
def test_bad_input(token_ids, table, error, message):
    with pytest.raises(error, match=message):
        kernels.embed(token_ids.to(DEVICE), table.to(DEVICE))
