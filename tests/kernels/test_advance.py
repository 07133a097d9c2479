"""advance, by both backends and the reference, against a loop over the tokens in Python, bit by bit."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import kernels
from internlm3.tests.kernels.support import DEVICE, MODULES, assert_same, backends, embedded, generator, run, seeds

NAMES = (
    "token", "seq_lens", "history", "max_len", "end_mask", "report", "output_counts", "min_len", "permitted", "allowed",
)  # fmt: skip
WRITTEN = ("token", "seq_lens", "history", "report", "output_counts", "allowed")


def make_state(seed, batch, vocab, padding=0, rows=1, spare=0):
    """sampled, logprob and the state. About half of the sequences end, reach min_len, or are idle.

    rows: of each sequence. About two thirds of the drafts are right. spare: tokens that the report has place for
    besides. Some new tokens are beyond the history.
    """
    rng = generator(seed)
    words = -(-vocab // 32)

    def integers(low, high, *shape, dtype=torch.int32):
        return embedded(torch.randint(low, high, shape, generator=rng).to(DEVICE, dtype), padding * (len(shape) > 1))

    def chance(share, *shape):
        return torch.rand(shape, generator=rng).to(DEVICE) < share

    lens = integers(0, 4, batch)
    state = {
        "token": integers(0, vocab, batch, dtype=torch.int64),
        "seq_lens": lens,
        "history": integers(0, vocab, batch, 4 + rows // 2),
        "max_len": lens + integers(0, 4, batch) * rows,
        "end_mask": integers(-(2**31), 2**31, batch, words),
        "report": integers(-5, 5, batch, 3 * (rows + spare) + 1),
        "output_counts": integers(0, 3, batch, vocab),
        "min_len": lens + integers(0, 3, batch) * rows // 2,
        "permitted": integers(-(2**31), 2**31, batch, words),
        "allowed": integers(-(2**31), 2**31, batch, words),
    }
    sampled = integers(0, vocab, batch * rows, dtype=torch.int64)
    sampled[0], sampled[-1] = 0, vocab - 1
    nothing = chance(0.2 / rows, batch * rows)
    logprob = -torch.rand(batch * rows, generator=rng) * 20
    logprob[torch.rand(batch * rows, generator=rng) < 0.2 / rows] = float("nan")
    if rows > 1:
        state["end_mask"] &= integers(-(2**31), 2**31, batch, words) & integers(-(2**31), 2**31, batch, words)
        state["report"][:, -1] = integers(0, rows, batch)
        drafts = integers(0, vocab, batch, rows, dtype=torch.int64)
        right = chance(0.8, batch, rows)
        drafts[:, 1:] = torch.where(right, sampled.view(batch, rows), drafts)[:, :-1]
        state["drafts"] = drafts
    sampled[nothing] = -1
    return sampled, logprob.to(DEVICE), state


def advanced(sampled, logprob, state):
    """The next state, sequence by sequence and token by token."""
    drafts = state.get("drafts")
    state = {name: state[name].tolist() for name in NAMES}
    batch = len(state["token"])
    sampled, logprob = sampled.view(batch, -1).tolist(), logprob.view(batch, -1).tolist()
    rows, most = len(sampled[0]), len(state["report"][0]) // 3
    for b in range(batch):
        report = state["report"][b]
        report[: 3 * most : 3] = [-1] * most
        for j in range(rows):
            length = state["seq_lens"][b]
            if length == 0 or (j > 0 and (j > report[-1] or drafts[b, j].item() != sampled[b][j - 1])):
                break
            token = max(sampled[b][j], 0)
            if length < len(state["history"][b]):
                state["history"][b][length] = token
            length += 1
            end = 2 if length >= state["max_len"][b] else 0
            end = 1 if state["end_mask"][b][token // 32] >> token % 32 & 1 else end
            end = 4 if sampled[b][j] < 0 else end
            end = 3 if math.isnan(logprob[b][j]) else end
            bits = struct.unpack("<i", struct.pack("<f", logprob[b][j]))[0]
            report[3 * j : 3 * j + 3] = [token, end, bits]
            state["token"][b] = token
            state["output_counts"][b][token] += 1
            if length == state["min_len"][b]:
                state["allowed"][b] = state["permitted"][b]
            state["seq_lens"][b] = length if end == 0 else 0
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
@given(
    seeds,
    st.integers(1, 9),
    st.sampled_from([1, 31, 32, 33]) | st.integers(1, 200),
    st.sampled_from([0, 5]),
    st.sampled_from([1, 1, 2, 3, 8, 16]),
    st.integers(0, 3),
)
def test_advance(seed, batch, vocab, padding, rows, spare):
    check(seed, batch, vocab, padding, rows, spare)


def test_a_whole_vocabulary():
    """InternLM3-8B's has 128512 tokens; this is a published fine-tune's, which is odd."""
    check(3, 4, 128133, 0, 4)


@backends
def test_a_run_of_drafts(backend):
    """All drafts are right; the last row has no draft after it. The third is wrong. The second token ends it."""
    wanted = {"all": [5, 6, 7, 8], "wrong": [5, 6, 7], "end": [5, 6], "limit": [5, 6, 7], "fewer": [5, 6, 7]}
    sampled, logprob, state = make_state(1, len(wanted), 40, rows=4)
    sampled.copy_(torch.tensor([5, 6, 7, 8] * len(wanted)))
    logprob.fill_(-1.0)
    state["seq_lens"].fill_(2)
    state["min_len"].zero_()
    state["end_mask"].zero_()
    state["end_mask"][2, 0] = 1 << 6
    state["max_len"].copy_(torch.tensor([99, 99, 99, 5, 99]))
    state["report"][:, -1] = torch.tensor([3, 3, 3, 3, 2])
    state["drafts"].copy_(torch.tensor([4, 5, 6, 7] * len(wanted)).view(-1, 4))
    state["drafts"][1, 3] = 9
    run(backend, "advance", sampled, logprob, **state, writes=[state[name] for name in WRITTEN])
    tokens = state["report"][:, :12:3].tolist()
    assert [[token for token in row if token >= 0] for row in tokens] == list(wanted.values())
    assert state["seq_lens"].tolist() == [6, 5, 0, 0, 5] and state["token"].tolist() == [8, 7, 6, 7, 7]
    assert state["report"][2, 4] == 1 and state["report"][3, 7] == 2


@backends
def test_steps_after_the_end_change_nothing(backend):
    """Queued steps may run after a sequence has ended: only its reported tokens change, to -1."""
    sampled, logprob, state = make_state(5, 6, 70, rows=3)
    state["seq_lens"].zero_()
    before = {name: x.clone() for name, x in state.items()}
    run(backend, "advance", sampled, logprob, **state, writes=[state[name] for name in WRITTEN])
    before["report"][:, :-1:3] = -1
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
            {"report": torch.zeros(2, 3, dtype=torch.int32)},
            ValueError,
            r"report has shape \[2, 3\], must have \[2, 3 M \+ 1\] with M >= 1",
        ),
        (
            {"allowed": torch.zeros(2, 1, dtype=torch.int32)},
            ValueError,
            r"allowed has shape \[2, 1\], must have \[2, 2",
        ),
        ({"end_mask": torch.zeros(2, 2, dtype=torch.int32, device="meta")}, ValueError, "end_mask is on meta"),
        ({"drafts": torch.zeros(1, 2, dtype=torch.int64)}, ValueError, r"has shape \[2, 2\], must have \[1, "),
    ],
)
def test_bad_input(bad, error, message):
    sampled, logprob, state = make_state(1, 2, 40)
    good = {"sampled": sampled, "logprob": logprob, **state}
    bad = {name: x if x.is_meta else x.to(DEVICE) for name, x in bad.items()}
    with pytest.raises(error, match=message):
        kernels.advance(**{**good, **bad})
