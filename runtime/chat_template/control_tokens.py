"""A guard against control tokens in what a user writes: they are encoded as the text that they look like.

As transformers' `sanitize_control_tokens`: the strings that go into a template have every control token marked, so that
the rendered prompt tells the template's own ones from the user's. The markers are private-use characters, and those
that a user writes are dropped.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from ..tokenization.added_tokens import AddedToken

_BEGIN, _END = "\U000f0000", "\U000f0001"


def control_tokens(added: Iterable[AddedToken], listed: Collection[str] | None, literals: str) -> list[str]:
    """The special tokens, and of the others those in the tokenizer's `chat_control_tokens`.

    `listed` is None where the tokenizer has no such list: then those count that stand in the template's `literals`.
    """

    def controls(token: AddedToken) -> bool:
        if listed is not None:
            return token.content in listed
        return token.content in literals and not token.content.isspace()

    return [token.content for token in added if token.special or controls(token)]


def marked(value: Any, tokens: Iterable[str]) -> Any:
    """A copy of JSON data in which the tokens stand between markers, in every string but an object's keys."""
    pattern = _any_of(tokens)

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(rf"{_BEGIN}\g<0>{_END}", value.replace(_BEGIN, "").replace(_END, ""))
        if isinstance(value, Mapping):
            return {key: mark(item) for key, item in value.items()}
        return [mark(item) for item in value] if isinstance(value, (list, tuple)) else value

    return mark(value)


def encode_marked(
    prompt: str, added: Mapping[str, int], encode: Callable[[str], list[int]], encode_plain: Callable[[str], list[int]]
) -> list[int]:
    """The ids of a prompt with marks: what stands between two is encoded by `encode_plain`, all else by `encode`.

    A marker without its partner (the template took a string apart) is dropped, and still parts the text on its sides.

    Raises:
        ValueError: plain text of a token that has the token's own id, because the vocabulary's pieces have it too.
    """
    lines = encode("\n")

    def piece(text: str, encode: Callable[[str], list[int]]) -> list[int]:
        # Behind a line break, so that no space is put before a piece from the middle.
        ids = encode("\n" + text)
        return ids[len(lines) :] if ids[: len(lines)] == lines else encode(text)

    # Text and marked tokens by turns; None is in place of a token where a marker stands alone.
    first, *rest = re.split(f"{_BEGIN}({_any_of(added).pattern}){_END}|[{_BEGIN}{_END}]", prompt)
    ids = encode(first)
    for index, text in enumerate(rest):
        if not text:
            continue
        is_token = index % 2 == 0
        new = piece(text, encode_plain if is_token else encode)
        if is_token and added[text] in new:
            raise ValueError(f"sanitize_control_tokens: plain text of {text!r} has the token's id {added[text]} too")
        ids += new
    return ids


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
