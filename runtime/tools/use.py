"""What one call of LLM.chat does about tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..sampling.params import SamplingParams
from ..tokenization.tokenizer import InternLM3Tokenizer
from .forced import any_call_schema, call_schema
from .formats import ToolFormat, format_of
from .schemas import Tool, allowed_tools, tool_schemas


@dataclass(frozen=True)
class ToolUse:
    """The tools of a call, and how they are used.

    Attributes:
        schemas: the tools that the prompt has.
        format: how calls in the answer are written; None: there are none to look for.
        forced: the JSON schema of the call that the answer must be; None: it may be anything.
    """

    schemas: list[dict[str, Any]] = field(default_factory=list)
    format: ToolFormat | None = None
    forced: dict[str, Any] | None = None

    @classmethod
    def of(cls, tokenizer: InternLM3Tokenizer, tools: Sequence[Tool] | None, choice: Any) -> ToolUse:
        """The use of `tools` by a `tool_choice`; "none" leaves them out of the prompt.

        Raises ValueError as tool_schemas, allowed_tools and format_of do.
        """
        schemas = tool_schemas(tools)
        allowed = allowed_tools(schemas, choice)
        if not schemas or choice == "none":
            return cls()
        format = format_of(tokenizer.get_chat_template(tools=schemas))
        return cls(schemas, format, None if allowed is None else call_schema(allowed, format))

    @property
    def opening(self) -> str:
        """The beginning of the answer that the prompt already has: the mark that begins a forced call."""
        return "" if self.forced is None or self.format is None else self.format.begin + "\n"

    @property
    def in_place_of_json(self) -> tuple[str, str, str] | None:
        """Calls that an answer may be whose text must be JSON: their marks, and between these the schema of one."""
        if self.format is None or self.forced is not None:
            return None
        return self.format.begin, json.dumps(any_call_schema(self.schemas, self.format)), self.format.end

    def params(self, given: Sequence[SamplingParams]) -> list[SamplingParams]:
        """Settings by which an answer is the forced call, if there is one. It has no text that a form of JSON is about.

        Raises ValueError for other settings that say themselves what the answer may be.
        """
        if self.forced is None:
            return list(given)
        for params in given:
            if params.constraint not in (None, "json_schema", "json_object"):
                raise ValueError(
                    f"{params.constraint} and tool_choice each say what the answer may be; give one of them"
                )
        return [SamplingParams.from_kwargs(params, json_schema=self.forced) for params in given]
