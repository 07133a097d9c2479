"""What a tokenizer asks of its vocabulary, whichever file that comes from."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from .added_tokens import AddedToken, AddedTokens


class Speller(Protocol):
    """From tokens to text, token after token. All that `push` and `flush` return together is the text."""

    def push(self, token: str) -> str:
        """The text that is certain with this token: no character is unfinished."""

    def flush(self) -> str:
        """The rest, when no token follows: each byte of an unfinished character shows as U+FFFD."""


class Vocabulary(ABC):
    """Text to ids, and ids to tokens and back; nothing of prompts, frames or batches.

    file_name: what its file is called in a checkpoint. pieces: how many ids are its own. added: its added tokens.
    frame: the ids that its file puts before and behind a text; None where it says nothing of that.
    """

    file_name: ClassVar[str]
    frame: tuple[list[int], list[int]] | None = None
    added: AddedTokens
    pieces: int

    @abstractmethod
    def save(self, before: list[str], behind: list[str]) -> bytes:
        """The content of its file; where that frames a text, with these tokens."""

    @abstractmethod
    def __len__(self) -> int:
        """One more than the largest id."""

    @abstractmethod
    def find(self, content: str) -> int | None:
        """The id of a token, an added one before a piece; None where it has none."""

    @abstractmethod
    def token(self, id: int) -> str:
        """An id that nothing is known of (an unused row of the embedding) is ""."""

    @abstractmethod
    def add(self, token: AddedToken) -> None:
        """Makes `token` an added token, if it is none yet, with the id it has or else the next one."""

    @abstractmethod
    def ids(self) -> dict[str, int]:
        """Every token with its id."""

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def encode_plain(self, text: str) -> list[int]:
        """As a text without any added token, whatever it looks like."""

    @abstractmethod
    def spans(self, text: str) -> list[tuple[int, int, int]]:
        """`encode` with each id's characters: (id, start, end). A piece of no character belongs to the next one."""

    @abstractmethod
    def tokenize(self, text: str) -> list[str]: ...

    @abstractmethod
    def speller(self, drop_first_space: bool) -> Speller:
        """For one text; it leaves out the first token's space where that is asked for, or where its library does."""


def check_text(text: Any) -> str:
    """`text`, if it is a string of valid Unicode. Raises TypeError or ValueError."""
    if not isinstance(text, str):
        raise TypeError(f"a text must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of a text is a lone surrogate: no valid Unicode") from error
    return text
