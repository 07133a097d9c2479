"""The interface of vocabularies, for any file format."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from .added_tokens import AddedToken, AddedTokens


class Speller(Protocol):
    """Makes one text of tokens, token by token. The text is the concatenation of all that `push` and `flush` return."""

    def push(self, token: str) -> str:
        """The text that becomes final with this token: whole characters only."""

    def flush(self) -> str:
        """The rest of the text after the last token. Each byte of an incomplete character becomes U+FFFD."""


class Vocabulary(ABC):
    """Text to ids, and ids to tokens and back. Special tokens of a prompt and batches are the tokenizer's.

    Attributes:
        file_name: the name of its file in a checkpoint.
        pieces: number of ids without added tokens.
        added: the added tokens.
        frame: the ids that its file puts (before, after) a text; None if the file does not define them.
    """

    file_name: ClassVar[str]
    frame: tuple[list[int], list[int]] | None = None
    added: AddedTokens
    pieces: int

    @abstractmethod
    def save(self, before: list[str], after: list[str]) -> bytes:
        """The content of its file. If the file defines a frame, `before` and `after` become the tokens of it."""

    @abstractmethod
    def __len__(self) -> int:
        """One more than the largest id."""

    @abstractmethod
    def find(self, content: str) -> int | None:
        """The id of a token, or None. Added tokens take precedence over pieces."""

    @abstractmethod
    def token(self, id: int) -> str:
        """The token of an id; "" for an unused row of the embedding."""

    @abstractmethod
    def token_bytes(self) -> list[bytes | None]:
        """For each id the bytes that its token adds inside a text; None for an added token and for what is no text."""

    @abstractmethod
    def add(self, token: AddedToken) -> None:
        """Makes `token` an added token unless it is one, with the id of its piece, else the next free id."""

    @abstractmethod
    def ids(self) -> dict[str, int]:
        """All tokens: token -> id."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, in which added tokens are recognised."""

    @abstractmethod
    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text, in which added tokens are not recognised."""

    @abstractmethod
    def spans(self, text: str) -> list[tuple[int, int, int]]:
        """Like `encode`, with each id's characters: (id, start, end). A piece without characters has the next one's."""

    @abstractmethod
    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""

    @abstractmethod
    def speller(self, drop_first_space: bool) -> Speller:
        """A new speller for one text. `drop_first_space`: leave out the space of the first token."""


def check_text(text: Any) -> str:
    """`text`, if it is a string of valid Unicode. Raises TypeError or ValueError."""
    if not isinstance(text, str):
        raise TypeError(f"a text must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of a text is a lone surrogate: not valid Unicode") from error
    return text
