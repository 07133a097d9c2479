"""`generate` against transformers' own: the same tokens, scores, lengths, padding, streamers and refusals."""

import copy
import functools
import inspect
import json
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from internlm3 import InternLM3Config, InternLM3ForCausalLM, InternLM3Tokenizer
from internlm3.runtime.compat import generation
from internlm3.runtime.engine import prefill
from internlm3.runtime.model.kv_cache import PAGE

QUESTIONS = [
    "What is the capital of France?",
    "Explain photosynthesis to a ten-year-old.",
    "Write a haiku about the sea.",
    "中国的首都是哪里？",
    "请用一句话介绍人工智能。",
    "What is 17 * 23?",
    "Give me three tips for sleeping better.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
]
TEXTS = [
    "The quick brown fox",
    "Once upon a time, in a village at the foot of the mountains, there lived",
    "In 1969, the first human beings to walk on the Moon were",
    "My favourite condiment is",
    "The French Revolution began in",
    "To be, or not to be, that is the question:",
    "Water boils at a temperature of",
    "The three primary colours are red,",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "Ingredients:\n- 2 eggs\n- 100 g of flour\n- a pinch of salt\n\nMethod:\n1.",
    "Q: Who wrote Hamlet?\nA:",
    "Abstract. We present a new method for",
    "BREAKING NEWS: scientists have",
    "The opposite of hot is",
    "She opened the letter with trembling hands and read:",
    "Monday, Tuesday, Wednesday,",
    "The mitochondria is the powerhouse of",
    "According to the World Health Organization,",
    "A list of European countries: Austria, Belgium,",
    "It was a bright cold day in April, and the clocks were striking",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "import numpy as np\n\ndef softmax(x):\n",
    "SELECT name, age FROM users WHERE",
    "for (int i = 0; i < n; i++) {\n",
    "#!/bin/bash\n# back up a folder\n",
    "<html>\n<head>\n<title>",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    '{"name": "Alice", "age": 30, "city": ',
    "git commit -m",
    "The derivative of x^2 is",
    "If 3x + 5 = 20, then x =",
    "The sum of the first 100 positive integers is",
    "2, 3, 5, 7, 11, 13,",
    "Theorem. There are infinitely many primes.\nProof.",
    "今天天气很好，我们",
    "人工智能是",
    "从前有一座山，山里有",
    "床前明月光，",
    "Bonjour, je m'appelle",
    "🙂 emoji: 🎉 means",
]


@pytest.fixture(scope="module")
def real(demo_model):
    """The demo model in float32, ours and transformers', and its tokenizer."""
    ours = InternLM3ForCausalLM.from_pretrained(demo_model, dtype="float32", device="cpu", progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    return SimpleNamespace(ours=ours, theirs=theirs, tokenizer=InternLM3Tokenizer.from_pretrained(demo_model))


@pytest.fixture(scope="module")
def tiny():
    """A random model whose text is lively, in both libraries; a row ends at 2 or 5."""
    config = InternLM3Config(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, eos_token_id=[2, 5], pad_token_id=0, max_position_embeddings=64,
        rope_scaling={"rope_type": "dynamic", "factor": 4.0},
    )  # fmt: skip
    ours = InternLM3ForCausalLM(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for parameter in ours.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * parameter.shape[1] ** -0.5)
    values = {**config.to_dict(), "rope_parameters": config.rope_parameters}
    for key in ("architectures", "model_type", "torch_dtype", "rope_theta", "rope_scaling"):
        del values[key]
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.InternLM3Config(**values)).eval()
    theirs.load_state_dict(ours.state_dict())
    return SimpleNamespace(ours=ours, theirs=theirs)


PROMPTS = torch.tensor([[7, 8, 9, 10, 11, 12], [20, 33, 41, 6, 18, 49], [1, 1, 3, 3, 4, 4]])


def padded(rows, pad, left):
    """[B, T] ids and their mask."""
    width = max(map(len, rows))
    fill = [(width - len(row)) * [pad] for row in rows]
    ids = [gap + row if left else row + gap for gap, row in zip(fill, rows, strict=True)]
    gaps = [[0] * len(gap) for gap in fill]
    mask = [gap + [1] * len(row) if left else [1] * len(row) + gap for gap, row in zip(gaps, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def real_prompts(tokenizer):
    """50 prompts: texts to go on with, code, maths, Chinese, and chats."""
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        for question in QUESTIONS
    ]
    prompts = chats + [tokenizer.encode(text) for text in TEXTS]
    assert len(prompts) == 50 and len({tuple(prompt) for prompt in prompts}) == 50
    return prompts


def answer_of(row, start, eos=2):
    """The new tokens of a row, up to the end of text."""
    answer = row[start:].tolist()
    return answer[: answer.index(eos) + 1] if eos in answer else answer


# -------------------------------------------------------------------- greedy, on a real model


GREEDY = {"do_sample": False, "max_new_tokens": 64}


@functools.cache  # test_generate_captured.py asks too
def greedy_answers(demo_model):
    """transformers' greedy answers to the 50 prompts, in one batch padded on the left."""
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    ids, mask = padded(real_prompts(InternLM3Tokenizer.from_pretrained(demo_model)), 2, left=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the temperature in generation_config.json
        answers = [answer_of(row, ids.shape[1]) for row in model.generate(ids, attention_mask=mask, **GREEDY)]
    assert sum(map(len, answers)) > 2000  # real answers, not fifty ends of text
    return answers


def check_greedy(real, expected, prompts, answers):
    """Where texts part, the two tokens must tie in transformers' own logits (closer than 1e-4 of the largest), which
    rounding may break either way; more than one such tie would be no accident. All by the prompt's index.
    """
    ties = []
    for index, answer in answers.items():
        if answer != expected[index]:
            at = next(i for i, (a, b) in enumerate(zip(answer, expected[index], strict=False)) if a != b)
            logits = real.theirs(torch.tensor([prompts[index] + answer[:at]])).logits[0, -1]
            gap = (logits[expected[index][at]] - logits[answer[at]]).abs() / logits.abs().max()
            assert gap < 1e-4, f"prompt {index} parts at token {at} with a gap of {gap:.1e}"
            ties.append(index)
    assert len(ties) <= 1, f"prompts {ties} tie"


@pytest.mark.parametrize("chosen", [range(25), range(25, 50)], ids=str)
def test_greedy_tokens_are_those_of_transformers(real, demo_model, chosen):
    """50 real prompts, 64 tokens, each alone."""
    prompts = real_prompts(real.tokenizer)
    answers = {
        index: answer_of(real.ours.generate(torch.tensor([prompts[index]]), **GREEDY)[0], len(prompts[index]))
        for index in chosen
    }
    check_greedy(real, greedy_answers(demo_model), prompts, answers)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_tokens_in_a_ragged_batch_are_those_of_transformers(real, demo_model, side):
    """The same 50 prompts, half of them padded on each side."""
    prompts = real_prompts(real.tokenizer)
    chosen = range(side == "right", 50, 2)
    ids, mask = padded([prompts[index] for index in chosen], 2, left=side == "left")
    answers = [answer_of(row, ids.shape[1]) for row in real.ours.generate(ids, mask, **GREEDY)]
    check_greedy(real, greedy_answers(demo_model), prompts, dict(zip(chosen, answers, strict=True)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seed_is_a_text(demo_model, real, dtype):
    """The same seed gives the same text: twice, alone, in any batch, at any place; streams and seeds differ."""
    model = real.ours
    if dtype != "float32":
        model = InternLM3ForCausalLM.from_pretrained(demo_model, dtype=dtype, device="cpu", progress=False)
    prompts = real_prompts(real.tokenizer)[8:12]
    options = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 12, "seed": 7}
    alone = [answer_of(model.generate(torch.tensor([p]), **options)[0], len(p)) for p in prompts]
    assert alone[0] == answer_of(model.generate(torch.tensor([prompts[0]]), **options)[0], len(prompts[0]))
    for order, left in (([0, 1, 2, 3], True), ([3, 1, 0], False)):
        ids, mask = padded([prompts[index] for index in order], 2, left)
        together = model.generate(ids, mask, **options)
        assert [answer_of(row, ids.shape[1]) for row in together] == [alone[index] for index in order]
    many = model.generate(torch.tensor([prompts[0]]), num_return_sequences=3, **options)
    assert answer_of(many[0], len(prompts[0])) == alone[0]
    assert len({tuple(row.tolist()) for row in many}) == 3
    other = model.generate(torch.tensor([prompts[0]]), **{**options, "seed": 8})
    assert answer_of(other[0], len(prompts[0])) != alone[0]


def test_stop_strings(real):
    """Text-level stops, across token borders; the stop stays in the sequence, as in transformers."""
    prompt = torch.tensor([real.tokenizer.encode("Count: one, two, three,")])
    greedy = {"do_sample": False, "max_new_tokens": 30}
    text = real.tokenizer.decode(real.ours.generate(prompt, **greedy)[0, prompt.shape[1] :].tolist())
    for start in (3, 8, 15):
        stop = text[start : start + 5]
        out = real.ours.generate(prompt, stop_strings=[stop, "never said"], tokenizer=real.tokenizer, **greedy)
        said = real.tokenizer.decode(out[0, prompt.shape[1] :].tolist())
        assert stop in said and stop not in real.tokenizer.decode(out[0, prompt.shape[1] : -1].tolist())
        assert real.ours.generate(prompt, stop_strings=stop, tokenizer=real.tokenizer, **greedy).equal(out)
    with pytest.raises(ValueError, match=r"stop_strings needs tokenizer="):
        real.ours.generate(prompt, stop_strings="x", **greedy)


def test_transformers_text_streamer(real, capsys):
    prompt = torch.tensor([real.tokenizer.encode("The capital of France is")])
    streamer = transformers.TextStreamer(real.tokenizer, skip_prompt=True)
    out = real.ours.generate(prompt, streamer=streamer, do_sample=False, max_new_tokens=12)
    assert capsys.readouterr().out.strip() == real.tokenizer.decode(out[0, prompt.shape[1] :].tolist()).strip()


# -------------------------------------------------------------------- lengths, ends, padding, scores: on a small one


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
def test_greedy_options(tiny, options):
    flags = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for rows in (PROMPTS, PROMPTS[:1], PROMPTS[1:2]):
        mask = torch.ones_like(rows)
        ours = tiny.ours.generate(rows, mask, **flags, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = tiny.theirs.generate(rows, attention_mask=mask, **flags, **options)
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
    model = InternLM3ForCausalLM(config, dtype=torch.float32)
    model.load_state_dict(tiny.ours.state_dict())
    ids = torch.tensor([[0, 7, 0, 8]])
    options = {"do_sample": False, "max_new_tokens": 5}
    assert model.generate(ids, **options).equal(model.generate(ids, torch.ones_like(ids), **options))


def test_num_return_sequences(tiny):
    out = tiny.ours.generate(PROMPTS, num_return_sequences=4, do_sample=True, seed=1, max_new_tokens=8)
    assert out.shape[0] == 12 and out[:, :6].equal(PROMPTS.repeat_interleave(4, 0))
    assert len({tuple(row.tolist()) for row in out}) > 9
    first = tiny.ours.generate(PROMPTS, do_sample=True, seed=1, max_new_tokens=8)
    width = first.shape[1]
    assert out[::4, :width].equal(first)


def test_sampling_follows_the_probabilities(tiny):
    """2000 draws of one token against the model's own softmax."""
    out = tiny.ours.generate(
        PROMPTS[:1], num_return_sequences=2000, do_sample=True, seed=2, max_new_tokens=1, min_new_tokens=0
    )
    expected = tiny.ours(PROMPTS[:1]).logits[0, -1].softmax(-1) * 2000
    counts = torch.bincount(out[:, -1], minlength=50)
    often = expected > 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    assert chi2 < 3 * often.sum().item()  # about its number of degrees of freedom; 3 times is beyond any chance


def test_numbers_of_numpy_and_torch_are_numbers(tiny):
    plain = tiny.ours.generate(PROMPTS, max_new_tokens=7, min_new_tokens=3, eos_token_id=[30, 5], pad_token_id=3)
    for number, several in (
        (np.int64, np.array),
        (torch.tensor, torch.tensor),
        (int, lambda ids: [*map(np.int32, ids)]),
    ):
        lengths = {"max_new_tokens": number(7), "min_new_tokens": number(3)}
        assert tiny.ours.generate(PROMPTS, eos_token_id=several([30, 5]), pad_token_id=number(3), **lengths).equal(
            plain
        )
        one = tiny.ours.generate(PROMPTS, eos_token_id=number(30), max_length=number(13))
        assert one.equal(tiny.ours.generate(PROMPTS, eos_token_id=30, max_length=13))


def test_generation_config_objects(tiny):
    """The checkpoint's file, then the object or dictionary, then keywords; the last one wins."""
    plain = tiny.ours.generate(PROMPTS, do_sample=False, max_new_tokens=7)
    for config in (
        transformers.GenerationConfig(do_sample=False, max_new_tokens=7),
        {"do_sample": False, "max_new_tokens": 7},
        {"do_sample": False, "max_new_tokens": 7, "transformers_version": "5", "cache_implementation": None},
    ):
        assert tiny.ours.generate(PROMPTS, generation_config=config).equal(plain)
        assert tiny.ours.generate(PROMPTS, generation_config=config, max_new_tokens=3).equal(plain[:, :9])
    tiny.ours.generation_config = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": 2}
    try:
        assert tiny.ours.generate(PROMPTS).equal(plain[:, :9])
        assert tiny.ours.generate(PROMPTS, generation_config={"max_new_tokens": 5}).equal(plain[:, :11])
        assert tiny.ours.generate(PROMPTS, max_new_tokens=None).equal(plain[:, :9])
    finally:
        tiny.ours.generation_config = {}


def test_a_generation_config_in_its_places(tiny):
    """By position, as transformers has it, and in the place of the model's own, where its entries are attributes."""
    plain = tiny.ours.generate(PROMPTS, do_sample=False, max_new_tokens=7)
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=7)
    assert tiny.ours.generate(PROMPTS, config).equal(plain)
    assert tiny.ours.generate(PROMPTS, {"max_new_tokens": 7}).equal(plain)
    with pytest.raises(TypeError, match="generation_config"):
        tiny.ours.generate(PROMPTS, 5)
    try:
        tiny.ours.generation_config = transformers.GenerationConfig(max_new_tokens=3, pad_token_id=40)
        assert (tiny.ours.generation_config.pad_token_id, tiny.ours.generation_config.top_k) == (40, None)
        assert plain[0, 6] == 2  # the end of text, and padding behind it
        padding = (plain == 0).long()
        assert tiny.ours.generate(PROMPTS).equal((plain + 40 * padding)[:, :9])
        tiny.ours.generation_config.pad_token_id = 44
        tiny.ours.generation_config.max_new_tokens = 2
        assert tiny.ours.generate(PROMPTS).equal((plain + 44 * padding)[:, :8])
        for wants in ({"return_dict_in_generate": True, "output_scores": True}, {"return_dict_in_generate": True}):
            out = tiny.ours.generate(PROMPTS, transformers.GenerationConfig(**wants))
            assert (out.scores is not None) == ("output_scores" in wants)
    finally:
        tiny.ours.generation_config = {}


NEUTRAL = {
    "num_beams": 1, "no_repeat_ngram_size": 0, "length_penalty": 1.0, "stopping_criteria": None, "use_cache": True,
    "early_stopping": False, "num_beam_groups": 1, "diversity_penalty": 0.0, "bad_words_ids": None, "penalty_alpha": 0,
    "suppress_tokens": [], "guidance_scale": 1.0, "encoder_repetition_penalty": 1, "output_attentions": False,
    "prefix_allowed_tokens_fn": None, "synced_gpus": False, "cache_implementation": None, "max_time": None,
    "renormalize_logits": False, "assistant_model": None, "bos_token_id": 1, "past_key_values": None,
    "position_ids": None, "epsilon_cutoff": 0.0, "return_dict_in_generate": False,
}  # fmt: skip


def test_neutral_values_are_accepted(tiny):
    plain = tiny.ours.generate(PROMPTS, do_sample=False, max_new_tokens=7)
    assert tiny.ours.generate(PROMPTS, do_sample=False, max_new_tokens=7, **NEUTRAL).equal(plain)
    for name, value in NEUTRAL.items():
        assert tiny.ours.generate(PROMPTS, max_new_tokens=7, **{name: value}).equal(plain), name


CHANGING = [
    {"num_beams": 4}, {"max_time": 1}, {"forced_bos_token_id": 2}, {"guidance_scale": 1.5}, {"epsilon_cutoff": 0.1},
    {"eta_cutoff": 0.1}, {"penalty_alpha": 0.6}, {"encoder_repetition_penalty": 1.1}, {"top_h": 0.5},
    {"token_healing": True}, {"num_beams": True},
]  # fmt: skip
IDLE = [{"use_cache": False}, {"early_stopping": True}, {"num_beam_groups": 2}, {"length_penalty": 2.0},
        {"cache_implementation": "static"}, {"low_memory": True}]  # fmt: skip


@pytest.mark.parametrize("setting", [*CHANGING, *IDLE], ids=str)
def test_what_is_not_supported_is_refused_by_name(tiny, setting):
    """From a keyword always; from a file or an object only where it would change the tokens."""
    [(name, value)] = setting.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not supported")):
        tiny.ours.generate(PROMPTS, **setting)
    plain = tiny.ours.generate(PROMPTS, max_new_tokens=2)
    as_object = SimpleNamespace(to_dict=lambda: setting)
    try:
        for given in (setting, as_object):
            tiny.ours.generation_config = given
            if setting in IDLE:
                assert tiny.ours.generate(PROMPTS, max_new_tokens=2).equal(plain)
                assert tiny.ours.generate(PROMPTS, given, max_new_tokens=2).equal(plain)
                continue
            with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not supported")):
                tiny.ours.generate(PROMPTS)
            tiny.ours.generation_config = {}
            with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not supported")):
                tiny.ours.generate(PROMPTS, given)
    finally:
        tiny.ours.generation_config = {}


def test_every_setting_of_transformers_is_known(tiny):
    """None of a GenerationConfig's attributes is a misspelling here, nor any argument of transformers' `generate`."""
    names = {*transformers.GenerationConfig().to_dict(), *inspect.signature(tiny.theirs.generate).parameters}
    for name in names - {"inputs", "self", "kwargs"}:
        if not name.startswith("_"):
            tiny.ours.generate(PROMPTS, **{"max_new_tokens": 1, name: None})


def test_keywords_of_forward(tiny):
    plain = tiny.ours(PROMPTS).logits
    for model in (tiny.ours, tiny.ours.model):
        neutral = {
            "output_attentions": False,
            "return_dict": True,
            "cache_position": None,
            "output_hidden_states": None,
        }
        out = model(PROMPTS, **neutral)
        assert out[0].shape[:2] == PROMPTS.shape and (model is tiny.ours.model or out.logits.equal(plain))
        with pytest.raises(ValueError, match="forward: output_attentions=True is not supported"):
            model(PROMPTS, output_attentions=True)
        with pytest.raises(TypeError, match="forward: unknown keyword 'atention_mask'; did you mean 'attention_mask'"):
            model(PROMPTS, atention_mask=torch.ones_like(PROMPTS))
    with pytest.raises(ValueError, match=r"assistant_model=\w+ForCausalLM\(.{,60} \.\.\. is not supported"):
        tiny.ours.generate(PROMPTS, assistant_model=tiny.theirs)


def test_outputs_are_read_as_transformers_are(tiny):
    for options in ({}, {"labels": PROMPTS}, {"output_hidden_states": True, "use_cache": False}):
        ours, theirs = tiny.ours(PROMPTS, **options), tiny.theirs(PROMPTS, **options)
        assert list(ours) == list(theirs.keys()) and len(ours) == len(theirs)
        for index, name in enumerate(theirs.keys()):
            assert ours[name] is ours[index] is ours.to_tuple()[index] is getattr(ours, name)
        assert torch.allclose(ours[0], theirs[0], atol=1e-4)
        assert [name for name, _ in ours.items()] == list(dict(**ours)) == list(ours)
    with pytest.raises(KeyError, match="CausalLMOutput holds logits, past_key_values; it has no 'loss'"):
        tiny.ours(PROMPTS)["loss"]
    wants = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 2, "do_sample": False}
    ours, theirs = tiny.ours.generate(PROMPTS, **wants), tiny.theirs.generate(PROMPTS, **wants)
    assert ours[0].equal(theirs[0]) and torch.allclose(ours[1][0], theirs[1][0], atol=1e-4)
    assert list(ours) == ["sequences", "scores", "logprobs"]


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
    """It would print them interleaved; it says so by the rows that it is given first."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
    prompts = PROMPTS[: 1 if several else 2]
    for model in (tiny.ours, tiny.theirs):
        with pytest.raises(ValueError, match="batch size 1"):
            model.generate(prompts, streamer=transformers.TextStreamer(tokenizer), max_new_tokens=2, **several)


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


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.7])
def test_a_processor_sees_every_row_of_the_call(tiny, repetition_penalty):
    """As transformers hands it over: rows in their order and columns, ended ones padded, scores behind the penalty."""
    ids, mask = padded([PROMPTS[0].tolist(), PROMPTS[1].tolist()[:3], PROMPTS[2].tolist()], 0, left=True)
    seen = {"ours": [], "theirs": []}

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


REPEATS = {(13,): 9.0, (20,): 9.0, (30,): 8.0}
PROCESSED = [
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


@pytest.mark.parametrize("source", ["keyword", "object", "file"])
@pytest.mark.parametrize("settings", PROCESSED, ids=lambda settings: "+".join(settings)[:40])
def test_settings_that_go_by_the_text(tiny, settings, source):
    """Greedy tokens and their scores, against transformers' own processors; from every source alike."""
    flags = {"return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": [2, 5], **flags}
    mask = torch.ones_like(PROMPTS)
    theirs = tiny.theirs.generate(PROMPTS, attention_mask=mask, **options, **settings)
    first, *rest = settings
    without = tiny.theirs.generate(PROMPTS, attention_mask=mask, **options, **{name: settings[name] for name in rest})
    assert theirs.sequences.tolist() != without.sequences.tolist() or settings[first] == 40  # it does something here
    if source == "keyword":
        ours = tiny.ours.generate(PROMPTS, mask, **options, **settings)
    elif source == "object":
        ours = tiny.ours.generate(PROMPTS, mask, generation_config=transformers.GenerationConfig(**options, **settings))
    else:
        tiny.ours.generation_config = in_a_file(settings)
        try:
            ours = tiny.ours.generate(PROMPTS, mask, **options)
        finally:
            tiny.ours.generation_config = {}
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    ended = torch.zeros(len(PROMPTS), dtype=torch.bool)
    for step, (mine, other) in enumerate(zip(ours.scores, theirs.scores, strict=True)):
        torch.testing.assert_close(mine[~ended], other[~ended], rtol=1e-3, atol=1e-3)
        ended |= torch.isin(ours.sequences[:, 6 + step], torch.tensor([2, 5]))


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5, "temperature": 0.7, "seed": 1}], ids=str)
def test_renormalized_scores(tiny, options):
    """Log-probabilities of what a step draws from: as transformers' log_softmax behind all else; the tokens stay."""
    flags = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 6, "min_new_tokens": 6}
    plain = tiny.ours.generate(PROMPTS, **flags, **options)
    out = tiny.ours.generate(PROMPTS, renormalize_logits=True, **flags, **options)
    assert out.sequences.equal(plain.sequences)
    process = transformers.LogitNormalization()
    for mine, before in zip(out.scores, plain.scores, strict=True):
        torch.testing.assert_close(mine, process(PROMPTS, before))


def test_every_order_of_processors_is_that_of_transformers(tiny):
    """What is forced comes behind what the prefix allows, and what is suppressed at the beginning behind both."""
    settings = {"forced_eos_token_id": 30, "begin_suppress_tokens": [7, 9], "bad_words_ids": [[8, 8]]}
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": 2, **settings}
    options["prefix_allowed_tokens_fn"] = lambda row, ids: [7, 8, 9 + row]
    ours = tiny.ours.generate(PROMPTS, **options)
    assert ours.equal(tiny.theirs.generate(PROMPTS, attention_mask=torch.ones(3, 6), pad_token_id=0, **options))
    assert (ours[:, -1] == 30).all()


def test_rows_that_waited_see_their_own_step(tiny, monkeypatch):
    """More answers than rows: what a processor is given of a row that came later is that row's text, and no more."""
    options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": 2, "pad_token_id": 0}
    settings = {"no_repeat_ngram_size": 2, "exponential_decay_length_penalty": (3, 1.2), "forced_eos_token_id": 30}
    together = tiny.ours.generate(PROMPTS, **options, **settings)
    monkeypatch.setattr(generation, "MAX_BATCH_SIZE", 2)
    tiny.ours._shared = None
    few = tiny.ours.generate(PROMPTS, **options, **settings)
    tiny.ours._shared = None
    assert few.equal(together)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be an integer >= 0; got -1"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size must be an integer"),
        ({"bad_words_ids": [3]}, "bad_words_ids must be a sequence; got 3"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must hold sequences of at least one token id"),
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
    for given in ({}, settings):
        with pytest.raises(ValueError, match=message):
            tiny.ours.generate(PROMPTS, given, **({} if given else settings))


@pytest.mark.parametrize("one", [True, False])
def test_stopping_criteria(tiny, one):
    """Each is asked of all rows behind every step, as in transformers; a row of which one is true ends there."""
    seen = {"ours": [], "theirs": []}

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


@pytest.mark.parametrize("watched", [False, True])
def test_logits_that_are_no_numbers_are_an_error(tiny, watched):
    """float16 overflows where bfloat16 does not: one sentence says so, from whichever row."""
    for dtype, fails in ((torch.float16, True), (torch.bfloat16, False)):
        model = copy.deepcopy(tiny.ours).to(dtype)
        model.lm_head.weight *= 30000
        options = {"max_new_tokens": 2, "return_dict_in_generate": watched, "output_logits": watched}
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


@pytest.mark.parametrize("length", [40, 64, 65, 127, 150])
def test_a_long_prompt_in_chunks(tiny, monkeypatch, length):
    """A prompt beyond the window (64) goes through in pieces and counts as one: all is turned by its whole length."""
    prompt = torch.randint(6, 50, (1, length), generator=torch.Generator().manual_seed(length))
    flags = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    whole = tiny.ours.generate(prompt, eos_token_id=[], **flags)
    monkeypatch.setattr(prefill, "CHUNK", PAGE)
    monkeypatch.setattr(prefill, "LAUNCH_TOKENS", PAGE)
    chunks = tiny.ours.generate(prompt, eos_token_id=[], **flags)
    assert chunks.sequences.equal(whole.sequences)
    theirs = tiny.theirs(prompt).logits[:, -1]
    for out in (whole, chunks):
        torch.testing.assert_close(out.logits[0], theirs, rtol=1e-3, atol=1e-4)
    # The third step in one pass, with the base of the prompt: what the first part of a cache fixes.
    cache = tiny.ours(prompt).past_key_values
    rest = tiny.ours(whole.sequences[:, length : length + 2], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(chunks.logits[2], rest, rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_token": 5}, TypeError, "'max_new_token'; did you mean 'max_new_tokens'"),
        ({"temprature": 5}, TypeError, "'temprature'; did you mean 'temperature'"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": -3}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": "5"}, ValueError, "max_new_tokens"),
        ({"max_length": 6}, ValueError, "max_length"),
        ({"max_length": 3}, ValueError, "max_length"),
        ({"max_length": "9"}, ValueError, "max_length"),
        ({"min_new_tokens": -1}, ValueError, "min_new_tokens|min_tokens"),
        ({"min_length": "9"}, ValueError, "min_length"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, ValueError, "min_new_tokens|min_tokens"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature"),
        ({"do_sample": True, "temperature": -1.0}, ValueError, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, ValueError, "top_p"),
        ({"do_sample": True, "top_k": -2}, ValueError, "top_k"),
        ({"do_sample": True, "min_p": 2.0}, ValueError, "min_p"),
        ({"do_sample": "yes"}, ValueError, "do_sample"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty"),
        ({"num_return_sequences": 2, "do_sample": False}, ValueError, "temperature 0|num_return_sequences"),
        ({"num_return_sequences": 0}, ValueError, "n must be|num_return_sequences"),
        ({"num_beams": 4}, ValueError, "num_beams"),
        ({"use_cache": False}, ValueError, "use_cache"),
        ({"logit_bias": {50: 1.0}}, ValueError, "logit_bias"),
        ({"eos_token_id": 50, "min_new_tokens": 2}, ValueError, "eos_token_id"),
        ({"eos_token_id": "</s>"}, ValueError, "eos_token_id"),
        ({"eos_token_id": [2, -7]}, ValueError, "eos_token_id"),
        ({"pad_token_id": "0"}, ValueError, "pad_token_id"),
        ({"pad_token_id": 50}, ValueError, "pad_token_id"),
        ({"input_ids": None}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(1, 3)}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "input_ids"),
        ({"input_ids": [[1, 2]]}, (TypeError, ValueError), "input_ids"),
        ({"input_ids": torch.tensor([[1, 50]])}, ValueError, "50, which is outside the vocabulary of 50"),
        ({"input_ids": torch.tensor([[1, -1]])}, ValueError, "-1, which is outside the vocabulary of 50"),
        ({"attention_mask": torch.zeros(1, 6)}, ValueError, "row 0 of input_ids is empty"),
        ({"attention_mask": torch.ones(1, 5)}, ValueError, "attention_mask"),
        ({"inputs": PROMPTS}, ValueError, "inputs"),
        ({"generation_config": 5}, (TypeError, ValueError), "generation_config"),
        ({"logits_processor": 5}, (TypeError, ValueError), "logits_processor"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(tiny, options, error, message):
    """One error that names the argument, before anything is generated."""
    step: list = []
    with pytest.raises(error, match=message):
        tiny.ours.generate(
            **{"input_ids": PROMPTS[:1], "streamer": SimpleNamespace(put=step.append, end=print), **options}
        )
    assert not step


def test_settings_without_effect_are_said(tiny):
    with pytest.warns(UserWarning, match="temperature, top_p have no effect"):
        tiny.ours.generate(PROMPTS[:1], temperature=0.5, top_p=0.9, max_new_tokens=1)
