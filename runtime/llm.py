"""LLM: a checkpoint, its tokenizer and the decode loop behind three verbs: generate, chat and stream."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .causal_lm import InternLM3ForCausalLM
from .chat_template import check_messages, joined_text
from .config import InternLM3Config
from .generation import GENERATION_CONFIG, Batch, read_generation_config
from .keywords import reject_unknown
from .outputs import Chunk, CompletionOutput, RequestOutput
from .prompts import THINKING_SYSTEM_PROMPT
from .request import Request, check_prompt
from .sampling import RECOMMENDED_THINKING, SamplingParams
from .snapshots import locate
from .text import Writer
from .token_ids import check_ids
from .tokenizer import InternLM3Tokenizer


class LLM:
    """A model that answers.

    Settings of the checkpoint's generation_config.json are the defaults of every call: see `default_params`. Ends of
    text are the tokenizer's, <|im_end|> and generation_config's; a call's `stop` adds to them.

    Args:
        model: a folder, or a hub repository "owner/name".
        dtype: "auto" (as the checkpoint says), "bfloat16", "float16" or "float32".
        device: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".
        max_seq_len: prompt and answer together, in tokens; by default the trained window. Beyond the window only with
            dynamic NTK in the checkpoint.
        max_batch_size: prompts that are decoded together; more wait for their turn.
        revision, token, cache_dir, local_files_only: as in huggingface_hub.
        progress: show progress bars of download and load.

    Raises:
        FileNotFoundError, ValueError, MemoryError, TypeError: as InternLM3ForCausalLM.from_pretrained.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        max_seq_len: int | None = None,
        max_batch_size: int = 16,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        progress: bool = True,
        **unknown: Any,
    ):
        # Remote code is never run, so its switch means nothing here and may stay in people's calls.
        unknown.pop("trust_remote_code", None)
        reject_unknown("LLM", unknown, LLM.__init__.__kwdefaults__ or ())
        _check_count("max_batch_size", max_batch_size)
        folder = locate(
            model,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            progress=progress,
        )
        # What is small and may be wrong comes before the weights.
        self.config = InternLM3Config.from_file(folder / "config.json")
        self.max_seq_len = _check_window(self.config, max_seq_len)
        self.max_batch_size = max_batch_size
        self.tokenizer = InternLM3Tokenizer.from_pretrained(folder)
        # A pad token may lie beyond the embedding: fine-tuning scripts add one, and no model ever reads it.
        ids = {self.tokenizer.vocab_size - 1, *self.tokenizer.added_tokens_decoder} - {self.tokenizer.pad_token_id}
        if max(ids) >= self.config.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {len(self.tokenizer)} tokens and the model's vocabulary "
                f"{self.config.vocab_size}; they belong to different checkpoints"
            )
        self.default_params, ends = _generation_defaults(folder, self.config.vocab_size)
        self.eos_token_ids = sorted({*ends, *self.config.eos_token_ids, *self.tokenizer.eos_ids})
        self.model = InternLM3ForCausalLM.from_pretrained(folder, dtype=dtype, device=device, progress=progress)

    # ---------------------------------------------------------------- the three verbs

    def generate(self, prompts: Any, sampling_params: SamplingParams | None = None, **kwargs: Any) -> Any:
        """Continues a text or a sequence of token ids, or each in a list: a RequestOutput, or a list of them in order.

        Ids may be a list of integers, or a tensor or array: [T], or [B, T] for several. `sampling_params` replaces the
        checkpoint's defaults; keywords (SamplingParams' names and their aliases) go over either. Raises ValueError for
        an empty or too long prompt or a bad setting, TypeError for an unknown keyword or what is no prompt.
        """
        params = self._params(sampling_params, kwargs)
        several, single = _prompts(prompts)
        outputs = self._answer([self._encode(prompt) for prompt in several], params)
        return outputs[0] if single else outputs

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | None = None,
        *,
        thinking: bool = False,
        stream: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Answers a conversation ([{"role": ..., "content": ...}, ...], or one user message as a string), or several.

        thinking: InternLM3's deep-thinking mode, which is its published system prompt (behind the conversation's own,
            if it has one) with its recommended settings and room for 8192 tokens.
        stream: gives the answer as it comes, as `stream` does.

        Returns and raises as `generate`.
        """
        several = isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], (str, list, tuple))
        single = isinstance(messages, str) or not several
        conversations = [_conversation(each, thinking) for each in ([messages] if single else messages)]
        if stream:
            if not single:
                raise ValueError(f"stream answers one conversation; there are {len(conversations)}")
            return self.stream(conversations[0], sampling_params or _preset(thinking), **kwargs)
        params = self._params(sampling_params or _preset(thinking), kwargs)
        outputs = self._answer([self._render(conversation) for conversation in conversations], params)
        return outputs[0] if single else outputs

    def stream(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        *,
        thinking: bool = False,
        **kwargs: Any,
    ) -> Iterator[Chunk]:
        """As `generate` (for a text or ids) or `chat` (for messages), giving the answer as it comes.

        Closing the iterator stops generation at once, and so does Ctrl-C.
        """
        params = self._params(sampling_params or _preset(thinking), kwargs)
        if params.n != 1:
            raise ValueError(f"stream gives one answer; n is {params.n}")
        if thinking or (isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping)):
            _, ids = self._render(_conversation(prompt, thinking))
        else:
            several, _ = _prompts(prompt)
            if len(several) != 1:
                raise ValueError(f"stream answers one prompt; there are {len(several)}")
            _, ids = self._encode(several[0])
        return self._chunks(self._rows([ids], params)[0])

    # ---------------------------------------------------------------- prompts and settings

    def _params(self, params: SamplingParams | None, kwargs: dict[str, Any]) -> SamplingParams:
        if params is not None and not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be one SamplingParams, not {params!r:.60}; or give keywords")
        merged = SamplingParams.from_kwargs(self.default_params if params is None else params, **kwargs)
        idle = [name for name in ("top_k", "top_p", "min_p", "typical_p") if kwargs.get(name) is not None]
        if merged.greedy and idle:
            warnings.warn(f"{', '.join(idle)} have no effect at temperature 0, which is greedy", stacklevel=3)
        # A stop string that is a special token never shows in the text: it is met as a token.
        added = self.tokenizer.added_tokens_encoder
        tokens = [added[stop] for stop in merged.stops if stop in added]
        if tokens:
            merged = replace(merged, stop_token_ids=[*(merged.stop_token_ids or ()), *tokens])
        merged.check_vocab(self.config.vocab_size)
        return merged

    def _encode(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt) if prompt else []
        if not isinstance(prompt, Sequence) or not all(isinstance(token, int) for token in prompt):
            raise TypeError(f"a prompt must be a string or token ids (messages go to chat), not {prompt!r:.60}")
        return None, list(prompt)

    def _render(self, messages: list[dict[str, Any]]) -> tuple[str | None, list[int]]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text, self.tokenizer.encode(text, add_special_tokens=False)

    def _rows(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Request]:
        rows = []
        for index, prompt in enumerate(prompts):
            name = f"prompt {index}" if len(prompts) > 1 else "the prompt"
            check_prompt(name, prompt, self.config.vocab_size)
            room = self.max_seq_len - len(prompt)
            if room < 1:
                raise ValueError(
                    f"{name} has {len(prompt)} tokens, and max_seq_len is {self.max_seq_len}: "
                    "shorten it, or load the model with a larger max_seq_len"
                )
            limit = min(params.max_tokens or room, room)
            rows += [Request(prompt, params, limit, answer) for answer in range(params.n)]
        return rows

    # ---------------------------------------------------------------- the loop

    def _answer(self, prompts: Sequence[tuple[str | None, list[int]]], params: SamplingParams) -> list[RequestOutput]:
        rows = self._rows([ids for _, ids in prompts], params)
        texts: list[str] = []
        for start in range(0, len(rows), self.max_batch_size):
            texts += self._run(rows[start : start + self.max_batch_size])
        answers = [
            CompletionOutput(
                row.answer,
                text,
                row.token_ids,
                row.logprobs,
                row.top_logprobs if params.logprobs else None,
                row.finish_reason,
                row.stop_reason,
            )
            for row, text in zip(rows, texts, strict=True)
        ]
        return [
            RequestOutput(text, ids, answers[index * params.n : (index + 1) * params.n], params)
            for index, (text, ids) in enumerate(prompts)
        ]

    def _run(self, rows: list[Request]) -> list[str]:
        """The whole text of each row's answer."""
        batch = Batch(self.model, rows, self.eos_token_ids)
        writers = [Writer(row, self.tokenizer) for row in rows]
        texts = [""] * len(rows)
        running = list(range(len(rows)))
        while running:
            batch.step()
            for index in running:
                texts[index] += writers[index].write()
            running = [index for index in running if rows[index].finish_reason is None]
            batch.drop_finished()
        return texts

    def _chunks(self, row: Request) -> Iterator[Chunk]:
        batch = Batch(self.model, [row], self.eos_token_ids)
        writer = Writer(row, self.tokenizer)
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        begin = first = time.perf_counter()
        while row.finish_reason is None:
            batch.step()
            text = writer.write()
            now = time.perf_counter()
            decoded = len(row.token_ids)
            if decoded == 1:
                first = now
            yield Chunk(
                text,
                row.token_ids[-1:],
                row.logprobs[-1:],
                row.top_logprobs[-1:] if row.params.logprobs else None,
                row.finish_reason,
                row.stop_reason,
                len(row.prompt_ids),
                decoded,
                len(row.prompt_ids) / (first - begin),
                (decoded - 1) / (now - first) if decoded > 1 else 0.0,
                peak_memory(self.model.device),
            )


def peak_memory(device: torch.device) -> float:
    """The most memory held so far, in gigabytes: PyTorch's on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _prompts(given: Any) -> tuple[list[Any], bool]:
    """The prompts as a list, and whether it was one alone. Ids in a tensor or an array become lists of integers."""
    if isinstance(given, str):
        return [given], True
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise TypeError(f"prompts must be a string, token ids, or a list of them, not {given!r:.60}")
    listed = [each.tolist() if hasattr(each, "tolist") else each for each in given]
    single = bool(listed) and isinstance(listed[0], int)
    return ([listed] if single else listed), single


def _conversation(messages: Any, thinking: bool) -> list[dict[str, Any]]:
    """Checked messages, in thinking mode with its system prompt behind the conversation's own."""
    if messages == "":
        raise ValueError("the message is empty: give at least one character")
    messages = check_messages([{"role": "user", "content": messages}] if isinstance(messages, str) else messages)
    if not thinking:
        return messages
    leads = messages[0]["role"] == "system"
    own, rest = (joined_text(messages[0]["content"]), messages[1:]) if leads else ("", messages)
    return [{"role": "system", "content": own + THINKING_SYSTEM_PROMPT}, *rest]


def _preset(thinking: bool) -> SamplingParams | None:
    return RECOMMENDED_THINKING if thinking else None


def _generation_defaults(folder: Path, vocab_size: int) -> tuple[SamplingParams, list[int]]:
    """What generation_config.json says: the settings, and the ends of text."""
    values = read_generation_config(folder)
    ends = values.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    try:
        check_ids("eos_token_id", ends, vocab_size)
        return SamplingParams.from_generation_config(values), ends
    except ValueError as error:
        raise ValueError(f"{folder / GENERATION_CONFIG}: {error}") from None


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1; it is {value!r}")


def _check_window(config: InternLM3Config, wanted: int | None) -> int:
    window = config.max_position_embeddings
    if wanted is None:
        return window
    _check_count("max_seq_len", wanted)
    dynamic = config.rope_scaling is not None and config.rope_scaling["rope_type"] == "dynamic"
    if wanted > window and not dynamic:
        raise ValueError(
            f"max_seq_len is {wanted}, and the model was trained for {window} (max_position_embeddings) "
            "with no dynamic NTK to go further"
        )
    return wanted
