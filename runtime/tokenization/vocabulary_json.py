"""A vocabulary of a `tokenizer.json`, which the `tokenizers` library reads: what transformers 5 saves."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from .added_tokens import AddedToken, AddedTokens
from .vocabulary import Speller, Vocabulary, check_text

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class JsonVocabulary(Vocabulary):
    """The vocabulary of a `tokenizer.json`.

    Args:
        path: the file.
        added_tokens: by id; those that the file has none of come behind its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is none of the library's files, or it would give an added token another id.
    """

    file_name = "tokenizer.json"

    def __init__(self, path: Path, added_tokens: Mapping[int, AddedToken]) -> None:
        content = path.read_bytes()
        try:
            self._library = tokenizers.Tokenizer.from_buffer(content)
            framed, text = self._library.encode("a").ids, self.encode("a")
        except BaseException as error:  # the library raises nothing more precise, and panics past Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{path} is no tokenizer, or it is damaged; fetch it again ({error})") from None
        start = next((i for i in range(len(framed) + 1) if framed[i : i + len(text)] == text), None)
        if start is None:
            raise ValueError(f"{path} has a post-processor that changes more than a text's two ends")
        self.frame = framed[:start], framed[start + len(text) :]
        self._library.no_truncation()
        self._library.no_padding()
        self.pieces = max(self._library.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        for id, token in sorted(added_tokens.items()):
            self._add(token)
            if (own := self.find(token.content)) != id:
                raise ValueError(f"{path} gives {token.content!r} the id {own}, and added_tokens_decoder the id {id}")
        self._mirror()

    def _add(self, token: AddedToken) -> None:
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        self._library.add_tokens([tokenizers.AddedToken(token.content, **flags)])

    def _mirror(self) -> None:
        self.added = AddedTokens()
        for id, token in self._library.get_added_tokens_decoder().items():
            flags = (token.lstrip, token.rstrip, token.single_word, token.normalized, token.special)
            self.added.add(id, AddedToken(token.content, *flags))

    def save(self, before: list[str], behind: list[str]) -> bytes:
        if ([*map(self.find, before)], [*map(self.find, behind)]) != self.frame:
            ends = [(token, self.find(token)) for token in {*before, *behind}]
            single = [*before, "$A", *behind]
            pair = [*single, *(f"{token}:1" for token in (*before, "$B", *behind))]
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

    def ids(self) -> dict[str, int]:
        return self._library.get_vocab()

    def encode(self, text: str) -> list[int]:
        return self._library.encode(check_text(text), add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        # The library's own steps, of which its added tokens are none.
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
    """As the file's decoder spells; that knows itself what to do with a first space.

    A token is spelt behind the one before it, which is spelt alone once more: what is new is the difference.
    """

    def __init__(self, decoder: Any):
        self._decode = " ".join if decoder is None else decoder.decode
        self._last: list[str] = []
        self._waiting: list[str] = []

    def push(self, token: str) -> str:
        if not token:
            return ""
        self._waiting.append(token)
        # One byte that belongs to no character makes U+FFFD of all the bytes beside it: they wait for their end.
        if _BYTE.fullmatch(token) or self._new().endswith("\ufffd"):
            return ""
        return self.flush()

    def flush(self) -> str:
        text = self._new()
        self._last, self._waiting = self._waiting[-1:] or self._last, []
        return text

    def _new(self) -> str:
        return self._decode(self._last + self._waiting)[len(self._decode(self._last)) :]
