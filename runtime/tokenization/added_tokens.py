"""Added tokens such as `<|im_start|>`: strings with ids of their own, besides the pieces of the vocabulary."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..common.checks import is_int, is_unicode
from ..common.shown import shown

MAX_ID = 2**31 - 1  # of an int32 row number


@dataclass(frozen=True)
class AddedToken:
    """One entry of tokenizer_config.json's added_tokens_decoder.

    Attributes:
        content: the token's text.
        lstrip, rstrip: drop white space before or after the token in a text.
        single_word: match only between spaces or the ends of the text.
        normalized: kept for the file only, since texts are split at tokens before SentencePiece normalises them.
        special: left out by `decode(skip_special_tokens=True)`.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = True

    @classmethod
    def parse(cls, value: Any, where: str) -> "AddedToken":
        """A token from a string, a dict with `content` and flags, or an AddedToken of another library with these.

        Raises ValueError, naming `where`.
        """
        if isinstance(value, cls):
            return value
        fields = {"content": value} if isinstance(value, str) else value
        if hasattr(value, "content"):
            fields = {name: getattr(value, name) for name in cls.__dataclass_fields__ if hasattr(value, name)}
        if not isinstance(fields, dict) or not isinstance(fields.get("content"), str) or not fields["content"]:
            raise ValueError(f"{where}: a token is a non-empty string or a dict with its 'content', not {shown(value)}")
        if not is_unicode(fields["content"]):
            raise ValueError(f"{where}: the token {shown(fields['content'])} has a lone surrogate: not valid Unicode")
        flags = {name: fields[name] for name in cls.__dataclass_fields__ if name != "content" and name in fields}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{where}: {shown(name)} must be true or false, not {shown(flag)}")
        return cls(fields["content"], **flags)


def parse_added_tokens(decoder: Any) -> dict[int, AddedToken]:
    """added_tokens_decoder with integer ids. Raises ValueError for an invalid id or token."""
    if not isinstance(decoder, Mapping):
        raise ValueError(f"added_tokens_decoder must be a dict, not {shown(decoder)}")
    return parse_pairs(decoder.items(), "added_tokens_decoder")


def parse_pairs(pairs: Iterable[tuple[Any, Any]], name: str) -> dict[int, AddedToken]:
    """Added tokens by id, from (id, token) as files have them. Raises ValueError, naming `name`, for an invalid one."""
    tokens: dict[int, AddedToken] = {}
    for key, value in pairs:
        where = f"{name}[{shown(key)}]"
        token = AddedToken.parse(value, where)
        digits = isinstance(key, str) and key.isdecimal() and len(key) <= len(str(MAX_ID))
        id = int(key) if digits else key
        if not is_int(id) or not 0 <= id <= MAX_ID:
            raise ValueError(f"{where}, {shown(token.content)}: an id must be a whole number from 0 to {MAX_ID}")
        if tokens.setdefault(id, token).content != token.content:
            raise ValueError(f"{where}: {shown(tokens[id].content)} and {shown(token.content)} have the same id")
    return tokens


class AddedTokens:
    """The added tokens of a vocabulary: lookup by id and by text, and splitting of texts at them."""

    def __init__(self) -> None:
        self.by_id: dict[int, AddedToken] = {}
        self.ids: dict[str, int] = {}
        self._pattern: re.Pattern[str] | None = None

    def add(self, id: int, token: AddedToken) -> None:
        """Adds a token, replacing the one with this id."""
        replaced = self.by_id.get(id)
        if replaced is not None:
            del self.ids[replaced.content]
        self.by_id[id] = token
        self.ids[token.content] = id
        self._pattern = None

    def split(self, text: str) -> Iterator[tuple[str | int, int]]:
        """Yields (segment, position) for each segment of a text: the id of an added token, or the text in between.

        The leftmost token wins, and of those that start there the longest.
        """
        start, strip_left = 0, False
        for match in self._regex().finditer(text):
            id = self.ids[match.group()]
            token = self.by_id[id]
            if token.single_word and not _stands_alone(text, match):
                continue
            yield from _between(text, start, match.start(), strip_left, token.lstrip)
            yield id, match.start()
            start, strip_left = match.end(), token.rstrip
        yield from _between(text, start, len(text), strip_left, False)

    def _regex(self) -> re.Pattern[str]:
        if self._pattern is None:
            longest_first = sorted(self.ids, key=len, reverse=True)
            self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        return self._pattern

    def to_json(self) -> dict[str, dict[str, Any]]:
        """As in tokenizer_config.json: {"128131": {"content": "<|im_end|>", "lstrip": false, ...}}."""
        return {str(id): asdict(token) for id, token in sorted(self.by_id.items())}


def _between(text: str, start: int, end: int, strip_left: bool, strip_right: bool) -> Iterator[tuple[str, int]]:
    """Yields text[start:end] with its position, stripped on the given sides, unless it is empty."""
    segment = text[start:end].rstrip() if strip_right else text[start:end]
    kept = segment.lstrip() if strip_left else segment
    if kept:
        yield kept, start + len(segment) - len(kept)


def _stands_alone(text: str, match: re.Match[str]) -> bool:
    start, end = match.span()
    return (start == 0 or text[start - 1] == " ") and (end == len(text) or text[end] == " ")
