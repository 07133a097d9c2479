"""InternLM3Tokenizer against SentencePiece itself and against transformers.

transformers 5.23 has no InternLM3Tokenizer. Its class for a SentencePiece file without conversion is
SentencePieceBackend. With `legacy=True` it splits a text at the added tokens and passes every other segment to
SentencePiece unchanged, as InternLM3's published tokenizer does. So it is the oracle for ids, bos and eos, padding and
truncation. It joins tokens differently, so decoded text is compared with M2M100Tokenizer's convert_tokens_to_string
(which treats special tokens in the same way, but strips both ends) and with SentencePiece segment by segment. The
`tokenizers` library's BPE is a third oracle, on real text.
"""

import copy
import json
import random
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import given, settings

from internlm3 import InternLM3Tokenizer
from internlm3.runtime.tokenization.added_tokens import AddedToken
from internlm3.tests.support.tokenizers import (
    ANY_TEXT,
    CORPUS,
    SPECIAL,
    TEXTS,
    TRAINED,
    edited,
    loaded,
    oracle,
    sentencepiece_ids,
    sentencepiece_text,
    train,
    write_checkpoint,
)

# Ids and text


def test_ids_equal_transformers_and_sentencepiece(checkpoint):
    tokenizer, expected = InternLM3Tokenizer.from_pretrained(checkpoint), oracle(checkpoint)
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text), text
        assert tokenizer.encode(text, add_special_tokens=False) == sentencepiece_ids(checkpoint, text), text
        assert tokenizer.tokenize(text) == expected.tokenize(text), text
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == tokenizer.encode(text)[1:], text


@settings(max_examples=60)
@given(text=ANY_TEXT)
def test_random_text_equals_the_oracles(checkpoint, text):
    tokenizer, expected = loaded(checkpoint)
    ids = tokenizer.encode(text)
    assert ids == expected.encode(text)
    assert ids[1:] == sentencepiece_ids(checkpoint, text)
    assert tokenizer.decode(ids) == sentencepiece_text(checkpoint, ids)


def test_decoded_text_equals_transformers_walk(checkpoint):
    from transformers import M2M100Tokenizer

    tokenizer, expected = loaded(checkpoint)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        walked = M2M100Tokenizer.convert_tokens_to_string(expected, expected.convert_ids_to_tokens(ids))
        assert tokenizer.decode(ids).strip() == walked, text
        kept = [id for id in ids if id not in tokenizer.all_special_ids]
        assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(kept), text


def test_random_ids_decode_as_sentencepiece_does(checkpoint):
    tokenizer, _ = loaded(checkpoint)
    generator = random.Random(20)
    for _ in range(150):
        ids = [1] + [generator.randrange(len(tokenizer) + 5) for _ in range(generator.randrange(12))]
        assert tokenizer.decode(ids) == sentencepiece_text(checkpoint, ids), ids


@pytest.fixture(scope="session", params=["plain", "dummy"])
def lossless(request, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("lossless") / request.param, train(TRAINED[request.param]))


@settings(max_examples=100)
@given(text=ANY_TEXT)
def test_text_comes_back_whole(lossless, text):
    """With byte fallback and no normalisation nothing is lost, except that the visible space becomes a space."""
    tokenizer, _ = loaded(lossless)
    assert tokenizer.decode(tokenizer.encode(text)) == "<s>" + text.replace("▁", " ")


def test_real_text_equals_rust_tokenizers(mistral_wheel, tmp_path):
    """transformers' LlamaTokenizer rebuilds the BPE from the pieces for the `tokenizers` library.

    It orders pieces of several spaces differently from SentencePiece, so the text has none. It puts no dummy prefix
    after special tokens, so the text has none of these either.
    """
    from transformers import LlamaTokenizer

    wheel = zipfile.ZipFile(mistral_wheel)
    model = wheel.read("mistral_common/data/tokenizer.model.v1")
    directory = write_checkpoint(tmp_path / "v1", model, eos_token="</s>")
    tokenizer, rust = InternLM3Tokenizer.from_pretrained(directory), LlamaTokenizer.from_pretrained(directory)
    names = [name for name in wheel.namelist() if "/tokens/" in name and name.endswith(".py")]
    sources = [re.sub(r"(\s|</?\w+>)+", " ", wheel.read(name).decode()) for name in names]
    assert sum(map(len, sources)) > 100_000
    for text in [*CORPUS[:2], *CORPUS[4:], *sources]:
        assert tokenizer.encode(text, add_special_tokens=False) == rust.encode(text, add_special_tokens=False), text


def test_real_text_comes_back_whole(mistral_wheel, tmp_path):
    wheel = zipfile.ZipFile(mistral_wheel)
    model = wheel.read("mistral_common/data/tokenizer.model.v1")
    tokenizer = InternLM3Tokenizer.from_pretrained(write_checkpoint(tmp_path / "v1", model))
    sources = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith((".py", "METADATA"))]
    assert sum(map(len, sources)) > 500_000
    for text in sources:
        assert tokenizer.decode(tokenizer.encode(text)) == "<s>" + text


def test_first_space_of_an_answer_is_dropped(plain):
    tokenizer = InternLM3Tokenizer.from_pretrained(plain)
    ids = tokenizer.encode("the  the", add_special_tokens=False)
    spaced = tokenizer.encode("  the", add_special_tokens=False)
    assert tokenizer.decode(ids) == "the  the"
    assert tokenizer.decode(spaced) == " the"
    kept = InternLM3Tokenizer.from_pretrained(plain, add_prefix_space=False)
    assert kept.encode("  the", add_special_tokens=False) == spaced
    assert kept.decode(spaced) == "  the"


# Added tokens


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_token_flags(plain, tmp_path, flag):
    config = json.loads((plain / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    config["added_tokens_decoder"]["700"] = {"content": "[X]", **flags, flag: True}
    directory = write_checkpoint(tmp_path / flag, (plain / "tokenizer.model").read_bytes(), **config)
    tokenizer, expected = InternLM3Tokenizer.from_pretrained(directory), oracle(directory)
    for text in ["a [X] b", "a   [X]\t\n b", "[X]", "the [X]", "[X] the", "[X]<|im_start|>", " [X] [X] "]:
        if flag == "single_word" and ("[X]<" in text or "[X]\t" in text):
            continue  # transformers encodes what is left of a rejected token as a segment of its own
        assert tokenizer.encode(text) == expected.encode(text), text
    if flag == "single_word":
        assert 700 not in tokenizer.encode("the[X]")
        assert 700 not in tokenizer.encode("[X]the")


def test_longest_added_token_wins_and_wins_over_pieces(plain, tmp_path):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(plain / "tokenizer.model"))
    piece = next(piece for piece in processor.encode("look at the dog", out_type=str) if piece[0] == "▁" != piece)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"]
    added |= {"800": {"content": "[A"}, "801": {"content": "[AB]"}, "802": {"content": piece, "special": False}}
    directory = write_checkpoint(tmp_path / "checkpoint", (plain / "tokenizer.model").read_bytes(), **config)
    tokenizer = InternLM3Tokenizer.from_pretrained(directory)
    assert tokenizer.encode("[AB][A[AB", add_special_tokens=False)[:2] == [801, 800]
    assert tokenizer.convert_tokens_to_ids(piece) == 802
    assert tokenizer.encode(piece, add_special_tokens=False) == [802]
    assert 802 in tokenizer.encode("look at the dog")
    assert tokenizer.encode("look at the dog") == oracle(directory).encode("look at the dog")
    assert tokenizer.decode([1, 802, 801], skip_special_tokens=True) == piece.removeprefix("▁")


def test_tokens_added_later(plain):
    tokenizer = InternLM3Tokenizer.from_pretrained(plain)
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<tool>", "<|im_end|>", AddedToken("<think>", special=True)]) == 2
    assert tokenizer.encode("<tool>x<think>")[1] == size
    assert tokenizer.decode(tokenizer.encode("<tool>x<think>"), skip_special_tokens=True) == "<tool>x"
    assert len(tokenizer) == size + 2


def test_ids_of_named_tokens_come_from_the_files(plain, tmp_path):
    tokenizer = InternLM3Tokenizer.from_pretrained(plain)
    size = tokenizer.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token_id == 2
    assert tokenizer.eos_ids == [2, size + 4]
    assert tokenizer.all_special_ids == [0, 1, 2, size + 3, size + 4]
    assert tokenizer.all_special_tokens == SPECIAL
    assert len(tokenizer) == size + 5
    assert tokenizer.convert_ids_to_tokens([size, size + 3, 10**9]) == ["", "<|im_start|>", ""]
    assert tokenizer.get_vocab()["<|im_end|>"] == size + 4
    assert tokenizer.get_vocab() | oracle(plain).get_vocab() == tokenizer.get_vocab()

    older = tmp_path / "older"
    older.mkdir()
    shutil.copy(plain / "tokenizer.model", older)
    (older / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 900, "<tool>": 901}))
    (older / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    tokenizer = InternLM3Tokenizer.from_pretrained(older)
    assert tokenizer.eos_ids == [900]
    assert tokenizer.encode("<tool>", add_special_tokens=False) == [901]
    assert 901 not in tokenizer.all_special_ids
    (older / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert InternLM3Tokenizer.from_pretrained(older).eos_ids == [2, 900]


# Batches


@pytest.mark.parametrize("seed", range(3))
def test_padding_and_truncation_equal_transformers(checkpoint, seed):
    generator = random.Random(seed)
    tokenizer, expected = loaded(checkpoint)
    for _ in range(40):
        batch = generator.sample(TEXTS, k=generator.randint(1, 5))
        # No empty second text: cutting at its left, transformers drops its frame too.
        pairs = generator.choice([None, generator.sample(CORPUS, k=len(batch))])
        truncation = generator.choice([False, True, "longest_first", "only_first", "only_second"])
        if pairs is None and truncation == "only_second":
            continue
        padding = generator.choice([False, True, "longest", "max_length"])
        options = {
            "padding": padding,
            "truncation": truncation,
            "max_length": generator.randint(4, 40) if truncation or padding == "max_length" else None,
            "padding_side": generator.choice(["left", "right", None]),
            "add_special_tokens": generator.random() < 0.7,
            "return_token_type_ids": pairs is None,
        }
        tokenizer.truncation_side = expected.truncation_side = generator.choice(["left", "right"])
        try:
            actual = tokenizer(batch, pairs, **options)
        except ValueError as error:  # transformers returns rows that are longer than max_length
            assert "raise max_length" in str(error)
            longest = max(map(len, expected(batch, pairs, **{**options, "padding": False}).input_ids))
            assert longest > options["max_length"], options
            continue
        assert dict(actual) == dict(expected(batch, pairs, **options)), options
    tokenizer.truncation_side = expected.truncation_side = "right"


def test_tensors(plain):
    import torch

    tokenizer = InternLM3Tokenizer.from_pretrained(plain)
    one = tokenizer("the dog", return_tensors="pt").to("cpu")
    assert one.input_ids.dtype == torch.long
    assert one.input_ids.tolist() == [tokenizer.encode("the dog")]
    assert torch.equal(tokenizer.encode("the dog", return_tensors="pt"), one["input_ids"])
    several = tokenizer(["the", "the dog does"], padding=True, return_tensors="pt", padding_side="left")
    assert several.attention_mask.sum(1).tolist() == [len(tokenizer.encode(text)) for text in ("the", "the dog does")]
    assert tokenizer.batch_decode(several.input_ids, skip_special_tokens=True) == ["the", "the dog does"]
    assert tokenizer.decode(one.input_ids[0]) == tokenizer.decode(one.input_ids[0].numpy()) == "<s>the dog"
    assert tokenizer.decode(torch.tensor(1)) == tokenizer.decode(1) == "<s>"
    assert tokenizer([]).input_ids == []


def test_pair_has_two_frames(plain):
    tokenizer = InternLM3Tokenizer.from_pretrained(plain, add_eos_token=True)
    a, b = (tokenizer.encode(text, add_special_tokens=False) for text in ("the", "dog"))
    encoding = tokenizer("the", "dog", return_token_type_ids=True)
    assert encoding.input_ids == [1, *a, 2, 1, *b, 2]
    assert encoding.token_type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 2)


def test_clean_up_is_transformers(plain):
    tokenizer = InternLM3Tokenizer.from_pretrained(plain, clean_up_tokenization_spaces=True)
    # The end: where one replacement makes room for another.
    text = "do n't stop , it 's fine . really ? yes ! we 've n ' t  ' s  .  ' re ' . ' '  . n 't"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == oracle(plain).clean_up_tokenization(text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_token_set_later_needs_an_id(plain):
    tokenizer = InternLM3Tokenizer.from_pretrained(plain)
    tokenizer.pad_token = "[PAD]"
    with pytest.raises(ValueError, match=r"pad_token is '\[PAD\]', which has no id: add it first"):
        tokenizer.pad_token_id  # noqa: B018
    tokenizer.add_tokens("[PAD]")
    assert tokenizer.pad_token_id == len(tokenizer) - 1


def test_truncation_without_a_limit_cuts_nothing(plain):
    """As in transformers, where "no limit" is 10^30 too."""
    tokenizer = InternLM3Tokenizer.from_pretrained(plain)
    for text in TEXTS:
        assert tokenizer.encode(text, truncation=True) == oracle(plain).encode(text, truncation=True)
    limited = InternLM3Tokenizer.from_pretrained(plain, model_max_length=7)
    assert len(limited.encode("a" * 50, truncation=True)) == 7


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.decode([1, -1]), ValueError, "negative: -1"),
        (lambda t: t.convert_ids_to_tokens(-5), ValueError, "negative: -5"),
        (lambda t: t.decode([1.5]), TypeError, "whole numbers"),
        (lambda t: t.decode("12"), TypeError, "whole numbers"),
        (lambda t: t.decode([[1, 2]]), TypeError, "batch_decode"),
        (lambda t: t(5), TypeError, "string or a list of strings"),
        (lambda t: t(["a", 5]), TypeError, "not int"),
        (lambda t: t(b"a"), TypeError, "not bytes"),
        (lambda t: t("half \ud83d"), ValueError, "character 5 .* lone surrogate"),
        (lambda t: t(["a"], "b"), ValueError, "text_pair"),
        (lambda t: t(["a"], ["b", "c"]), ValueError, "text_pair"),
        (lambda t: t("a", return_tensors="np"), ValueError, "'np'"),
        (lambda t: t("a", padding="widest"), ValueError, "widest"),
        (lambda t: t("a", truncation="first"), ValueError, "first"),
        (lambda t: t("a", padding_side="top"), ValueError, "top"),
        (lambda t: t("a", padding="max_length"), ValueError, "max_length"),
        (lambda t: t("a", max_length=5), ValueError, "does nothing"),
        (lambda t: t("a", max_length=0, truncation=True), ValueError, "at least 1"),
        (lambda t: t("a b c", max_length=2, truncation="only_second"), ValueError, "only_second"),
        (lambda t: t(["a", "a long one"], return_tensors="pt"), ValueError, "padding=True"),
        (lambda t: t("a", add_special_token=False), TypeError, "did you mean 'add_special_tokens'"),
        (lambda t: t.encode("a", zzz=1), TypeError, "unknown keyword 'zzz'; known are add_special_tokens"),
        (lambda t: t("a").logits, AttributeError, "input_ids"),
        (lambda t: t("a").to("cpu"), TypeError, "return_tensors='pt'"),
    ],
)
def test_bad_calls(plain, call, error, message):
    with pytest.raises(error, match=message):
        call(InternLM3Tokenizer.from_pretrained(plain))


def test_padding_without_a_pad_token(plain):
    tokenizer = InternLM3Tokenizer.from_pretrained(plain, pad_token=None)
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token"):
        tokenizer(["a", "b c"], padding=True)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["a", "b c"], padding=True).input_ids[0][-1] == tokenizer.eos_token_id


def test_keywords_of_copied_scripts(plain, tmp_path):
    tokenizer = InternLM3Tokenizer.from_pretrained(
        pretrained_model_name_or_path=plain, use_fast=False, legacy=True, trust_remote_code=True, subfolder=""
    )
    ids = tokenizer(
        "the dog", stride=0, is_split_into_words=False, return_offsets_mapping=False, verbose=False
    ).input_ids
    assert ids == InternLM3Tokenizer.from_pretrained(plain).encode("the dog")
    assert tokenizer.decode(ids, spaces_between_special_tokens=False) == "<s>the dog"
    tokenizer.save_pretrained(save_directory=tmp_path, push_to_hub=False)
    assert InternLM3Tokenizer.from_pretrained(tmp_path).encode("the dog") == ids
    for call in (
        lambda: tokenizer("the dog", return_offsets_mapping=True),
        lambda: tokenizer("the dog", pad_to_multiple_of=8),
        lambda: tokenizer.decode(ids, spaces_between_special_tokens=True),
        lambda: tokenizer.save_pretrained(tmp_path, push_to_hub=True),
        lambda: InternLM3Tokenizer.from_pretrained(plain, subfolder="sub"),
    ):
        with pytest.raises(ValueError, match="is not supported; it can only be"):
            call()
    with pytest.raises(TypeError, match="'skip_special_token'; did you mean 'skip_special_tokens'"):
        tokenizer.decode(ids, skip_special_token=True)


def test_misspelt_override_names_the_nearest(plain):
    assert InternLM3Tokenizer.from_pretrained(plain, trust_remote_code=True).padding_side == "right"
    with pytest.raises(TypeError, match="'padding_sid'; did you mean 'padding_side'"):
        InternLM3Tokenizer.from_pretrained(plain, padding_sid="left")


# The demo model


def test_demo_model_ids_equal_transformers(demo_model, demo_pair):
    tokenizer, expected = demo_pair
    processor = sentencepiece.SentencePieceProcessor(model_file=str(demo_model / "tokenizer.model"))
    for text in [*TEXTS, *tokenizer.all_special_tokens, Path(__file__).read_text(encoding="utf-8")]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == expected.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(ids) == expected.decode(ids), text
        if not any(token in text for token in tokenizer.all_special_tokens):
            assert ids == processor.encode(text), text


@settings(max_examples=100)
@given(text=ANY_TEXT)
def test_demo_model_random_text_equals_transformers(demo_pair, text):
    tokenizer, expected = demo_pair
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == expected.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == expected.decode(ids)


def test_demo_model_chat(demo_pair):
    tokenizer, expected = demo_pair
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == expected.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == prompt


# Special tokens that are set later, and rows that are padded later: transformers is the oracle


@pytest.fixture
def pair(plain, tmp_path):
    """A tokenizer, and transformers' of the same files: with no gap between ids, which it would fill."""
    config = json.loads((plain / "tokenizer_config.json").read_text())
    added = {id if int(id) < 9 else str(int(id) - 3): token for id, token in config["added_tokens_decoder"].items()}
    folder = edited(plain, tmp_path / "pair", added_tokens_decoder=added)
    return InternLM3Tokenizer.from_pretrained(folder), oracle(folder)


NAMES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")


def same_special_tokens(ours, theirs):
    for name in (f"{name}_token{end}" for name in NAMES for end in ("", "_id")):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.extra_special_tokens == theirs.extra_special_tokens
    assert {*theirs.all_special_ids} <= {*ours.all_special_ids}
    assert ours.get_added_vocab() == theirs.get_added_vocab() == ours.added_tokens_encoder
    assert [*ours.get_added_vocab().values()] == sorted(theirs.get_added_vocab().values())
    assert len(ours) == len(theirs)


def test_ids_of_special_tokens_are_set_as_in_transformers(pair):
    for tokenizer in pair:
        tokenizer.pad_token = None
        tokenizer.pad_token_id = tokenizer.eos_token_id
    same_special_tokens(*pair)
    assert pair[0](["a", "b c"], padding=True).input_ids == pair[1](["a", "b c"], padding=True).input_ids
    added = pair[0].convert_tokens_to_ids("<|im_end|>")
    for name, id in (("eos", added), ("bos", np.int64(2)), ("unk", 300), ("cls", torch.tensor(7)), ("pad", None)):
        for tokenizer in pair:
            setattr(tokenizer, f"{name}_token_id", id if id is None else int(id) if tokenizer is pair[1] else id)
        same_special_tokens(*pair)
    assert pair[0].encode("the dog") == pair[1].encode("the dog")
    for wrong in (len(pair[0]), -1, "2", 1.0, True):
        with pytest.raises(ValueError, match="pad_token_id must be the id of a token, or None; got"):
            pair[0].pad_token_id = wrong
    with pytest.raises(ValueError, match="pad_token: a token is a non-empty string"):
        pair[0].pad_token = 2


def test_special_tokens_are_added_as_in_transformers(pair, tmp_path):
    tokens = tokenizers.AddedToken("<tool>", lstrip=True), "<|im_start|>"
    for added in (
        {"pad_token": "[PAD]"},
        {"pad_token": "[PAD]", "cls_token": "<cls>", "eos_token": "<|im_end|>"},
        {"additional_special_tokens": ["<think>", "</think>"]},
        {"extra_special_tokens": tokens},
        {"mask_token": "the"},  # a piece
        {},
    ):
        ours, theirs = (tokenizer.add_special_tokens(added) for tokenizer in pair)
        assert ours == theirs
        same_special_tokens(*pair)
    for tokenizer in pair:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<one more>"]}, replace_extra_special_tokens=False)
    same_special_tokens(*pair)
    text = "a <think>x [PAD]<cls> <tool>, the dog <one more>"
    assert pair[0].encode(text) == pair[1].encode(text)
    with pytest.raises(ValueError, match="'pda_token' is no special token: known are bos_token"):
        pair[0].add_special_tokens({"pda_token": "<x>"})
    pair[0].save_pretrained(tmp_path)
    again = InternLM3Tokenizer.from_pretrained(tmp_path)
    assert again.get_added_vocab() == pair[0].get_added_vocab()
    assert again.special_tokens_map == pair[0].special_tokens_map
    assert again.encode(text) == pair[0].encode(text)


def plain_lists(encoding):
    return {name: column.tolist() if hasattr(column, "tolist") else column for name, column in encoding.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": False},
        {"padding": "max_length", "max_length": 9},
        {"padding_side": "left", "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 2, "pad_to_multiple_of": 4},
        {"return_attention_mask": False},
        {"return_tensors": "pt"},
        {"return_tensors": "np", "padding_side": "left"},
    ],
    ids=str,
)
def test_pad_is_transformers(pair, options):
    rows = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    for rows_given in (
        {"input_ids": rows},
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], "labels": [0, 1, 1]},
        [{"input_ids": row, "token_type_ids": [0] * len(row), "special_tokens_mask": [0] * len(row)} for row in rows],
        [{"input_ids": torch.tensor(row)} for row in rows],
        [{"input_ids": np.array(row)} for row in rows],
        {"input_ids": rows[0]},
        {"input_ids": []},
    ):
        try:
            theirs = pair[1].pad(copy.deepcopy(rows_given), **options)
            ragged = any(getattr(column, "dtype", None) == np.dtype(object) for column in theirs.values())
        except ValueError:
            ragged = True
        if ragged:
            with pytest.raises(ValueError, match="needs rows of one length"):
                pair[0].pad(copy.deepcopy(rows_given), **options)
            continue
        ours = pair[0].pad(copy.deepcopy(rows_given), **options)
        assert plain_lists(ours) == plain_lists(theirs)
        assert {name: type(column) for name, column in ours.items()} == {n: type(c) for n, c in theirs.items()}


def test_what_cannot_be_padded(plain):
    tokenizer = InternLM3Tokenizer.from_pretrained(plain)
    with pytest.raises(ValueError, match="input_ids"):
        tokenizer.pad({"ids": [[1]]})
    with pytest.raises(ValueError, match="padding=True"):
        tokenizer.pad({"input_ids": [[1], [1, 2]]}, padding=False, return_tensors="pt")
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token"):
        tokenizer.pad({"input_ids": [[1], [1, 2]]})
