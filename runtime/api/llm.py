"""LLM: a checkpoint and its tokenizer, with three methods: generate, chat and stream."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from tqdm import tqdm

from ..checkpoint.gguf.folder import locate
from ..checkpoint.load import load_model, resolve_device
from ..common.checks import check_bool, check_int
from ..common.neutral import without_neutral
from ..common.other_libraries import LLM as LLM_NEUTRAL
from ..common.other_libraries import LLM_COUNTERPARTS
from ..common.progress import hides_bar
from ..common.shown import shown
from ..common.warn_caller import warn_caller
from ..engine.answer import Answer
from ..engine.engine import Engine
from ..engine.graphs import eager
from ..engine.hooks import LogitsHooks
from ..engine.request import Request, check_prompt
from ..engine.shared import SharedEngine
from ..model.config import InternLM3Config
from ..model.model import LanguageModel, invariant_rows
from ..sampling.keywords import SamplingKeywords
from ..sampling.logits_processors import early_processors, processors
from ..sampling.params import RECOMMENDED_THINKING, SamplingParams
from ..sampling.settings import FILTERS
from ..tokenization.text_stream import TextStream
from ..tokenization.tokenizer import InternLM3Tokenizer
from ..tools.prompt import chat_prompt
from ..tools.schemas import Tool
from ..tools.text_stream import ToolTextStream
from ..tools.use import ToolUse
from .call import Call
from .inputs import (
    PromptTooLong,
    check_window,
    checkpoint_defaults,
    conversation_of,
    encode_prompt,
    prompt_list,
    token_ids_of,
)
from .outputs import Chunk, RequestOutput, ToolAnswer
from .perplexity import Perplexity, perplexity
from .prompt_logprobs import PromptLogprobs, Scores, joined, scores

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..structured.grammars import Grammars


class LLM:
    """A model with its tokenizer, ready to answer.

    The defaults of every call are the settings in the checkpoint's generation_config.json (`default_params`). Answers
    end at the end-of-text tokens of the tokenizer and of generation_config.json (`eos_token_ids`); a call's `stop` adds
    to these.

    Args:
        model: a local folder, a hub repository "owner/name", or a GGUF file: its path, or "owner/name:file.gguf".
        dtype: "auto", "bfloat16", "float16" or "float32". "auto" is as the checkpoint says; on a CPU without products
            of that dtype it is float32, if that takes at most two thirds of the free memory.
        device: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".
        max_seq_len: the context window, prompt and answer together, in tokens; by default the trained window. A larger
            one needs dynamic NTK in the checkpoint.
        max_batch_size: the number of answers that are decoded together; more wait.
        cache_tokens: the size of the KV cache in tokens; by default max_seq_len for every answer of a batch, but at
            most half of the free memory.
        cuda_graphs: on a GPU, run decode steps from CUDA graphs; False launches the same kernels one by one.
        batch_invariant: on a GPU, make answers bit-identical alone and in any batch; a single answer is slower, and
            prefixes are reused in whole chunks of 512 prompt tokens instead of pages of 64 of prompts and answers.
        quantization: "int4", "int8" or "fp8" quantises the weights while they are loaded: to 4 bits in groups of 128
            inputs, to int8 or to float8_e4m3fn for each output; the head to int8. None: as the checkpoint is, which
            needs no switch; the name of its method ("gptq", "awq", ...) states what it must be.
        speculation: verify tokens that are drafted from earlier occurrences of the text's end, several in one step.
            The text is the same: on a CPU bit by bit in bfloat16, on a GPU as it is in a batch (see batch_invariant).
            "auto" does so where a step with drafts takes less than 1.3 of the time of one without: on a GPU, with up to
            8 answers decoded together.
        revision, token, cache_dir, local_files_only: as in huggingface_hub.
        progress: show progress bars for download, loading, and several prompts on a terminal; and say in a line on
            stderr if "auto" is not the checkpoint's dtype.

    Attributes:
        config, tokenizer, model: of the checkpoint.
        default_params: the SamplingParams of a call that gives none.
        eos_token_ids: end-of-text tokens.

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
        quantization: str | None = None,
        speculation: bool | Literal["auto"] = "auto",
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        progress: bool = True,
        **unknown: Any,
    ):
        neutral = {**LLM_NEUTRAL, "tokenizer": (model,)}
        known = LLM.__init__.__kwdefaults__ or ()
        without_neutral("LLM", unknown, neutral, known=known, counterparts=LLM_COUNTERPARTS)
        batch_size = check_int("max_batch_size", max_batch_size, 1)
        if speculation != "auto":
            check_bool("speculation", speculation, "True, False or 'auto'")
        cache_tokens = None if cache_tokens is None else check_int("cache_tokens", cache_tokens, 0)
        most = invariant_rows(resolve_device(device)) if batch_invariant else batch_size
        if batch_size > most:
            raise ValueError(
                f"batch_invariant holds for up to {most} answers decoded together, and max_batch_size is "
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
        # Small files that may be wrong are read before the weights.
        self.config = InternLM3Config.from_file(folder / "config.json")
        self.max_seq_len = check_window(self.config, max_seq_len)
        self.max_batch_size = batch_size
        self.tokenizer = InternLM3Tokenizer.from_pretrained(folder)
        # A pad token may have no embedding: fine-tuning scripts add one, and the model never reads it.
        ids = {self.tokenizer.vocab_size - 1, *self.tokenizer.added_tokens_decoder} - {self.tokenizer.pad_token_id}
        if max(ids) >= self.config.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {len(self.tokenizer)} tokens and the model's vocabulary "
                f"{self.config.vocab_size}; they belong to different checkpoints"
            )
        self.default_params, ends = checkpoint_defaults(folder, self.config.vocab_size)
        self.eos_token_ids = sorted({*ends, *self.config.eos_token_ids, *self.tokenizer.eos_ids})
        self._ends = frozenset(self.eos_token_ids)
        self._progress = progress
        self._name = os.fspath(model)
        self.model = load_model(
            LanguageModel,
            folder,
            config=self.config,
            dtype=dtype,
            device=device,
            batch_invariant=batch_invariant,
            fast_on_cpu=True,
            keep_quantised=True,
            quantization=quantization,
            progress=progress,
        )
        self._shared = SharedEngine(
            cache_tokens, None if cuda_graphs else eager, None if speculation == "auto" else bool(speculation)
        )
        self._shared.get(self.model, self.max_batch_size, self.max_seq_len)  # too little memory is an error here

    def __repr__(self) -> str:
        return (
            f"LLM({self._name!r}, dtype={str(self.model.dtype).removeprefix('torch.')!r}, "
            f"device={str(self.model.device)!r}, max_seq_len={self.max_seq_len}, max_batch_size={self.max_batch_size})"
        )

    # ---------------------------------------------------------------- generate, chat, stream

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
        """Continues one prompt or several.

        Args:
            prompts: a text, a sequence of token ids ([T] as a list, tensor or array), or several of either ([B, T]).
            sampling_params: used in place of the checkpoint's defaults; one for all prompts, or a list of one for each.
            **kwargs: keywords of SamplingParams, which override either. use_tqdm=False shows no progress bar.

        Returns:
            A RequestOutput, or for several prompts a list of them in order. Prompt and answer joined are one text: an
            answer that begins with a new word begins with its space.

        Raises:
            ValueError: an empty or too long prompt, or a bad setting.
            TypeError: an unknown keyword, or something that is not a prompt.
        """
        progress = check_bool("use_tqdm", kwargs.pop("use_tqdm", True))
        return self._answer(self._generate_call(prompts, sampling_params, kwargs), progress)

    @overload
    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        thinking: bool = False,
        tools: Sequence[Tool] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
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
        tools: Sequence[Tool] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
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
        tools: Sequence[Tool] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        stream: Literal[False] = False,
        **kwargs: Unpack[SamplingKeywords],
    ) -> list[RequestOutput]: ...
    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        thinking: bool = False,
        tools: Sequence[Tool] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        stream: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Answers one conversation or several.

        Args:
            messages: [{"role": ..., "content": ...}, ...], one user message as a string, or a list of either. Calls of
                tools and their results are messages in OpenAI's form; see `run_tools`.
            sampling_params, **kwargs: as for `generate`.
            thinking: InternLM3's deep-thinking mode: its published system prompt, after the conversation's own if there
                is one, with its recommended settings and room for 8192 tokens.
            tools: what the model may call: Python functions with type hints and a docstring, or JSON schemas in
                OpenAI's form. Calls are in the output's `tool_calls`; nothing is run.
            tool_choice: "auto"; "none" leaves the tools out; "required", or {"type": "function", "function": {"name":
                ...}}, for an answer that is one call, by a grammar: this needs the extra `json`.
            stream: return an iterator of chunks, as `stream` does.

        Returns and raises as `generate`.
        """
        progress = check_bool("use_tqdm", kwargs.pop("use_tqdm", True))
        call = self._chat_call(messages, sampling_params, thinking, tools, tool_choice, kwargs)
        return self._chunks(call) if stream else self._answer(call, progress)

    def stream(
        self,
        prompt: str
        | Sequence[int]
        | Sequence[str]
        | Sequence[Sequence[int]]
        | Sequence[Mapping[str, Any]]
        | torch.Tensor,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        thinking: bool = False,
        tools: Sequence[Tool] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        **kwargs: Unpack[SamplingKeywords],
    ) -> Iterator[Chunk]:
        """Like `generate` (for texts or token ids) or `chat` (for messages), as an iterator of chunks.

        With several prompts or n > 1 the chunks of all answers come as they are generated; `chunk.prompt_index` and
        `chunk.index` say whose each is.

        Closing the iterator stops generation at once, and so does Ctrl-C.

        Example:
            for chunk in llm.stream("Once upon a time", max_tokens=64):
                print(chunk.text, end="", flush=True)
        """
        return self._chunks(self._stream_call(prompt, sampling_params, thinking, tools, tool_choice, kwargs))

    def perplexity(
        self, text: str | Sequence[int], *, window: int | None = None, stride: int | None = None
    ) -> Perplexity:
        """How well the model predicts a text: exp of the mean loss over its tokens, by a sliding window.

        Args:
            text: a text, which is tokenised like a prompt, or token ids.
            window: tokens that the model sees at once; by default 2048, or max_seq_len if that is less.
            stride: tokens between the beginnings of two windows; by default half a window. Every token but those of the
                first window has at least window - stride tokens before it.

        Raises:
            ValueError: fewer than two tokens, an impossible window or stride, or a token outside the vocabulary.
        """
        size = check_int("window", min(2048, self.max_seq_len) if window is None else window, 2, self.max_seq_len)
        step = check_int("stride", max(size // 2, 1) if stride is None else stride, 1, size)
        ids = self.tokenizer.encode(text) if isinstance(text, str) else token_ids_of(text)
        check_prompt("the text", ids, self.config.vocab_size)
        if len(ids) < 2:
            raise ValueError("the text has one token, and a perplexity needs two")
        return perplexity(self.model, ids, size, step, progress=self._progress)

    def chat_prompt_ids(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        thinking: bool = False,
        tools: Sequence[Tool] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
    ) -> list[int]:
        """The token ids of the prompt that `chat` gives the model for one conversation; the arguments are its own."""
        use = ToolUse.of(self.tokenizer, tools, tool_choice)
        return self._render(conversation_of(self.tokenizer, messages, thinking), use)[1]

    def prompt_logprobs(self, prompt: str | Sequence[int], count: int = 0) -> PromptLogprobs:
        """How likely each token of a prompt is after those before it.

        Args:
            prompt: a text, which is tokenised as `generate` does, or token ids; of max_seq_len tokens at most.
            count: how many of the likeliest tokens to give in each place.

        Raises ValueError as `generate`.
        """
        return joined(*self._prompt_logprobs(prompt, count))

    def _prompt_logprobs(self, prompt: Any, count: int) -> tuple[list[int], Iterator[Scores]]:
        _, ids = self._encode(prompt)
        check_prompt("the prompt", ids, self.config.vocab_size)
        if len(ids) > self.max_seq_len:
            raise PromptTooLong(f"the prompt has {len(ids)} tokens, and max_seq_len is {self.max_seq_len}: shorten it")
        return ids, scores(self.model, self.engine, ids, check_int("count", count, 0))

    # ---------------------------------------------------------------- calls, which AsyncLLM makes too

    def _generate_call(self, prompts: Any, sampling_params: Any, kwargs: Mapping[str, Any]) -> Call:
        several, single = prompt_list(prompts)
        params = self._params(sampling_params, kwargs, None if single else len(several))
        return self._call([self._encode(prompt) for prompt in several], params, single, chat=False, use=ToolUse())

    def _chat_call(
        self,
        messages: Any,
        sampling_params: Any,
        thinking: bool,
        tools: Sequence[Tool] | None,
        tool_choice: str | Mapping[str, Any],
        kwargs: Mapping[str, Any],
    ) -> Call:
        several = isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], (str, list, tuple))
        single = isinstance(messages, str) or not several
        conversations = [
            conversation_of(self.tokenizer, each, thinking) for each in ([messages] if single else messages)
        ]
        given = sampling_params or (RECOMMENDED_THINKING if thinking else None)
        use = ToolUse.of(self.tokenizer, tools, tool_choice)
        params = use.params(self._params(given, kwargs, None if single else len(conversations)))
        return self._call([self._render(each, use) for each in conversations], params, single, chat=True, use=use)

    def _stream_call(
        self,
        prompt: Any,
        sampling_params: Any,
        thinking: bool,
        tools: Sequence[Tool] | None,
        tool_choice: str | Mapping[str, Any],
        kwargs: Mapping[str, Any],
    ) -> Call:
        messages = isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], Mapping)
        if messages or thinking or tools or tool_choice not in ("auto", "none", None):
            return self._chat_call(prompt, sampling_params, thinking, tools, tool_choice, kwargs)
        return self._generate_call(prompt, sampling_params, kwargs)

    def _call(
        self,
        prompts: list[tuple[str | None, list[int]]],
        params: list[SamplingParams],
        single: bool,
        *,
        chat: bool,
        use: ToolUse,
    ) -> Call:
        requests = self._requests([ids for _, ids in prompts], params, use)
        return Call(prompts, params, [self._new_answer(request, chat, use) for request in requests], single)

    # ---------------------------------------------------------------- prompts and settings

    def _params(self, given: Any, kwargs: Mapping[str, Any], count: int | None) -> list[SamplingParams]:
        """The settings of each of `count` prompts; None for a single prompt, which takes no list."""
        several = list(given) if isinstance(given, (list, tuple)) and count is not None else None
        if several is not None and len(several) != count:
            raise ValueError(f"there are {len(several)} sampling_params for {count} prompts: give one for each, or one")
        each = [given] if several is None else several
        for params in each:
            if params is not None and not isinstance(params, SamplingParams):
                what = "one SamplingParams" if count is None else "a SamplingParams, or a list of them"
                raise TypeError(f"sampling_params must be {what}, not {shown(given)}; or give keywords")
        merged = [self._merged(self.default_params if params is None else params, kwargs) for params in each]
        idle = [name for name in FILTERS if kwargs.get(name) is not None]
        if idle and any(params.greedy for params in merged):
            warn_caller(f"no effect at temperature 0, which is greedy: {', '.join(idle)}")
        return merged * (1 if count is None else count) if several is None else merged

    def _merged(self, params: SamplingParams, kwargs: Mapping[str, Any]) -> SamplingParams:
        merged = SamplingParams.from_kwargs(params, **kwargs)
        # A stop string that is a special token never appears in the text: it is matched as a token.
        added = self.tokenizer.added_tokens_encoder
        tokens = [added[stop] for stop in merged.stops if stop in added]
        if tokens:
            merged = replace(merged, stop_token_ids=[*(merged.stop_token_ids or ()), *tokens])
        merged.check_vocab(self.config.vocab_size)
        return merged

    def _encode(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, encode_prompt(self.tokenizer, prompt, self.max_seq_len) if prompt else []
        return None, token_ids_of(prompt)

    def _render(self, messages: list[dict[str, Any]], use: ToolUse) -> tuple[str | None, list[int]]:
        text = chat_prompt(self.tokenizer, messages, use.schemas) + use.opening
        return text, encode_prompt(self.tokenizer, text, self.max_seq_len, add_special_tokens=False)

    def _requests(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], use: ToolUse) -> list[Request]:
        requests = []
        for index, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            name = f"prompt {index}" if len(prompts) > 1 else "the prompt"
            check_prompt(name, prompt, self.config.vocab_size)
            room = self.max_seq_len - len(prompt)
            if room < 1:
                raise PromptTooLong(
                    f"{name} has {len(prompt)} tokens, and max_seq_len is {self.max_seq_len}: "
                    "shorten it, or load the model with a larger max_seq_len"
                )
            limit = min(wanted.max_tokens or room, room)
            own = [Request(prompt, wanted, limit, self._ends, answer) for answer in range(wanted.n)]
            if wanted.constraint is not None:
                for request in own:
                    request.constraint = self._grammars.constraint(wanted, request.ends, use.in_place_of_json)
            early = early_processors(wanted)
            late = processors(wanted, begin=len(prompt), most=limit, ends=own[0].ends)
            if early or late:
                ids = torch.tensor([prompt] * len(own), dtype=torch.int64, device="cpu")
                hooks = LogitsHooks(ids, 0, early, late, own)
                for request in own:
                    request.hooks = hooks
            requests += own
        return requests

    # ---------------------------------------------------------------- running requests

    def _answer(self, call: Call, progress: bool) -> Any:
        visible = progress and self._progress and len(call.prompts) > 1
        bar = tqdm(total=len(call.answers), unit="answer", disable=hides_bar(visible))
        with bar, closing(self.engine.run(call.answers)) as run:
            for updates in run:
                bar.update(sum(update.finished for update in updates))
        return call.outputs()

    def _chunks(self, call: Call) -> Iterator[Chunk]:
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with closing(self.engine.run(call.answers)) as run:
            for updates in run:
                for update in updates:
                    yield call.chunk([update], device)

    @cached_property
    def _grammars(self) -> Grammars:
        """Compiles the constraints of requests."""
        try:
            from ..structured.grammars import Grammars
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error}: json_schema, json_object, regex, choice and grammar need it: pip install 'internlm3[json]'",
                name=error.name,
            ) from None
        return Grammars(self.tokenizer, self.config.vocab_size)

    def _new_answer(self, request: Request, chat: bool, use: ToolUse) -> Answer:
        """A text continues its prompt's, so that both joined are the whole; a chat answer is a text of its own.

        The text of a constrained answer is exactly what its grammar had: neither its first space nor any other is left
        out.
        """
        p = request.params
        options: dict[str, Any] = {
            "stops": p.stops,
            "include_stop": p.include_stop_str_in_output,
            "skip_special_tokens": p.skip_special_tokens,
            "min_tokens": p.min_tokens,
            "exact": request.constraint is not None,
        }
        if use.format is not None:
            return ToolAnswer(request, ToolTextStream(self.tokenizer, use.format, bool(use.opening), **options))
        return Answer(request, TextStream(self.tokenizer, prompt_ids=() if chat else request.prompt_ids, **options))

    @property
    def engine(self) -> Engine:
        """The engine that all calls run through."""
        return self._shared.get(self.model, self.max_batch_size, self.max_seq_len)

    def warm_up(self) -> None:
        """Compiles every kernel and captures every step that a request can need, so that no request waits for that.

        Without it the first request of its kind does, which takes seconds on a GPU and hardly any time on a CPU. For
        servers: call it before the first request. Raises RuntimeError while requests are under way.
        """
        self.engine.warm_up()
