"""The text of an answer that may call tools."""

from __future__ import annotations

from typing import Any

from ..tokenization.text_stream import TextStream
from ..tokenization.tokenizer import InternLM3Tokenizer
from .formats import ToolFormat
from .parser import ToolCallParser


class ToolTextStream(TextStream):
    """A TextStream without the calls in its text: `parser` has them. Stop strings are looked for in calls as well.

    Args:
        format, begun: as for ToolCallParser. The special tokens of the format are read even where others are skipped.
        options: of TextStream.
    """

    def __init__(self, tokenizer: InternLM3Tokenizer, format: ToolFormat, begun: bool, **options: Any):
        marks = format.begin + format.end
        kept = [id for token, id in tokenizer.added_tokens_encoder.items() if token in marks]
        super().__init__(tokenizer, kept_tokens=kept, **options)
        self.parser = ToolCallParser(format, begun)

    def push(self, token_id: int) -> str:
        text = self.parser.push(super().push(token_id))
        return text if self.stopped is None else text + self.parser.finish()

    def flush(self) -> str:
        return self.parser.push(super().flush()) + self.parser.finish()
