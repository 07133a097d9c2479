"""InternLM3Tokenizer against SentencePiece itself and against transformers.

transformers 5.23 has no InternLM3Tokenizer. Its class for a SentencePiece file without conversion is
SentencePieceBackend; with `legacy=True` it splits a text at the added tokens and hands every other segment to
SentencePiece as it is, which is what InternLM3's own tokenizer does. So it is the oracle for ids, frames, padding and
truncation. Its joining of tokens is another one, so that decoded text is held against M2M100Tokenizer's
convert_tokens_to_string (the same walk over special tokens, but stripped at both ends) and against SentencePiece
segment by segment. The Rust tokenizers' BPE is a third opinion, on real text.
"""

import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm3 import InternLM3Tokenizer
from internlm3.runtime.tokenization.added_tokens import AddedToken
from internlm3.runtime.tokenization.tokenizer_files import NAMED_TOKENS, NO_LIMIT

MISTRAL_COMMON = "mistral-common==1.13.1"
MISTRAL_COMMON_SHA256 = "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not even look up.",
    "A tokenizer turns text into numbers; numbers turn into text again.",
    "for i in range(10):\n    print(i, end=', ')\n",
    "def add(a: int, b: int) -> int:\n\treturn a + b",
    "书生·浦语是上海人工智能实验室开发的对话语言模型。",
    "上海有外滩、豫园、东方明珠和田子坊。今天天气很好。",
    "Ⅷ ﬁne Ｆｕｌｌ ｗｉｄｔｈ ½ cup, naïve café, São Paulo",
    "don't, it's, we've: 3.14159 + 2.71828 = 5.85987",
    "<b>bold</b> [link](https://example.org/a?b=c&d=e) `code`",
    "🙂🙃 emoji and 🇨🇳 flags and 👩‍💻 families",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "     ",
    " leading",
    "trailing ",
    "  two  spaces  everywhere  ",
    "\ttab\tseparated\t",
    "\n\nnew\r\nlines\n",
    "no\u00a0break\u00a0space and zero\u200bwidth and \ufeffBOM and ideographic\u3000space",
    "e\u0301 combining, \u1e9b\u0323 normalising",
    "▁ the visible space ▁▁",
    "<s>",
    "</s><s> </s>",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "  <|im_start|>   x   <|im_end|>  ",
    "<|im_start|><|im_start|><|im_end|><|im_end|>",
    "<|im_start <|im_end|> |im_end|> <unk> <0x41>",
    "𝕳𝖊𝖑𝖑𝖔 ༄༅ ﷽ \x00\x01\x7f",
    "a" * 3000,
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
# Words of every kind, with the special tokens and their fragments, joined at random.
ANY_TEXT = st.lists(
    st.one_of(st.sampled_from([*SPECIAL, "<|im_", "end|>", " ", "  ", "\n", "the", "你好", "▁"]), st.text(max_size=8)),
    max_size=12,
).map("".join)

TRAINED = {
    "plain": {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    "dummy": {"add_dummy_prefix": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    "nfkc": {"add_dummy_prefix": True, "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    "squeeze": {"add_dummy_prefix": False, "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc_cf"},
    "unknowns": {"add_dummy_prefix": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity",
                 "byte_fallback": False},
}  # fmt: skip
REAL = {"mistral-v1": "tokenizer.model.v1", "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3"}


def train(options: dict) -> bytes:
    model = io.BytesIO()
    options = {"byte_fallback": True, "character_coverage": 1.0, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=model, model_type="bpe", vocab_size=512,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="session")
def mistral_wheel() -> Path:
    """mistral-common's wheel with real SentencePiece files, downloaded once into the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "internlm3"
    wheel = cache / "mistral_common-1.13.1-py3-none-any.whl"
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            requirement = Path(folder, "requirements.txt")
            requirement.write_text(f"{MISTRAL_COMMON} --hash=sha256:{MISTRAL_COMMON_SHA256}\n")
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
            subprocess.run([*pip, "--dest", folder, "-r", str(requirement)], check=True)
            Path(folder, wheel.name).replace(wheel)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == MISTRAL_COMMON_SHA256, f"{wheel} is damaged: delete it"
    return wheel


def write_checkpoint(directory: Path, model: bytes, **config) -> Path:
    """A tokenizer's folder with two added tokens behind the pieces, and a gap of three unused ids."""
    directory.mkdir(parents=True)
    (directory / "tokenizer.model").write_bytes(model)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {0: "<unk>", 1: "<s>", 2: "</s>", size + 3: "<|im_start|>", size + 4: "<|im_end|>"}
    config = {
        "added_tokens_decoder": {str(id): {"content": content, **flags} for id, content in added.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", **flags},
        "unk_token": "<unk>",
        "pad_token": "</s>",
        **config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture(scope="session", params=[*TRAINED, *REAL])
def checkpoint(request, tmp_path_factory) -> Path:
    if request.param in REAL:
        wheel = zipfile.ZipFile(request.getfixturevalue("mistral_wheel"))
        model = wheel.read("mistral_common/data/" + REAL[request.param])
    else:
        model = train(TRAINED[request.param])
    return write_checkpoint(tmp_path_factory.mktemp("tokenizers") / request.param, model)


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", train(TRAINED["plain"]))


def oracle(directory: Path, **options):
    from transformers import logging
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    logging.set_verbosity_error()
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {int(id): _hf_token(token) for id, token in config["added_tokens_decoder"].items()}
    named = {name: "</s>" if name == "eos_token" else config[name] for name in ("bos_token", "eos_token", "unk_token")}
    return SentencePieceBackend(
        vocab_file=str(directory / "tokenizer.model"), legacy=True, special_tokens_pattern="bos", pad_token="</s>",
        added_tokens_decoder=added, **named, extra_special_tokens=config["additional_special_tokens"], **options,
    )  # fmt: skip


def _hf_token(fields: dict):
    from tokenizers import AddedToken as HFAddedToken

    return HFAddedToken(**fields)


def sentencepiece_ids(directory: Path, text: str) -> list[int]:
    """Brute force: cut the text at the first, longest special token; SentencePiece encodes what is before it."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": processor.get_piece_size() + 3}
    ids["<|im_end|>"] = ids["<|im_start|>"] + 1
    result: list[int] = []
    while text:
        starts = [(text.find(token), token) for token in ids if token in text]
        start, token = min(starts, default=(len(text), ""))
        result += processor.encode(text[:start]) if start else []
        result += [ids[token]] if token else []
        text = text[start + len(token) :]
    return result


def sentencepiece_text(directory: Path, ids: list[int]) -> str:
    """Brute force: special ids as their text, each run between them through SentencePiece; unused ids as nothing."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    size = processor.get_piece_size()
    special = {0: "<unk>", 1: "<s>", 2: "</s>", size + 3: "<|im_start|>", size + 4: "<|im_end|>"}
    text, run = "", []
    for id in [*ids, 1]:
        if id in special:
            text += processor.decode(run) + special[id]
            run = []
        elif id < size:
            run.append(id)
    return text.removesuffix("<s>")


# Ids and text


def test_ids_equal_transformers_and_sentencepiece(checkpoint):
    tokenizer, expected = InternLM3Tokenizer.from_pretrained(checkpoint), oracle(checkpoint)
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text), text
        assert tokenizer.encode(text, add_special_tokens=False) == sentencepiece_ids(checkpoint, text), text
        assert tokenizer.tokenize(text) == expected.tokenize(text), text
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == tokenizer.encode(text)[1:], text


@settings(max_examples=150)
@given(text=ANY_TEXT)
def test_random_text_equals_the_oracles(checkpoint, text):
    tokenizer, expected = _both(checkpoint)
    ids = tokenizer.encode(text)
    assert ids == expected.encode(text)
    assert ids[1:] == sentencepiece_ids(checkpoint, text)
    assert tokenizer.decode(ids) == sentencepiece_text(checkpoint, ids)


_loaded: dict = {}


def _both(directory: Path):
    if directory not in _loaded:
        _loaded[directory] = InternLM3Tokenizer.from_pretrained(directory), oracle(directory)
    return _loaded[directory]


def test_decoded_text_equals_transformers_walk(checkpoint):
    from transformers import M2M100Tokenizer

    tokenizer, expected = _both(checkpoint)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        walked = M2M100Tokenizer.convert_tokens_to_string(expected, expected.convert_ids_to_tokens(ids))
        assert tokenizer.decode(ids).strip() == walked, text
        kept = [id for id in ids if id not in tokenizer.all_special_ids]
        assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(kept), text


def test_random_ids_decode_as_sentencepiece_does(checkpoint):
    tokenizer, _ = _both(checkpoint)
    generator = random.Random(20)
    for _ in range(300):
        ids = [1] + [generator.randrange(len(tokenizer) + 5) for _ in range(generator.randrange(12))]
        assert tokenizer.decode(ids) == sentencepiece_text(checkpoint, ids), ids


@pytest.fixture(scope="session", params=["plain", "dummy"])
def lossless(request, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("lossless") / request.param, train(TRAINED[request.param]))


@settings(max_examples=200)
@given(text=ANY_TEXT)
def test_text_comes_back_whole(lossless, text):
    """With bytes for what is no piece and no normalisation, nothing is lost but the visible space, which is a space."""
    tokenizer, _ = _both(lossless)
    assert tokenizer.decode(tokenizer.encode(text)) == "<s>" + text.replace("▁", " ")


def test_real_text_equals_rust_tokenizers(mistral_wheel, tmp_path):
    """transformers' LlamaTokenizer rebuilds the BPE from the pieces for the Rust library: no SentencePiece in it.

    Its order among pieces that are runs of spaces is not SentencePiece's, so the text has none; nor special tokens,
    behind which LlamaTokenizer puts no dummy prefix.
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


@pytest.mark.parametrize("seed", range(5))
def test_padding_and_truncation_equal_transformers(checkpoint, seed):
    generator = random.Random(seed)
    tokenizer, expected = _both(checkpoint)
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


# Files


def test_saving_round_trips(checkpoint, tmp_path):
    tokenizer = InternLM3Tokenizer.from_pretrained(checkpoint, padding_side="left", chat_template="{{ messages }}")
    tokenizer.add_tokens("<tool>")
    paths = tokenizer.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(Path(path).name for path in paths) == sorted(os.listdir(tmp_path / "new" / "folder"))
    again = InternLM3Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert again.added_tokens_decoder == tokenizer.added_tokens_decoder
    assert again.padding_side == "left"
    assert again.chat_template == "{{ messages }}"
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.all_special_ids == tokenizer.all_special_ids
    for text in [*TEXTS, "a<tool>b"]:
        assert again.encode(text) == tokenizer.encode(text)
    again.save_pretrained(tmp_path / "twice")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "new" / "folder" / name).read_bytes()


def test_saving_over_another_tokenizer(checkpoint, saved_by_transformers, tmp_path):
    """The last save wins, whatever files an older one had."""
    folder = edited(saved_by_transformers, tmp_path / "a")
    (folder / "chat_template.jinja").write_text("old")
    (folder / "added_tokens.json").write_text(json.dumps({"<old>": 5000}))
    tokenizer = InternLM3Tokenizer.from_pretrained(checkpoint, chat_template="new")
    tokenizer.save_pretrained(folder)
    again = InternLM3Tokenizer.from_pretrained(folder)
    assert (again.chat_template, again.added_tokens_decoder) == ("new", tokenizer.added_tokens_decoder)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


def test_save_vocabulary_is_the_file(checkpoint, tmp_path):
    (path,) = InternLM3Tokenizer.from_pretrained(checkpoint).save_vocabulary(tmp_path, filename_prefix="my")
    assert path == str(tmp_path / "my-tokenizer.model")
    assert Path(path).read_bytes() == (checkpoint / "tokenizer.model").read_bytes()


def test_nothing_half_written_stays(plain, tmp_path, monkeypatch):
    tokenizer = InternLM3Tokenizer.from_pretrained(plain)

    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save_pretrained(tmp_path / "full")
    assert os.listdir(tmp_path / "full") == []


def test_chat_template_file_wins(plain, tmp_path):
    directory = write_checkpoint(tmp_path / "a", (plain / "tokenizer.model").read_bytes(), chat_template="config")
    assert InternLM3Tokenizer.from_pretrained(directory).chat_template == "config"
    (directory / "chat_template.jinja").write_text("书生 file", encoding="utf-8")
    assert InternLM3Tokenizer.from_pretrained(directory).chat_template == "书生 file"
    assert InternLM3Tokenizer.from_pretrained(directory, chat_template="mine").chat_template == "mine"


def test_remote_code_is_never_run(plain, tmp_path):
    directory = write_checkpoint(
        tmp_path / "a", (plain / "tokenizer.model").read_bytes(), auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}
    )
    (directory / "evil.py").write_text("raise SystemExit('executed')")
    tokenizer = InternLM3Tokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(tmp_path / "b")
    assert "auto_map" not in json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())


# tokenizer.json


def save_by_transformers(checkpoint: Path, folder: Path) -> Path:
    """What transformers 5 makes of a checkpoint: tokenizer.json and tokenizer_config.json, and nothing else."""
    from transformers import AutoTokenizer

    base = edited(checkpoint, folder / "base", eos_token="</s>")
    (base / "config.json").write_text(json.dumps({"model_type": "internlm3"}))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "saved")
    assert sorted(os.listdir(folder / "saved")) == ["tokenizer.json", "tokenizer_config.json"]
    return folder / "saved"


@pytest.fixture(scope="session")
def saved_by_transformers(checkpoint, tmp_path_factory) -> Path:
    return save_by_transformers(checkpoint, tmp_path_factory.mktemp("by_transformers"))


@pytest.fixture(scope="session")
def plain_by_transformers(plain, tmp_path_factory) -> Path:
    return save_by_transformers(plain, tmp_path_factory.mktemp("plain_by_transformers"))


def edited(folder: Path, target: Path, **config) -> Path:
    """A copy of the folder with other entries in its tokenizer_config.json."""
    shutil.copytree(folder, target)
    old = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**old, **config}))
    return target


def test_tokenizer_json_alone_equals_transformers(saved_by_transformers, tmp_path):
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(saved_by_transformers)
    tokenizer = InternLM3Tokenizer.from_pretrained(saved_by_transformers)
    tokenizer.save_pretrained(tmp_path / "again")
    again = InternLM3Tokenizer.from_pretrained(tmp_path / "again")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == again.encode(text) == expected.encode(text), text
        assert tokenizer.tokenize(text) == expected.tokenize(text), text
        assert tokenizer.decode(ids) == again.decode(ids) == expected.decode(ids), text
        skipped = expected.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == again.decode(ids, skip_special_tokens=True) == skipped
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert len(tokenizer) == len(again) == len(expected)
    assert tokenizer.all_special_ids == sorted(expected.all_special_ids)
    assert tokenizer.eos_ids == [2, expected.convert_tokens_to_ids("<|im_end|>")]
    assert tokenizer.convert_tokens_to_ids(["<s>", "never seen"]) == expected.convert_tokens_to_ids(
        ["<s>", "never seen"]
    )
    assert tokenizer.add_tokens(["<tool>"]) == expected.add_tokens(["<tool>"]) == 1
    assert tokenizer.encode("a<tool>b") == expected.encode("a<tool>b")


@pytest.mark.parametrize("frame", [("<s>", None), ("<s>", "</s>"), (None, None)])
def test_frame_of_a_tokenizer_json_is_transformers(plain, plain_by_transformers, tmp_path, frame):
    """The file's own frame counts, whatever the configuration says; a keyword wins, and is saved into the file."""
    from transformers import AutoTokenizer

    folder = edited(plain_by_transformers, tmp_path / "a", add_bos_token=False, add_eos_token=True)
    library = json.loads((folder / "tokenizer.json").read_text())
    ends = [[{"SpecialToken": {"id": token, "type_id": 0}}] if token else [] for token in frame]
    library["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*ends[0], {"Sequence": {"id": "A", "type_id": 0}}, *ends[1]],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for i, t in enumerate(frame, 1) if t},
    }
    (folder / "tokenizer.json").write_text(json.dumps(library))
    for number, options in enumerate([{}, {"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": False}]):
        tokenizer = InternLM3Tokenizer.from_pretrained(folder, **options)
        tokenizer.save_pretrained(tmp_path / str(number))
        ids = AutoTokenizer.from_pretrained(folder, **options).encode("the dog")
        assert tokenizer.encode("the dog") == ids
        assert InternLM3Tokenizer.from_pretrained(tmp_path / str(number)).encode("the dog") == ids
        assert AutoTokenizer.from_pretrained(tmp_path / str(number)).encode("the dog") == ids
    # It counts as well where the base's tokenizer.model lies beside it.
    expected = AutoTokenizer.from_pretrained(folder).encode("the dog")
    shutil.copy(plain / "tokenizer.model", folder)
    assert InternLM3Tokenizer.from_pretrained(folder).encode("the dog") == expected
    InternLM3Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "b")
    assert InternLM3Tokenizer.from_pretrained(tmp_path / "b").encode("the dog") == expected


def test_a_frame_of_other_tokens_is_refused(plain_by_transformers, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json puts \['</s>'\] before a text, which is not bos_token '<s>'"):
        folder = edited(plain_by_transformers, tmp_path / "a")
        library = json.loads((folder / "tokenizer.json").read_text())
        library["post_processor"] = {"type": "BertProcessing", "sep": ["<s>", 1], "cls": ["</s>", 2]}
        (folder / "tokenizer.json").write_text(json.dumps(library))
        InternLM3Tokenizer.from_pretrained(folder)


def test_ids_of_special_tokens_come_from_tokenizer_json(checkpoint, saved_by_transformers, tmp_path):
    """The base's tokenizer.model was copied beside transformers' two files: these count, as they do there."""
    from transformers import AutoTokenizer

    folder = edited(saved_by_transformers, tmp_path / "a")
    shutil.copy(checkpoint / "tokenizer.model", folder)
    expected = AutoTokenizer.from_pretrained(folder)
    tokenizer = InternLM3Tokenizer.from_pretrained(folder)
    for token in SPECIAL:
        assert tokenizer.encode(token, add_special_tokens=False) == [expected.convert_tokens_to_ids(token)], token
    assert tokenizer.eos_ids == [2, expected.convert_tokens_to_ids("<|im_end|>")]
    assert tokenizer.all_special_ids == sorted(expected.all_special_ids)
    for text in CORPUS:
        assert tokenizer.encode(text) == expected.encode(text), text


@pytest.mark.parametrize("key", [*NAMED_TOKENS, "additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_no_id_is_invented_at_load(plain, tmp_path, file, key):
    given = "<nowhere>" if key in NAMED_TOKENS else ["<|im_start|>", "<nowhere>"]
    folder = edited(plain, tmp_path / "a", **{key: given})
    if file == "tokenizer.json":
        shutil.copy(_library_file(plain, tmp_path), folder)
        (folder / "tokenizer.model").unlink()
    name = "additional_special_tokens" if key == "extra_special_tokens" else key
    with pytest.raises(ValueError, match=rf"{name} '<nowhere>' has no id: neither {re.escape(file)} nor added_tokens"):
        InternLM3Tokenizer.from_pretrained(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<nowhere>": 517}))
    tokenizer = InternLM3Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("<nowhere>", add_special_tokens=False) == [517]
    assert 517 in tokenizer.all_special_ids


def _library_file(plain: Path, tmp_path: Path) -> Path:
    """The checkpoint's tokenizer.json with the ids of its added_tokens_decoder: the gap is filled."""
    from tokenizers import AddedToken as LibraryToken
    from tokenizers import Tokenizer
    from transformers import LlamaTokenizer

    pieces = edited(plain, tmp_path / "pieces", eos_token="</s>", added_tokens_decoder={}, additional_special_tokens=[])
    LlamaTokenizer.from_pretrained(pieces).save_pretrained(pieces)
    library = Tokenizer.from_file(str(tmp_path / "pieces" / "tokenizer.json"))
    library.add_tokens([LibraryToken(f"<gap {i}>") for i in range(3)])
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("kind", ["nfkc", "plain"])
def test_flipped_bytes_of_a_tokenizer_json(tmp_path, kind):
    """Damage anywhere: one error that names the file, or a tokenizer still. nfkc's table makes the library panic."""
    base = write_checkpoint(tmp_path / "a", train(TRAINED[kind]))
    folder = save_by_transformers(base, tmp_path)
    content, refusals = (folder / "tokenizer.json").read_bytes(), 0
    for seed in range(60):
        dice, damaged = random.Random(seed), bytearray(content)
        for _ in range(dice.choice([1, 3, 10])):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        (folder / "tokenizer.json").write_bytes(damaged)
        try:
            InternLM3Tokenizer.from_pretrained(folder)
        except ValueError as error:
            assert str(folder) in str(error) and len(str(error)) < 800, f"seed {seed}: {error}"
            refusals += 1
    assert refusals > 20


def test_a_token_set_later_needs_an_id(plain):
    tokenizer = InternLM3Tokenizer.from_pretrained(plain)
    tokenizer.pad_token = "[PAD]"
    with pytest.raises(ValueError, match=r"pad_token is '\[PAD\]', which has no id: add it first"):
        tokenizer.pad_token_id  # noqa: B018
    tokenizer.add_tokens("[PAD]")
    assert tokenizer.pad_token_id == len(tokenizer) - 1


@pytest.mark.parametrize("extra", [["<tool>"], {"tool_token": "<tool>"}, {"tool_token": {"content": "<tool>"}}])
def test_extra_special_tokens(plain, tmp_path, extra):
    config = json.loads((plain / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"] | {"700": {"content": "<tool>", "special": False}}
    folder = edited(plain, tmp_path / "a", extra_special_tokens=extra, added_tokens_decoder=added)
    tokenizer = InternLM3Tokenizer.from_pretrained(folder)
    assert 700 in tokenizer.all_special_ids
    assert (
        tokenizer.extra_special_tokens
        == tokenizer.additional_special_tokens
        == ["<|im_start|>", "<|im_end|>", "<tool>"]
    )
    assert tokenizer.decode([700, *tokenizer.encode("the")], skip_special_tokens=True) == "the"
    tokenizer.save_pretrained(tmp_path / "b")
    assert 700 in InternLM3Tokenizer.from_pretrained(tmp_path / "b").all_special_ids


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<|im_end|>": 900}),
        ("added_tokens.json", {"<other>": 516}),
        ("tokenizer.json", {"added_tokens": [{"id": 900, "content": "<|im_end|>"}]}),
        ("tokenizer.json", {"added_tokens": [{"id": 516, "content": "<other>"}]}),
    ],
)
def test_two_files_that_disagree_about_an_id(plain, tmp_path, file, content):
    folder = edited(plain, tmp_path / "a")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"tokenizer_config.json gives '<.im_end.>' the id 516, and {file} gives"):
        InternLM3Tokenizer.from_pretrained(folder)


def test_a_tokenizer_json_that_gives_other_ids(plain, tmp_path):
    """An added token that the library's file has no entry for gets its next id, whatever the configuration says."""
    folder = edited(plain, tmp_path / "a", added_tokens_decoder={"900": {"content": "<tool>"}})
    shutil.copy(_library_file(plain, tmp_path), folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="gives '<tool>' the id 517, and added_tokens_decoder the id 900"):
        InternLM3Tokenizer.from_pretrained(folder)
    for content in ("{}", '{"added_tokens": 5}', '{"added_tokens": [{"content": "a"}]}', "nonsense"):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            InternLM3Tokenizer.from_pretrained(folder)


def test_truncation_without_a_limit_cuts_nothing(plain):
    """As in transformers, whose "no limit" is 10^30 too."""
    tokenizer = InternLM3Tokenizer.from_pretrained(plain)
    for text in TEXTS:
        assert tokenizer.encode(text, truncation=True) == oracle(plain).encode(text, truncation=True)
    limited = InternLM3Tokenizer.from_pretrained(plain, model_max_length=7)
    assert len(limited.encode("a" * 50, truncation=True)) == 7


NULLS = ["add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "model_max_length",
         "padding_side", "truncation_side", "additional_special_tokens", "extra_special_tokens", "chat_template",
         "chat_control_tokens", "pad_token"]  # fmt: skip


@pytest.mark.parametrize("name", NULLS)
def test_null_settings(plain, tmp_path, name):
    """A switch that is null is off, as InternLM3's own class takes it; any other setting has its default."""
    tokenizer = InternLM3Tokenizer.from_pretrained(edited(plain, tmp_path / "a", **{name: None}))
    ids = tokenizer("the  dog n't", padding=name != "pad_token").input_ids
    text = tokenizer.decode(ids)
    if name == "add_bos_token":
        assert ids == sentencepiece_ids(plain, "the  dog n't")
        assert text == "the  dog n't"
    else:
        assert ids == oracle(plain).encode("the  dog n't")
        assert text == "<s>the  dog n't"
    assert tokenizer.model_max_length == NO_LIMIT
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "right")


# Bad input


@pytest.mark.parametrize("kind", ["missing", "empty", "random", "cut", "between pieces"])
def test_bad_sentencepiece_file(plain, tmp_path, kind):
    directory = write_checkpoint(tmp_path / "a", (plain / "tokenizer.model").read_bytes())
    path = directory / "tokenizer.model"
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "between pieces":  # 300 whole pieces, each as key, one byte of length, content
        position = 0
        for _ in range(300):
            position += 2 + data[position + 1]
        path.write_bytes(data[:position])
    else:
        path.write_bytes({"empty": b"", "random": random.Random(1).randbytes(5000), "cut": data[:-50]}[kind])
    with pytest.raises(FileNotFoundError if kind == "missing" else ValueError, match=r"tokenizer\.model"):
        InternLM3Tokenizer.from_pretrained(directory)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"a": ', "tokenizer_config.json is not valid JSON"),
        ("[1, 2]", "tokenizer_config.json must hold a JSON object"),
        ('{"added_tokens_decoder": {"x": {"content": "a"}}}', "'x'"),
        ('{"added_tokens_decoder": {"-1": {"content": "a"}}}', "'-1'"),
        ('{"added_tokens_decoder": {"900": {"lstrip": true}}}', "'900'"),
        ('{"added_tokens_decoder": {"900": {"content": "a", "lstrip": "no"}}}', "lstrip"),
        ('{"added_tokens_decoder": ["a"]}', "added_tokens_decoder"),
        ('{"added_tokens_decoder": {"1' + "0" * 30 + '": {"content": "<big>"}}}', "'<big>': an id must be"),
        ('{"added_tokens_decoder": {"2147483648": {"content": "<big>"}}}', "'<big>': an id must be"),
        ('{"eos_token": 2}', "eos_token"),
        ('{"bos_token": null}', "add_bos_token is true and bos_token is null"),
        ('{"add_bos_token": "yes"}', "add_bos_token"),
        ('{"padding_side": "up"}', "padding_side"),
        ('{"model_max_length": "long"}', "model_max_length"),
        ('{"model_max_length": NaN}', "model_max_length"),
        ('{"chat_template": [{"name": "default"}]}', "chat_template"),
        ('{"additional_special_tokens": "<a>"}', "additional_special_tokens"),
        ('{"spaces_between_special_tokens": true}', "spaces_between_special_tokens"),
    ],
)
def test_bad_config(plain, tmp_path, config, message):
    shutil.copy(plain / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message) as error:
        InternLM3Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


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


@pytest.fixture(scope="session")
def demo_pair(demo_model):
    """Ours, and transformers' own choice for the folder: the pieces rebuilt as a BPE for the Rust library."""
    from transformers import AutoTokenizer

    return InternLM3Tokenizer.from_pretrained(demo_model), AutoTokenizer.from_pretrained(demo_model)


def test_demo_model_ids_equal_transformers(demo_model, demo_pair):
    tokenizer, expected = demo_pair
    processor = sentencepiece.SentencePieceProcessor(model_file=str(demo_model / "tokenizer.model"))
    for text in [*TEXTS, *tokenizer.all_special_tokens, Path(__file__).read_text(encoding="utf-8")]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == expected.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(ids) == expected.decode(ids), text
        if not any(token in text for token in tokenizer.all_special_tokens):
            assert ids == processor.encode(text), text


@settings(max_examples=200)
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
