"""The vocabulary of a `tokenizer.json`, the format of the `tokenizers` library, which transformers 5 saves."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from ..common.shown import one_line, shown
from .added_tokens import AddedToken, AddedTokens
from .vocabulary import Speller, Vocabulary, check_text

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# How a byte-level vocabulary writes bytes: GPT-2 gave those that print as themselves the same character, and the others
# in order the characters from 256 on.
_PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_BYTES = {
    **{chr(byte): byte for byte in _PRINTED},
    **{chr(256 + place): byte for place, byte in enumerate(sorted({*range(256)}.difference(_PRINTED)))},
}


class JsonVocabulary(Vocabulary):
    """The vocabulary of a `tokenizer.json`.

    Args:
        path: the file.
        added_tokens: by id. Those that the file lacks get the ids after its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or would give an added token another id.
    """

    file_name = "tokenizer.json"

    def __init__(self, path: Path, added_tokens: Mapping[int, AddedToken]) -> None:
        content = path.read_bytes()
        try:
            self._library = tokenizers.Tokenizer.from_buffer(content)
            framed, text = self._library.encode("a").ids, self.encode("a")
        except BaseException as error:  # the library raises plain Exception, and panics with a BaseException
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"{path} is no tokenizer, or it is damaged; fetch it again ({one_line(str(error))})"
            ) from None
        start = next((i for i in range(len(framed) + 1) if framed[i : i + len(text)] == text), None)
        if start is None:
            raise ValueError(f"{path} has a post-processor that changes more than the two ends of a text")
        self.frame = framed[:start], framed[start + len(text) :]
        self._library.no_truncation()
        self._library.no_padding()
        self.pieces = max(self._library.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        for id, token in sorted(added_tokens.items()):
            self._add(token)
            if (own := self.find(token.content)) != id:
                raise ValueError(
                    f"{path} gives {shown(token.content)} the id {own}, and added_tokens_decoder the id {id}"
                )
        self._mirror()

    def _add(self, token: AddedToken) -> None:
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        self._library.add_tokens([tokenizers.AddedToken(token.content, **flags)])

    def _mirror(self) -> None:
        self.added = AddedTokens()
        for id, token in self._library.get_added_tokens_decoder().items():
            flags = (token.lstrip, token.rstrip, token.single_word, token.normalized, token.special)
            self.added.add(id, AddedToken(token.content, *flags))

    def save(self, before: list[str], after: list[str]) -> bytes:
        if ([*map(self.find, before)], [*map(self.find, after)]) != self.frame:
            ends = [(token, self.find(token)) for token in {*before, *after}]
            single = [*before, "$A", *after]
            pair = [*single, *(f"{token}:1" for token in (*before, "$B", *after))]
            self._library.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
        return self._library.to_str(pretty=True).encode()

    def __len__(self) -> int:
        return max(self.pieces, max(self.added.by_id, default=-1) + 1)

    def find(self, content: str) -> int | None:
        return self._library.token_to_id(content)

    def token(self, id: int) -> str:
        return (self._library.id_to_token(id) if id < len(self) else None) or ""

    def add(self, token: AddedToken) -> None:
        if token.content not in self.added.ids:
            self._add(token)
            self._mirror()

    def token_bytes(self) -> list[bytes | None]:
        decoder = self._library.decoder
        byte_level, byte_fallback = (name in str(decoder) for name in ("ByteLevel(", "ByteFallback("))
        decode = " ".join if decoder is None else decoder.decode
        before = decode(["a"])

        def bytes_of(token: str) -> bytes | None:
            if not token or token in self.added.ids:
                return None
            if byte_level:
                return bytes(map(_BYTES.__getitem__, token)) if _BYTES.keys() >= {*token} else None
            if byte_fallback and _BYTE.fullmatch(token):
                return bytes.fromhex(token[3:5])
            return decode(["a", token]).removeprefix(before).encode()

        return [bytes_of(self.token(id)) for id in range(len(self))]

    def ids(self) -> dict[str, int]:
        return self._library.get_vocab()

    def encode(self, text: str) -> list[int]:
        return self._library.encode(check_text(text), add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        # The library's steps, without the one that recognises added tokens.
        library = self._library
        normalized = check_text(text) if library.normalizer is None else library.normalizer.normalize_str(text)
        splits = [normalized]
        if library.pre_tokenizer is not None:
            splits = [split for split, _ in library.pre_tokenizer.pre_tokenize_str(normalized)]
        return [token.id for split in splits for token in library.model.tokenize(split)]

    def spans(self, text: str) -> list[tuple[int, int, int]]:
        encoding = self._library.encode(check_text(text), add_special_tokens=False)
        return [(id, start, end) for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def tokenize(self, text: str) -> list[str]:
        return self._library.encode(check_text(text), add_special_tokens=False).tokens

    def speller(self, drop_first_space: bool) -> Speller:
        return LibrarySpeller(self._library.decoder)


class LibrarySpeller:
    """Decodes with the file's decoder, which handles the first space itself.

    The text of a token is the difference between decoding it together with the previous token, and decoding only that.
    """

    def __init__(self, decoder: Any):
        self._decode = " ".join if decoder is None else decoder.decode
        self._last: list[str] = []
        self._waiting: list[str] = []

    def push(self, token: str) -> str:
        if not token:
            return ""
        self._waiting.append(token)
        # A byte that belongs to no character turns the bytes beside it into U+FFFD: a run of bytes waits for its end.
        if _BYTE.fullmatch(token) or self._new().endswith("\ufffd"):
            return ""
        return self.flush()

    def flush(self) -> str:
        text = self._new()
        self._last, self._waiting = self._waiting[-1:] or self._last, []
        return text

    def _new(self) -> str:
        return self._decode(self._last + self._waiting)[len(self._decode(self._last)) :]
