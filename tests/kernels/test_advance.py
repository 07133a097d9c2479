"""advance, by both backends and the reference, against a loop over the rows in Python, bit by bit."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import kernels
from internlm3.tests.kernels.support import DEVICE, MODULES, assert_same, backends, embedded, generator, run, seeds

NAMES = ("token", "seq_lens", "max_len", "end_mask", "report", "output_counts", "min_len", "permitted", "allowed")
WRITTEN = ("token", "seq_lens", "report", "output_counts", "allowed")


def make_state(seed, rows, vocab, padding=0):
    """sampled, logprob and the state, in which about half of the rows end, reach min_len, or are idle."""
    rng = generator(seed)
    words = -(-vocab // 32)

    def integers(low, high, *shape, dtype=torch.int32):
        return embedded(torch.randint(low, high, shape, generator=rng).to(DEVICE, dtype), padding * (len(shape) > 1))

    lens = integers(0, 4, rows)
    state = {
        "token": integers(0, vocab, rows, dtype=torch.int64),
        "seq_lens": lens,
        "max_len": lens + integers(0, 4, rows),
        "end_mask": integers(-(2**31), 2**31, rows, words),
        "report": integers(-5, 5, rows, 3),
        "output_counts": integers(0, 3, rows, vocab),
        "min_len": lens + integers(0, 3, rows),
        "permitted": integers(-(2**31), 2**31, rows, words),
        "allowed": integers(-(2**31), 2**31, rows, words),
    }
    sampled = integers(0, vocab, rows, dtype=torch.int64)
    sampled[0], sampled[-1] = 0, vocab - 1
    sampled[torch.rand(rows, generator=rng).to(DEVICE) < 0.2] = -1
    logprob = -torch.rand(rows, generator=rng) * 20
    logprob[torch.rand(rows, generator=rng) < 0.2] = float("nan")
    return sampled, logprob.to(DEVICE), state


def advanced(sampled, logprob, state):
    """The next state, row by row."""
    state = {name: state[name].tolist() for name in NAMES}
    for row, sampled_token in enumerate(sampled.tolist()):
        token = max(sampled_token, 0)
        length = state["seq_lens"][row]
        if length == 0:
            state["report"][row][0] = -1
            continue
        length += 1
        end = 2 if length >= state["max_len"][row] else 0
        end = 1 if state["end_mask"][row][token // 32] >> token % 32 & 1 else end
        end = 4 if sampled_token < 0 else end
        end = 3 if math.isnan(logprob[row]) else end
        bits = struct.unpack("<i", struct.pack("<f", logprob[row].item()))[0]
        state["report"][row] = [token, end, bits]
        state["token"][row] = token
        state["output_counts"][row][token] += 1
        if length == state["min_len"][row]:
            state["allowed"][row] = state["permitted"][row]
        state["seq_lens"][row] = length if end == 0 else 0
    return state


def check(*shape):
    expected = advanced(*make_state(*shape))
    for backend in MODULES:
        sampled, logprob, state = make_state(*shape)
        run(backend, "advance", sampled, logprob, **state, writes=[state[name] for name in WRITTEN])
        for name in WRITTEN:
            wanted = torch.tensor(expected[name], dtype=state[name].dtype, device=DEVICE)
            assert_same(wanted, **{f"{backend}'s {name}": state[name]})


@pytest.mark.op(name="advance")
@settings(max_examples=100)
@given(seeds, st.integers(1, 9), st.sampled_from([1, 31, 32, 33]) | st.integers(1, 200), st.sampled_from([0, 5]))
def test_advance(seed, rows, vocab, padding):
    check(seed, rows, vocab, padding)


def test_the_vocabulary_of_internlm3():
    check(3, 4, 128512)


@backends
def test_steps_after_the_end_change_nothing(backend):
    """Queued steps may run after a row has ended: only its reported token changes, to -1."""
    sampled, logprob, state = make_state(5, 6, 70)
    state["seq_lens"].zero_()
    before = {name: x.clone() for name, x in state.items()}
    run(backend, "advance", sampled, logprob, **state, writes=[state[name] for name in WRITTEN])
    before["report"][:, 0] = -1
    for name, x in state.items():
        assert_same(before[name], **{name: x})


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"sampled": torch.zeros(2, dtype=torch.int32)}, TypeError, "sampled is torch.int32, must be torch.int64"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int64)}, TypeError, "seq_lens is torch.int64, must be torch.int32"),
        ({"logprob": torch.zeros(2, dtype=torch.float64)}, TypeError, "logprob is torch.float64"),
        ({"max_len": torch.zeros(3, dtype=torch.int32)}, ValueError, r"max_len has shape \[3\], must have \[2\]"),
        (
            {"report": torch.zeros(2, 2, dtype=torch.int32)},
            ValueError,
            r"report has shape \[2, 2\], must have \[2, 3",
        ),
        (
            {"allowed": torch.zeros(2, 1, dtype=torch.int32)},
            ValueError,
            r"allowed has shape \[2, 1\], must have \[2, 2",
        ),
        ({"end_mask": torch.zeros(2, 2, dtype=torch.int32, device="meta")}, ValueError, "end_mask is on meta"),
    ],
)
def test_bad_input(bad, error, message):
    sampled, logprob, state = make_state(1, 2, 40)
    good = {"sampled": sampled, "logprob": logprob, **state}
    bad = {name: x if x.is_meta else x.to(DEVICE) for name, x in bad.items()}
    with pytest.raises(error, match=message):
        kernels.advance(**{**good, **bad})
