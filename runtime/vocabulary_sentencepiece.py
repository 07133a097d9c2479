"""A vocabulary of SentencePiece's pieces and of the added tokens over and beside them.

A text is split at the added tokens, and SentencePiece encodes every segment between them by itself with the
normaliser settings of its own file. A dummy prefix, where the file asks for one, thus applies to each segment.
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import sentencepiece

from .added_tokens import AddedToken, AddedTokens
from .vocabulary import Vocabulary, check_text

_SPACE = "\u2581"  # SentencePiece's visible space


class SentencePieceVocabulary(Vocabulary):
    """The vocabulary of a `tokenizer.model`.

    Args:
        path: the SentencePiece model.
        added_tokens: by id.

    Raises:
        FileNotFoundError: no such file. ValueError: it is no SentencePiece model, or it is damaged.
    """

    file_name = "tokenizer.model"

    def __init__(self, path: Path, added_tokens: Mapping[int, AddedToken]) -> None:
        self.sp_model = _load(path)
        self.pieces: int = self.sp_model.get_piece_size()
        self.added = AddedTokens()
        for id, token in added_tokens.items():
            self.added.add(id, token)
        # Pieces that have another id as added tokens: that one wins, wherever SentencePiece yields the piece.
        self._moved: dict[int, int] = {}
        for content, id in self.added.ids.items():
            piece_id = self._piece_id(content)
            if piece_id is not None and piece_id != id:
                self._moved[piece_id] = id

    def save(self, before: list[str], behind: list[str]) -> bytes:
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
                # Of the bytes of one character only the last one has it, and a dummy prefix has none.
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

    def text(self, tokens: Iterable[str], drop_first_space: bool) -> str:
        """Added tokens as they are, the runs of pieces between them as SentencePiece decodes them.

        SentencePiece itself drops the dummy prefix of a run; `drop_first_space` is for the very first token.
        """
        tokens = list(tokens)
        if tokens and drop_first_space:
            tokens[0] = tokens[0].removeprefix(_SPACE)
        text = ""
        for is_added, run in itertools.groupby(tokens, self.added.ids.__contains__):
            pieces = list(run)
            text += "".join(pieces) if is_added else self.sp_model.decode(pieces)
        return text


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path} is no SentencePiece model, or it is damaged; fetch it again ({error})") from error
    return processor
