"""TextStream: its parts, joined, are the text that `decode` returns; a character comes as soon as it is complete."""

import copy
import itertools
import json

import pytest
import sentencepiece
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import StopStringCriteria

from internlm3 import InternLM3Tokenizer
from internlm3.runtime.tokenization.detokenizer import Detokenizer
from internlm3.runtime.tokenization.text_stream import TextStream
from internlm3.tests.support.tokenizers import TRAINED, loaded, train, write_checkpoint

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "def add(a, b):\n    return a + b  # two spaces",
    "书生·浦语是上海人工智能实验室开发的语言模型。今天天气很好，我们去公园散步吧。",
    "Numbers such as 3.14159 and 42; “quotes”, dashes – and so on…",
    "I do n't know what it 's for , we 've got ' some ' , they 're fine . I 'm , too ! Yes ?",
] * 30
SPECIAL = ["<|im_start|>", "<|im_end|>"]
KINDS: dict[str, dict] = {
    "dummy prefix": {},
    "no dummy prefix": {"add_dummy_prefix": False},
    "whitespace kept": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "dummy prefix, whitespace kept": {"remove_extra_whitespaces": False},
    "unigram": {"model_type": "unigram", "vocab_size": 360},
}


def trained(folder, **options):
    """A tokenizer of a small vocabulary."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        character_coverage=0.98,
        minloglevel=2,
        control_symbols=["<control>"],
        user_defined_symbols=["▁▁", "▁▁▁▁"],
        **{"model_type": "bpe", "vocab_size": 430, "normalization_rule_name": "identity", "byte_fallback": True}
        | options,
    )
    tokenizer = InternLM3Tokenizer(folder / "tokenizer.model")
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


@pytest.fixture(scope="module", params=[*KINDS, "demo model"])
def plain(request, tmp_path_factory):
    """Small vocabularies with each normaliser, trained here, and the demo model's."""
    if request.param == "demo model":
        return InternLM3Tokenizer.from_pretrained(request.getfixturevalue("demo_model"))
    return trained(tmp_path_factory.mktemp("tokenizer"), **KINDS[request.param])


WAYS = [
    {"clean_up_tokenization_spaces": False, "add_prefix_space": True},
    {"clean_up_tokenization_spaces": True, "add_prefix_space": False},
]


@pytest.fixture(scope="module", params=WAYS, ids=["as it is", "cleaned up"])
def tokenizer(request, plain):
    """Each of them, decoding as InternLM3 does, and with the first space kept and English punctuation cleaned up."""
    tokenizer = copy.copy(plain)
    vars(tokenizer).update(request.param)
    return tokenizer


def cleaned_up(text):
    """transformers' clean_up_tokenization; test_tokenizer.py compares decode with transformers itself."""
    for mark in [".", "?", "!", ","]:
        text = text.replace(" " + mark, mark)
    text = text.replace(" ' ", "'")
    for end in ["n't", "'m", "'s", "'ve", "'re"]:
        text = text.replace(" " + end, end)
    return text


def sentencepiece_text(tokenizer, ids, skip):
    """The text by SentencePiece itself, called for each run of pieces between added tokens."""
    tokens = tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=skip)
    if tokens and tokenizer.add_prefix_space:
        tokens[0] = tokens[0].removeprefix("▁")
    runs = itertools.groupby(tokens, tokenizer.added_tokens_encoder.__contains__)
    text = "".join("".join(run) if added else tokenizer._vocabulary.sp_model.decode(list(run)) for added, run in runs)
    return cleaned_up(text) if tokenizer.clean_up_tokenization_spaces else text


def tokens_of(tokenizer):
    """Lists of ids; those that cause trouble are more frequent."""
    bytes_ = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    added = list(tokenizer.added_tokens_decoder)
    spaces = tokenizer.convert_tokens_to_ids(["▁", "▁▁", "▁the", "▁a", "\n", "<control>"])
    texts = [*"é书🙂🇨🇳👩‍🚀\u2028\u00a0", *" .?!,'", " ' ", " n't", " 'm", " 's", " 've", " 're", "  '", " ' s"]
    whole = st.sampled_from(texts).map(lambda text: [bytes_[byte] for byte in text.encode()])
    one = st.one_of(
        st.integers(0, len(tokenizer) + 3),  # some after the last token: ids without one
        st.sampled_from(bytes_),
        st.sampled_from(bytes_[0x80:]),
        st.sampled_from(added),
        st.sampled_from(spaces),
    ).map(lambda token: [token])
    cut = whole.flatmap(lambda ids: st.integers(1, len(ids)).map(lambda end: ids[:end]))
    return st.lists(one | whole | cut, max_size=90).map(lambda parts: [token for part in parts for token in part])


def streamed(tokenizer, ids, **options):
    """The texts that each push, and then flush, return; and the stream."""
    stream = TextStream(tokenizer, **options)
    return [stream.push(token) for token in ids] + [stream.flush()], stream


@settings(max_examples=50)
@given(data=st.data(), skip=st.booleans())
def test_the_parts_joined_are_the_whole(tokenizer, data, skip):
    ids = data.draw(tokens_of(tokenizer))
    parts, stream = streamed(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(parts) == sentencepiece_text(tokenizer, ids, skip)
    assert stream.stopped is None


def test_a_vocabulary_without_bytes(tmp_path):
    """There <0x41> is an ordinary name, here of an added token."""
    tokenizer = trained(tmp_path, byte_fallback=False, vocab_size=300)
    tokenizer.add_tokens(["<0x41>"])
    tokens = ["▁", "<unk>", "<0x41>", "▁", "▁the", "<unk>", "▁", "<0x41>", "<control>", "▁the"]
    for ids in itertools.permutations(tokenizer.convert_tokens_to_ids(tokens), 4):
        parts, _ = streamed(tokenizer, ids, skip_special_tokens=False)
        assert "".join(parts) == tokenizer.decode(ids) == sentencepiece_text(tokenizer, ids, skip=False)


@pytest.mark.parametrize(
    "tokens",
    [
        ["▁the"] * 31 + ["▁"] * 4 + ["▁dog"],
        ["▁the"] * 31 + ["▁", "▁the"],
        ["<unk>"] * 15 + [f"<0x{byte:02X}>" for byte in "🙂🇨🇳👩".encode()] + ["▁", "▁"],
    ],
    ids=["four spaces before a word", "a space before a word", "spaces after bytes"],
)
def test_no_space_is_lost_in_a_long_text(tokenizer, tokens):
    """A token that is empty at the start of a text is a space in its middle, however long the text."""
    ids = tokenizer.convert_tokens_to_ids(tokens)
    parts, _ = streamed(tokenizer, ids, skip_special_tokens=False)
    whole = "".join(parts)
    assert whole == sentencepiece_text(tokenizer, ids, skip=False)
    assert whole.endswith({"▁dog": "the     dog", "▁the": "the  the", "▁": "👩  "}[tokens[-1]])


# What the clean-up changes, also where one change enables another, and what may follow the part of a text.
CLEANED = [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"]
CLEANED += [" ' .", " n ' t", "  ' m", "  ' s", "  ' ve", "  ' re"]
GOES_ON = ["", "x", *(text[start:] for text in CLEANED for start in range(len(text)))]


def common(texts):
    """The longest common prefix."""
    first, last = min(texts), max(texts)
    return next((first[:end] for end, letter in enumerate(first) if letter != last[end]), first)


@settings(max_examples=100)
@given(text=st.lists(st.sampled_from([*CLEANED, *" '.nsvrex"]), max_size=20).map("".join))
@example(text="    do n't ' go '  . ' ' '  ' s")
def test_text_that_may_still_be_cleaned_up_stays_pending(plain, text):
    """Letter by letter: the text so far is the common prefix of all possible texts, no less and no more."""
    cleaning = copy.copy(plain)
    cleaning.clean_up_tokenization_spaces = True
    stream, out = TextStream(cleaning), ""
    for end, letter in enumerate(text, 1):
        out += stream.push(cleaning.convert_tokens_to_ids(f"<0x{ord(letter):02X}>"))
        assert out == common([cleaned_up(text[:end] + rest) for rest in GOES_ON])
    assert out + stream.flush() == cleaned_up(text)


@settings(max_examples=40)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=60), skip=st.booleans())
@example(text="书生·浦语 🙂🇨🇳 naïve — 3 × 4\t\n\n  ende", skip=True)
@example(text="the the the 天天天 " * 12, skip=True)
def test_a_character_comes_at_once_and_complete(plain, text, skip):
    """After each token all text that it completes has come: only the bytes of an incomplete character are missing."""
    ids = plain.encode(text, add_special_tokens=False)
    stream, out = TextStream(plain, skip_special_tokens=skip), ""
    for end, token in enumerate(ids, 1):
        out += stream.push(token)
        so_far = plain.decode(ids[:end], skip_special_tokens=skip)
        assert "\ufffd" not in out or "\ufffd" in text
        if "\ufffd" not in text:
            assert out == so_far.rstrip("\ufffd")
    assert out + stream.flush() == plain.decode(ids, skip_special_tokens=skip)


@settings(max_examples=30)
@given(data=st.data())
def test_bytes_that_cannot_become_a_character_do_not_stay_pending(tokenizer, data):
    byte = data.draw(st.sampled_from([0x80, 0xBF, 0xC0, 0xC1, 0xF5, 0xFF, 0x41]))
    (token,) = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>"])
    parts, _ = streamed(tokenizer, [token])
    assert parts[0] and not parts[1]


def test_no_character_waits_long_after_a_start(tokenizer):
    """A character has at most four bytes: so many pushes after a lead byte, all text before it has come."""
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in [0xF0] * 100])
    stream, out = TextStream(tokenizer), ""
    for count, token in enumerate(ids, 1):
        out += stream.push(token)
        assert len(out) >= count - 4


# -------------------------------------------------------------------- stop strings


def cut_at(text, stops, include):
    """The text up to the stop string that is complete first (of several the longest), and that stop string."""
    for end in range(1, len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            stop = max(whole, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=50)
@given(data=st.data(), include=st.booleans())
def test_stop_strings(tokenizer, data, include):
    """Random stop strings, most of them taken from the text: the text ends where brute force ends it."""
    ids = data.draw(tokens_of(tokenizer))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    part = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 6)).map(lambda at: text[at[0] : sum(at)])
    stops = data.draw(
        st.lists(st.one_of(part, st.sampled_from(["aa", "ab", "\n\n", "天", "zz"])).filter(bool), max_size=3)
    )
    parts, stream = streamed(tokenizer, ids, stops=stops, include_stop=include)
    assert ("".join(parts), stream.stopped) == cut_at(text, stops, include)


@pytest.mark.parametrize(
    ("stops", "text", "parts"),
    [
        (["<end>"], "a<end>b", ["a", "", "", "", "", "", ""]),
        (["<end>"], "a<enb", ["a", "", "", "", "<enb"]),
        (["aab"], "aaab", ["", "", "a", ""]),
        (["abc", "bx"], "abx", ["", "", "a"]),
        (["b", "abc"], "abc", ["", "a", ""]),
        (["ab"], "aaa", ["", "a", "a"]),
    ],
)
def test_text_that_may_become_a_stop_string_stays_pending(demo_model, stops, text, parts):
    """Letter by letter: only text that may still become a stop string stays pending."""
    tokenizer = InternLM3Tokenizer.from_pretrained(demo_model)
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()])
    parts_, stream = streamed(tokenizer, ids, stops=stops)
    assert parts_[: len(parts)] == parts
    assert ("".join(parts_), stream.stopped) == cut_at(text, stops, include=False)
    assert stream.push(ids[0]) == stream.flush() == "" or stream.stopped is None


def test_token_boundaries_do_not_decide_which_stop_string_wins(tokenizer):
    for tokens in (["<0x23>", "▁the"], ["<0x23>", "<0x20>", "<0x74>", "<0x68>", "<0x65>"]):
        ids = tokenizer.convert_tokens_to_ids(tokens)
        for stops, before, met in ((["# the", "th"], "# ", "th"), (["e", "he"], "# t", "he"), (["t", "th"], "# ", "t")):
            parts, stream = streamed(tokenizer, ids, stops=stops)
            assert ("".join(parts), stream.stopped) == (before, met)


def test_a_stop_string_before_min_tokens_is_text(tokenizer):
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in b"#ab-ab-aab"])
    for stop, first, text in (
        ("ab", 0, "#"),
        ("ab", 3, "#ab-"),
        ("b-a", 3, "#a"),
        ("b-a", 5, "#ab-a"),
        ("ab", 7, "#ab-ab-a"),
    ):
        stream = TextStream(tokenizer, [stop], min_tokens=first + 1)
        assert "".join(map(stream.push, ids)) == text
        assert stream.stopped == stop


def test_a_stop_string_across_tokens(tokenizer):
    text = "the quick brown fox jumps over the lazy dog"
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    for start in range(len(whole) - 9):
        stop = whole[start : start + 9]
        parts, stream = streamed(tokenizer, ids, stops=[stop])
        assert "".join(parts) == whole[: whole.find(stop)] and stream.stopped == stop
        parts, _ = streamed(tokenizer, ids, stops=[stop], include_stop=True)
        assert "".join(parts) == whole[: whole.find(stop) + 9]


def test_a_special_token_as_a_stop_string(tokenizer):
    (end,) = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    ids = [*tokenizer.encode("fox", add_special_tokens=False), end, *tokenizer.encode("dog", add_special_tokens=False)]
    parts, stream = streamed(tokenizer, ids, stops=["<|im_end|>"], skip_special_tokens=False)
    assert "".join(parts) == "fox" and stream.stopped == "<|im_end|>"


# -------------------------------------------------------------------- text after a prompt


@settings(max_examples=60)
@given(data=st.data(), skip=st.booleans())
def test_an_answer_continues_its_prompt(plain, data, skip):
    """Its text is what SentencePiece's text of both together has after the prompt's."""
    ids = data.draw(tokens_of(plain))
    cut = data.draw(st.integers(0, len(ids)))
    parts, _ = streamed(plain, ids[cut:], prompt_ids=ids[:cut], skip_special_tokens=skip)
    prompt, whole = (sentencepiece_text(plain, part, skip) for part in (ids[:cut], ids))
    assert "".join(parts) == whole[len(common([prompt, whole])) :]


@settings(max_examples=60)
@given(data=st.data(), include=st.booleans())
def test_a_stop_string_may_begin_in_the_prompt(plain, data, include):
    """Brute force: the first stop string of the whole text that ends in the answer."""
    text = data.draw(st.text("ab c天", min_size=1, max_size=30))
    ids = plain.encode("x" + text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    prompt, whole = common([plain.decode(ids[:cut]), plain.decode(ids)]), plain.decode(ids)
    begin = data.draw(st.integers(max(0, len(prompt) - 4), max(0, len(whole) - 1)))
    stop = whole[begin : begin + data.draw(st.integers(1, 8))]
    stops = data.draw(st.permutations([stop, "ab", "a b a"]))
    options = {"include_stop": include, "prompt_ids": ids[:cut]}
    parts, stream = streamed(plain, ids[cut:], stops=stops, stops_begin_in_prompt=True, **options)
    ends = [end for end in range(len(prompt) + 1, len(whole) + 1) if whole[:end].endswith(tuple(stops))]
    met = max((stop for stop in stops if whole[: ends[0]].endswith(stop)), key=len) if ends else None
    end = len(whole) if met is None else ends[0] - (0 if include else len(met))
    assert ("".join(parts), stream.stopped) == (whole[len(prompt) : end], met)
    # By default only the answer's own text is searched.
    parts, stream = streamed(plain, ids[cut:], stops=stops, **options)
    assert ("".join(parts), stream.stopped) == cut_at(whole[len(prompt) :], stops, include)


def test_stop_strings_end_where_transformers_ends(tmp_path):
    """StopStringCriteria, which sees the tokens of the prompt too, is true first of the same token."""
    folder = write_checkpoint(tmp_path / "checkpoint", train(TRAINED["dummy"]))
    tokenizer, theirs = loaded(folder)
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog, and the dog does not even look up.")
    ids = [id for id in ids if tokenizer.convert_ids_to_tokens(id) != "▁"]  # which for StopStringCriteria is no text
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for begin, length, cut in itertools.product(range(4, 40, 5), (1, 3, 9), (6, 11)):
        stop = text[begin : begin + length]
        criterion = StopStringCriteria(theirs, [stop])
        counts = range(cut + 1, len(ids) + 1)
        expected = next((count for count in counts if criterion(torch.tensor([ids[:count]]), None)), None)
        stream = TextStream(
            tokenizer, [stop], skip_special_tokens=False, prompt_ids=ids[:cut], stops_begin_in_prompt=True
        )
        met = [count for count in counts if stream.push(ids[count - 1]) is not None and stream.stopped]
        assert expected == next(iter(met), None)


def test_a_long_prompt_is_read_from_its_end(plain, monkeypatch):
    read = []
    monkeypatch.setattr(Detokenizer, "follow", lambda self, tokens: read.extend(tokens) or "".join(tokens))
    TextStream(plain, ["a stop string"], prompt_ids=plain.encode("word " * 5000), stops_begin_in_prompt=True)
    assert len(read) < 100


# A vocabulary of a tokenizer.json: the tokenizers library is the oracle


def _byte_level():
    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    return library


def _byte_fallback():
    """As transformers saves Llama's: a space is added before the text, and the decoder removes it."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    library = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.train_from_iterator(CORPUS[:4], trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *bytes_]))
    # The bytes are plain pieces, and no added tokens.
    content = json.loads(library.to_str())
    content["added_tokens"] = content["added_tokens"][:1]
    return Tokenizer.from_str(json.dumps(content))


def _metaspace():
    library = Tokenizer(models.BPE(unk_token="<unk>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>"]))
    return library


@pytest.fixture(scope="module", params=[_byte_level, _byte_fallback, _metaspace])
def library(request, tmp_path_factory):
    """A tokenizer, and the object of the library tokenizers, from one file."""
    library = request.param()
    library.add_special_tokens(SPECIAL)
    path = tmp_path_factory.mktemp("library") / "tokenizer.json"
    library.save(str(path))
    return InternLM3Tokenizer(path, bos_token=None, eos_token=None, unk_token=None), library


@settings(max_examples=80)
@given(data=st.data(), skip=st.booleans())
def test_the_parts_are_what_the_library_decodes(library, data, skip):
    tokenizer, oracle = library
    texts = st.sampled_from(["書🙂é", " the", "  ", "▁", "天", *SPECIAL]).map(lambda text: tokenizer.encode(text))
    bytes_ = [id for token, id in oracle.get_vocab().items() if token.startswith("<0x")] or [1]
    single = st.one_of(st.integers(0, len(tokenizer) + 2), st.sampled_from(bytes_)).map(lambda id: [id])
    ids = [*itertools.chain(*data.draw(st.lists(st.one_of(texts, single), max_size=20)))]
    parts, _ = streamed(tokenizer, ids, skip_special_tokens=skip)
    known = [id for id in ids if id < len(tokenizer)]
    text = oracle.decode(known, skip_special_tokens=skip)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip) == text


def test_a_character_of_a_library_comes_at_once_and_complete(library):
    tokenizer, oracle = library
    ids = tokenizer.encode("the quick 天气很好 book " * 3)
    parts, _ = streamed(tokenizer, ids)
    for end in range(1, len(ids)):
        so_far = oracle.decode(ids[:end], skip_special_tokens=True)
        assert so_far.startswith("".join(parts[:end]))
        assert "\ufffd" not in parts[end]
        if oracle.id_to_token(ids[end - 1])[:3] != "<0x":
            assert "".join(parts[:end]) == so_far.rstrip("\ufffd")


@settings(max_examples=60)
@given(data=st.data())
def test_an_answer_continues_its_prompt_as_the_library_decodes_both(library, data):
    tokenizer, oracle = library
    texts = st.sampled_from(["書🙂é", " the", "the", "  ", "天", *SPECIAL]).map(lambda text: tokenizer.encode(text))
    ids = [*itertools.chain(*data.draw(st.lists(texts, max_size=20)))]
    cut = data.draw(st.integers(0, len(ids)))
    parts, _ = streamed(tokenizer, ids[cut:], prompt_ids=ids[:cut], skip_special_tokens=False)
    prompt, whole = (oracle.decode(part, skip_special_tokens=False) for part in (ids[:cut], ids))
    assert "".join(parts) == whole[len(common([prompt, whole])) :]
