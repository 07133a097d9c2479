"""What a caller of LLM passes in, in one form: prompts, conversations, the context window, a checkpoint's defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..chat_template.messages import check_messages, joined_text
from ..chat_template.render import literals
from ..common.checks import as_ints, as_list, check_ids, check_int
from ..common.shown import one_line, shown
from ..model.config import InternLM3Config
from ..sampling.generation_config import GENERATION_CONFIG, read_generation_config, refuse_unsupported
from ..sampling.params import SamplingParams
from ..tokenization.tokenizer import InternLM3Tokenizer
from .prompts import THINKING_SYSTEM_PROMPT


class PromptTooLong(ValueError):
    """A prompt that leaves no room for an answer in the context window."""


def prompt_list(given: Any) -> tuple[list[Any], bool]:
    """The prompts in a list, and whether the caller gave a single one. Tensors and arrays become lists of integers."""
    if isinstance(given, str):
        return [given], True
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, (Mapping, bytes, bytearray)) or not isinstance(given, Iterable):
        raise TypeError(f"prompts must be a string, token ids, or a list of them, not {shown(given)}")
    listed = [each.tolist() if hasattr(each, "tolist") else each for each in given]
    single = bool(listed) and isinstance(listed[0], int)
    return ([listed] if single else listed), single


def token_ids_of(prompt: Any) -> list[int]:
    """A prompt's token ids as Python integers. Raises TypeError if it is anything else."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        ids = as_ints(prompt)
        if ids is not None:
            return ids
    raise TypeError(f"a prompt must be a string or token ids (messages go to chat), not {shown(prompt)}")


def encode_prompt(tokenizer: InternLM3Tokenizer, text: str, window: int, **options: Any) -> list[int]:
    """A text's token ids.

    A text that is far too long for the context window is refused after its beginning: all of it would take seconds and
    a gigabyte for 10 MB. A beginning may have more tokens than the whole, as its end is cut, but not twice as many.

    Args:
        options: of `tokenizer.encode`.

    Raises:
        PromptTooLong: the text has more than twice as many tokens as the window.
    """
    length = 16 * window
    while length < len(text):
        count = len(tokenizer.encode(text[:length], **options))
        if count > 2 * window + 100:
            raise PromptTooLong(
                f"a prompt of {len(text)} characters has more than {count // 2} tokens, and max_seq_len is {window}: "
                "shorten it, or load the model with a larger max_seq_len"
            )
        length *= 2
    return tokenizer.encode(text, **options)


def conversation_of(tokenizer: InternLM3Tokenizer, messages: Any, thinking: bool) -> list[dict[str, Any]]:
    """Checked messages; in thinking mode its system prompt follows the conversation's own.

    OpenAI's "developer" is the role "system" of models that do not know it: so it is here, unless the chat template
    names it.
    """
    if messages == "":
        raise ValueError("the message is empty: give at least one character")
    messages = check_messages([{"role": "user", "content": messages}] if isinstance(messages, str) else messages)
    from_developer = any(message["role"] == "developer" for message in messages)
    if from_developer and "developer" not in literals(tokenizer.get_chat_template()):
        messages = [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]
    if not thinking:
        return messages
    leads = messages[0]["role"] == "system"
    own, rest = (joined_text(messages[0]["content"]), messages[1:]) if leads else ("", messages)
    return [{"role": "system", "content": own + THINKING_SYSTEM_PROMPT}, *rest]


def checkpoint_defaults(folder: Path, vocab_size: int) -> tuple[SamplingParams, list[int]]:
    """The sampling parameters and end-of-text tokens of a checkpoint's generation_config.json."""
    values = read_generation_config(folder)
    ends = as_list(values.get("eos_token_id"))
    try:
        check_ids("eos_token_id", ends, vocab_size)
        refuse_unsupported(values)
        if values.get("min_length"):
            raise ValueError(
                f"min_length={shown(values['min_length'])} counts the prompt too: write min_new_tokens for LLM"
            )
        params = SamplingParams.from_generation_config(values)
        params.check_vocab(vocab_size)
        return params, ends
    except ValueError as error:
        raise ValueError(f"{folder / GENERATION_CONFIG}: {one_line(str(error))}") from None


def check_window(config: InternLM3Config, wanted: int | None, name: str = "max_seq_len") -> int:
    """The context window to use, by default the trained one.

    Raises ValueError, naming the argument, if the model does not support it.
    """
    window = config.max_position_embeddings
    if wanted is None:
        return window
    wanted = check_int(name, wanted, 1)
    dynamic = config.rope_scaling is not None and config.rope_scaling["rope_type"] == "dynamic"
    if wanted > window and not dynamic:
        raise ValueError(
            f"{name} is {shown(wanted)}, and the model was trained for {window} (max_position_embeddings) "
            "with no dynamic NTK to go further"
        )
    return wanted
