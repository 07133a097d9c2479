"""LLM as its users meet it: what they type, what comes back, how it ends, and what it says to a mistake."""

import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import internlm3
import numpy as np
import pytest
import torch
from internlm3 import (
    LLM,
    RECOMMENDED_THINKING,
    SYSTEM_PROMPT,
    THINKING_SYSTEM_PROMPT,
    Chunk,
    InternLM3Config,
    InternLM3ForCausalLM,
    RequestOutput,
    SamplingParams,
)
from internlm3.runtime.engine import shared
from internlm3.runtime.engine.graphs import StepQueue, eager

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a small village by the sea, and in that village",
    "def fibonacci(n):",
    "Water",
    "今天天气很好，我们",
]
TINY_WINDOW = 64
DYNAMIC = {"rope_type": "dynamic", "factor": 6.0}


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> LLM:
    return LLM(demo_model, progress=False)


@pytest.fixture(scope="module")
def exact(demo_model: Path) -> LLM:
    return LLM(demo_model, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def make(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a small random model with the demo model's tokenizer; weights depend on the shape alone."""

    def make(generation_config: dict[str, Any] | None = None, **overrides: Any) -> Path:
        values = {
            "vocab_size": 49152,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": TINY_WINDOW,
            # Large enough for texts that differ from prompt to prompt.
            "initializer_range": 0.3,
            "dtype": "float32",
            **overrides,
        }
        folder = tmp_path_factory.mktemp("tiny")
        torch.manual_seed(0)
        model = InternLM3ForCausalLM(InternLM3Config(**values))
        model.generation_config = generation_config or {}
        model.save_pretrained(folder)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(demo_model / name, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def tiny_folder(make: Callable[..., Path]) -> Path:
    return make()


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, progress=False)


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path) -> LLM:
    """The same model as `tiny`, with an engine of its own, to which no test does harm."""
    return LLM(tiny_folder, progress=False)


@pytest.fixture
def as_op() -> Callable[..., Any]:
    """What makes of a function an op of the backend; here every function is one. See test_llm_captured.py."""
    return lambda function: function


@pytest.fixture
def script(tiny: LLM, monkeypatch: pytest.MonkeyPatch, as_op: Any) -> Callable[[Sequence[int]], list[int]]:
    """Makes `tiny` say exactly these tokens; returns the list that grows by each token it was asked for."""

    def script(tokens: Sequence[int]) -> list[int]:
        said: list[int] = []

        def head(x: torch.Tensor) -> torch.Tensor:
            said.append(tokens[min(len(said), len(tokens) - 1)])  # steps may run ahead of what is read
            logits = torch.zeros(len(x), tiny.config.vocab_size)
            logits[:, said[-1]] = 99
            return logits

        monkeypatch.setattr(tiny.model, "head", as_op(head))
        return said

    return script


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each step, or the end of prompts, draws a token for: run by Python or replayed."""
    drawn: list[int] = []
    copy_report = StepQueue.copy_report

    def counting(steps: StepQueue, readers: Sequence[Any]) -> None:
        drawn.append(sum(reader is not None for reader in readers))
        copy_report(steps, readers)

    monkeypatch.setattr(StepQueue, "copy_report", counting)
    return drawn


def ahead(llm: LLM) -> int:
    """How many tokens the device draws ahead of those that were read."""
    return llm.engine._depth - 1


def ids_of(llm: LLM, text: str) -> list[int]:
    return llm.tokenizer.encode(text, add_special_tokens=False)


def same(outputs: Sequence[RequestOutput], expected: Sequence[RequestOutput]) -> bool:
    """The same prompts, tokens, texts and ends. Log-probabilities only nearly: a float32 product of several rows may
    differ in its last bits from that of one.
    """
    answers = [[answer for output in each for answer in output.outputs] for each in (outputs, expected)]
    for one, other in zip(*answers, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    return [said(output) for output in outputs] == [said(output) for output in expected]


def said(output: RequestOutput) -> list[Any]:
    answers = [(a.index, a.text, a.token_ids, a.finish_reason, a.stop_reason) for a in output.outputs]
    return [output.prompt, output.prompt_token_ids, answers]


def text_of(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


# -------------------------------------------------------------------- what comes back


@pytest.mark.parametrize(
    "question",
    [
        "What is the capital of France?",
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}],
    ],
    ids=["text", "messages", "parts"],
)
def test_chat_knows_the_capital_of_france(llm, question):
    answer = llm.chat(question, temperature=0)
    assert isinstance(answer, RequestOutput)
    assert "Paris" in answer.text
    assert "<|im_" not in answer.text
    assert (answer.outputs[0].finish_reason, answer.outputs[0].stop_reason) == ("stop", None)
    assert "What is the capital of France?<|im_end|>\n<|im_start|>assistant\n" in answer.prompt
    assert llm.tokenizer.decode(answer.prompt_token_ids) == answer.prompt
    assert len(answer.outputs[0].logprobs) == len(answer.outputs[0].token_ids)
    assert answer.outputs[0].cumulative_logprob == sum(answer.outputs[0].logprobs)


@pytest.mark.parametrize(
    "give",
    [list, tuple, torch.tensor, np.array, lambda ids: np.array(ids, np.int32), lambda ids: [np.int64(i) for i in ids]],
    ids=["list", "tuple", "tensor", "array", "int32 array", "numpy ints"],
)
def test_a_prompt_may_be_token_ids(tiny, give):
    ids = ids_of(tiny, PROMPTS[0])
    expected = tiny.generate(PROMPTS[0], max_tokens=6)
    got = tiny.generate(give(ids), max_tokens=6)
    assert isinstance(got, RequestOutput)
    assert got.prompt is None and got.prompt_token_ids == ids and got.outputs == expected.outputs
    assert text_of(list(tiny.stream(give(ids), max_tokens=6))) == expected.text


@pytest.mark.parametrize(
    "give",
    [lambda ids: [ids, ids], lambda ids: torch.tensor([ids, ids]), lambda ids: [torch.tensor(ids), np.array(ids)]],
    ids=["lists", "matrix", "tensor and array"],
)
def test_several_prompts_may_be_token_ids(tiny, give):
    ids = ids_of(tiny, PROMPTS[0])
    expected = tiny.generate(ids, max_tokens=4)
    assert same(tiny.generate(give(ids), max_tokens=4), [expected, expected])


def test_a_list_gives_a_list_in_order(tiny):
    tiny.max_batch_size, before = 2, tiny.max_batch_size
    try:
        together = tiny.generate(PROMPTS, max_tokens=5)
    finally:
        tiny.max_batch_size = before
    assert [output.prompt for output in together] == PROMPTS
    assert same(together, [tiny.generate(prompt, max_tokens=5) for prompt in PROMPTS])
    assert len({output.text for output in together}) == len(PROMPTS)
    assert same(tiny.generate(PROMPTS[:1], max_tokens=5), together[:1])
    assert tiny.generate([]) == []
    assert same(tiny.generate((text for text in PROMPTS[:2]), max_tokens=5), together[:2])


@pytest.mark.parametrize(
    ("terminal", "progress", "prompts", "shown"),
    [(True, True, 3, True), (False, True, 3, False), (True, False, 3, False), (True, True, 1, False)],
)
def test_a_progress_bar_over_several_prompts_on_a_terminal(tiny, monkeypatch, terminal, progress, prompts, shown):
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(tiny, "_progress", progress)
    tiny.generate(PROMPTS[:prompts], max_tokens=3)
    assert ("3/3" in stderr.getvalue()) is bool(stderr.getvalue()) is shown


def test_several_conversations(tiny):
    hello, bye = [{"role": "user", "content": "hello"}], [{"role": "user", "content": "bye"}]
    together = tiny.chat([hello, bye], max_tokens=3)
    assert same(together, [tiny.chat(hello, max_tokens=3), tiny.chat("bye", max_tokens=3)])
    assert same(tiny.chat(["hello", "bye"], max_tokens=3), together)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 7}], ids=["greedy", "seeded"]
)
def test_a_ragged_batch_says_what_each_says_alone(llm, exact, dtype, settings):
    model = llm if dtype == "bfloat16" else exact
    together = model.generate(PROMPTS, max_tokens=10, **settings)
    alone = [model.generate(prompt, max_tokens=10, **settings) for prompt in PROMPTS]
    assert same(together, alone)
    if dtype == "bfloat16":  # here every bit of a row is its own
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


@pytest.mark.parametrize("seed", [None, -1])
def test_without_a_seed_torchs_generator_decides(tiny, seed):
    def say() -> str:
        return tiny.generate("hello", temperature=1.0, max_tokens=8, seed=seed).text

    torch.manual_seed(5)
    first, second = say(), say()
    torch.manual_seed(5)
    assert (say(), say()) == (first, second)
    assert first != second


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "seeded"])
def test_a_stream_is_generate_in_pieces(llm, settings):
    messages = [{"role": "user", "content": "Name three colours, with an emoji each."}]
    whole = llm.chat(messages, max_tokens=24, **settings)
    chunks = list(llm.stream(messages, max_tokens=24, **settings))
    answer = whole.outputs[0]
    assert text_of(chunks) == answer.text
    assert [token for chunk in chunks for token in chunk.token_ids] == answer.token_ids
    assert [logprob for chunk in chunks for logprob in chunk.logprobs] == answer.logprobs
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == (answer.finish_reason, answer.stop_reason)
    assert {chunk.prompt_tokens for chunk in chunks} == {len(whole.prompt_token_ids)}
    assert [chunk.decode_tokens for chunk in chunks] == list(range(1, len(chunks) + 1))


def test_figures_of_a_stream(tiny, monkeypatch):
    clock = iter([10.0, 10.0, 10.5, 10.75, 11.0])  # a prefill of half a second, then a token each quarter
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    chunks = list(tiny.stream([504] * 20, max_tokens=3))
    monkeypatch.undo()
    assert [chunk.prompt_tps for chunk in chunks] == [40.0] * 3
    assert [chunk.decode_tps for chunk in chunks] == [0.0, 4.0, 4.0]
    status = Path("/proc/self/status")
    if status.exists():
        [high] = [int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        assert chunks[-1].peak_memory == pytest.approx(high * 1024 / 1e9, rel=0.02)


def test_chat_can_stream(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "max_seq_len", 1000)
    for settings in ({}, {"thinking": True, "seed": 1}, {"temperature": 0.5, "seed": 1}):
        whole = tiny.chat("hello", max_tokens=5, **settings)
        assert text_of(list(tiny.chat("hello", stream=True, max_tokens=5, **settings))) == whole.text


# -------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ({"max_new_tokens": 3}, {"max_tokens": 3}),
        ({"temp": 0.7}, {"temperature": 0.7}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"stop_words": ["a"]}, {"stop": ("a",)}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"random_seed": 4}, {"seed": 4}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"num_return_sequences": 1}, {"n": 1}),
    ],
    ids=lambda value: "+".join(value),
)
@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_names_of_other_libraries(tiny, verb, typed, meant):
    limit = {} if "max_new_tokens" in typed else {"max_tokens": 2}
    applied = getattr(tiny, verb)("hi", **limit, **typed).sampling_params
    assert {name: getattr(applied, name) for name in meant} == meant


def test_generation_config_is_applied_and_shown(make):
    config = {"do_sample": True, "temperature": 0.3, "top_k": 7, "repetition_penalty": 1.2, "max_new_tokens": 4}
    llm = LLM(make(config), progress=False)
    expected = SamplingParams(temperature=0.3, top_k=7, repetition_penalty=1.2, max_tokens=4)
    assert llm.default_params == expected
    output = llm.generate("hello")
    assert output.sampling_params == expected and len(output.outputs[0].token_ids) == 4
    assert llm.generate("hello", temp=0.5).sampling_params == SamplingParams.from_kwargs(expected, temperature=0.5)
    # Parameters that are given whole replace the checkpoint's.
    assert llm.generate("hello", SamplingParams(max_tokens=2)).sampling_params == SamplingParams(max_tokens=2)


def test_without_do_sample_a_checkpoint_is_greedy(tiny):
    assert tiny.default_params == SamplingParams(temperature=0)


def test_a_filter_without_effect_is_told_once_with_the_callers_line(tiny):
    with pytest.warns(UserWarning, match="top_p, have no effect|top_p have no effect at temperature 0") as caught:
        tiny.generate("hello", top_p=0.9, max_tokens=1)
    assert [Path(warning.filename).name for warning in caught] == ["test_llm.py"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.generate("hello", top_p=0.9, temperature=1, max_tokens=1)


def test_ends_are_the_union_of_every_source(make):
    eos = LLM(make({"eos_token_id": [11, 7]}, eos_token_id=[9, 11]), progress=False)
    assert eos.eos_token_ids == [2, 7, 9, 11]  # 2 is <|im_end|>
    for end in eos.eos_token_ids:
        stops: list[dict[str, Any]] = [{}, {"stop": []}, {"stop": "never"}, {"stop_token_ids": [5]}]
        for stop in stops:
            answer = eos.generate("hello", logit_bias={end: 1e4}, max_tokens=3, **stop).outputs[0]
            assert (answer.token_ids, answer.text) == ([end], "")
            assert (answer.finish_reason, answer.stop_reason) == ("stop", None)


@pytest.mark.parametrize("own", [None, "You teach.", ""], ids=["no system", "own system", "empty system"])
def test_thinking_is_the_published_prompt(llm, own):
    published = (len(THINKING_SYSTEM_PROMPT), hashlib.sha256(THINKING_SYSTEM_PROMPT.encode()).hexdigest())
    assert published == (2382, "e28ddb4dc2001db12cb37abed508a66c4263532eb2c9d36d95a17fdd316d2936")
    question = [{"role": "user", "content": "2+2?"}]
    messages = question if own is None else [{"role": "system", "content": own}, *question]
    output = llm.chat(messages, thinking=True, max_tokens=1)
    if own:
        in_parts = [{"role": "system", "content": [{"type": "text", "text": own}]}, *question]
        assert llm.chat(in_parts, thinking=True, max_tokens=1).prompt == output.prompt
    assert output.prompt == (
        f"<|im_start|>system\n{own or ''}{THINKING_SYSTEM_PROMPT}<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    if own is None:
        assert llm.chat("2+2?", thinking=True, max_tokens=1).prompt == output.prompt
        [chunk] = llm.stream("2+2?", thinking=True, max_tokens=1)
        assert chunk.prompt_tokens == len(output.prompt_token_ids)


def test_min_tokens_holds_a_stop_string_back(tiny):
    free = tiny.generate("hello", temperature=0, max_tokens=12).outputs[0]
    stop = tiny.tokenizer.decode(free.token_ids[:1]).strip() or free.text[:1]
    for least in (0, 5, 12):
        answer = tiny.generate("hello", temperature=0, max_tokens=12, stop=stop, min_tokens=least).outputs[0]
        assert len(answer.token_ids) >= max(least, 1)
        assert answer.token_ids == free.token_ids[: len(answer.token_ids)]
        if least == 12:
            assert answer.text.startswith(free.text[:-1][:20])


BY_THE_TEXT = {
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[260], [300, 301]],
    "sequence_bias": [[[900], 9.0], [[900, 901], 30.0], [[260], 50.0]],
    "exponential_decay_length_penalty": [3, 1.01],
    "begin_suppress_tokens": [900],
    "suppress_tokens": [903],
    "forced_eos_token_id": 904,
}


def test_settings_that_go_by_the_text(make, tiny):
    """What a generation_config.json asks for holds in LLM, as in `generate`; and so does a keyword."""
    file = LLM(make({**BY_THE_TEXT, "max_new_tokens": 9}), progress=False)
    outputs = file.generate(PROMPTS)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([file.tokenizer.encode(prompt)])
        expected = file.model.generate(ids, do_sample=False, max_new_tokens=9, eos_token_id=file.eos_token_ids)
        assert output.outputs[0].token_ids == expected[0, ids.shape[1] :].tolist()
        assert "".join(chunk.text for chunk in file.stream(prompt)) == output.text
    assert same(tiny.generate(PROMPTS, temperature=0, max_tokens=9, **BY_THE_TEXT), outputs)
    assert [*map(said, tiny.generate(PROMPTS, temperature=0, max_tokens=9))] != [*map(said, outputs)]
    settings = SamplingParams(temperature=1, n=3, seed=1, max_tokens=9, **BY_THE_TEXT)
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


def test_timings(tiny_folder, tiny, monkeypatch):
    """On a clock that ticks once a look: the second waits for the first one's row, and decodes all its tokens."""
    single = LLM(tiny_folder, max_batch_size=1, progress=False)
    ticks = iter(range(10_000))
    monkeypatch.setattr("internlm3.runtime.api.llm.time.perf_counter", lambda: float(next(ticks)))
    one, two = (output.timings for output in single.generate(["hello", "one two"], temperature=0, max_tokens=4))
    steps = [
        len(output.outputs[0].token_ids) - 1
        for output in tiny.generate(["hello", "one two"], temperature=0, max_tokens=4)
    ]
    assert (one.prompt, one.first_token, one.decode) == (1, 2, steps[0])
    assert (two.prompt, two.first_token, two.decode) == (1, 2 + steps[0] + 2, steps[1])


@pytest.mark.parametrize("given", [b"hello", bytearray(b"hello"), [b"hello"], [True, False], [[1.5]], {"a": 1}, None])
def test_what_is_no_prompt(tiny, given):
    with pytest.raises((TypeError, ValueError), match="prompt"):
        tiny.generate(given, max_tokens=1)


def test_numbers_of_numpy_are_numbers(tiny_folder):
    llm = LLM(tiny_folder, progress=False, max_seq_len=np.int64(64), max_batch_size=np.int32(2))
    ids = [5, 6, 7]
    expected = llm.generate(ids, temperature=0, max_tokens=2)
    for given in (np.array(ids), torch.tensor(ids), [np.int64(5), np.int32(6), 7], [torch.tensor(5), 6, 7]):
        assert same([llm.generate(given, temperature=0, max_tokens=np.int64(2))], [expected])
    assert same(llm.generate([[np.int64(5), 6, 7]], temperature=0, max_tokens=2), [expected])


def test_without_the_module_of_posix(tiny, monkeypatch):
    """Windows has no `resource`: what it would tell is 0."""
    monkeypatch.setitem(sys.modules, "resource", None)
    assert {chunk.peak_memory for chunk in tiny.stream("hello", max_tokens=2)} == {0.0}


def test_a_pad_token_may_lie_beyond_the_embedding(make, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "padded")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["49152"] = {"content": "[PAD]", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "[PAD]"}))
    padded = LLM(folder, progress=False)
    assert padded.tokenizer.pad_token_id == padded.config.vocab_size
    prompts = ["hi", "what is it"]
    expected = LLM(tiny_folder, progress=False).generate(prompts, temperature=0, max_tokens=3)
    assert same(padded.generate(prompts, temperature=0, max_tokens=3), expected)
    with pytest.raises(ValueError, match="49152, which is outside the vocabulary of 49152"):
        padded.generate("a[PAD]b")
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "additional_special_tokens": ["[PAD]"]}))
    with pytest.raises(ValueError, match="they belong to different checkpoints"):
        LLM(folder, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": "false"}, "do_sample must be True, False or None; got 'false'"),
        ({"eos_token_id": True}, "eos_token_id holds True"),
        ({"eos_token_id": [2, False]}, "eos_token_id holds False"),
        ({"eos_token_id": "2"}, "eos_token_id holds '2'"),
        ({"do_sample": True, "temperature": "0.5"}, "temperature must be a number"),
        ({"do_sample": True, "top_k": True}, "top_k must be an integer"),
        ({"no_repeat_ngram_size": "3"}, "no_repeat_ngram_size must be an integer >= 0; got '3'"),
        ({"suppress_tokens": [10**6]}, "suppress_tokens holds 1000000, which is outside the vocabulary"),
        ({"min_length": 30}, "min_length=30 counts the prompt too: write min_new_tokens"),
        ({"top_h": 0.5}, "generate: top_h=0.5 is not supported"),
        ({"guidance_scale": 1.5}, "generate: guidance_scale=1.5 is not supported"),
    ],
)
def test_settings_of_a_wrong_kind_in_a_file(tiny_folder, tmp_path, settings, message):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"generation_config\.json: {message}"):
        LLM(folder, progress=False)


def test_a_template_that_reads_parts_gets_them(tiny, monkeypatch):
    template = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert tiny.chat([{"role": "user", "content": parts}], max_tokens=1).prompt == "[one][two]"


def test_thinking_has_its_recommended_limits(llm, script, tiny, monkeypatch):
    monkeypatch.setattr(tiny, "max_seq_len", 10_000)
    script([tiny.eos_token_ids[0]] * 3)
    applied = tiny.chat("hi", thinking=True).sampling_params
    assert applied == RECOMMENDED_THINKING
    assert (applied.temperature, applied.top_p, applied.top_k) == (1.0, 0.8, 40)
    assert (applied.repetition_penalty, applied.max_tokens) == (1.005, 8192)
    assert tiny.chat("hi", thinking=True, max_tokens=5, seed=1).sampling_params == SamplingParams.from_kwargs(
        RECOMMENDED_THINKING, max_tokens=5, seed=1
    )
    assert tiny.chat("hi", SamplingParams(top_k=3), thinking=True).sampling_params == SamplingParams(top_k=3)


def test_names_of_the_package():
    code = (
        "import sys, internlm3\n"
        "from internlm3 import SYSTEM_PROMPT, THINKING_SYSTEM_PROMPT\n"
        "assert 'torch' not in sys.modules\n"
        "print(*sorted(internlm3.__all__))"
    )
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"LLM", "RECOMMENDED", "RECOMMENDED_THINKING", "RequestOutput", "CompletionOutput", "Chunk"} < {*listed}
    for name in listed:
        assert getattr(internlm3, name) is not None and name in dir(internlm3)
    assert SYSTEM_PROMPT.startswith("You are an AI assistant whose name is InternLM (书生·浦语).\n- InternLM")
    with pytest.raises(AttributeError, match=r"'internlm3' has no attribute 'LMM'.*LLM"):
        internlm3.LMM  # noqa: B018


# -------------------------------------------------------------------- how an answer ends


def test_length(tiny):
    answer = tiny.generate("hello", max_tokens=3).outputs[0]
    assert (answer.finish_reason, answer.stop_reason, len(answer.token_ids)) == ("length", None, 3)


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_the_context_ends_an_answer(tiny_folder, max_tokens):
    llm = LLM(tiny_folder, max_seq_len=12, progress=False)
    answer = llm.generate([504] * 5, max_tokens=max_tokens, ignore_eos=True).outputs[0]
    assert (answer.finish_reason, answer.stop_reason, len(answer.token_ids)) == ("length", None, 7)
    assert len(llm.generate([504] * 11, max_tokens=max_tokens).outputs[0].token_ids) == 1


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("verb", ["generate", "stream"])
def test_a_stop_string_is_met_across_tokens(tiny, script, drawn, verb, include):
    story = ids_of(tiny, "One fish, two fish. The end is near, said the fish")
    words = [tiny.tokenizer.decode([token]) for token in story]
    assert not any("e end i" in word for word in words)
    said = script(story)
    settings = {"stop": ["nothing", "e end i"], "include_stop_str_in_output": include, "max_tokens": len(story)}
    if verb == "generate":
        last = tiny.generate("x", **settings).outputs[0]
        text = last.text
    else:
        chunks = list(tiny.stream("x", **settings))
        last, text = chunks[-1], text_of(chunks)
    assert text == ("One fish, two fish. The end i" if include else "One fish, two fish. Th")
    assert (last.finish_reason, last.stop_reason) == ("stop", "e end i")
    # It ends at once: the token that completes the stop string is the last one asked for, but for those drawn ahead.
    assert tiny.tokenizer.decode(said[: len(drawn) - ahead(tiny)]).endswith(" is") and len(drawn) < len(story)


def test_a_stop_string_leaves_its_row_to_others(tiny, drawn):
    """While one answer goes on, nothing is drawn for the one that has ended, but what was under way."""
    long = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    text = tiny.generate(PROMPTS[0], **long).text
    drawn.clear()
    params = [SamplingParams(**long, stop=text[5:9]), SamplingParams(**long)]
    one, two = (output.outputs[0] for output in tiny.generate(PROMPTS[:2], params))
    assert len(one.token_ids) < 12 < len(two.token_ids) == 20
    assert sum(drawn) == len(one.token_ids) + ahead(tiny) + 20


def test_what_might_become_a_stop_string_is_held_and_given_back(tiny, script):
    story = ids_of(tiny, "the end of the endless day")
    script(story)
    chunks = list(tiny.stream("x", stop="endless night", max_tokens=len(story)))
    assert text_of(chunks) == "the end of the endless day"
    script(story)
    chunks = list(tiny.stream("x", stop="endless dayX", max_tokens=len(story)))
    assert text_of(chunks) == "the end of the endless day" and chunks[-1].finish_reason == "length"


@pytest.mark.parametrize("skip", [True, False])
def test_a_special_token_is_a_stop_string(tiny, script, drawn, skip):
    plain = ids_of(tiny, "some code")
    mark = tiny.tokenizer.convert_tokens_to_ids("<file_sep>")
    said = script([*plain, mark, *plain])
    answer = tiny.generate("x", stop=["<file_sep>"], skip_special_tokens=skip, max_tokens=9).outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("some code", "stop", "<file_sep>")
    assert said[: len(drawn) - ahead(tiny)] == [*plain, mark] and len(drawn) < 9


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
    said = script([end, *plain, end])
    answer = tiny.generate("x", ignore_eos=True, max_tokens=2 + len(plain)).outputs[0]
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("code", said, "length")


def test_min_tokens_holds_every_end_back(tiny, script):
    end, other = tiny.eos_token_ids[0], 300
    for ends, reason in ((end, None), (other, other)):
        script([ends] * 4)
        answer = tiny.generate("x", min_tokens=3, max_tokens=9, stop_token_ids=[other]).outputs[0]
        assert len(answer.token_ids) == 4 and answer.token_ids.count(ends) == 1 and answer.token_ids[-1] == ends
        assert (answer.finish_reason, answer.stop_reason) == ("stop", reason)


# -------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.5, "seed": 2, "top_k": 50}], ids=str)
def test_logprobs_are_the_models_own(exact, settings):
    output = exact.generate(PROMPTS[0], max_tokens=8, logprobs=5, **settings)
    answer = output.outputs[0]
    whole = torch.tensor([output.prompt_token_ids + answer.token_ids])
    expected = exact.model(whole).logits[0, len(output.prompt_token_ids) - 1 : -1].double().log_softmax(-1)
    chosen = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    # float32 through 30 layers, one token at a time against all at once.
    torch.testing.assert_close(torch.tensor(answer.logprobs).double(), chosen, atol=1e-4, rtol=0)
    for found, row in zip(answer.top_logprobs, expected, strict=True):
        values, ids = row.topk(5)
        assert list(found) == ids.tolist()
        torch.testing.assert_close(torch.tensor(list(found.values())).double(), values, atol=1e-4, rtol=0)
    chunks = list(exact.stream(PROMPTS[0], max_tokens=8, logprobs=5, **settings))
    assert [chunk.top_logprobs for chunk in chunks] == [[found] for found in answer.top_logprobs]


def test_alternatives_are_reported_only_where_asked_for(tiny):
    assert tiny.generate("x", max_tokens=2).outputs[0].top_logprobs is None
    assert next(tiny.stream("x", max_tokens=2)).top_logprobs is None


# -------------------------------------------------------------------- whole characters


def whole_characters(tokenizer: Any, tokens: Sequence[int]) -> str:
    """What may be shown of a text so far: all but a last character that is not complete."""
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
def test_streams_show_whole_characters_as_soon_as_they_are_whole(tiny, script, monkeypatch, text):
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


def test_half_a_character_shows_only_where_the_answer_ends_in_it(tiny, script):
    half = ids_of(tiny, "a靐")[:-1]
    script(half)
    chunks = list(tiny.stream("x", max_tokens=len(half)))
    assert text_of(chunks[:-1]) == "a"
    assert text_of(chunks) == tiny.tokenizer.decode(half) != "a"


def test_a_stop_string_within_multibyte_text(tiny, script):
    tokens = ids_of(tiny, "你好，世界。再见")
    script(tokens)
    assert text_of(list(tiny.stream("x", stop="。", max_tokens=len(tokens)))) == "你好，世界"


# -------------------------------------------------------------------- stopping in the middle


def held_pages(llm: LLM) -> int:
    pages = llm.engine.pages
    return len(pages) - pages.free


def counted(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> list[int]:
    """Grows by one with every pass through the model that draws tokens."""
    calls: list[int] = []
    head = llm.model.head

    def counting(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return head(x)

    monkeypatch.setattr(llm.model, "head", counting)
    return calls


def test_closing_a_stream_stops_it_and_frees_it(tiny, undisturbed, drawn):
    stream = tiny.stream("hello", max_tokens=30, ignore_eos=True)
    assert drawn == []
    for chunk in stream:
        if chunk.decode_tokens == 3:
            break
    assert len(drawn) == 3 + ahead(tiny) and held_pages(tiny) == 1
    stream.close()
    assert len(drawn) == 3 + ahead(tiny) and held_pages(tiny) == 0
    assert list(stream) == []
    assert tiny.generate("hello", max_tokens=6) == undisturbed.generate("hello", max_tokens=6)


@pytest.mark.parametrize("at", [1, 2, 3], ids=["prompt", "first step", "later step"])
@pytest.mark.parametrize("verb", ["generate", "stream"])
def test_ctrl_c_in_a_step_reaches_the_caller_and_leaves_the_model_well(tiny, undisturbed, monkeypatch, as_op, verb, at):
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
def test_a_users_exception_leaves_the_model_well(tiny, undisturbed, where):
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

    prompt = torch.tensor([[504, 300]])
    expected = undisturbed.model.generate(prompt, max_new_tokens=5)
    with pytest.raises(RuntimeError, match="mine"):
        tiny.model.generate(prompt, max_new_tokens=5, streamer=Streamer(), logits_processor=process)
    assert torch.equal(tiny.model.generate(prompt, max_new_tokens=5), expected)
    assert held_pages(tiny) == 0


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
def test_logits_that_are_no_numbers_end_an_answer(tiny, value, at, settings):
    """And no other: what came before stays; the rest of the batch, and who has its pages next, say what they always do.

    One token's embedding is broken, which stands in one of the texts alone.
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


def test_streams_may_be_read_by_turns(tiny):
    one, two = (tiny.stream(prompt, max_tokens=8) for prompt in PROMPTS[:2])
    turns = list(zip(one, two, strict=True))
    for side, prompt in enumerate(PROMPTS[:2]):
        assert text_of([turn[side] for turn in turns]) == tiny.generate(prompt, max_tokens=8).text


# -------------------------------------------------------------------- past the window


def test_the_window_is_the_default_and_the_limit(tiny_folder, tiny):
    assert tiny.max_seq_len == TINY_WINDOW
    message = f"max_seq_len is {TINY_WINDOW + 1}.*trained for {TINY_WINDOW} .*no dynamic NTK"
    with pytest.raises(ValueError, match=message):
        LLM(tiny_folder, max_seq_len=TINY_WINDOW + 1, progress=False)
    assert LLM(tiny_folder, max_seq_len=TINY_WINDOW, progress=False).max_seq_len == TINY_WINDOW


def test_dynamic_ntk_goes_past_the_window(make, tiny):
    folder = make(rope_scaling=DYNAMIC)
    assert LLM(folder, progress=False).max_seq_len == TINY_WINDOW
    far = LLM(folder, max_seq_len=2 * TINY_WINDOW, progress=False)
    for weight, same in zip(tiny.model.parameters(), far.model.parameters(), strict=True):
        assert torch.equal(weight, same)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(300, 40_000, (TINY_WINDOW + 36,), generator=generator).tolist()

    # Up to the window it is plain RoPE, bit for bit.
    settings = {"logprobs": 3, "ignore_eos": True}
    inside = far.generate(prompt[: TINY_WINDOW - 10], max_tokens=10, **settings)
    assert inside.outputs == tiny.generate(prompt[: TINY_WINDOW - 10], max_tokens=10, **settings).outputs

    # Past it, up to max_seq_len, and with other frequencies than plain RoPE.
    past = far.generate(prompt, **settings).outputs[0]
    assert (len(past.token_ids), past.finish_reason) == (TINY_WINDOW - 36, "length")
    plain = tiny.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    stretched = far.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert (plain - stretched).abs().max() > 1e-2
    assert past.logprobs[0] == pytest.approx(stretched.max().item(), abs=1e-4)
    # A prompt inside the window may be answered across its end, on the frequencies it began with.
    across = far.generate(prompt[: TINY_WINDOW - 10], max_tokens=30, **settings).outputs[0]
    assert across.token_ids[:10] == inside.outputs[0].token_ids and len(across.token_ids) == 30
    assert text_of(list(far.stream(prompt, **settings))) == past.text


# -------------------------------------------------------------------- mistakes

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate(""), ValueError, "the prompt is empty"),
        (lambda m: m.generate([[]]), ValueError, "the prompt is empty"),
        (lambda m: m.generate(["hi", ""]), ValueError, "prompt 1 is empty"),
        (lambda m: m.stream(""), ValueError, "the prompt is empty"),
        (lambda m: m.generate([504, 49152]), ValueError, "49152, which is outside the vocabulary of 49152"),
        (lambda m: m.generate(["hi", [-1]]), ValueError, "prompt 1 holds -1, which is outside the vocabulary"),
        (lambda m: m.generate([504] * 64), ValueError, "64 tokens, and max_seq_len is 64"),
        (lambda m: m.stream([504] * 99), ValueError, "99 tokens, and max_seq_len is 64"),
        (lambda m: m.generate(["hi", "hi " * 80]), ValueError, "prompt 1 has .* max_seq_len is 64"),
        (lambda m: m.chat("hi " * 80), ValueError, "max_seq_len is 64"),
        (lambda m: m.generate(None), TypeError, "prompts must be .* not None"),
        (lambda m: m.generate(5), TypeError, "prompts must be .* not 5"),
        (lambda m: m.generate({"prompt": "hi"}), TypeError, "prompts must be .* not {'prompt'"),
        (lambda m: m.generate([1.5]), TypeError, "token ids.* not 1.5"),
        (lambda m: m.generate(torch.tensor([1.5])), TypeError, "token ids.* not 1.5"),
        (lambda m: m.generate([504, "hi"]), TypeError, r"token ids.* not \[504, 'hi'\]"),
        (lambda m: m.generate(MESSAGES), TypeError, "messages go to chat"),
        (lambda m: m.generate("\ud800"), ValueError, "Unicode"),
        (lambda m: m.stream(["hi", "you"]), ValueError, "stream answers one prompt; there are 2"),
        (lambda m: m.stream([]), ValueError, "stream answers one prompt; there are 0"),
        (lambda m: m.stream("hi", n=2, temperature=1), ValueError, "stream gives one answer; n is 2"),
        (lambda m: m.chat(["hi", "you"], stream=True), ValueError, "one conversation; there are 2"),
        (lambda m: m.chat([]), ValueError, "messages must be a non-empty list"),
        (lambda m: m.chat(""), ValueError, "empty"),
        (lambda m: m.chat(MESSAGES[0]), ValueError, "messages must be a non-empty list"),
        (lambda m: m.chat(None), ValueError, "messages must be a non-empty list"),
        (lambda m: m.chat(None, thinking=True), ValueError, "messages must be a non-empty list"),
        (lambda m: m.chat([5], thinking=True), ValueError, r"messages\[0\] must be a dict"),
        (lambda m: m.chat([{"role": "robot", "content": "hi"}]), ValueError, "unknown role 'robot'.*assistant"),
        (lambda m: m.chat([*MESSAGES, {"role": "user"}]), ValueError, r"messages\[1\]: 'content'"),
        (lambda m: m.chat([{"role": "user", "content": 5}]), ValueError, r"messages\[0\]: 'content'.* int"),
        (lambda m: m.generate("hi", {"top_k": 3}), TypeError, "one SamplingParams, not {'top_k': 3}"),
        (lambda m: m.generate("hi", [SamplingParams()]), TypeError, "one SamplingParams"),
        (lambda m: m.generate("hi", max_token=3), TypeError, "'max_token'; did you mean 'max_tokens'"),
        (lambda m: m.generate("hi", temprature=3), TypeError, "'temprature'; did you mean 'temperature'"),
        (lambda m: m.chat("hi", repitition_penalty=3), TypeError, "did you mean 'repetition_penalty'"),
        (lambda m: m.stream("hi", stop_token_id=3), TypeError, "did you mean 'stop_token_ids'"),
        (lambda m: m.generate("hi", temperature=-1), ValueError, r"temperature .* got -1"),
        (lambda m: m.generate("hi", temperature=float("nan")), ValueError, r"temperature .* got nan"),
        (lambda m: m.generate("hi", temperature="hot"), ValueError, r"temperature .* got 'hot'"),
        (lambda m: m.generate("hi", top_p=-1), ValueError, r"top_p .*\[0, 1\]; got -1"),
        (lambda m: m.generate("hi", top_k=-2), ValueError, "top_k .* got -2"),
        (lambda m: m.generate("hi", max_tokens=0), ValueError, "max_tokens .* got 0"),
        (lambda m: m.generate("hi", logprobs=True), ValueError, "logprobs .* got True"),
        (lambda m: m.generate("hi", stop=""), ValueError, "stop .* got ''"),
        (lambda m: m.generate("hi", stop=[3]), ValueError, "stop .* got 3"),
        (lambda m: m.generate("hi", n=2, temp=0), ValueError, "n must be 1 at temperature 0"),
        (lambda m: m.generate("hi", min_tokens=3, max_tokens=2), ValueError, "min_tokens .* max_tokens = 2; got 3"),
        (lambda m: m.generate("hi", temp=1, temperature=2), ValueError, "temp=1 and temperature=2"),
        (lambda m: m.generate("hi", do_sample=True, temperature=0), ValueError, "do_sample=True contradicts"),
        (lambda m: m.generate("hi", allowed_token_ids=[10**6]), ValueError, "allowed_token_ids holds 1000000"),
        (lambda m: m.generate("hi", logit_bias={10**6: 1}), ValueError, "logit_bias holds 1000000"),
        (lambda m: m.generate("hi", stop_token_ids=[10**6]), ValueError, "stop_token_ids holds 1000000"),
    ],
)
def test_a_mistake_in_a_call_is_named_before_the_model_runs(tiny, monkeypatch, call, error, message):
    calls = counted(monkeypatch, tiny)
    with pytest.raises(error, match=message):
        call(tiny)
    assert calls == []


def test_a_templates_own_error_is_told(tiny, monkeypatch):
    refusing = "{% for m in messages %}\n{{ raise_exception('roles must alternate') }}{% endfor %}"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", refusing)
    with pytest.raises(ValueError, match=r"line 2.*roles must alternate"):
        tiny.chat("hi")
    monkeypatch.setattr(tiny.tokenizer, "chat_template", "{% for %}")
    with pytest.raises(ValueError, match="line 1: syntax error"):
        tiny.chat("hi")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_model_len": 10}, TypeError, "LLM: unknown keyword 'max_model_len'; did you mean 'max_seq_len'"),
        ({"max_seq_len": 0}, ValueError, "max_seq_len .* it is 0"),
        ({"max_seq_len": "10"}, ValueError, "max_seq_len .* it is '10'"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size .* it is 0"),
        ({"max_batch_size": 17, "batch_invariant": True}, ValueError, "up to 16 answers .* max_batch_size is 17"),
        ({"dtype": "int8"}, ValueError, "dtype 'int8' is not supported.*bfloat16"),
        ({"device": "gpu"}, ValueError, "device 'gpu' is no device"),
        ({"device": "cuda:99"}, ValueError, "device 'cuda:99' does not exist"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_in_loading_is_named(tiny_folder, arguments, error, message):
    with pytest.raises(error, match=message):
        LLM(tiny_folder, progress=False, **arguments)


@pytest.mark.parametrize(("options", "capture"), [({}, None), ({"cuda_graphs": False}, eager)], ids=["on", "off"])
def test_cuda_graphs_may_be_turned_off(tiny_folder, monkeypatch, options, capture):
    """What a GPU replays is then run as it is: to the engine that is another capture, and nothing else."""
    asked: list[Any] = []
    monkeypatch.setattr(shared, "Engine", lambda model, *, capture, **_: asked.append(capture))
    LLM(tiny_folder, progress=False, **options)
    assert {*asked} == {capture}


def test_the_switch_for_remote_code_means_nothing(tiny_folder):
    LLM(tiny_folder, progress=False, trust_remote_code=True)


def spoilt(folder: Path, where: Path, **changes: Any) -> Path:
    """A copy whose files are removed (None), replaced (bytes), or given other JSON keys (a dict)."""
    copy = Path(shutil.copytree(folder, where / "copy"))
    for name, change in changes.items():
        path = copy / name.replace("__", ".")
        if change is None:
            path.unlink()
        elif isinstance(change, bytes):
            path.write_bytes(change)
        else:
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(content | change))
    return copy


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"config__json": None}, FileNotFoundError, "config.json is missing"),
        ({"config__json": b"{"}, ValueError, "config.json is not valid JSON"),
        ({"config__json": {"model_type": "llama"}}, ValueError, "config.json: model_type is 'llama'"),
        ({"config__json": {"vocab_size": 40_000}}, ValueError, "the tokenizer has 49080 tokens.* vocabulary 40000"),
        ({"config__json": {"rope_scaling": {"type": "yarn", "factor": 2}}}, ValueError, "rope_type 'yarn'"),
        ({"tokenizer__model": None}, FileNotFoundError, "tokenizer.model"),
        ({"tokenizer__model": b"nonsense"}, ValueError, "tokenizer.model"),
        ({"tokenizer_config__json": {"chat_template": 5}}, (ValueError, TypeError), "chat_template"),
        ({"generation_config__json": b"]"}, ValueError, "generation_config.json is not valid JSON"),
        (
            {"generation_config__json": {"do_sample": True, "top_p": 7}},
            ValueError,
            "generation_config.json: top_p .* got 7",
        ),
        (
            {"generation_config__json": {"eos_token_id": [2, 49152]}},
            ValueError,
            "generation_config.json: eos_token_id holds 49152",
        ),
        ({"generation_config__json": {"eos_token_id": "2"}}, ValueError, "_config.json: eos_token_id holds '2'"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_spoilt_folder_is_named_before_its_weights_are_read(
    tiny_folder, tmp_path, monkeypatch, changes, error, message
):
    folder = spoilt(tiny_folder, tmp_path, **changes)
    monkeypatch.setattr("internlm3.runtime.api.llm.load_model", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(error, match=message) as raised:
        LLM(folder, progress=False)
    assert "copy" in str(raised.value) or "config.json" in str(raised.value)


def test_missing_weights(tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"contains no weights: it needs model\.safetensors"):
        LLM(spoilt(tiny_folder, tmp_path, model__safetensors=None), progress=False)


def test_no_such_checkpoint(tmp_path, tiny_folder):
    with pytest.raises(FileNotFoundError, match="there is no folder '/no/such/folder'"):
        LLM("/no/such/folder")
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file"):
        LLM(tiny_folder / "config.json")
    with pytest.raises(FileNotFoundError, match=r"'no-one/nothing' is no local folder.* in the cache"):
        LLM("no-one/nothing", cache_dir=tmp_path, local_files_only=True)


def test_no_network_and_nothing_cached(tmp_path):
    # Port 9 of this machine: nobody listens there.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    code = "from internlm3 import LLM\ntry: LLM('no-one/nothing')\nexcept FileNotFoundError as error: print(error)"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "'no-one/nothing' is no local folder" in ran.stdout and "network" in ran.stdout, ran.stderr
