"""The tokenizer of a GGUF file, as the files of a checkpoint.

llama.cpp knows a vocabulary by `tokenizer.ggml.model`: "llama" is SentencePiece's byte-pair encoding, whose scores the
file has; "gpt2" is a byte-level byte-pair encoding, whose merges it has, and which splits a text first as
`tokenizer.ggml.pre` says.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
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
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word that is a token is not merged from its parts


def write_tokenizer(header: GGUFHeader, folder: Path) -> None:
    """Writes tokenizer.model or tokenizer.json, and tokenizer_config.json.

    Raises:
        ValueError: a vocabulary of another kind, or one that contradicts itself.
    """
    settings = Settings(header)
    kind = settings.get("tokenizer.ggml.model", str)
    if kind not in ("llama", "gpt2"):
        raise ValueError(f"{header.path}: tokenizer.ggml.model is {shown(kind)}; this runtime reads 'llama' and 'gpt2'")
    tokens = settings.items("tokenizer.ggml.tokens", str)
    types = settings.items("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise ValueError(f"{header.path}: tokenizer.ggml has {len(tokens)} tokens and {len(types)} types")
    _check_different(header, tokens)
    ids = {name: settings.token_id(key) for name, key in _NAMED.items()}
    named = {f"{name}_token": None if id is None else tokens[id] for name, id in ids.items()}
    eos = settings.get("tokenizer.ggml.add_eos_token", bool, False)
    if kind == "llama":
        scores = settings.items("tokenizer.ggml.scores", float)
        if len(scores) != len(tokens):
            raise ValueError(f"{header.path}: tokenizer.ggml has {len(tokens)} tokens and {len(scores)} scores")
        if _UNKNOWN not in types:  # SentencePiece needs one
            types = [*types]
            types[ids["unk"] or 0] = _UNKNOWN
        prefix = settings.get("tokenizer.ggml.add_space_prefix", bool, True)
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(tokens, scores, types, prefix))
        special: tuple[int, ...] = (_CONTROL, _UNKNOWN)
        bos = settings.get("tokenizer.ggml.add_bos_token", bool, True)
    else:
        special = (_CONTROL, _UNKNOWN, _USER_DEFINED)
        pre = settings.get("tokenizer.ggml.pre", str, "default")
        if pre not in _SPLITS:
            known = ", ".join(map(repr, _SPLITS))
            raise ValueError(
                f"{header.path}: tokenizer.ggml.pre is {shown(pre)}; this runtime splits text as {known} do"
            )
        bos = settings.get("tokenizer.ggml.add_bos_token", bool, pre == "llama-bpe")
        ends = named["bos_token"] if bos else None, named["eos_token"] if eos else None
        merges = settings.items("tokenizer.ggml.merges", str)
        _check_merges(header, merges, {*tokens})
        write_json(folder / "tokenizer.json", _json_tokenizer(pre, tokens, types, merges, *ends))
    added = {
        i: token
        for i, token in enumerate(tokens)
        # SentencePiece writes "\u2581" for spaces before it looks for pieces, so it never finds one with a space.
        if types[i] in special or (types[i] == _USER_DEFINED and " " in token)
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "InternLM3Tokenizer",
            "added_tokens_decoder": {str(i): _added(token, types[i]) for i, token in added.items()},
            **named,
            "add_bos_token": bos and named["bos_token"] is not None,
            "add_eos_token": eos and named["eos_token"] is not None,
            "add_prefix_space": False,  # SentencePiece itself removes the space that it added
            "clean_up_tokenization_spaces": False,
            "chat_template": settings.get("tokenizer.chat_template", str),
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


def _check_different(header: GGUFHeader, tokens: Sequence[str]) -> None:
    """Raises ValueError unless there are tokens, none of them empty and no two alike."""
    first: dict[str, int] = {"": -1}
    for id, token in enumerate(tokens):
        if (other := first.setdefault(token, id)) != id:
            found = f"tokens {other} and {id} are both {shown(token)}" if token else f"token {id} is empty"
            raise ValueError(f"{header.path}: tokenizer.ggml.tokens: {found}")
    if not tokens:
        raise ValueError(f"{header.path}: tokenizer.ggml.tokens is empty")


def _check_merges(header: GGUFHeader, merges: Sequence[str], tokens: Collection[str]) -> None:
    """Raises ValueError unless each merge is of two tokens, and makes one. The library `tokenizers` panics at some."""
    for index, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if (wrong := next((part for part in (left, right, left + right) if part not in tokens), None)) is not None:
            raise ValueError(
                f"{header.path}: tokenizer.ggml.merges: merge {index} is {shown(merge)}, and {shown(wrong)} is no token"
            )


def _added(token: str, type: int) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": token, **flags, "special": type != _USER_DEFINED}


def _json_tokenizer(
    pre: str, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], bos: str | None, eos: str | None
) -> dict[str, Any]:
    """The contents of a tokenizer.json.

    Args:
        pre: how a text is split first.
        tokens, types, merges: of the vocabulary.
        bos, eos: the tokens in front of every text, and behind it.
    """
    steps, own = _SPLITS[pre]
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = [i for i, type in enumerate(types) if type in (_CONTROL, _UNKNOWN, _USER_DEFINED)]
    first, last = ([] if end is None else [{"SpecialToken": {"id": end, "type_id": 0}}] for end in (bos, eos))
    text, second = ({"Sequence": {"id": id, "type_id": type_id}} for type_id, id in enumerate("AB"))
    ends = {end for end in (bos, eos) if end is not None}
    frame = {
        "type": "TemplateProcessing",
        "single": [*first, text, *last],
        "pair": [*first, text, *last, *first, second, *last],
        "special_tokens": {end: {"id": end, "ids": [tokens.index(end)], "tokens": [end]} for end in ends},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **_added(tokens[i], types[i])} for i in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, {**bytes_of, "use_regex": own}]},
        "post_processor": frame if ends else None,
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
            "merges": merges,
        },
    }
