"""LLM from a user's side: outputs, defaults and settings, and the context window."""

import contextlib
import gc
import hashlib
import io
import json
import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import internlm3
from internlm3 import (
    LLM,
    RECOMMENDED_THINKING,
    SYSTEM_PROMPT,
    THINKING_SYSTEM_PROMPT,
    RequestOutput,
    SamplingParams,
)
from internlm3.tests.support.llm import DYNAMIC, PROMPTS, TINY_WINDOW, causal_lm, ids_of, same, text_of

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


def test_a_chat_computes_only_what_is_new(llm):
    """Real text, five turns with the thinking prompt switched on and off: a turn reuses every whole page of the two
    conversations so far, and the answers are those of a model that has seen nothing before.
    """
    known: dict[bool, list[int]] = {False: [], True: []}
    messages: list[dict[str, str]] = [{"role": "system", "content": SYSTEM_PROMPT}]
    words = ["bread", "cheese", "apples", "tea", "salt"]
    for turn, word in enumerate(words):
        messages.append({"role": "user", "content": f"Tell me one short fact about {word}."})
        thinking = turn in (1, 3)
        answer = llm.chat(messages, thinking=thinking, temperature=0, max_tokens=8)
        ids, past = answer.prompt_token_ids, known[thinking]
        common = next((n for n, (one, other) in enumerate(zip(ids, past, strict=False)) if one != other), len(past))
        least = min(common, len(ids) - 1, len(past) - 1) // 64 * 64 if past else 0
        assert answer.cached_tokens >= least
        known[thinking] = ids + answer.outputs[0].token_ids
        messages.append({"role": "assistant", "content": answer.text})
    assert common == len(past) > 200, "an answer's tokens are those of its text, so they are reused as well"
    fresh = causal_lm(llm).generate(torch.tensor([ids]), max_new_tokens=8, eos_token_id=llm.eos_token_ids)
    assert fresh[0, len(ids) :].tolist() == answer.outputs[0].token_ids


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


def test_a_batch_of_real_prompts_gives_what_each_gives_alone(llm):
    settings = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 6}
    together = llm.generate(PROMPTS, **settings)
    assert same(together, [llm.generate(prompt, **settings) for prompt in PROMPTS])
    assert [*llm.stream(PROMPTS[1], **settings)][-1].finish_reason == "length"


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


@pytest.mark.parametrize("seed", [None, -1])
def test_without_a_seed_torchs_generator_draws_one(tiny, seed):
    def say() -> str:
        return tiny.generate("hello", temperature=1.0, max_tokens=8, seed=seed).text

    torch.manual_seed(5)
    first, second = say(), say()
    torch.manual_seed(5)
    assert (say(), say()) == (first, second)
    assert first != second


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


def test_a_filter_without_effect_is_warned_of_once_at_the_callers_line(tiny):
    with pytest.warns(UserWarning, match="no effect at temperature 0, which is greedy: top_p$") as caught:
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


def test_a_developer_is_the_system_unless_the_template_knows_one(llm, monkeypatch):
    def prompts(role):
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
        messages += [{"role": role, "content": [{"type": "text", "text": "In French."}]}]
        return [llm.chat(messages, thinking=thinking, max_tokens=1).prompt for thinking in (False, True)]

    assert prompts("developer") == prompts("system") and "system\nIn French." in prompts("developer")[1]
    template = "{% for m in messages %}{{ 'D' if m.role == 'developer' else m.role }}: {{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    assert prompts("developer")[0] == "D: Be brief.\nuser: 2+2?\nD: In French.\n"


def test_timings(tiny_folder, tiny, monkeypatch):
    """With a clock that advances at each reading: the second prompt waits for the slot of the first."""
    single = LLM(tiny_folder, max_batch_size=1, progress=False)
    ticks = iter(range(10_000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    one, two = (output.timings for output in single.generate(["hello", "one two"], temperature=0, max_tokens=4))
    steps = [
        len(output.outputs[0].token_ids) - 1
        for output in tiny.generate(["hello", "one two"], temperature=0, max_tokens=4)
    ]
    assert (one.prompt, one.first_token, one.decode) == (1, 2, steps[0])
    assert (two.prompt, two.first_token, two.decode) == (1, 2 + steps[0] + 2, steps[1])


@pytest.mark.parametrize("given", [b"hello", bytearray(b"hello"), [b"hello"], [True, False], [[1.5]], {"a": 1}, None])
def test_a_value_that_is_not_a_prompt(tiny, given):
    with pytest.raises((TypeError, ValueError), match="prompt"):
        tiny.generate(given, max_tokens=1)


def test_numpy_numbers_are_accepted(tiny_folder):
    llm = LLM(tiny_folder, progress=False, max_seq_len=np.int64(64), max_batch_size=np.int32(2))
    ids = [5, 6, 7]
    expected = llm.generate(ids, temperature=0, max_tokens=2)
    for given in (np.array(ids), torch.tensor(ids), [np.int64(5), np.int32(6), 7], [torch.tensor(5), 6, 7]):
        assert same([llm.generate(given, temperature=0, max_tokens=np.int64(2))], [expected])
    assert same(llm.generate([[np.int64(5), 6, 7]], temperature=0, max_tokens=2), [expected])


def test_without_the_resource_module(tiny, monkeypatch):
    """Windows has no `resource`: peak memory is then reported as 0."""
    monkeypatch.setitem(sys.modules, "resource", None)
    assert {chunk.peak_memory for chunk in tiny.stream("hello", max_tokens=2)} == {0.0}


def test_a_pad_token_may_have_no_embedding(make, tiny_folder, tmp_path):
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
    for weight, other in zip(tiny.model.parameters(), far.model.parameters(), strict=True):
        assert torch.equal(weight, other)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(300, 40_000, (TINY_WINDOW + 36,), generator=generator).tolist()

    # Up to the window it is plain RoPE, bit for bit.
    settings = {"logprobs": 3, "ignore_eos": True}
    inside = far.generate(prompt[: TINY_WINDOW - 10], max_tokens=10, **settings)
    assert inside.outputs == tiny.generate(prompt[: TINY_WINDOW - 10], max_tokens=10, **settings).outputs

    # Past it, up to max_seq_len, and with other frequencies than plain RoPE.
    past = far.generate(prompt, **settings).outputs[0]
    assert (len(past.token_ids), past.finish_reason) == (TINY_WINDOW - 36, "length")
    plain = causal_lm(tiny)(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    stretched = causal_lm(far)(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert (plain - stretched).abs().max() > 1e-2
    assert past.logprobs[0] == pytest.approx(stretched.max().item(), abs=1e-4)
    # A prompt inside the window may be answered across its end, on the frequencies it began with.
    across = far.generate(prompt[: TINY_WINDOW - 10], max_tokens=30, **settings).outputs[0]
    assert across.token_ids[:10] == inside.outputs[0].token_ids and len(across.token_ids) == 30
    assert text_of(list(far.stream(prompt, **settings))) == past.text


@pytest.mark.parametrize("used", ["never", "generate", "chat", "hooks", "a stream", "half a stream", "an error"])
def test_a_deleted_llm_frees_its_weights_and_cache_at_once(tiny_folder, used):
    """Without the garbage collector, so that the next model fits."""
    gc.collect()
    gc.disable()
    try:
        llm = LLM(tiny_folder, progress=False)
        if used == "generate":
            llm.generate(PROMPTS[:3], max_tokens=4, temperature=1.0, n=2)
        elif used == "chat":
            llm.chat("hi", max_tokens=4)
        elif used == "hooks":
            llm.generate("hi", max_tokens=4, no_repeat_ngram_size=2, logprobs=2)
        elif used == "a stream":
            list(llm.stream("hi", max_tokens=4))
        elif used == "half a stream":
            stream = llm.stream("hi", max_tokens=4)
            next(stream)
            del stream
        elif used == "an error":
            with contextlib.suppress(ValueError):
                llm.generate("hi " * TINY_WINDOW)
        left = [weakref.ref(x) for x in (llm.model.lm_head.weight, llm.engine.kv_cache.layers[0], llm)]
        del llm
        assert [ref() for ref in left] == [None] * 3
    finally:
        gc.enable()
