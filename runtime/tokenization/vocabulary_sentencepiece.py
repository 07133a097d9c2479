"""The vocabulary of a `tokenizer.model`: SentencePiece's pieces and added tokens.

A text is split at the added tokens, and SentencePiece encodes each segment in between with the normaliser settings of
its file. So a dummy prefix, if the file asks for one, applies to each segment.
"""

import codecs
from collections.abc import Mapping
from pathlib import Path

import sentencepiece

from ..common.shown import one_line
from .added_tokens import AddedToken, AddedTokens
from .vocabulary import Speller, Vocabulary, check_text

_SPACE = "\u2581"  # SentencePiece's visible space


class SentencePieceVocabulary(Vocabulary):
    """The vocabulary of a `tokenizer.model`.

    Args:
        path: the SentencePiece model.
        added_tokens: by id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or no SentencePiece model.
    """

    file_name = "tokenizer.model"

    def __init__(self, path: Path, added_tokens: Mapping[int, AddedToken]) -> None:
        self.sp_model = _load(path)
        self.pieces: int = self.sp_model.get_piece_size()
        self.added = AddedTokens()
        for id, token in added_tokens.items():
            self.added.add(id, token)
        # Pieces that are added tokens with another id: it replaces the piece's id in SentencePiece's output.
        self._moved: dict[int, int] = {}
        for content, id in self.added.ids.items():
            piece_id = self._piece_id(content)
            if piece_id is not None and piece_id != id:
                self._moved[piece_id] = id

    def save(self, before: list[str], after: list[str]) -> bytes:
        return self.sp_model.serialized_model_proto()

    def __len__(self) -> int:
        return max(self.pieces, max(self.added.by_id, default=-1) + 1)

    def _piece_id(self, content: str) -> int | None:
        id = self.sp_model.piece_to_id(content)
        return id if self.sp_model.id_to_piece(id) == content else None

    def find(self, content: str) -> int | None:
        added = self.added.ids.get(content)
        return self._piece_id(content) if added is None else added

    def add(self, token: AddedToken) -> None:
        if token.content not in self.added.ids:
            piece_id = self._piece_id(token.content)
            self.added.add(len(self) if piece_id is None else piece_id, token)

    def token(self, id: int) -> str:
        added = self.added.by_id.get(id)
        if added is not None:
            return added.content
        return self.sp_model.id_to_piece(id) if id < self.pieces else ""

    def token_bytes(self) -> list[bytes | None]:
        model, ids = self.sp_model, list(range(self.pieces))
        pieces, are_bytes = model.id_to_piece(ids), model.is_byte(ids)
        kinds = zip(model.is_control(ids), model.is_unknown(ids), model.is_unused(ids), strict=True)
        table: list[bytes | None] = []
        for piece, is_byte, kind in zip(pieces, are_bytes, kinds, strict=True):
            if any(kind) or piece in self.added.ids:
                table.append(None)
            else:
                table.append(bytes.fromhex(piece[3:5]) if is_byte else piece.replace(_SPACE, " ").encode())
        return table + [None] * (len(self) - self.pieces)

    def ids(self) -> dict[str, int]:
        pieces = self.sp_model.id_to_piece(list(range(self.pieces)))
        return {**{piece: id for id, piece in enumerate(pieces)}, **self.added.ids}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for segment, _ in self.added.split(check_text(text)):
            ids += [segment] if isinstance(segment, int) else self.encode_plain(segment)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        ids = self.sp_model.encode(check_text(text))
        return [self._moved.get(id, id) for id in ids] if self._moved else ids

    def spans(self, text: str) -> list[tuple[int, int, int]]:
        spans = []
        for segment, start in self.added.split(check_text(text)):
            if isinstance(segment, int):
                spans.append((segment, start, start + len(self.added.by_id[segment].content)))
                continue
            pieces = self.sp_model.encode(segment, return_type="offset_mapping")
            following, part = 0, []
            for id, (begin, end) in zip(reversed(pieces["ids"]), reversed(pieces["offsets"]), strict=True):
                # Only the last byte of a character has its offsets, and a dummy prefix has none.
                following = end if end > begin else max(following, end)
                part.append((self._moved.get(id, id), start + begin, start + following))
            spans += reversed(part)
        return spans

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        for segment, _ in self.added.split(check_text(text)):
            if isinstance(segment, int):
                tokens.append(self.added.by_id[segment].content)
            else:
                tokens += self.sp_model.encode(segment, out_type=str)
        return tokens

    def speller(self, drop_first_space: bool) -> Speller:
        return PieceSpeller(self, drop_first_space)


def _one_byte(error: UnicodeError) -> tuple[str, int]:
    """A codec error handler: like SentencePiece, replaces each byte that belongs to no character by U+FFFD."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error("sentencepiece", _one_byte)


class PieceSpeller:
    """Spells added tokens as they are, and each run of pieces between them as SentencePiece decodes it.

    In a run, bytes become characters. Any other piece has the same text at every position except the start of a run:
    there a model that adds a space before a text (`add_dummy_prefix`) drops the first space, and one that removes
    spaces (`remove_extra_whitespaces`) drops all of them. Denormalisation rules, which no language
    model has, are not applied.

    Args:
        drop_first_space: drop the space of the first token, whatever the model does.
    """

    def __init__(self, vocabulary: SentencePieceVocabulary, drop_first_space: bool):
        self._added = vocabulary.added.ids
        self._model = vocabulary.sp_model
        self._drops_every_space = self._model.decode([_SPACE, _SPACE]) == ""
        self._drop_first_space = drop_first_space
        self._at_start = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("sentencepiece")

    def push(self, token: str) -> str:
        if self._drop_first_space:
            self._drop_first_space = False
            token = token.removeprefix(_SPACE)
        if token in self._added:
            self._at_start = True
            return self.flush() + token
        id = self._model.piece_to_id(token)
        byte = self._model.is_byte(id)
        # Bytes wait until their character is complete; any other piece ends them.
        text = self._utf8.decode(bytes.fromhex(token[3:5]) if byte else b"", final=not byte)
        self._at_start = self._at_start and not text
        return text if byte else text + self._piece(token, id)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _piece(self, token: str, id: int) -> str:
        if self._at_start:
            text = self._model.decode([token])
            self._at_start = not text and (token != _SPACE or self._drops_every_space)
            return text
        if self._model.is_control(id) or self._model.is_unknown(id):
            return self._model.decode([token])
        return token.replace(_SPACE, " ")


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise ValueError(
            f"{path} is damaged, or no SentencePiece model; fetch it again ({one_line(str(error))})"
        ) from error
    if processor.unk_id() < 0:  # a null character, which the library takes for an unused piece
        raise ValueError(f"{path} has no unknown token, which a SentencePiece model needs; fetch it again")
    return processor
