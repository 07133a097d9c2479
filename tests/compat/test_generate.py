"""`generate` of a small model against transformers' own: lengths, ends, padding, scores, streamers, bad logits."""

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers

from internlm3 import InternLM3Config, InternLM3ForCausalLM
from internlm3.runtime.model.kv_cache import PAGE
from internlm3.tests.support.capture import CapturedEngines
from internlm3.tests.support.engine import shorten_chunks
from internlm3.tests.support.prompts import PROMPTS, padded


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 9},
        {"max_length": 9, "max_new_tokens": 12},
        {"max_new_tokens": 1},
        {"max_new_tokens": 58},
        {"max_new_tokens": 30, "min_new_tokens": 20},
        {"max_new_tokens": 30, "min_length": 20},
        {"max_new_tokens": 30, "eos_token_id": 7},
        {"max_new_tokens": 30, "eos_token_id": list(range(0, 50, 5)), "pad_token_id": 3},
        {"max_new_tokens": 20, "repetition_penalty": 1.5},
        {"max_new_tokens": 20, "repetition_penalty": 1.2, "min_new_tokens": 15, "eos_token_id": [4, 9]},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("steps")
def test_greedy_options(tiny, options):
    flags = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for rows in (PROMPTS, PROMPTS[:1], PROMPTS[1:2]):
        mask = torch.ones_like(rows)
        ours = tiny.ours.generate(rows, mask, **flags, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = tiny.expected(rows, **flags, **options)
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        assert len(ours.scores) == len(theirs.scores) == len(ours.logits)
        ended = torch.zeros(len(rows), dtype=torch.bool)
        eos = torch.tensor(options.get("eos_token_id", [2, 5]))
        for step, (logits, scores) in enumerate(zip(ours.logits, ours.scores, strict=True)):
            # Past the window transformers turns each new key by another base; this runtime's sequence keeps its own.
            if rows.shape[1] + step < 64:
                torch.testing.assert_close(logits[~ended], theirs.logits[step][~ended], rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(scores[~ended], theirs.scores[step][~ended], rtol=1e-3, atol=1e-4)
            assert logits.dtype == scores.dtype == torch.float32
            assert torch.isneginf(logits[ended]).all() and torch.isneginf(scores[ended]).all()
            token = ours.sequences[:, rows.shape[1] + step]
            expected = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
            torch.testing.assert_close(ours.logprobs[~ended, step], expected[~ended], rtol=1e-4, atol=1e-5)
            assert (ours.logprobs[ended, step] == 0).all()
            ended |= torch.isin(token, eos)


def test_captured_steps_are_replayed(tiny, monkeypatch):
    """What the captured half of these tests is about."""
    engines = CapturedEngines(monkeypatch, depth=2)
    copied = copy.deepcopy(tiny.ours)
    out = copied.generate(PROMPTS, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    assert engines.recorder.replays >= 4  # of five steps after the prompts, the first of which is captured
    assert out.equal(tiny.ours.generate(PROMPTS, do_sample=False, max_new_tokens=6, min_new_tokens=6))


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.7, "temperature": 0.8},
        {"min_p": 0.1, "temperature": 1.3},
        {"typical_p": 0.6},
        {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3, "temperature": 0.7, "min_new_tokens": 3},
    ],
    ids=str,
)
def test_scores_of_sampling_are_those_of_transformers(tiny, options):
    """The distribution that each step draws from, transformers' own processors over the same texts."""
    flags = {"do_sample": True, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ours = tiny.ours.generate(PROMPTS[:1], seed=5, max_new_tokens=10, **flags, **options)
    config = transformers.GenerationConfig(**{"top_k": 50, "do_sample": True, "max_new_tokens": 10, **options})
    config._eos_token_tensor = torch.tensor([2, 5])
    processors = tiny.theirs._get_logits_processor(config, input_ids_seq_length=6, device="cpu")
    for step, scores in enumerate(ours.scores):
        prefix = ours.sequences[:, : 6 + step]
        expected = processors(prefix, tiny.theirs(prefix).logits[:, -1])
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)
        assert scores[0, ours.sequences[0, 6 + step]] > -torch.inf


@pytest.mark.parametrize(
    "options", [{"do_sample": False, "max_new_tokens": 20}, {"do_sample": True, "seed": 3}], ids=str
)
def test_transition_scores_are_those_of_transformers(tiny, options):
    """After a row's end they are 0, where transformers has scores of padding."""
    flags = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = tiny.ours.generate(PROMPTS, **flags, **options)
    ended = out.scores[0].new_tensor([[step.isneginf().all() for step in row] for row in zip(*out.scores, strict=True)])
    for steps in (out.scores, out.logits):
        for normalised in (False, True):
            ours = tiny.ours.compute_transition_scores(out.sequences, steps, normalize_logits=normalised)
            theirs = tiny.theirs.compute_transition_scores(out.sequences, steps, normalize_logits=normalised)
            torch.testing.assert_close(ours, theirs.masked_fill(ended.bool(), 0.0))
    torch.testing.assert_close(ours, out.logprobs, rtol=1e-4, atol=1e-5)


def test_transition_scores_of_another_call(tiny):
    out = tiny.ours.generate(PROMPTS, max_new_tokens=3, return_dict_in_generate=True, output_scores=True)
    for sequences, scores in ((out.sequences[:1], out.scores), (out.sequences, ()), (out.sequences[:, :2], out.scores)):
        with pytest.raises(ValueError, match=r"sequences \[.*not of one call: .* output_scores"):
            tiny.ours.compute_transition_scores(sequences, scores)
    with pytest.raises(ValueError, match="no beam search"):
        tiny.ours.compute_transition_scores(out.sequences, out.scores, beam_indices=torch.zeros(2, 3))


@pytest.mark.usefixtures("steps")
def test_ragged_batches(tiny):
    """Either side, with a mask or with a padding token that speaks for itself."""
    rows = [[7, 8, 9], [20, 33, 41, 6, 18, 49], [11]]
    options = {"do_sample": False, "max_new_tokens": 15}
    alone = [tiny.ours.generate(torch.tensor([row]), **options)[0, len(row) :].tolist() for row in rows]
    for left in (True, False):
        ids, mask = padded(rows, 0, left)
        for given in (mask, mask.bool(), None):
            out = tiny.ours.generate(ids, given, **options)
            assert out[:, :6].equal(ids)
            for row, expected in zip(out, alone, strict=True):
                answer = row[6:].tolist()
                assert answer[: len(expected)] == expected and set(answer[len(expected) :]) <= {0}
    theirs = tiny.theirs.generate(input_ids=padded(rows, 0, True)[0], **options)
    assert tiny.ours.generate(padded(rows, 0, True)[0], **options).equal(theirs)


def test_without_a_padding_or_an_end_token_nothing_is_padding(tiny):
    """0 is then a token like any other."""
    config = InternLM3Config.from_dict({**tiny.ours.config.to_dict(), "eos_token_id": None, "pad_token_id": None})
    model: Any = InternLM3ForCausalLM(config, dtype=torch.float32)
    model.load_state_dict(tiny.ours.state_dict())
    ids = torch.tensor([[0, 7, 0, 8]])
    options = {"do_sample": False, "max_new_tokens": 5}
    assert model.generate(ids, **options).equal(model.generate(ids, torch.ones_like(ids), **options))


@pytest.mark.usefixtures("steps")
def test_num_return_sequences(tiny):
    out = tiny.ours.generate(PROMPTS, num_return_sequences=4, do_sample=True, seed=1, max_new_tokens=8)
    assert out.shape[0] == 12 and out[:, :6].equal(PROMPTS.repeat_interleave(4, 0))
    assert len({tuple(row.tolist()) for row in out}) > 9
    first = tiny.ours.generate(PROMPTS, do_sample=True, seed=1, max_new_tokens=8)
    width = first.shape[1]
    assert out[::4, :width].equal(first)


def test_sampling_follows_the_probabilities(tiny):
    """600 draws of one token against the model's own softmax."""
    out = tiny.ours.generate(
        PROMPTS[:1], num_return_sequences=600, do_sample=True, seed=2, max_new_tokens=1, min_new_tokens=0
    )
    expected = tiny.ours(PROMPTS[:1]).logits[0, -1].softmax(-1) * 600
    counts = torch.bincount(out[:, -1], minlength=50)
    often = expected > 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    assert chi2 < 3 * often.sum().item()  # about its number of degrees of freedom; 3 times is beyond any chance


@pytest.mark.usefixtures("steps")
def test_penalties_and_bias(tiny):
    """Presence, frequency and bias act as OpenAI's: on what was generated, by count."""
    greedy = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 2, "min_new_tokens": 20}
    plain = tiny.ours.generate(PROMPTS[:1], **greedy)[0, 6:].tolist()
    forced = tiny.ours.generate(PROMPTS[:1], logit_bias={13: 100.0}, **greedy)[0, 6:].tolist()
    assert forced == [13] * 20
    banned = tiny.ours.generate(PROMPTS[:1], logit_bias={plain[0]: -100.0}, **greedy)[0, 6:].tolist()
    assert plain[0] not in banned
    flags = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **greedy}
    out = tiny.ours.generate(PROMPTS[:1], presence_penalty=1.5, frequency_penalty=0.5, **flags)
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        counts = torch.bincount(out.sequences[0, 6 : 6 + step], minlength=50)
        expected = logits[0] - 0.5 * counts - 1.5 * (counts > 0)
        expected[2] = -torch.inf
        torch.testing.assert_close(scores[0], expected)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("length", [40, 64, 65, 127, 150])
def test_a_long_prompt_in_chunks(tiny, monkeypatch, length):
    """Chunked prefill of a prompt beyond the window (64): rotary frequencies follow from its whole length."""
    prompt = torch.randint(6, 50, (1, length), generator=torch.Generator().manual_seed(length))
    flags = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    whole = tiny.ours.generate(prompt, eos_token_id=[], **flags)
    shorten_chunks(monkeypatch, PAGE, PAGE)
    chunks = tiny.ours.generate(prompt, eos_token_id=[], **flags)
    assert chunks.sequences.equal(whole.sequences)
    theirs = tiny.theirs(prompt).logits[:, -1]
    for out in (whole, chunks):
        torch.testing.assert_close(out.logits[0], theirs, rtol=1e-3, atol=1e-4)
    # The third step in one pass, with the base of the prompt: what the first part of a cache fixes.
    cache = tiny.ours(prompt).past_key_values
    rest = tiny.ours(whole.sequences[:, length : length + 2], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(chunks.logits[2], rest, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("hooks", [False, True])
def test_logits_that_are_no_numbers_are_an_error(tiny, hooks):
    """float16 overflows where bfloat16 does not: the error names the row."""
    for dtype, fails in ((torch.float16, True), (torch.bfloat16, False)):
        model = copy.deepcopy(tiny.ours).to(dtype)
        model.lm_head.weight *= 30000
        options = {"max_new_tokens": 2, "return_dict_in_generate": hooks, "output_logits": hooks}
        if not fails:
            model.generate(PROMPTS, **options)
            continue
        with pytest.raises(RuntimeError, match=r"row 0: the model's logits are not numbers .* bfloat16"):
            model.generate(PROMPTS, **options)
    model = copy.deepcopy(tiny.ours)
    model.model.embed_tokens.weight[49] = float("nan")  # which the second prompt alone ends with
    with pytest.raises(RuntimeError, match="row 1: the model's logits are not numbers"):
        model.generate(PROMPTS, **options)
    assert model.generate(PROMPTS[2:], max_new_tokens=3).equal(tiny.ours.generate(PROMPTS[2:], max_new_tokens=3))


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_processor_that_leaves_no_token_is_an_error(tiny, value, do_sample):
    """Of one row at its third token."""

    length = PROMPTS.shape[1]

    def forbid(ids, scores):
        if ids.shape[1] == length + 2:
            scores[1] = value
        return scores

    with pytest.raises(RuntimeError, match="row 1: no token is left to choose"):
        tiny.ours.generate(PROMPTS, logits_processor=[forbid], max_new_tokens=5, do_sample=do_sample)
    assert tiny.ours.generate(PROMPTS, logits_processor=[forbid], max_new_tokens=2).shape[1] == length + 2


@pytest.mark.usefixtures("steps")
def test_streamer(tiny):
    """put(prompt), put(each step's tokens), end(): what transformers' streamers are given."""
    calls: dict[str, list] = {"ours": [], "theirs": []}

    class Recorder:
        def __init__(self, name):
            self.calls = calls[name]

        def put(self, value):
            assert value.device.type == "cpu"
            self.calls.append(value.tolist())

        def end(self):
            self.calls.append("end")

    out = tiny.ours.generate(PROMPTS[:1], streamer=Recorder("ours"), do_sample=False, max_new_tokens=10)
    tiny.theirs.generate(
        PROMPTS[:1], attention_mask=torch.ones(1, 6), streamer=Recorder("theirs"), do_sample=False, max_new_tokens=10
    )
    assert calls["ours"] == calls["theirs"]
    assert [token for (token,) in calls["ours"][1:-1]] == out[0, 6:].tolist()


@pytest.mark.parametrize("several", [{"num_return_sequences": 2, "do_sample": True}, {}])
def test_several_answers_are_refused_by_transformers_own_streamer(tiny, demo_model, several):
    """It would print them interleaved, and refuses the rows that it gets first."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
    prompts = PROMPTS[: 1 if several else 2]
    for model in (tiny.ours, tiny.theirs):
        with pytest.raises(ValueError, match="batch size 1"):
            model.generate(prompts, streamer=transformers.TextStreamer(tokenizer), max_new_tokens=2, **several)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_torchs_default_dtype_changes_nothing(tiny, default):
    flags = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 6}
    flags |= {"logit_bias": {3: -2, 9: 1.5}, "sequence_bias": {(4, 5): 3}, "no_repeat_ngram_size": 2, "seed": 1}
    expected = tiny.ours.generate(PROMPTS, do_sample=True, **flags)
    try:
        torch.set_default_dtype(default)
        found = tiny.ours.generate(PROMPTS, do_sample=True, **flags)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.sequences.equal(expected.sequences) and found.logprobs.equal(expected.logprobs)
    for ours, theirs in ((found.scores, expected.scores), (found.logits, expected.logits)):
        assert all(a.dtype == b.dtype == torch.float32 and a.equal(b) for a, b in zip(ours, theirs, strict=True))
