"""The tokenizer of a GGUF file, as the files of a checkpoint.

llama.cpp knows a vocabulary by `tokenizer.ggml.model`: "llama" is SentencePiece's byte-pair encoding, whose scores the
file has; "gpt2" is a byte-level byte-pair encoding, whose merges it has, and which splits a text first as
`tokenizer.ggml.pre` says.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.files import write_json
from ...common.shown import shown
from .reader import GGUFHeader
from .settings import Settings

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(
    1, 7
)  # types of tokens; SentencePiece's are the same
_SPLIT_DIGITS = {"type": "Digits", "individual_digits": True}
# The regular expressions are those of the models' own tokenizers.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS: Mapping[str, tuple[Sequence[Any], bool]] = {  # name -> (steps before the bytes, whether GPT-2's own follows)
    "default": ((), True),
    "gpt-2": ((), True),
    "smollm": ((_SPLIT_DIGITS,), True),
    "llama-bpe": (({"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},), False),
    "qwen2": (({"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False},), False),
}
_WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word that is a token is not merged from its parts


def write_tokenizer(header: GGUFHeader, folder: Path) -> None:
    """Writes tokenizer.model or tokenizer.json, and tokenizer_config.json.

    Raises:
        ValueError: a vocabulary of another kind, or one that contradicts itself.
    """
    settings = Settings(header)
    kind = settings.get("tokenizer.ggml.model")
    tokens = settings.items("tokenizer.ggml.tokens", str)
    types = settings.items("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise ValueError(f"{header.path}: tokenizer.ggml has {len(tokens)} tokens and {len(types)} types")
    named = _named_tokens(header, settings, tokens)
    if kind == "llama":
        scores = settings.items("tokenizer.ggml.scores", float)
        if len(scores) != len(tokens):
            raise ValueError(f"{header.path}: tokenizer.ggml has {len(tokens)} tokens and {len(scores)} scores")
        types = _with_unknown(types, settings.get("tokenizer.ggml.unknown_token_id", 0))
        prefix = settings.get("tokenizer.ggml.add_space_prefix", True)
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(tokens, scores, types, bool(prefix)))
        special: tuple[int, ...] = (_CONTROL, _UNKNOWN)
        bos = settings.get("tokenizer.ggml.add_bos_token", True)
    elif kind == "gpt2":
        special = (_CONTROL, _UNKNOWN, _USER_DEFINED)
        bos = settings.get("tokenizer.ggml.add_bos_token", settings.get("tokenizer.ggml.pre") == "llama-bpe")
        write_json(
            folder / "tokenizer.json",
            _json_tokenizer(header, settings, tokens, types, named["bos_token"] if bos else None),
        )
    else:
        raise ValueError(f"{header.path}: tokenizer.ggml.model is {shown(kind)}; this runtime reads 'llama' and 'gpt2'")
    added = {i: token for i, token in enumerate(tokens) if types[i] in special}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "InternLM3Tokenizer",
            "added_tokens_decoder": {str(i): _added(token, types[i]) for i, token in added.items()},
            **named,
            "add_bos_token": bool(bos) and named["bos_token"] is not None,
            "add_eos_token": bool(settings.get("tokenizer.ggml.add_eos_token", False)),
            "add_prefix_space": False,  # SentencePiece itself removes the space that it added
            "clean_up_tokenization_spaces": False,
            "chat_template": settings.get("tokenizer.chat_template"),
        },
    )


def sentencepiece_model(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], prefix: bool) -> bytes:
    """A SentencePiece model of byte-pair encoding, in the wire format of Protocol Buffers.

    The fields are those of sentencepiece_model.proto. prefix: whether a text gets a space in front.
    """
    pieces = (
        _bytes(1, token.encode()) + _float(2, score) + _integer(3, type)
        for token, score, type in zip(tokens, scores, types, strict=True)
    )
    trainer = _integer(3, 2) + _integer(4, len(tokens)) + _integer(35, _BYTE in types)  # model_type BPE; byte_fallback
    trainer += _integer(40, types.index(_UNKNOWN)) + _integer(41, -1) + _integer(42, -1) + _integer(43, -1)
    # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = _bytes(1, b"identity") + _integer(3, prefix) + _integer(4, 0) + _integer(5, 1)
    return b"".join(_bytes(1, piece) for piece in pieces) + _bytes(2, trainer) + _bytes(3, normalizer)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _with_unknown(types: list[int], unknown: Any) -> list[int]:
    """The types with exactly one unknown token, which SentencePiece needs."""
    if _UNKNOWN in types or not isinstance(unknown, int) or not 0 <= unknown < len(types):
        return types
    return [_UNKNOWN if i == unknown else type for i, type in enumerate(types)]


def _named_tokens(header: GGUFHeader, settings: Settings, tokens: Sequence[str]) -> dict[str, str | None]:
    named: dict[str, str | None] = {}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        id = settings.get(f"tokenizer.ggml.{key}_token_id")
        if id is not None and not (isinstance(id, int) and 0 <= id < len(tokens)):
            raise ValueError(f"{header.path}: tokenizer.ggml.{key}_token_id is {shown(id)}, of {len(tokens)} tokens")
        named[f"{name}_token"] = None if id is None else tokens[id]
    return named


def _added(token: str, type: int) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": token, **flags, "special": type != _USER_DEFINED}


def _json_tokenizer(
    header: GGUFHeader, settings: Settings, tokens: Sequence[str], types: Sequence[int], bos: str | None
) -> dict[str, Any]:
    """The contents of a tokenizer.json. bos: the token in front of every text."""
    pre = settings.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        known = ", ".join(map(repr, _SPLITS))
        raise ValueError(f"{header.path}: tokenizer.ggml.pre is {shown(pre)}; this runtime splits text as {known} do")
    steps, own = _SPLITS[pre]
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = [i for i, type in enumerate(types) if type in (_CONTROL, _UNKNOWN, _USER_DEFINED)]
    in_front = {"SpecialToken": {"id": bos, "type_id": 0}}
    frame = {
        "type": "TemplateProcessing",
        "single": [in_front, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [in_front, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}} if bos is not None else {},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **_added(tokens[i], types[i])} for i in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, {**bytes_of, "use_regex": own}]},
        "post_processor": frame if bos is not None else None,
        "decoder": {**bytes_of, "use_regex": own},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS_FIRST,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": settings.items("tokenizer.ggml.merges", str),
        },
    }
