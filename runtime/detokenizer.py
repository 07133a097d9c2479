"""From tokens to text: `decode` is this, token after token, so that a text reads the same at once and as it comes."""

import codecs
from collections.abc import Iterable

from .clean_up import CleanUp
from .vocabulary import SPACE, Vocabulary


def _one_byte(error: UnicodeError) -> tuple[str, int]:
    """SentencePiece shows every byte that belongs to no character as a U+FFFD of its own."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error("sentencepiece", _one_byte)


class Detokenizer:
    """Added tokens as they are, and the runs of pieces between them as SentencePiece decodes each.

    In a run, bytes become characters; every other piece has one text wherever it stands, but for the run's start: there
    a model that adds a space before a text (`add_dummy_prefix`) leaves the first one out, and one that removes spaces
    (`remove_extra_whitespaces`) all of them. Rules of denormalisation, which no language model has, are not applied.

    Args:
        drop_first_space: leave out the first token's space, whatever the model does.
        clean_up: also remove spaces before English punctuation.
    """

    def __init__(self, vocabulary: Vocabulary, drop_first_space: bool, clean_up: bool):
        self._added = vocabulary.added.ids
        self._model = vocabulary.sp_model
        self._drops_every_space = self._model.decode([SPACE, SPACE]) == ""
        self._drop_first_space = drop_first_space
        self._at_start = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("sentencepiece")
        self._clean_up = CleanUp() if clean_up else None

    def text(self, tokens: Iterable[str]) -> str:
        """All of it, of all tokens."""
        return self._clean("".join(map(self._spell, tokens))) + self.flush()

    def push(self, token: str) -> str:
        """The text that is certain with this token: no character is unfinished, no space may still be cleaned away."""
        return self._clean(self._spell(token))

    def flush(self) -> str:
        """The rest, when no token follows: each byte of an unfinished character shows as U+FFFD."""
        text = self._clean(self._utf8.decode(b"", final=True))
        return text + self._clean_up.flush() if self._clean_up else text

    def _clean(self, text: str) -> str:
        return self._clean_up.push(text) if self._clean_up else text

    def _spell(self, token: str) -> str:
        if self._drop_first_space:
            self._drop_first_space = False
            token = token.removeprefix(SPACE)
        if token in self._added:
            self._at_start = True
            return self._utf8.decode(b"", final=True) + token
        id = self._model.piece_to_id(token)
        byte = self._model.is_byte(id)
        # Bytes wait for their character, and any other piece says that there is none.
        text = self._utf8.decode(bytes.fromhex(token[3:5]) if byte else b"", final=not byte)
        self._at_start = self._at_start and not text
        return text if byte else text + self._piece(token, id)

    def _piece(self, token: str, id: int) -> str:
        if self._at_start:
            text = self._model.decode([token])
            self._at_start = not text and (token != SPACE or self._drops_every_space)
            return text
        if self._model.is_control(id) or self._model.is_unknown(id):
            return self._model.decode([token])
        return token.replace(SPACE, " ")
