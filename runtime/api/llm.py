"""LLM: a checkpoint, its tokenizer and the decode loop behind three verbs: generate, chat and stream."""

from __future__ import annotations

import itertools
import operator
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from tqdm import tqdm

from ..checkpoint.load import load_model
from ..common.checks import check_ids
from ..common.hub import NEUTRAL, locate
from ..common.keywords import reject_unknown, without_neutral
from ..engine.answer import Answer, Update
from ..engine.engine import Engine
from ..engine.graphs import eager
from ..engine.hooks import LogitsHooks
from ..engine.request import Request, check_prompt
from ..engine.shared import SharedEngine
from ..model.config import InternLM3Config
from ..model.model import INVARIANT_ROWS, LanguageModel
from ..sampling.generation_config import GENERATION_CONFIG, read_generation_config, refuse_unsupported
from ..sampling.logits_processors import early_processors, processors
from ..sampling.params import RECOMMENDED_THINKING, SamplingKeywords, SamplingParams
from ..tokenization.chat_template import check_messages, joined_text
from ..tokenization.text_stream import TextStream
from ..tokenization.tokenizer import InternLM3Tokenizer
from .outputs import Chunk, CompletionOutput, RequestOutput, Timings
from .prompts import THINKING_SYSTEM_PROMPT

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        max_batch_size: answers that are decoded together; more wait for their turn.
        cache_tokens: how many tokens' keys and values are kept in all; by default a window for every answer of a batch,
            but at most half of the memory that is free.
        cuda_graphs: on a GPU, replay decode steps from CUDA graphs; without, the same steps are launched one by one.
        batch_invariant: on a GPU, an answer is the same to the last bit whatever else is decoded with it; a single
            answer is slower.
        revision, token, cache_dir, local_files_only: as in huggingface_hub.
        progress: show progress bars of download, of load, and of several prompts on a terminal.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: an argument or a file is wrong; the message names it.
        TypeError: an unknown keyword.
        MemoryError: the weights, or the KV cache of one window, don't fit into free memory.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        max_seq_len: int | None = None,
        max_batch_size: int = 16,
        cache_tokens: int | None = None,
        cuda_graphs: bool = True,
        batch_invariant: bool = False,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        progress: bool = True,
        **unknown: Any,
    ):
        unknown = without_neutral("LLM", unknown, NEUTRAL)
        reject_unknown("LLM", unknown, LLM.__init__.__kwdefaults__ or ())
        batch_size = _check_count("max_batch_size", max_batch_size)
        if batch_invariant and batch_size > INVARIANT_ROWS:
            raise ValueError(
                f"batch_invariant holds for up to {INVARIANT_ROWS} answers decoded together, and max_batch_size is "
                f"{batch_size}: lower it, or do without"
            )
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
        self.max_seq_len = check_window(self.config, max_seq_len)
        self.max_batch_size = batch_size
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
        self._ends = frozenset(self.eos_token_ids)
        self._progress = progress
        self.model = load_model(
            LanguageModel,
            folder,
            config=self.config,
            dtype=dtype,
            device=device,
            batch_invariant=batch_invariant,
            progress=progress,
        )
        self._shared = SharedEngine(self.model, cache_tokens, None if cuda_graphs else eager)
        self._shared.get(self.max_batch_size, self.max_seq_len)  # too little memory is an error here

    # ---------------------------------------------------------------- the three verbs

    @overload
    def generate(
        self,
        prompts: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        **kwargs: Unpack[SamplingKeywords],
    ) -> RequestOutput: ...
    @overload
    def generate(
        self,
        prompts: list[str] | tuple[str, ...] | list[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **kwargs: Unpack[SamplingKeywords],
    ) -> list[RequestOutput]: ...
    @overload
    def generate(
        self,
        prompts: Iterable[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **kwargs: Unpack[SamplingKeywords],
    ) -> Any: ...
    def generate(self, prompts: Any, sampling_params: Any = None, **kwargs: Any) -> Any:
        """Continues a text or a sequence of token ids, or each in a list: a RequestOutput, or a list of them in order.

        Ids may be a list of integers, or a tensor or array: [T], or [B, T] for several. `sampling_params` replaces the
        checkpoint's defaults, for all prompts or in a list for each; keywords (SamplingParams' names and their aliases)
        go over either. Raises ValueError for an empty or too long prompt or a bad setting, TypeError for an unknown
        keyword or what is no prompt.
        """
        several, single = _prompts(prompts)
        params = self._params(sampling_params, kwargs, None if single else len(several))
        outputs = self._answer([self._encode(prompt) for prompt in several], params)
        return outputs[0] if single else outputs

    @overload
    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        thinking: bool = False,
        stream: Literal[False] = False,
        **kwargs: Unpack[SamplingKeywords],
    ) -> RequestOutput: ...
    @overload
    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        thinking: bool = False,
        stream: Literal[True],
        **kwargs: Unpack[SamplingKeywords],
    ) -> Iterator[Chunk]: ...
    @overload
    def chat(
        self,
        messages: list[str] | Sequence[list[dict[str, Any]]] | Sequence[list[dict[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        thinking: bool = False,
        stream: Literal[False] = False,
        **kwargs: Unpack[SamplingKeywords],
    ) -> list[RequestOutput]: ...
    def chat(
        self, messages: Any, sampling_params: Any = None, *, thinking: bool = False, stream: bool = False, **kwargs: Any
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
        params = self._params(sampling_params or _preset(thinking), kwargs, None if single else len(conversations))
        outputs = self._answer([self._render(conversation) for conversation in conversations], params)
        return outputs[0] if single else outputs

    def stream(
        self,
        prompt: str | Sequence[int] | Sequence[Mapping[str, Any]] | torch.Tensor,
        sampling_params: SamplingParams | None = None,
        *,
        thinking: bool = False,
        **kwargs: Unpack[SamplingKeywords],
    ) -> Iterator[Chunk]:
        """As `generate` (for a text or ids) or `chat` (for messages), giving the answer as it comes.

        Closing the iterator stops generation at once, and so does Ctrl-C.
        """
        [params] = self._params(sampling_params or _preset(thinking), kwargs, None)
        if params.n != 1:
            raise ValueError(f"stream gives one answer; n is {params.n}")
        if thinking or (isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping)):
            _, ids = self._render(_conversation(prompt, thinking))
        else:
            several, _ = _prompts(prompt)
            if len(several) != 1:
                raise ValueError(f"stream answers one prompt; there are {len(several)}")
            _, ids = self._encode(several[0])
        return self._chunks(self._requests([ids], [params])[0])

    # ---------------------------------------------------------------- prompts and settings

    def _params(self, given: Any, kwargs: Mapping[str, Any], count: int | None) -> list[SamplingParams]:
        """The settings of each of `count` prompts; None: of the one that stands alone, which takes no list."""
        several = list(given) if isinstance(given, (list, tuple)) and count is not None else None
        if several is not None and len(several) != count:
            raise ValueError(f"there are {len(several)} sampling_params for {count} prompts: give one for each, or one")
        each = [given] if several is None else several
        for params in each:
            if params is not None and not isinstance(params, SamplingParams):
                what = "one SamplingParams" if count is None else "a SamplingParams, or a list of them"
                raise TypeError(f"sampling_params must be {what}, not {given!r:.60}; or give keywords")
        merged = [self._merged(self.default_params if params is None else params, kwargs) for params in each]
        idle = [name for name in ("top_k", "top_p", "min_p", "typical_p") if kwargs.get(name) is not None]
        if idle and any(params.greedy for params in merged):
            warnings.warn(f"{', '.join(idle)} have no effect at temperature 0, which is greedy", stacklevel=3)
        return merged * (1 if count is None else count) if several is None else merged

    def _merged(self, params: SamplingParams, kwargs: Mapping[str, Any]) -> SamplingParams:
        merged = SamplingParams.from_kwargs(params, **kwargs)
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
        try:
            others = isinstance(prompt, (bytes, bytearray)) or any(isinstance(token, bool) for token in prompt)
            if isinstance(prompt, Sequence) and not others:
                return None, [operator.index(token) for token in prompt]
        except TypeError:
            pass
        raise TypeError(f"a prompt must be a string or token ids (messages go to chat), not {prompt!r:.60}")

    def _render(self, messages: list[dict[str, Any]]) -> tuple[str | None, list[int]]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text, self.tokenizer.encode(text, add_special_tokens=False)

    def _requests(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Request]:
        requests = []
        for index, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            name = f"prompt {index}" if len(prompts) > 1 else "the prompt"
            check_prompt(name, prompt, self.config.vocab_size)
            room = self.max_seq_len - len(prompt)
            if room < 1:
                raise ValueError(
                    f"{name} has {len(prompt)} tokens, and max_seq_len is {self.max_seq_len}: "
                    "shorten it, or load the model with a larger max_seq_len"
                )
            limit = min(wanted.max_tokens or room, room)
            own = [Request(prompt, wanted, limit, self._ends, answer) for answer in range(wanted.n)]
            early = early_processors(wanted)
            late = processors(wanted, begin=len(prompt), most=limit, ends=own[0].ends)
            if early or late:
                hooks = LogitsHooks(torch.tensor([prompt] * len(own)), 0, early, late, own)
                for request in own:
                    request.hooks = hooks
            requests += own
        return requests

    # ---------------------------------------------------------------- through the engine

    def _answer(
        self, prompts: Sequence[tuple[str | None, list[int]]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        called = time.perf_counter()
        answers = [self._new_answer(request) for request in self._requests([ids for _, ids in prompts], params)]
        bar = tqdm(total=len(answers), unit="answer", disable=None if self._progress and len(prompts) > 1 else True)
        with bar:
            for updates in self.engine.run(answers):
                bar.update(sum(update.finished for update in updates))
        outputs, done = [], iter(answers)
        for (text, ids), wanted in zip(prompts, params, strict=True):
            own = list(itertools.islice(done, wanted.n))
            outputs.append(
                RequestOutput(
                    text,
                    ids,
                    [_completion(answer) for answer in own],
                    wanted,
                    own[0].request.cached_tokens,
                    _timings([answer.request for answer in own], called),
                )
            )
        return outputs

    def _chunks(self, request: Request) -> Iterator[Chunk]:
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        answer = self._new_answer(request)
        called = time.perf_counter()
        for updates in self.engine.run([answer]):
            for update in updates:
                yield _chunk(update, called, device)

    def _new_answer(self, request: Request) -> Answer:
        p = request.params
        stream = TextStream(
            self.tokenizer, p.stops, p.include_stop_str_in_output, p.skip_special_tokens, min_tokens=p.min_tokens
        )
        return Answer(request, stream)

    @property
    def engine(self) -> Engine:
        """The engine that all calls run through."""
        return self._shared.get(self.max_batch_size, self.max_seq_len)

    def warm_up(self) -> None:
        """Compiles every kernel and captures every step that a request can need, so that no request waits for that.

        Without it the first request of its kind does, which takes seconds on a GPU and hardly any time on a CPU. For
        servers: call it before the first request. Raises RuntimeError while requests are under way.
        """
        self.engine.warm_up()


def _completion(answer: Answer) -> CompletionOutput:
    request = answer.request
    return CompletionOutput(
        request.answer,
        answer.text,
        request.token_ids,
        request.logprobs,
        request.top_logprobs if request.params.logprobs else None,
        request.finish_reason,
        request.stop_reason,
    )


def _chunk(update: Update, called: float, device: torch.device) -> Chunk:
    answer, request = update.answer, update.answer.request
    read = answer.read_tokens
    new = slice(read if update.token_id is None else read - 1, read)
    times = request.times[:read]
    return Chunk(
        update.text,
        request.token_ids[new],
        request.logprobs[new],
        request.top_logprobs[new] if request.params.logprobs else None,
        request.finish_reason if update.finished else None,
        request.stop_reason if update.finished else None,
        len(request.prompt_ids),
        read,
        len(request.prompt_ids) / (times[0] - called) if times else 0.0,
        (read - 1) / (times[-1] - times[0]) if read > 1 else 0.0,
        peak_memory(device),
        request.cached_tokens,
    )


def _timings(requests: Sequence[Request], called: float) -> Timings:
    timed = [request for request in requests if request.times]
    if not timed:
        return Timings(0.0, 0.0, 0.0)
    first = min(timed, key=lambda request: request.times[0])
    begun, last = first.times[0], max(request.times[-1] for request in timed)
    return Timings(begun - first.began, begun - called, last - begun)


def peak_memory(device: torch.device) -> float:
    """The most memory held so far, in gigabytes: PyTorch's on a GPU, else the process's; 0 where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows has none
        return 0.0
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _prompts(given: Any) -> tuple[list[Any], bool]:
    """The prompts as a list, and whether it was one alone. Ids in a tensor or an array become lists of integers."""
    if isinstance(given, str):
        return [given], True
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, (Mapping, bytes, bytearray)) or not isinstance(given, Iterable):
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
        refuse_unsupported(values)
        if values.get("min_length"):
            raise ValueError(f"min_length={values['min_length']!r} counts the prompt too: write min_new_tokens for LLM")
        params = SamplingParams.from_generation_config(values)
        params.check_vocab(vocab_size)
        return params, ends
    except ValueError as error:
        raise ValueError(f"{folder / GENERATION_CONFIG}: {error}") from None


def _check_count(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool) and operator.index(value) >= 1:
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} must be an integer of at least 1; it is {value!r}")


def check_window(config: InternLM3Config, wanted: int | None) -> int:
    """The length to open, at most: the trained window for None. Raises ValueError for what the model does not take."""
    window = config.max_position_embeddings
    if wanted is None:
        return window
    wanted = _check_count("max_seq_len", wanted)
    dynamic = config.rope_scaling is not None and config.rope_scaling["rope_type"] == "dynamic"
    if wanted > window and not dynamic:
        raise ValueError(
            f"max_seq_len is {wanted}, and the model was trained for {window} (max_position_embeddings) "
            "with no dynamic NTK to go further"
        )
    return wanted
