"""draft, by both backends and the reference, against a search by brute force in Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import kernels
from internlm3.kernels.reference import LONGEST_MATCH
from internlm3.tests.kernels.support import DEVICE, MODULES, backends, embedded, generator, module_of, run, seeds

LIMITS = ("max_len", "min_len", "most_drafts")
WRITTEN = ("report", "drafts", "draft_lens")


def make(texts, width, rows, limits=None, padding=0):
    """The op's arguments: the tokens of each sequence, what follows them being poison that no draft may be made of."""
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    history = torch.full((len(texts), width), 7, dtype=torch.int32)
    for row, text in enumerate(texts):
        history[row, : len(text)] = torch.tensor(text, dtype=torch.int32)
    none = {"max_len": lengths + 1000, "min_len": lengths, "most_drafts": lengths * 0 + 1000}
    given = {"history": history, "seq_lens": lengths, **none, **(limits or {})}
    arguments = {name: embedded(x.to(DEVICE), padding * (x.dim() > 1)) for name, x in given.items()}
    written = {"report": (4, torch.int32), "drafts": (rows, torch.int64), "draft_lens": (rows, torch.int32)}
    outputs = {name: torch.full((len(texts), size), 99, dtype=dtype) for name, (size, dtype) in written.items()}
    return arguments | {name: embedded(x.to(DEVICE), padding) for name, x in outputs.items()}


def drafted(text, max_len, min_len, most, rows):
    """The drafts of one sequence, by trying every place and every length of a match."""
    matches = [
        (size, place)
        for place in range(1, len(text))
        for size in range(2, min(LONGEST_MATCH, place) + 1)
        if text[place - size : place] == text[len(text) - size :]
    ]
    if not matches:
        return []
    _, place = max(matches)
    count = min(rows - 1, most)
    while count > 0 and not all(
        length < max_len and (length < min_len or len(text) >= min_len)
        for length in range(len(text), len(text) + count + 1)
    ):
        count -= 1
    endless = text[place:] * (1 + rows)
    return endless[: max(count, 0)]


def check(texts, width, rows, limits=None, padding=0):
    outcomes = []
    for backend in MODULES:
        arguments = make(texts, width, rows, limits, padding)
        asked = {name: arguments[name].tolist() for name in LIMITS}
        run(backend, "draft", **arguments, writes=[arguments[name] for name in WRITTEN])
        for row, text in enumerate(texts):
            expected = drafted(text, *(asked[name][row] for name in LIMITS), rows) if text else []
            spare = [0] * (rows - 1 - len(expected))
            read = [text[-1], *expected, *spare] if text else [0] * rows
            lengths = [len(text) + j for j in range(len(expected) + 1)] + spare if text else [0] * rows
            assert arguments["report"][row].tolist() == [99, 99, 99, len(expected)], backend
            assert arguments["drafts"][row].tolist() == read and arguments["draft_lens"][row].tolist() == lengths, (
                backend
            )
            outcomes.append(expected)
    return outcomes[: len(texts)]


@pytest.mark.op(name="draft")
@settings(max_examples=60)
@given(
    seeds,
    st.integers(1, 4),
    st.integers(1, 17),
    st.integers(1, 4),
    st.integers(0, 150),
    st.sampled_from([0, 5]),
    st.sampled_from([16, 64]),
)
def test_draft(seed, batch, rows, letters, longest, padding, block):
    """Texts of few different tokens, in which parts are repeated; idle sequences; and limits of any tightness."""
    rng = generator(seed)

    def below(high):
        return int(torch.randint(high, (), generator=rng))

    texts = []
    for _ in range(batch):
        text = torch.randint(letters, (below(longest + 1),), generator=rng).tolist()
        if text:
            begin = below(len(text))
            text += text[begin : begin + below(60)]
        texts.append(text)
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)

    def near(low, high):
        return lengths + torch.randint(low, high, (batch,), generator=rng, dtype=torch.int32)

    most = torch.randint(0, 2 * rows, (batch,), generator=rng, dtype=torch.int32)
    limits = {"max_len": near(0, 2 * rows + 1), "min_len": near(-2, 2 * rows), "most_drafts": most}
    width = max(1, *map(len, texts)) + below(2 * block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of(kernels.draft), "BLOCK", block)
        patch.setattr(module_of(kernels.draft), "BLOCKS", 4)
        check(texts, width, rows, limits, padding)


def test_the_longest_match_and_the_last_of_equal_ones():
    assert check([[1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]], 16, 4) == [[4, 9, 2]]
    assert check([[2, 3, 4, 8, 9, 2, 3, 5, 1, 2, 3]], 16, 4) == [[5, 1, 2]]
    assert check([[3, 4, 8, 9, 1, 3]], 16, 4) == [[]]  # one token is no match
    assert check([[3], [3, 3]], 2, 4) == [[], []]


def test_a_text_that_repeats_itself_goes_on():
    assert check([[9, 1, 2, 3, 1, 2, 3, 1, 2]], 16, 9) == [[3, 1, 2, 3, 1, 2, 3, 1]]


def test_a_match_is_as_long_as_its_bound():
    """Beyond LONGEST_MATCH tokens, the last place is taken though an earlier one matches longer."""
    part = list(range(10, 10 + LONGEST_MATCH))
    assert check([[5, *part, 1, 6, *part, 2, 5, *part]], 200, 2) == [[2]]
    assert check([[5, *part[1:], 1, 6, *part[1:], 2, 5, *part[1:]]], 200, 2) == [[1]]


def test_a_match_ends_where_its_sequence_begins():
    """Before the first token of the second one, the memory has what would make its first match longer."""
    assert check([[9] * 8 + [5], [1, 2, 8, 1, 2, 9, 5, 1, 2]], 9, 2)[1] == [9]


def test_the_last_place_of_the_last_block():
    """The only match is where the sequence ends, and the history is full."""
    block = module_of(kernels.draft).BLOCK
    assert check([[*range(100, 98 + block), 5, 5, 5]], 1 + block, 3) == [[5, 5]]


def test_a_context_of_32k():
    text = torch.randint(50, (32768,), generator=generator(4)).tolist()
    text[-40:] = text[777 : 777 + 40]
    assert check([text[:30000] + text[-40:], text[:-1]], 32768, 16)[0] == text[817 : 817 + 15]


@backends
def test_limits_end_drafts(backend):
    """max_len counts the token that a row samples; while the text is shorter than min_len, rows stay below it."""
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    for limits, expected in [
        ({"max_len": 9}, 0), ({"max_len": 10}, 1), ({"min_len": 9}, 0), ({"min_len": 11}, 2), ({"min_len": 8}, 5),
        ({"most_drafts": 0}, 0), ({"most_drafts": 3}, 3), ({"max_len": 4}, 0),
    ]:  # fmt: skip
        limits = {name: torch.tensor([value], dtype=torch.int32) for name, value in limits.items()}
        arguments = make([text], 20, 6, limits)
        run(backend, "draft", **arguments, writes=[arguments[name] for name in WRITTEN])
        assert arguments["report"][0, -1] == expected
        lengths = [8 + j for j in range(expected + 1)] + [0] * (5 - expected)
        assert arguments["draft_lens"].tolist() == [lengths]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"history": torch.zeros(1, 9, dtype=torch.int64)}, TypeError, "history is torch.int64, must be torch.int32"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int32)}, ValueError, r"seq_lens has shape \[2\], must have \[1\]"),
        ({"drafts": torch.zeros(1, 4, dtype=torch.int32)}, TypeError, "drafts is torch.int32, must be torch.int64"),
        ({"draft_lens": torch.zeros(1, 3, dtype=torch.int32)}, ValueError, r"draft_lens has shape \[1, 3\], must have"),
        ({"report": torch.zeros(1, 4, device="meta").int()}, ValueError, "report is on meta"),
    ],
)
def test_bad_input(bad, error, message):
    bad = {name: x if x.is_meta else x.to(DEVICE) for name, x in bad.items()}
    with pytest.raises(error, match=message):
        kernels.draft(**{**make([[1, 2, 1, 2]], 9, 4), **bad})
