"""Input that no prompt can be: far too long, nested without end, beyond any number."""

import pytest

from internlm3.runtime.common.shown import shown
from internlm3.tests.support.llm import TINY_WINDOW


def nested_list(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def nested_dict(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.fixture
def encoded(tiny, monkeypatch):
    """The lengths of the texts that the tokenizer of `tiny` encodes."""
    lengths, encode = [], tiny.tokenizer.encode

    def counted(text, **options):
        lengths.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(tiny.tokenizer, "encode", counted)
    return lengths


@pytest.mark.parametrize(
    ("way", "text"),
    [("generate", "the quick "), ("generate", "a"), ("generate", "<|im_end|>"), ("stream", " "), ("chat", "书")],
)
def test_ten_megabytes_are_refused_after_their_beginning(tiny, encoded, text, way):
    whole = (text * 10_000_000)[:10_000_000]
    says = r"a prompt of 1000\d+ characters has more than \d+ tokens, and max_seq_len is 64: shorten it"
    with pytest.raises(ValueError, match=says):
        list(tiny.stream(whole)) if way == "stream" else getattr(tiny, way)(whole)
    assert sum(encoded) < 1000 * TINY_WINDOW


def test_a_long_text_of_few_tokens_is_a_prompt(tiny):
    """Tokens are counted, not characters."""
    tiny.tokenizer.add_tokens("=" * 500)
    text = "=" * 500 * 20
    (output,) = tiny.generate([text], max_tokens=2)
    assert output.prompt_token_ids == tiny.tokenizer.encode(text) and len(output.prompt_token_ids) < TINY_WINDOW


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.chat([{"role": "user", "content": nested_list(5000)}]), r"messages\[0\]: .* \[\[\[\[\[\.\.\."),
        (lambda m: m.chat([{"role": "user", "content": [nested_dict(5000)]}]), r"messages\[0\]: .* text only"),
        (lambda m: m.chat([{"role": "user", "content": "a", "b": nested_dict(5000)}]), r"messages\[0\] is nested too"),
        (lambda m: m.chat([{"role": nested_list(5000), "content": "a"}]), r"messages\[0\]: unknown role \[\["),
        (lambda m: m.chat([nested_dict(5000)]), r"messages\[0\]: unknown role None"),
        (lambda m: m.chat(nested_list(5000)), r"messages\[0\] must be a dict"),
        (lambda m: m.generate(nested_list(5000)), r"token ids .* not \[\[\[\[\[\.\.\."),
        (lambda m: m.generate("a", nested_list(5000)), r"one SamplingParams"),
        (lambda m: m.generate("a", stop=nested_list(5000)), r"stop .* got \[\["),
        (lambda m: m.tokenizer.decode(nested_list(5000)), r"flat sequence .* not \[\["),
        (lambda m: template(m, tools=[nested_dict(5000)]), "tools is nested too deeply"),
        (lambda m: template(m, tools=[nested_dict(5000)], sanitize_control_tokens=True), "nested too deeply"),
        (
            lambda m: template(
                m, tools=[nested_dict(5000)], chat_template="{% generation %}{{ tools }}{% endgeneration %}",
                return_dict=True, return_assistant_tokens_mask=True,
            ),
            "tools is nested too deeply",
        ),
    ],
)  # fmt: skip
def test_nested_data(tiny, call, error):
    with pytest.raises((ValueError, TypeError), match=error) as caught:
        call(tiny)
    assert len(str(caught.value)) < 300


def template(model, **options):
    return model.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], **options)


@pytest.mark.parametrize(
    "settings",
    [
        *({name: 10**400} for name in ("temperature", "top_k", "top_p", "max_tokens", "min_tokens", "seed")),
        *({name: -(10**400)} for name in ("n", "presence_penalty", "no_repeat_ngram_size")),
        *({name: [10**400]} for name in ("stop_token_ids", "allowed_token_ids", "suppress_tokens")),
        {"logit_bias": {10**400: 1.0}},
        {"logit_bias": {5: 10**400}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_integers_of_400_digits(tiny, settings):
    with pytest.raises(ValueError, match=rf"^{next(iter(settings))}.* an integer of 1329 bits$"):
        tiny.generate("a", **settings)


def test_integers_of_400_digits_elsewhere(tiny, tiny_folder):
    with pytest.raises(ValueError, match="an integer of 1329 bits, which is outside the vocabulary"):
        tiny.generate([10**400])
    with pytest.raises(ValueError, match=r"messages\[0\]: a chat template is given JSON data only: .*4300 digits"):
        tiny.chat([{"role": "user", "content": "a", "number": 10**5000}])
    for name in ("max_seq_len", "max_batch_size", "cache_tokens"):
        with pytest.raises(ValueError, match=rf"^{name} .* an integer of 1329 bits$"):
            type(tiny)(tiny_folder, **{name: 10**400})


class Mute:
    def __repr__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        (True, "True"),
        ("a\nb", r"'a\nb'"),
        ("\ud800", r"'\ud800'"),
        ({"b": 1, "a": [None, 1.5]}, "{'b': 1, 'a': [None, 1.5]}"),
        (10**400, "an integer of 1329 bits"),
        ([-(10**5000)], "[an integer of 16610 bits]"),
        (nested_list(100_000), "[[[[[...]]]]]"),
        (nested_dict(100_000), "{'a': {'a': {'a': {'a': {...}}}}}"),
        ("x" * 10**6, f"'{'x' * 32}...{'x' * 33}'"),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_values_are_shown_in_one_short_line(value, text):
    assert shown(value) == text
    assert len(shown([value] * 1000)) <= 70 and len(shown(Mute())) < 70
