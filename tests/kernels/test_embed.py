"""embed, by both backends, against the reference. It copies, so all results are bit-identical."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import kernels
from internlm3.tests.kernels.support import (
    DEVICE,
    assert_same,
    backends,
    call,
    dtypes,
    embedded,
    generator,
    normal,
    run,
    run_all,
    seeds,
)

widths = st.one_of(st.sampled_from([1, 64, 1024, 1032, 2048]), st.integers(1, 150).map(lambda n: 8 * n))


@pytest.mark.op(name="embed")
@settings(max_examples=100)
@given(seeds, dtypes, st.integers(0, 5), st.integers(1, 40), widths, st.sampled_from([0, 8, 3]))
def test_embed(seed, dtype, rows, vocab, width, padding):
    rng = generator(seed)
    table = embedded(normal(rng, vocab, width, dtype=dtype), padding)
    # The ids include both ends of the table.
    ids = torch.cat((torch.tensor([0, vocab - 1]), torch.randint(vocab, (rows,), generator=rng))).to(DEVICE)
    results = run_all("embed", ids, table)
    assert_same(results.pop("reference"), **results)


@backends
def test_no_rows(backend):
    ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert run(backend, "embed", ids, torch.zeros(3, 8, device=DEVICE)).shape == (0, 8)


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
