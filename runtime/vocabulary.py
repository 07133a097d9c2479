"""A vocabulary: SentencePiece's pieces and the added tokens over and beside them.

A text is split at the added tokens, and SentencePiece encodes every segment between them by itself with the
normaliser settings of its own file. A dummy prefix, where the file asks for one, thus applies to each segment.
"""

from collections.abc import Mapping
from typing import Any

import sentencepiece

from .added_tokens import AddedToken, AddedTokens

SPACE = "\u2581"  # SentencePiece's visible space


class Vocabulary:
    """Text to ids, and ids to tokens and back; nothing of prompts, frames or batches.

    Args:
        sp_model: the loaded SentencePiece model.
        added_tokens_decoder: id (a number, or a string of one) to token, as in tokenizer_config.json.
    """

    def __init__(self, sp_model: sentencepiece.SentencePieceProcessor, added_tokens_decoder: Mapping[Any, Any]) -> None:
        self.sp_model = sp_model
        self.pieces: int = sp_model.get_piece_size()
        self.added = AddedTokens()
        for key, value in added_tokens_decoder.items():
            where = f"added_tokens_decoder[{key!r}]"
            if not str(key).isdecimal():
                raise ValueError(f"{where}: an id must be a whole number of at least 0")
            self.added.add(int(key), AddedToken.parse(value, where))
        # Pieces that have another id as added tokens: that one wins, wherever SentencePiece yields the piece.
        self._moved: dict[int, int] = {}
        for content, id in self.added.ids.items():
            piece_id = self._piece_id(content)
            if piece_id is not None and piece_id != id:
                self._moved[piece_id] = id

    def __len__(self) -> int:
        """One more than the largest id."""
        return max(self.pieces, max(self.added.by_id, default=-1) + 1)

    def _piece_id(self, content: str) -> int | None:
        id = self.sp_model.piece_to_id(content)
        return id if self.sp_model.id_to_piece(id) == content else None

    def add(self, token: AddedToken) -> str:
        """Makes `token` an added token, if it is none yet, with its piece's id or else the next one."""
        if token.content not in self.added.ids:
            piece_id = self._piece_id(token.content)
            self.added.add(len(self) if piece_id is None else piece_id, token)
        return token.content

    def id(self, token: str) -> int:
        """Added tokens win over pieces; an unknown token has SentencePiece's id for unknown ones."""
        added = self.added.ids.get(token)
        return self.sp_model.piece_to_id(token) if added is None else added

    def token(self, id: int) -> str:
        """An id that nothing is known of (an unused row of the embedding) is ""."""
        added = self.added.by_id.get(id)
        if added is not None:
            return added.content
        return self.sp_model.id_to_piece(id) if id < self.pieces else ""

    def ids(self) -> dict[str, int]:
        pieces = self.sp_model.id_to_piece(list(range(self.pieces)))
        return {**{piece: id for id, piece in enumerate(pieces)}, **self.added.ids}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for segment in self.added.split(_check(text)):
            if isinstance(segment, int):
                ids.append(segment)
            elif self._moved:
                ids += [self._moved.get(id, id) for id in self.sp_model.encode(segment)]
            else:
                ids += self.sp_model.encode(segment)
        return ids

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        for segment in self.added.split(_check(text)):
            if isinstance(segment, int):
                tokens.append(self.added.by_id[segment].content)
            else:
                tokens += self.sp_model.encode(segment, out_type=str)
        return tokens


def _check(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"a text must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of a text is a lone surrogate: no valid Unicode") from error
    return text
