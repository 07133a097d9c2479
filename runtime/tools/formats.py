"""How a checkpoint writes a call of a tool in its answer."""

from __future__ import annotations

from dataclasses import dataclass

from ..chat_template.render import literals, template_variables


@dataclass(frozen=True)
class ToolFormat:
    """A call is `begin`, a JSON object with the function's name and its arguments, and `end`.

    Attributes:
        begin, end: texts around the object. They may be special tokens.
        name, arguments: the object's keys. An answer may have `arguments` by another format's key: models mix them up.
        signs: texts that the chat template has if it teaches the model this format.
    """

    begin: str
    end: str
    name: str
    arguments: str
    signs: tuple[str, ...]


# InternLM2's and InternLM3's plugins, by InternLM's chat/chat_format.md.
INTERNLM = ToolFormat(
    "<|action_start|><|plugin|>", "<|action_end|>", "name", "parameters", ("<|action_start|>", "<|plugin|>")
)
# Hermes 2 Pro and Qwen 2.5. The second sign leaves out formats with the same tag around something else than JSON.
HERMES = ToolFormat("<tool_call>", "</tool_call>", "name", "arguments", ("<tool_call>", '"arguments"'))
FORMATS = (INTERNLM, HERMES)
ARGUMENT_KEYS = frozenset(format.arguments for format in FORMATS)


def renders_tools(template: str) -> bool:
    """Whether a chat template prints tools itself."""
    return "tools" in template_variables(template)


def format_of(template: str) -> ToolFormat:
    """The format of calls that a chat template teaches; InternLM's where it has no tools, as they are added then.

    Raises ValueError if the template has tools in a format that is not in the table.
    """
    if not renders_tools(template):
        return INTERNLM
    text = literals(template)
    for format in FORMATS:
        if all(sign in text for sign in format.signs):
            return format
    known = " and ".join(f"{format.begin}{{...}}{format.end}" for format in FORMATS)
    raise ValueError(
        f"the checkpoint's chat template teaches a format of tool calls that is not known here (known are {known}): "
        "render the prompt by tokenizer.apply_chat_template(messages, tools=...), give it to generate, and read the "
        "calls from its text"
    )
