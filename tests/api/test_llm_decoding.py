"""How LLM decodes: batches, ends of answers, streams, cancels and errors, with eager and with captured steps."""

import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from internlm3 import (
    LLM,
    InternLM3ForCausalLM,
    SamplingParams,
)
from internlm3.runtime.engine.graphs import StepQueue
from internlm3.tests.support.capture import as_op, capture, nothing_captured  # noqa: F401 - fixtures
from internlm3.tests.support.llm import PROMPTS, causal_lm, ids_of, result, same, text_of


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each step, and each prefill, the number of answers that get a token from it."""
    counts: list[int] = []
    copy_report = StepQueue.copy_report

    def counting(steps: StepQueue, readers: Sequence[Any], drafts: bool = False) -> None:
        counts.append(sum(reader is not None for reader in readers))
        copy_report(steps, readers, drafts)

    monkeypatch.setattr(StepQueue, "copy_report", counting)
    return counts


def ahead(llm: LLM) -> int:
    """The number of steps in flight beyond the one that is read."""
    return llm.engine._runner._depth - 1


def test_steps_are_replayed(capture, tiny):
    if capture is None:
        pytest.skip("steps are eager")
    before = capture.recorder.replays
    tiny.generate("hello", max_tokens=6, ignore_eos=True)
    # The prompt; of the five steps after it the first is captured.
    assert capture.recorder.replays - before == 5


# -------------------------------------------------------------------- batches and settings


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 7}], ids=["greedy", "seeded"]
)
def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone(tiny, tiny_folder, capture, dtype, settings):
    model = tiny if dtype == "float32" else LLM(tiny_folder, dtype=dtype, progress=False)
    together = model.generate(PROMPTS, max_tokens=10, **settings)
    alone = [model.generate(prompt, max_tokens=10, **settings) for prompt in PROMPTS]
    assert same(together, alone)
    if dtype == "bfloat16":  # on a CPU a row is bit-identical alone and in a batch
        assert together == alone


def test_n_answers_are_streams_of_one_seed(tiny):
    settings = {"temperature": 1.0, "seed": 3, "max_tokens": 8}
    three = tiny.generate(PROMPTS[:2], n=3, **settings)
    for output in three:
        assert [answer.index for answer in output.outputs] == [0, 1, 2]
        assert len({answer.text for answer in output.outputs}) == 3
        alone = tiny.generate(output.prompt, **settings)
        assert alone.text == output.text and alone.outputs[0].token_ids == output.outputs[0].token_ids
    assert tiny.generate(PROMPTS[:2], n=3, **settings) == three
    assert tiny.generate(PROMPTS[0], **{**settings, "seed": 4}).text != three[0].text


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "seeded"])
def test_a_stream_is_generate_in_chunks(tiny, settings):
    messages = [{"role": "user", "content": "Name three colours, with an emoji each."}]
    whole = tiny.chat(messages, max_tokens=24, **settings)
    chunks = list(tiny.stream(messages, max_tokens=24, **settings))
    answer = whole.outputs[0]
    assert text_of(chunks) == answer.text
    assert [token for chunk in chunks for token in chunk.token_ids] == answer.token_ids
    assert [logprob for chunk in chunks for logprob in chunk.logprobs] == answer.logprobs
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == (answer.finish_reason, answer.stop_reason)
    assert {chunk.prompt_tokens for chunk in chunks} == {len(whole.prompt_token_ids)}
    assert [chunk.decode_tokens for chunk in chunks] == list(range(1, len(chunks) + 1))


def test_no_stop_string_ends_an_answer_before_min_tokens(tiny):
    free = tiny.generate("hello", temperature=0, max_tokens=12).outputs[0]
    stop = tiny.tokenizer.decode(free.token_ids[:1]).strip() or free.text[:1]
    for least in (0, 5, 12):
        answer = tiny.generate("hello", temperature=0, max_tokens=12, stop=stop, min_tokens=least).outputs[0]
        assert len(answer.token_ids) >= max(least, 1)
        assert answer.token_ids == free.token_ids[: len(answer.token_ids)]
        if least == 12:
            assert answer.text.startswith(free.text[:-1][:20])


TEXT_DEPENDENT = {
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[260], [300, 301]],
    "sequence_bias": [[[900], 9.0], [[900, 901], 30.0], [[260], 50.0]],
    "exponential_decay_length_penalty": [3, 1.01],
    "begin_suppress_tokens": [900],
    "suppress_tokens": [903],
    "forced_eos_token_id": 904,
}


def test_settings_that_depend_on_the_text_so_far(make, tiny):
    """Settings of generation_config.json apply in LLM as in `generate`, and so do keywords."""
    folder = make({**TEXT_DEPENDENT, "max_new_tokens": 9})
    file = LLM(folder, progress=False)
    model = InternLM3ForCausalLM.from_pretrained(folder, progress=False)
    outputs = file.generate(PROMPTS)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([file.tokenizer.encode(prompt)])
        expected = model.generate(ids, do_sample=False, max_new_tokens=9, eos_token_id=file.eos_token_ids)
        assert output.outputs[0].token_ids == expected[0, ids.shape[1] :].tolist()
        assert "".join(chunk.text for chunk in file.stream(prompt)) == output.text
    assert same(tiny.generate(PROMPTS, temperature=0, max_tokens=9, **TEXT_DEPENDENT), outputs)
    assert [*map(result, tiny.generate(PROMPTS, temperature=0, max_tokens=9))] != [*map(result, outputs)]
    settings = SamplingParams(temperature=1, n=3, seed=1, max_tokens=9, **TEXT_DEPENDENT)
    for output in tiny.generate(PROMPTS, settings):
        for answer in output.outputs:
            ids = answer.token_ids
            assert ids[0] != 900 and not {260, 903} & {*ids} and ids[-1] == 904
            assert len({*itertools.pairwise(ids)}) == len(ids) - 1


def test_settings_for_each_prompt(tiny):
    prompts = ["hello", "what is it", "one two"]
    params = [SamplingParams(temperature=0, max_tokens=2), SamplingParams(seed=3, n=2, max_tokens=4),
              SamplingParams(temperature=0, max_tokens=3, logprobs=1)]  # fmt: skip
    together = tiny.generate(prompts, params)
    assert same(together, [tiny.generate(prompt, each) for prompt, each in zip(prompts, params, strict=True)])
    assert [output.sampling_params for output in together] == params
    assert [len(output.outputs) for output in together] == [1, 2, 1]
    shorter = tiny.generate(prompts, tuple(params), max_tokens=1)
    assert [output.sampling_params.max_tokens for output in shorter] == [1, 1, 1]
    asked = tiny.chat(prompts, params)
    assert same(asked, [tiny.chat(prompt, each) for prompt, each in zip(prompts, params, strict=True)])
    with pytest.raises(ValueError, match="there are 2 sampling_params for 3 prompts"):
        tiny.generate(prompts, params[:2])
    with pytest.raises(TypeError, match="sampling_params must be one SamplingParams"):
        tiny.generate("hello", params[:1])
    with pytest.raises(TypeError, match="sampling_params must be a SamplingParams, or a list of them"):
        tiny.generate(["hello"], [{}])


# -------------------------------------------------------------------- how an answer ends


def test_length(tiny):
    answer = tiny.generate("hello", max_tokens=3).outputs[0]
    assert (answer.finish_reason, answer.stop_reason, len(answer.token_ids)) == ("length", None, 3)


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_the_context_window_ends_an_answer(tiny_folder, max_tokens):
    llm = LLM(tiny_folder, max_seq_len=12, progress=False)
    answer = llm.generate([504] * 5, max_tokens=max_tokens, ignore_eos=True).outputs[0]
    assert (answer.finish_reason, answer.stop_reason, len(answer.token_ids)) == ("length", None, 7)
    assert len(llm.generate([504] * 11, max_tokens=max_tokens).outputs[0].token_ids) == 1


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("verb", ["generate", "stream"])
def test_a_stop_string_that_spans_tokens(tiny, script, sampled, verb, include):
    story = ids_of(tiny, "One fish, two fish. The end is near, said the fish")
    words = [tiny.tokenizer.decode([token]) for token in story]
    assert not any("e end i" in word for word in words)
    generated = script(story)
    settings = {"stop": ["nothing", "e end i"], "include_stop_str_in_output": include, "max_tokens": len(story)}
    if verb == "generate":
        last = tiny.generate("x", **settings).outputs[0]
        text = last.text
    else:
        chunks = list(tiny.stream("x", **settings))
        last, text = chunks[-1], text_of(chunks)
    assert text == ("One fish, two fish. The end i" if include else "One fish, two fish. Th")
    assert (last.finish_reason, last.stop_reason) == ("stop", "e end i")
    # It ends at once: the token that completes the stop string is the last one asked for, but for those sampled ahead.
    assert tiny.tokenizer.decode(generated[: len(sampled) - ahead(tiny)]).endswith(" is") and len(sampled) < len(story)


def test_a_stop_string_frees_its_slot(tiny, sampled):
    """While another answer goes on, no token is sampled for the one that ended, but for the steps in flight."""
    long = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    text = tiny.generate(PROMPTS[0], **long).text
    sampled.clear()
    params = [SamplingParams(**long, stop=text[5:9]), SamplingParams(**long)]
    one, two = (output.outputs[0] for output in tiny.generate(PROMPTS[:2], params))
    assert len(one.token_ids) < 12 < len(two.token_ids) == 20
    assert sum(sampled) == len(one.token_ids) + ahead(tiny) + 20


def test_text_that_might_become_a_stop_string_comes_later(tiny, script):
    story = ids_of(tiny, "the end of the endless day")
    script(story)
    chunks = list(tiny.stream("x", stop="endless night", max_tokens=len(story)))
    assert text_of(chunks) == "the end of the endless day"
    script(story)
    chunks = list(tiny.stream("x", stop="endless dayX", max_tokens=len(story)))
    assert text_of(chunks) == "the end of the endless day" and chunks[-1].finish_reason == "length"


@pytest.mark.parametrize("skip", [True, False])
def test_a_special_token_is_a_stop_string(tiny, script, sampled, skip):
    plain = ids_of(tiny, "some code")
    mark = tiny.tokenizer.convert_tokens_to_ids("<file_sep>")
    generated = script([*plain, mark, *plain])
    answer = tiny.generate("x", stop=["<file_sep>"], skip_special_tokens=skip, max_tokens=9).outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("some code", "stop", "<file_sep>")
    assert generated[: len(sampled) - ahead(tiny)] == [*plain, mark] and len(sampled) < 9


def test_stop_token_ids(tiny, script):
    first, second = ids_of(tiny, "hello")[0], ids_of(tiny, " world")[0]
    script([first, second, first])
    answer = tiny.generate("x", stop_token_ids=[second], max_tokens=3).outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("hello", "stop", second)
    script([first, second, first])
    answer = tiny.generate("x", stop_token_ids=[second], max_tokens=3, include_stop_str_in_output=True).outputs[0]
    assert (answer.text, answer.stop_reason) == ("hello world", second)


def test_special_tokens_may_show(tiny, script):
    plain, mark, end = ids_of(tiny, "code"), tiny.tokenizer.convert_tokens_to_ids("<file_sep>"), tiny.eos_token_ids[0]
    for skip, text in ((True, "codecode"), (False, "code<file_sep>code")):
        script([*plain, mark, *plain, end])
        assert tiny.generate("x", skip_special_tokens=skip, max_tokens=9).text == text
        script([*plain, mark, *plain, end])
        assert text_of(list(tiny.stream("x", skip_special_tokens=skip, max_tokens=9))) == text


def test_ignore_eos(tiny, script):
    plain, end = ids_of(tiny, "code"), tiny.eos_token_ids[0]
    generated = script([end, *plain, end])
    answer = tiny.generate("x", ignore_eos=True, max_tokens=2 + len(plain)).outputs[0]
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("code", generated, "length")


def test_no_end_token_before_min_tokens(tiny, script):
    end, other = tiny.eos_token_ids[0], 300
    for ends, reason in ((end, None), (other, other)):
        script([ends] * 4)
        answer = tiny.generate("x", min_tokens=3, max_tokens=9, stop_token_ids=[other]).outputs[0]
        assert len(answer.token_ids) == 4 and answer.token_ids.count(ends) == 1 and answer.token_ids[-1] == ends
        assert (answer.finish_reason, answer.stop_reason) == ("stop", reason)


# -------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.5, "seed": 2, "top_k": 50}], ids=str)
def test_logprobs_are_the_models_own(tiny, settings):
    output = tiny.generate(PROMPTS[0], max_tokens=8, logprobs=5, **settings)
    answer = output.outputs[0]
    whole = torch.tensor([output.prompt_token_ids + answer.token_ids])
    expected = causal_lm(tiny)(whole).logits[0, len(output.prompt_token_ids) - 1 : -1].double().log_softmax(-1)
    chosen = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    # float32, one token at a time against all at once.
    torch.testing.assert_close(torch.tensor(answer.logprobs).double(), chosen, atol=1e-4, rtol=0)
    for found, row in zip(answer.top_logprobs, expected, strict=True):
        values, ids = row.topk(5)
        assert list(found) == ids.tolist()
        torch.testing.assert_close(torch.tensor(list(found.values())).double(), values, atol=1e-4, rtol=0)
    # One number for one token, to the last bit: of every token of the vocabulary, and of five.
    every = tiny.generate(PROMPTS[0], max_tokens=8, logprobs=tiny.config.vocab_size, **settings).outputs[0]
    for token, number, found, all_found in zip(
        answer.token_ids, answer.logprobs, answer.top_logprobs, every.top_logprobs, strict=True
    ):
        assert number == found.get(token, number) == all_found[token]
        assert found.items() <= all_found.items()
    chunks = list(tiny.stream(PROMPTS[0], max_tokens=8, logprobs=5, **settings))
    assert [chunk.top_logprobs for chunk in chunks] == [[found] for found in answer.top_logprobs]


def test_alternatives_are_reported_only_on_request(tiny):
    assert tiny.generate("x", max_tokens=2).outputs[0].top_logprobs is None
    assert next(tiny.stream("x", max_tokens=2)).top_logprobs is None


# -------------------------------------------------------------------- whole characters


def whole_characters(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text so far without an incomplete last character."""
    return tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


@pytest.mark.parametrize(
    "text",
    [
        "今天天气很好，我们去公园吧。",
        "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇨🇳",
        "mixed 中文 and émoji 🎉🎊 naïve — “quotes”",
        "鱻龘靐 𠀀𠜎 ꙮ",
        "👋🏽",
    ],
)
def test_streams_give_characters_as_soon_as_they_are_complete(tiny, script, monkeypatch, text):
    monkeypatch.setattr(tiny, "max_seq_len", 1000)
    tokens = ids_of(tiny, text)
    script(tokens)
    shown = ""
    for count, chunk in enumerate(tiny.stream("x", max_tokens=len(tokens)), start=1):
        shown += chunk.text
        assert "\ufffd" not in chunk.text
        assert shown == whole_characters(tiny.tokenizer, tokens[:count])
    assert shown == text and count == len(tokens)
    assert count > 1


def test_an_incomplete_character_comes_only_at_the_end_of_an_answer(tiny, script):
    half = ids_of(tiny, "a靐")[:-1]
    script(half)
    chunks = list(tiny.stream("x", max_tokens=len(half)))
    assert text_of(chunks[:-1]) == "a"
    assert text_of(chunks) == tiny.tokenizer.decode(half) != "a"


def test_a_stop_string_in_multibyte_text(tiny, script):
    tokens = ids_of(tiny, "你好，世界。再见")
    script(tokens)
    assert text_of(list(tiny.stream("x", stop="。", max_tokens=len(tokens)))) == "你好，世界"


# -------------------------------------------------------------------- stopping in the middle


def held_pages(llm: LLM) -> int:
    pages = llm.engine.pages
    return len(pages) - pages.free


def test_closing_a_stream_stops_it_and_frees_its_pages(tiny, undisturbed, sampled):
    stream = tiny.stream("hello", max_tokens=30, ignore_eos=True)
    assert sampled == []
    for chunk in stream:
        if chunk.decode_tokens == 3:
            break
    assert len(sampled) == 3 + ahead(tiny) and held_pages(tiny) == 1
    stream.close()
    assert len(sampled) == 3 + ahead(tiny) and held_pages(tiny) == 0
    assert list(stream) == []
    assert tiny.generate("hello", max_tokens=6) == undisturbed.generate("hello", max_tokens=6)


@pytest.mark.parametrize("at", [1, 2, 3], ids=["prompt", "first step", "later step"])
@pytest.mark.parametrize("verb", ["generate", "stream"])
def test_ctrl_c_in_a_step_reaches_the_caller_and_the_model_works_on(tiny, undisturbed, monkeypatch, as_op, verb, at):
    head, calls = tiny.model.head, 0

    def interrupted(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return head(x)

    monkeypatch.setattr(tiny.model, "head", as_op(interrupted))
    with pytest.raises(KeyboardInterrupt):
        text_of([*tiny.stream("hello", max_tokens=6)]) if verb == "stream" else tiny.generate("hello", max_tokens=6)
    assert calls == at and held_pages(tiny) == 0
    assert tiny.generate("hello", max_tokens=6) == undisturbed.generate("hello", max_tokens=6)


@pytest.mark.parametrize("where", ["logits_processor", "put", "end"])
def test_after_a_callers_exception_the_model_goes_on_working(tiny, where):
    class Streamer:
        def put(self, ids: torch.Tensor) -> None:
            if where == "put" and ids.dim() == 1:
                raise RuntimeError("mine")

        def end(self) -> None:
            if where == "end":
                raise RuntimeError("mine")

    def process(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if where == "logits_processor" and ids.shape[1] == 4:
            raise RuntimeError("mine")
        return logits

    prompt, model = torch.tensor([[504, 300]]), causal_lm(tiny)
    expected = causal_lm(tiny).generate(prompt, max_new_tokens=5)
    with pytest.raises(RuntimeError, match="mine"):
        model.generate(prompt, max_new_tokens=5, streamer=Streamer(), logits_processor=process)
    pages = model.engine(1, 16).pages
    assert pages.free == len(pages)
    assert torch.equal(model.generate(prompt, max_new_tokens=5), expected)


def test_threads_do_not_disturb_each_other(tiny):
    work = [(prompt, {"max_tokens": 20, "temperature": 1.0, "seed": seed}) for seed, prompt in enumerate(PROMPTS)]
    alone = [tiny.generate(prompt, **settings) for prompt, settings in work]
    together: list[Any] = [None] * len(work)
    begin = threading.Barrier(len(work))

    def run(index: int) -> None:
        prompt, settings = work[index]
        begin.wait()
        text = text_of(list(tiny.stream(prompt, **settings)))
        together[index] = (tiny.generate(prompt, **settings), text)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same([output for output, _ in together], alone)
    assert [text for _, text in together] == [output.text for output in alone]


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 1}, {"logprobs": 2}], ids=str)
def test_logits_that_are_not_numbers_end_an_answer(tiny, value, at, settings):
    """That answer only: its earlier tokens stay; the rest of the batch, and the next user of its pages, do not change.

    The embedding of one token, which occurs in one of the texts only, is broken.
    """
    settings = {"max_tokens": 8, **settings}
    rest = [*PROMPTS[:1], *PROMPTS[2:]]
    expected, others = tiny.generate(PROMPTS[1], **settings), tiny.generate(rest, **settings)
    [broken] = expected.prompt_token_ids[-1:] if at == 0 else expected.outputs[0].token_ids[at - 1 : at]
    assert not any(broken in [*other.prompt_token_ids, *other.outputs[0].token_ids] for other in others)
    embedding = tiny.model.model.embed_tokens.weight
    whole = embedding[broken].clone()
    embedding[broken] = value
    try:
        first, output, *last = tiny.generate(PROMPTS[:3], **settings)
        last += tiny.generate(PROMPTS[3:], **settings)
        *chunks, end = tiny.stream(PROMPTS[1], **settings)
    finally:
        embedding[broken] = whole
    assert same([first, *last], others)
    answer = output.outputs[0]
    assert (answer.finish_reason, answer.token_ids) == ("error", expected.outputs[0].token_ids[:at])
    assert "logits are not numbers" in answer.stop_reason and len(answer.logprobs) == at
    assert answer.top_logprobs is None or len(answer.top_logprobs) == at
    assert [chunk.finish_reason for chunk in chunks] == [None] * at
    assert (end.finish_reason, end.stop_reason, end.token_ids) == ("error", answer.stop_reason, [])
    assert text_of([*chunks, end]) == answer.text


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({"allowed_token_ids": [9], "no_repeat_ngram_size": 1}, 1),
        ({"allowed_token_ids": [9], "bad_words_ids": [[9]]}, 0),
        ({"allowed_token_ids": [9, 11], "bad_words_ids": [[9, 9], [9, 11], [11, 9], [11, 11]]}, 1),
        ({"allowed_token_ids": [9], "begin_suppress_tokens": [9]}, 0),
        ({"allowed_token_ids": [9], "sequence_bias": {(9,): -math.inf}}, 0),
        ({"suppress_tokens": range(1, 10**9), "no_repeat_ngram_size": 1}, 1),
        ({"suppress_tokens": range(10**9)}, 0),
        ({"suppress_tokens": range(1, 10**9), "stop_token_ids": [0], "min_tokens": 2}, 0),
    ],
    ids=str,
)
def test_an_answer_with_no_token_left_ends_with_an_error(tiny, settings, at, temperature):
    """It does not get token 0. Whoever runs beside it is untouched. 10**9 stands for the size of the vocabulary."""
    vocab = tiny.config.vocab_size
    settings = {
        name: range(value.start, vocab) if isinstance(value, range) else value for name, value in settings.items()
    }
    settings = SamplingParams(**settings, temperature=temperature, max_tokens=4, seed=1)
    expected = tiny.generate(PROMPTS[1], max_tokens=4)
    output, other = tiny.generate(PROMPTS[:2], [settings, SamplingParams(temperature=0, max_tokens=4)])
    [answer] = output.outputs
    assert (answer.finish_reason, len(answer.token_ids), len(answer.logprobs)) == ("error", at, at)
    assert set(answer.token_ids) <= {0, 9, 11} and "no token is left to choose" in answer.stop_reason
    assert same([other], [expected])
    *chunks, end = tiny.stream(PROMPTS[0], settings)
    assert (len(chunks), end.finish_reason, end.stop_reason) == (at, "error", answer.stop_reason)


def test_streams_can_be_read_in_turns(tiny):
    one, two = (tiny.stream(prompt, max_tokens=8) for prompt in PROMPTS[:2])
    turns = list(zip(one, two, strict=True))
    for side, prompt in enumerate(PROMPTS[:2]):
        assert text_of([turn[side] for turn in turns]) == tiny.generate(prompt, max_tokens=8).text
