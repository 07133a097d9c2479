"""Speculation as a user of LLM sees it: the same texts, its figures, and its settings."""

import pytest
import torch

from internlm3 import LLM, SamplingParams
from internlm3.kernels import cpu
from internlm3.tests.support.drafts import Planted
from internlm3.tests.support.llm import PROMPTS, text_of


@pytest.fixture(scope="module")
def plain(tiny_folder):
    return LLM(tiny_folder, dtype="bfloat16", progress=False)


@pytest.fixture(scope="module")
def drafting(tiny_folder):
    return LLM(tiny_folder, dtype="bfloat16", speculation=True, progress=False)


@pytest.fixture
def plant(monkeypatch, plain):
    """Makes drafts that continue these outputs' texts, some of them wrong."""

    def plant(outputs, wrong=0.1):
        texts = [[*output.prompt_token_ids, *each.token_ids] for output in outputs for each in output.outputs]
        monkeypatch.setattr(cpu, "draft", Planted(texts, plain.config.vocab_size, plain.eos_token_ids[0], wrong))

    return plant


SETTINGS = [
    {"temperature": 0},
    {"temperature": 0.9, "top_p": 0.9, "seed": 3, "n": 3, "repetition_penalty": 1.1},
    {"seed": 5, "frequency_penalty": 0.7, "min_tokens": 7, "allowed_token_ids": [*range(2000, 2020)]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "n answers", "masked"])
def test_a_list_of_prompts_gives_the_same_outputs(plain, drafting, plant, settings):
    """Outputs are equal if texts, tokens, log-probabilities and reasons are."""
    expected = plain.generate(PROMPTS[:2], max_tokens=24, **settings)
    plant(expected, wrong=0.2)
    found = drafting.generate(PROMPTS[:2], max_tokens=24, **settings)
    assert found == expected
    assert 0 < sum(each.accepted for each in found) < sum(each.drafted for each in found)
    assert all((each.drafted, each.accepted) == (0, 0) for each in expected)


def test_a_stream_gives_the_same_chunks(plain, drafting, plant):
    expected = list(plain.stream("Once upon", temperature=0, max_tokens=30, ignore_eos=True))
    plant([plain.generate("Once upon", temperature=0, max_tokens=30, ignore_eos=True)])
    found = list(drafting.stream("Once upon", temperature=0, max_tokens=30, ignore_eos=True))
    assert [(x.text, x.token_ids, x.logprobs, x.decode_tokens, x.finish_reason) for x in found] == [
        (x.text, x.token_ids, x.logprobs, x.decode_tokens, x.finish_reason) for x in expected
    ]
    assert 0 < found[-1].accepted < found[-1].drafted
    assert [x.accepted for x in found] == sorted(x.accepted for x in found)


def test_a_stop_string_inside_a_run_ends_the_text(plain, drafting, plant):
    """Wherever it is, alone and beside others; tokens and log-probabilities after it are dropped."""
    whole = plain.generate("hello", temperature=0, max_tokens=20, ignore_eos=True)
    plant([whole], wrong=0.0)
    beginnings = {whole.text[begin : begin + 3] for begin in range(1, len(whole.text) - 3, 4)}
    for stop in sorted(beginnings):
        settings = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "stop": stop}
        expected, found = (each.generate("hello", **settings) for each in (plain, drafting))
        assert found == expected and found.outputs[0].stop_reason == stop
        assert len(found.outputs[0].logprobs) == len(found.outputs[0].token_ids)
        assert text_of(list(drafting.stream("hello", **settings))) == expected.text
    assert drafting.engine.pages.free == len(drafting.engine.pages)


def test_a_stream_that_is_closed_inside_a_run_frees_its_pages(plain, drafting, plant):
    whole = plain.generate("hello", temperature=0, max_tokens=40, ignore_eos=True)
    plant([whole], wrong=0.0)
    stream = drafting.stream("hello", temperature=0, max_tokens=40, ignore_eos=True)
    read = [next(stream).token_ids[0] for _ in range(7)]
    stream.close()
    assert read == whole.outputs[0].token_ids[:7]
    assert drafting.engine.pages.free == len(drafting.engine.pages)
    assert drafting.generate("hello", temperature=0, max_tokens=40, ignore_eos=True) == whole


def test_a_call_may_do_without(plain, drafting, plant):
    """Beside one that does not."""
    expected = plain.generate(PROMPTS[:2], temperature=0, max_tokens=20, ignore_eos=True)
    plant(expected, wrong=0.0)
    params = [SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, speculation=each) for each in (True, False)]
    found = drafting.generate(PROMPTS[:2], params)
    assert [each.outputs for each in found] == [each.outputs for each in expected]
    assert found[0].drafted > 0 and found[1].drafted == 0
    assert drafting.generate("x", max_tokens=9, speculation=False).drafted == 0


def test_what_the_host_samples_has_no_drafts(plain, drafting, plant):
    for settings in ({"logprobs": 2}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[5]]}):
        expected = plain.generate("hello", temperature=0, max_tokens=9, **settings)
        plant([expected])
        found = drafting.generate("hello", temperature=0, max_tokens=9, **settings)
        assert found == expected and found.drafted == 0


def test_float32_gives_the_same_tokens(tiny_folder, plant):
    """Its log-probabilities are equal up to rounding."""
    models = [LLM(tiny_folder, dtype="float32", speculation=each, progress=False) for each in (False, True)]
    expected = models[0].generate(PROMPTS, temperature=0, max_tokens=20)
    plant(expected)
    found = models[1].generate(PROMPTS, temperature=0, max_tokens=20)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.accepted and ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        torch.testing.assert_close(*(torch.tensor(x.outputs[0].logprobs) for x in (ours, theirs)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrong", ["yes", 1, None, 7])
def test_what_is_no_switch_is_refused(tiny_folder, drafting, wrong):
    with pytest.raises(ValueError, match="speculation must be True, False or 'auto'"):
        LLM(tiny_folder, speculation=wrong, progress=False)
    if wrong is not None:  # the default
        with pytest.raises(ValueError, match="speculation"):
            drafting.generate("x", speculation=wrong)


def test_a_cpu_does_without_by_default(plain, tiny_folder):
    assert plain.engine._runner.speculation is None
    assert LLM(tiny_folder, speculation="auto", progress=False).engine._runner.speculation is None
