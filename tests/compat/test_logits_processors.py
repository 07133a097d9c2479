"""What sees every step of `generate`: logits processors, settings that depend on the text, stopping criteria."""

import json
from typing import Any

import pytest
import torch
import transformers

from internlm3.runtime.compat import generation
from internlm3.runtime.engine.shared import SharedEngine
from internlm3.tests.support.prompts import PROMPTS, padded

REPEATS = {(13,): 9.0, (20,): 9.0, (30,): 8.0}

PROCESSED: Any = [
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "sequence_bias": REPEATS},
    {"no_repeat_ngram_size": 3, "sequence_bias": REPEATS},
    {"no_repeat_ngram_size": 40, "sequence_bias": REPEATS},
    {"bad_words_ids": [[43]]},
    {"bad_words_ids": [[43], [2], [5], [18, 30], [19, 48, 41], [13] * 30]},
    {"suppress_tokens": [43, 2, 40]},
    {"begin_suppress_tokens": [2, 18]},
    {"begin_suppress_tokens": range(2, 49)},
    {"sequence_bias": {(13,): 3.0, (2,): -5.0}},
    {"sequence_bias": {(18, 30): -30.0, (19,): -2.0, (43, 19, 48): 30.0, (18,) * 30: 90.0, (41,): -float("inf")}},
    {"exponential_decay_length_penalty": (2, 1.4)},
    {"exponential_decay_length_penalty": (0, 1.05), "repetition_penalty": 1.2},
    {"forced_eos_token_id": 5},
    {"forced_eos_token_id": [5, 30]},
    {
        "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [20, 33]], "suppress_tokens": [40, 41],
        "forced_eos_token_id": 5, "begin_suppress_tokens": [33, 18], "sequence_bias": {**REPEATS, (33, 6): 9.0},
        "repetition_penalty": 1.3, "exponential_decay_length_penalty": (4, 1.1), "min_new_tokens": 3,
    },
]  # fmt: skip


def in_a_file(settings):
    """As generation_config.json has them."""
    as_lists = {"sequence_bias": lambda biases: [[[*ids], bias] for ids, bias in biases.items()]}
    values = {name: as_lists.get(name, lambda value: value)(value) for name, value in settings.items()}
    return json.loads(json.dumps(values, default=list))


def from_source(model, source, options, settings):
    if source == "keyword":
        return model.generate(PROMPTS, **options, **settings)
    if source == "object":
        return model.generate(PROMPTS, generation_config=transformers.GenerationConfig(**options, **settings))
    model.generation_config = in_a_file(settings)
    try:
        return model.generate(PROMPTS, **options)
    finally:
        model.generation_config = {}


@pytest.mark.parametrize("settings", PROCESSED, ids=lambda settings: "+".join(settings)[:40])
def test_settings_that_depend_on_the_text(tiny, settings, steps):
    """Greedy tokens and their scores, against transformers' own processors; the same from every source."""
    flags = {"return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": [2, 5, 2], **flags}
    theirs = tiny.expected(PROMPTS, **options, **settings)
    first, *rest = settings
    without = tiny.expected(PROMPTS, **options, **{name: settings[name] for name in rest})
    assert theirs.sequences.tolist() != without.sequences.tolist() or settings[first] == 40  # it does something here
    for source in ("keyword", "object", "file") if steps == "eager" else ("keyword",):
        ours = from_source(tiny.ours, source, options, settings)
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        ended = torch.zeros(len(PROMPTS), dtype=torch.bool)
        for step, (mine, other) in enumerate(zip(ours.scores, theirs.scores, strict=True)):
            torch.testing.assert_close(mine[~ended], other[~ended], rtol=1e-3, atol=1e-3)
            ended |= torch.isin(ours.sequences[:, 6 + step], torch.tensor([2, 5]))


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("in_place", [True, False])
def test_logits_processor(tiny, in_place):
    """Called with the texts so far and their logits; the logits that come back stay the model's own."""
    seen = []

    def only_even(ids, scores):
        seen.append(ids.tolist())
        assert scores.dtype == torch.float32 and scores.shape == (len(ids), 50)
        scores = scores if in_place else scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores

    flags = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    kept = {"output_scores": True}
    rows = PROMPTS[:2]
    for given in ([only_even], only_even, transformers.LogitsProcessorList([only_even])):
        seen.clear()
        ours = tiny.ours.generate(rows, logits_processor=given, eos_token_id=49, **flags, **kept)
        assert seen[0] == rows.tolist() and seen[1] == ours.sequences[:, :7].tolist()
        assert (ours.sequences[:, 6:] % 2 == 0).all()
        theirs = tiny.theirs.generate(
            rows, attention_mask=torch.ones_like(rows), eos_token_id=49, **flags, **kept,
            logits_processor=transformers.LogitsProcessorList([lambda ids, x: only_even(ids, x.clone())]),
        )  # fmt: skip
        assert ours.sequences.equal(theirs.sequences)
        torch.testing.assert_close(ours.logits[0], theirs.logits[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours.scores[0], theirs.scores[0], rtol=1e-3, atol=1e-4)
        own = ours.logits[0].log_softmax(-1).gather(1, ours.sequences[:, 6:7])[:, 0]
        torch.testing.assert_close(ours.logprobs[:, 0], own)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.7])
def test_a_processor_sees_every_row_of_the_call(tiny, repetition_penalty):
    """As in transformers: rows in their order and columns, ended ones padded, scores after the penalty."""
    ids, mask = padded([PROMPTS[0].tolist(), PROMPTS[1].tolist()[:3], PROMPTS[2].tolist()], 0, left=True)
    seen: Any = {"ours": [], "theirs": []}

    def process(name):
        def process(ids, scores):
            """Every row has its own favourite, and ends at a step of its own."""
            step = len(seen[name])
            seen[name].append((ids.tolist(), scores.argmax(-1).tolist(), scores.clone()))
            scores = scores.clone()
            scores[torch.arange(3), torch.tensor([30, 31, 32])] += 3 + torch.arange(3)
            scores[:, 2] = -torch.inf
            scores[step % 3, 2] = 1000 if step in (3, 7) else -torch.inf
            return scores

        return process

    options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": 2, "repetition_penalty": repetition_penalty}
    ours = tiny.ours.generate(ids, mask, logits_processor=process("ours"), **options)
    listed = transformers.LogitsProcessorList([process("theirs")])
    theirs = tiny.theirs.generate(ids, attention_mask=mask, logits_processor=listed, pad_token_id=0, **options)
    assert ours.equal(theirs)
    assert [each[0] for each in seen["ours"]] == [each[0] for each in seen["theirs"]]
    for (tokens, _, mine), (_, _, other) in zip(seen["ours"], seen["theirs"], strict=True):
        running = [row for row, so_far in enumerate(tokens) if 2 not in so_far[6:]]
        torch.testing.assert_close(mine[running], other[running], rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("steps")
def test_allowed_tokens_by_prefix(tiny):
    """The functions that transformers takes, on ragged rows: the same tokens; none allowed is an error."""
    ids, mask = padded([PROMPTS[0].tolist(), PROMPTS[1].tolist()[:3]], 0, left=True)

    def allowed(row, text):
        return [int(text[-1] * 7 + row + i) % 44 + 6 for i in range(4)]

    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 2}
    ours = tiny.ours.generate(ids, mask, prefix_allowed_tokens_fn=allowed, **options)
    theirs = tiny.theirs.generate(ids, attention_mask=mask, prefix_allowed_tokens_fn=allowed, pad_token_id=0, **options)
    assert ours.equal(theirs)
    with pytest.raises(ValueError, match="allows row 0 no token"):
        tiny.ours.generate(ids, mask, prefix_allowed_tokens_fn=lambda row, text: [], **options)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5, "temperature": 0.7, "seed": 1}], ids=str)
def test_renormalized_scores(tiny, options):
    """Log-probabilities of what a step draws from: transformers' log_softmax, last of all; the tokens stay the same."""
    flags = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 6, "min_new_tokens": 6}
    plain = tiny.ours.generate(PROMPTS, **flags, **options)
    out = tiny.ours.generate(PROMPTS, renormalize_logits=True, **flags, **options)
    assert out.sequences.equal(plain.sequences)
    process = transformers.LogitNormalization()
    for mine, before in zip(out.scores, plain.scores, strict=True):
        torch.testing.assert_close(mine, process(PROMPTS, before))


@pytest.mark.usefixtures("steps")
def test_every_order_of_processors_is_that_of_transformers(tiny):
    """Forced tokens come after the allowed prefix, and tokens suppressed at the beginning after both."""
    settings = {"forced_eos_token_id": 30, "begin_suppress_tokens": [7, 9], "bad_words_ids": [[8, 8]]}
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": 2, **settings}
    options["prefix_allowed_tokens_fn"] = lambda row, ids: [7, 8, 9 + row]
    ours = tiny.ours.generate(PROMPTS, **options)
    assert ours.equal(tiny.theirs.generate(PROMPTS, attention_mask=torch.ones(3, 6), pad_token_id=0, **options))
    assert (ours[:, -1] == 30).all()


@pytest.mark.usefixtures("steps")
def test_a_forced_end_is_none_of_the_suppressed_tokens(tiny):
    """Of several that may end the answer the ones that are suppressed never do, as in transformers."""
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": 2, "pad_token_id": 0}
    for suppressed in ([5, 8], [30], [8, 9]):
        given = {"forced_eos_token_id": [5, 30], "suppress_tokens": suppressed}
        ours = tiny.ours.generate(PROMPTS, **options, **given)
        assert ours.equal(tiny.theirs.generate(PROMPTS, attention_mask=torch.ones(3, 6), **options, **given))
        assert not {*ours[:, 6:].flatten().tolist()} & {*suppressed}
    with pytest.raises(ValueError, match=r"suppress_tokens permit no token of forced_eos_token_id=\[5, 30\]"):
        tiny.ours.generate(PROMPTS, forced_eos_token_id=[5, 30], suppress_tokens=[30, 5], **options)


@pytest.mark.usefixtures("steps")
def test_rows_that_waited_see_their_own_step(tiny, monkeypatch):
    """More answers than rows: what a processor is given of a row that came later is that row's text, and no more."""
    options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": 2, "pad_token_id": 0}
    settings = {"no_repeat_ngram_size": 2, "exponential_decay_length_penalty": (3, 1.2), "forced_eos_token_id": 30}
    together = tiny.ours.generate(PROMPTS, **options, **settings)
    monkeypatch.setattr(generation, "MAX_BATCH_SIZE", 2)
    tiny.ours._shared = SharedEngine()
    few = tiny.ours.generate(PROMPTS, **options, **settings)
    tiny.ours._shared = SharedEngine()
    assert few.equal(together)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("one", [True, False])
def test_stopping_criteria(tiny, one):
    """Each runs on all rows after every step, as in transformers; a row for which one is true ends."""
    seen: Any = {"ours": [], "theirs": []}

    def criterion(name):
        def stop(ids, scores, **_):
            seen[name].append(ids.tolist())
            return torch.tensor([len(ids[0]) >= 9, len(ids[0]) >= 11])

        return stop

    options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": 49, "pad_token_id": 0}
    given = criterion("ours") if one else [criterion("ours")]
    ours = tiny.ours.generate(PROMPTS[:2], stopping_criteria=given, **options)
    listed = transformers.StoppingCriteriaList([criterion("theirs")])
    theirs = tiny.theirs.generate(PROMPTS[:2], attention_mask=torch.ones(2, 6), stopping_criteria=listed, **options)
    assert ours.equal(theirs) and ours.shape == (2, 11)
    assert seen["ours"] == seen["theirs"]
    assert tiny.ours.generate(PROMPTS[:1], stopping_criteria=lambda ids, scores: True, **options).shape == (1, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be an integer >= 0; got -1"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size must be an integer"),
        ({"bad_words_ids": [3]}, "bad_words_ids must be a sequence; got 3"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be sequences of at least one token id"),
        ({"bad_words_ids": [[3, 50]]}, "bad_words_ids holds 50, which is outside the vocabulary of 50"),
        ({"suppress_tokens": [50]}, "suppress_tokens holds 50, which is outside"),
        ({"suppress_tokens": "a"}, "suppress_tokens must be a sequence"),
        ({"begin_suppress_tokens": [-1]}, "begin_suppress_tokens: a token id must be an integer >= 0"),
        ({"forced_eos_token_id": 50}, "forced_eos_token_id holds 50"),
        ({"sequence_bias": {(3,): "x"}}, r"sequence_bias\[\(3,\)\] must be a number"),
        ({"sequence_bias": [[3]]}, "sequence_bias must be a mapping from sequences to biases, or a list of pairs"),
        ({"exponential_decay_length_penalty": (1,)}, r"exponential_decay_length_penalty must be \(start, factor\)"),
        ({"exponential_decay_length_penalty": (1, 0)}, "exponential_decay_length_penalty: factor must be a number"),
    ],
    ids=str,
)
def test_bad_settings_of_processors(tiny, settings, message):
    given: Any
    for given in ({}, settings):
        with pytest.raises(ValueError, match=message):
            tiny.ours.generate(PROMPTS, given, **({} if given else settings))
