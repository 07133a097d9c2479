"""Encodes control tokens in user input as plain text, so that a user cannot inject them.

Like transformers' `sanitize_control_tokens`. Every control token in the data for a template is put between two
private-use characters, so that in the rendered prompt the template's own control tokens can be told from the user's.
Private-use markers that a user writes are removed.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

_BEGIN, _END = "\U000f0000", "\U000f0001"


def control_tokens(added: Mapping[str, bool], listed: Collection[str] | None, literals: str) -> list[str]:
    """The added tokens that control the model: special ones, and others by the tokenizer's `chat_control_tokens`.

    Args:
        added: added token -> whether it is special.
        listed: `chat_control_tokens`. None if the tokenizer has no such list: then those count that occur in the
            template's `literals`.
    """

    def controls(token: str) -> bool:
        return token in listed if listed is not None else token in literals and not token.isspace()

    return [token for token, special in added.items() if special or controls(token)]


def mark(value: Any, tokens: Iterable[str]) -> Any:
    """A copy of JSON data with markers around the tokens, in every string except the keys of objects.

    Raises ValueError for data that are nested too deeply.
    """
    pattern = _any_of(tokens)

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(rf"{_BEGIN}\g<0>{_END}", value.replace(_BEGIN, "").replace(_END, ""))
        if isinstance(value, Mapping):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, (list, tuple)) else value

    try:
        return marked(value)
    except RecursionError:
        raise ValueError("sanitize_control_tokens: messages or variables are nested too deeply") from None


def encode_marked(
    prompt: str, added: Mapping[str, int], encode: Callable[[str], list[int]], encode_plain: Callable[[str], list[int]]
) -> list[int]:
    """The ids of a prompt with markers: text between two markers by `encode_plain`, everything else by `encode`.

    A marker without its partner (if the template took a string apart) is removed, and the text on its two sides is
    still encoded separately.

    Raises:
        ValueError: plain text of a token encodes to the token's id, because the vocabulary has it as a piece too.
    """
    newline = encode("\n")

    def segment(text: str, encode: Callable[[str], list[int]]) -> list[int]:
        # After a line break, so that a vocabulary that puts a space before every text does not do so in the middle.
        ids = encode("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)

    # Text and marked tokens alternate; for a lone marker the token is None.
    first, *rest = re.split(f"{_BEGIN}({_any_of(added).pattern}){_END}|[{_BEGIN}{_END}]", prompt)
    ids = encode(first)
    for index, text in enumerate(rest):
        if not text:
            continue
        is_token = index % 2 == 0
        new = segment(text, encode_plain if is_token else encode)
        if is_token and added[text] in new:
            raise ValueError(f"sanitize_control_tokens: plain text of {text!r} has the token's id {added[text]} too")
        ids += new
    return ids


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
