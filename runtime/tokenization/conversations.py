"""Conversations to prompts, as text or as ids, with the chat template of the checkpoint."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..chat_template.control_tokens import control_tokens, encode_marked, mark
from ..chat_template.render import literals, render, render_generated, template_variables
from ..chat_template.tools import function_schema
from ..common.keywords import nearest, reject_unknown
from .batch_encoding import Batcher, span_mask
from .vocabulary import Vocabulary


class Conversations(ABC):
    """The methods of a tokenizer that take messages."""

    chat_template: str | dict[str, str]
    chat_control_tokens: list[str] | None
    _vocabulary: Vocabulary

    @property
    @abstractmethod
    def special_tokens_map(self) -> dict[str, str]: ...

    @abstractmethod
    def _batcher(self, add_special_tokens: bool) -> Batcher: ...

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The Jinja source of a chat template.

        Args:
            chat_template: the name of one of the checkpoint's templates, if it has several, or Jinja source. None: the
                checkpoint's only template, else "tool_use" if `tools` are given, else "default".

        Raises ValueError for None if the checkpoint has several templates and no default.
        """
        named = {"default": self.chat_template} if isinstance(self.chat_template, str) else self.chat_template
        if chat_template is not None:
            return named.get(chat_template, chat_template) if isinstance(self.chat_template, dict) else chat_template
        name = "tool_use" if tools is not None and "tool_use" in named else "default"
        if name not in named:
            raise ValueError(f"the checkpoint has chat templates by the names {', '.join(named)} and no default: "
                             "give chat_template one of them")  # fmt: skip
        return named[name]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = False,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """The prompt of a conversation (a list of messages), or the prompts of a list of conversations.

        Args:
            tools, documents: JSON data for the template; InternLM3's published template reads neither. A tool may be a
                Python function, whose type hints and docstring make its JSON schema: see chat_template.tools.
            chat_template: Jinja source to use instead of the checkpoint's, or the name of one of its templates.
            add_generation_prompt: end with the header of an assistant's message.
            continue_final_message: end inside the last message, so that the model continues it; a string names the
                field to continue, if it is not "content".
            sanitize_control_tokens: encode control tokens in messages, tools, documents and variables as plain text;
                those of the template itself remain control tokens.
            return_dict: a BatchEncoding instead of the ids alone.
            return_assistant_tokens_mask: add `assistant_masks` to it: 1 for tokens of the template's
                `{% generation %}` blocks, else 0.
            tokenizer_kwargs: further keywords for calling the tokenizer.
            variables: further variables of the template.

        Returns:
            text with tokenize=False; otherwise ids: a list, or int64 [rows, length] with return_tensors="pt".

        Raises:
            ValueError: invalid messages, options that exclude each other, or a template that fails; see
                chat_template.render.
            TypeError: a keyword that is neither an argument nor a variable that the template reads.
        """
        template = self.get_chat_template(chat_template, tools)
        if isinstance(tools, (list, tuple)):
            tools = [function_schema(tool) if callable(tool) else tool for tool in tools]
        for name in variables.keys() - template_variables(template):
            match = nearest(name, Conversations.apply_chat_template.__kwdefaults__ or ())
            hint = f"did you mean {match!r}?" if match else "the chat template does not read it"
            raise TypeError(f"apply_chat_template: unknown keyword {name!r}; {hint}")
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        if return_assistant_tokens_mask and (continue_final_message or sanitize_control_tokens):
            other = "continue_final_message" if continue_final_message else "sanitize_control_tokens"
            raise ValueError(f"return_assistant_tokens_mask does not go with {other}")
        if sanitize_control_tokens and not tokenize:
            raise ValueError("sanitize_control_tokens needs tokenize=True: in a text nothing tells the tokens apart")
        batched = isinstance(conversation, (list, tuple)) and isinstance(next(iter(conversation), None), (list, tuple))
        conversations = conversation if batched else [conversation]
        given: dict[str, Any] = {"tools": tools, "documents": documents, **variables}
        if sanitize_control_tokens:
            added = {token.content: token.special for token in self._vocabulary.added.by_id.values()}
            tokens = control_tokens(added, self.chat_control_tokens, literals(template))
            conversations, given = mark(conversations, tokens), mark(given, tokens)
        given = {**self.special_tokens_map, **given}
        switches: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}

        columns = {}
        if return_assistant_tokens_mask:
            rendered = [render_generated(template, messages, **switches, **given) for messages in conversations]
            spans = [self._vocabulary.spans(prompt) for prompt, _ in rendered]
            encoded = [[id for id, _, _ in row] for row in spans]
            columns["assistant_masks"] = [
                span_mask(row, generated) for row, (_, generated) in zip(spans, rendered, strict=True)
            ]
        else:
            switches["continue_final_message"] = continue_final_message
            prompts = [render(template, messages, **switches, **given) for messages in conversations]
            if not tokenize:
                return prompts if batched else prompts[0]
            encoded = [self._encode_prompt(prompt, sanitize_control_tokens) for prompt in prompts]
        extra = dict(tokenizer_kwargs or {})
        reject_unknown("tokenizer_kwargs", extra, ("padding_side", "return_attention_mask", "return_token_type_ids"))
        encoding = self._batcher(add_special_tokens=False).batch(
            [(ids, None) for ids in encoded],
            columns,
            not batched,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **extra,
        )
        return encoding if return_dict else encoding["input_ids"]

    def _encode_prompt(self, prompt: str, sanitize: bool) -> list[int]:
        if not sanitize:
            return self._vocabulary.encode(prompt)
        vocabulary = self._vocabulary
        return encode_marked(prompt, vocabulary.added.ids, vocabulary.encode, vocabulary.encode_plain)
