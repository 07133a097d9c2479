"""Tokenizers for tests: small vocabularies, texts, and the oracles that they are compared with."""

import io
import json
import os
import shutil
from functools import cache, lru_cache
from pathlib import Path

import sentencepiece
from hypothesis import strategies as st

from internlm3 import InternLM3Tokenizer

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


def train(options: dict, corpus: list[str] = CORPUS) -> bytes:
    model = io.BytesIO()
    options = {"byte_fallback": True, "character_coverage": 1.0, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 3), model_writer=model, model_type="bpe", vocab_size=512,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


@lru_cache
def processor_of(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def write_checkpoint(directory: Path, model: bytes, **config) -> Path:
    """A tokenizer's folder. Two added tokens come after the pieces, and after a gap of three unused ids."""
    directory.mkdir(parents=True, exist_ok=True)
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
    processor = processor_of((directory / "tokenizer.model").read_bytes())
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
    processor = processor_of((directory / "tokenizer.model").read_bytes())
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


@cache
def loaded(directory: Path):
    """Our tokenizer of a folder, and the oracle."""
    return InternLM3Tokenizer.from_pretrained(directory), oracle(directory)


def save_by_transformers(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint as transformers 5 saves it: only tokenizer.json and tokenizer_config.json."""
    from transformers import AutoTokenizer

    base = edited(checkpoint, folder / "base", eos_token="</s>")
    (base / "config.json").write_text(json.dumps({"model_type": "internlm3"}))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "saved")
    assert sorted(os.listdir(folder / "saved")) == ["tokenizer.json", "tokenizer_config.json"]
    return folder / "saved"


def edited(folder: Path, target: Path, **config) -> Path:
    """A copy of the folder with other entries in its tokenizer_config.json."""
    shutil.copytree(folder, target)
    old = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**old, **config}))
    return target


def library_file(plain: Path, tmp_path: Path) -> Path:
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
