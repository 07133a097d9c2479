"""transformers' `generate`: its options become requests to the engine, and their tokens its tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.checks import as_list, check_batch, check_ids, check_int
from ..common.keywords import reject_unknown
from ..common.neutral import GENERATE_CHANGING, GENERATE_IDLE, GENERATE_NOTES
from ..engine.answer import Answer
from ..engine.engine import Engine
from ..engine.hooks import LogitsHooks
from ..engine.request import Request, check_prompt
from ..engine.shared import SharedEngine
from ..model.config import InternLM3Config
from ..model.model import INVARIANT_ROWS, LanguageModel
from ..sampling.generation_config import GenerationSettings, refuse_unsupported
from ..sampling.logits_processors import LogitsProcessor, early_processors, processors
from ..sampling.params import SamplingParams
from ..sampling.settings import FILTERS, GENERATE
from ..tokenization.text_stream import TextStream
from .model_outputs import Output

MAX_BATCH_SIZE = 64  # more requests wait
MIN_WINDOW = 1024  # an engine's least max_seq_len, so that a few calls of growing length don't make one each
DEFAULT_MAX_NEW_TOKENS = 20  # transformers' own
DEFAULT_TOP_K = 50  # likewise, where sampling is asked for

# (ids [B, L], None) -> whether all rows end, or which.
StoppingCriterion = Callable[[Tensor, None], bool | Tensor]


@dataclass
class GenerateOutput(Output):
    """What `generate` returns with return_dict_in_generate.

    sequences: [B * n, T + longest] prompt and answer. logprobs: [B * n, longest] float32 log-probability of each
    chosen token under the model's own softmax, 0 behind a row's end. logits, scores: a [B * n, V] float32 tensor for
    each step, before and after penalties, temperature and filters; -inf for rows that had ended.
    """

    order = ("sequences", "scores", "logits", "logprobs")
    sequences: Tensor
    logprobs: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None


_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
_SAMPLED_ONLY = ("temperature", *FILTERS, "seed")
_TOKENS = ("eos_token_id", "pad_token_id")
_OUTPUTS = ("return_dict_in_generate", "output_scores", "output_logits", "renormalize_logits")


class Generation(LanguageModel):
    """A language model with transformers' `generate`.

    Attributes:
        generation_config: the checkpoint's generation_config.json as read, where `generate` starts from; a dictionary
            whose entries are attributes too. transformers' GenerationConfig can take its place.
    """

    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__(config, **factory)
        self.generation_config = {}
        self._shared: SharedEngine | None = None

    @property
    def generation_config(self) -> GenerationSettings:
        return self._generation_config

    @generation_config.setter
    def generation_config(self, given: Any) -> None:
        self._generation_config = GenerationSettings.of(given)

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Any = None,
        *,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Sequence[LogitsProcessor] | LogitsProcessor | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
        stopping_criteria: Sequence[StoppingCriterion] | StoppingCriterion | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        return_dict_in_generate: bool | None = None,
        output_scores: bool | None = None,
        output_logits: bool | None = None,
        renormalize_logits: bool | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateOutput:
        """Continues prompts; names and meanings are those of transformers' `generate`.

        Settings come from the checkpoint's generation_config.json, then `generation_config` (a dictionary or an object
        with to_dict), then keywords: do_sample (False: greedy), temperature, top_k, top_p, min_p, typical_p,
        repetition_penalty, presence_penalty, frequency_penalty, logit_bias, seed, num_return_sequences, stop_strings
        (with tokenizer), eos_token_id (one or a list), pad_token_id, max_new_tokens or max_length (20 new ones where
        nothing is said), min_new_tokens or min_length, suppress_tokens, begin_suppress_tokens, bad_words_ids,
        no_repeat_ngram_size, sequence_bias, exponential_decay_length_penalty, forced_eos_token_id.

        Args:
            input_ids (or inputs): [B, T] integers, padded on either side.
            attention_mask: [B, T], zero at padding. In its place by position, a generation_config, as in transformers.
            logits_processor: callables (ids [B * n, L], scores [B * n, V] float32) -> scores, called where transformers
                calls them: behind penalties and masks, before temperature and filters. They see every row, as given,
                its answer behind it, padded where it has ended.
            prefix_allowed_tokens_fn: (row, its ids [L]) -> the tokens that may come next.
            stopping_criteria: callables (ids [B * n, L], None) -> one bool, or [B * n], asked behind every step; a row
                that one of them is true of ends.
            streamer: an object with put(ids) and end(), given the prompt first and then every step's tokens.
            output_scores, output_logits: keep them in the GenerateOutput that return_dict_in_generate asks for;
                renormalize_logits: the scores as log-probabilities.

        Returns:
            [B * num_return_sequences, T + longest answer] ids, padded with pad_token_id; or a GenerateOutput.

        Raises:
            TypeError: an unknown keyword. ValueError: a bad or contradictory setting, an empty prompt, a bad id.
            RuntimeError: logits that are not numbers, as float16 may give.
        """
        if (input_ids is None) == (inputs is None):
            raise ValueError("generate needs input_ids (or inputs, and not both): [B, T] integers")
        ids = inputs if input_ids is None else input_ids
        if not isinstance(ids, Tensor):
            raise TypeError(f"input_ids must be a tensor [B, T] of integers; it is a {type(ids).__name__}")
        if attention_mask is not None and not isinstance(attention_mask, Tensor) and generation_config is None:
            generation_config, attention_mask = attention_mask, None
        outputs = (return_dict_in_generate, output_scores, output_logits, renormalize_logits)
        options = _options(self, generation_config, {**kwargs, **dict(zip(_OUTPUTS, outputs, strict=True))})
        as_dict, keep_scores, keep_logits, normal = (bool(options.pop(name, False)) for name in _OUTPUTS)
        vocab_size = self.config.vocab_size
        eos = _token_ids("eos_token_id", options.get("eos_token_id", self.config.eos_token_ids), vocab_size)
        pads = _token_ids("pad_token_id", options.get("pad_token_id", self.config.pad_token_id), vocab_size)
        prompts = _prompts(ids, attention_mask, vocab_size, pads[0] if pads and pads[0] not in eos else None)
        pad = (*pads, *eos, 0)[0]
        params = _params(options, explicit=kwargs)
        texts = params.stops
        if texts and tokenizer is None:
            raise ValueError("stop_strings needs tokenizer=, to see the text that the tokens spell")

        most, least = _lengths(options, ids.shape[1])
        params = SamplingParams.from_kwargs(params, min_tokens=least)
        params.check_vocab(vocab_size)
        criteria = _callables("stopping_criteria", stopping_criteria)
        prefix = [*map(_constrained, _callables("prefix_allowed_tokens_fn", prefix_allowed_tokens_fn))]
        own = processors(params, begin=ids.shape[1], most=most, ends=eos, prefix=prefix)
        given = ids.repeat_interleave(params.n, dim=0)
        hooks = LogitsHooks(
            given.cpu().long(),
            pad,
            early_processors(params),
            [*own, *_callables("logits_processor", logits_processor)],
            keep_logits=keep_logits,
            keep_scores=keep_scores,
        )
        ends = frozenset(eos)
        requests = [
            Request(prompt, params, most, ends, answer, hooks if hooks.needed else None)
            for prompt in prompts
            for answer in range(params.n)
        ]
        hooks.requests = requests
        if streamer is not None:
            streamer.put(ids.repeat_interleave(params.n, dim=0).cpu())  # a row for each answer, as in transformers
        answers = [
            Answer(request, TextStream(tokenizer, texts, skip_special_tokens=False) if texts else None)
            for request in requests
        ]
        for tokens in self._run(answers, hooks, criteria):
            if streamer is not None:
                streamer.put(torch.tensor([pad if token is None else token for token in tokens]))
        if streamer is not None:
            streamer.end()

        generated = _padded([request.token_ids for request in requests], pad)
        sequences = torch.cat([given, generated.to(ids)], dim=1)
        if not as_dict:
            return sequences
        logprobs = torch.zeros(generated.shape)
        for index, request in enumerate(requests):
            logprobs[index, : len(request.logprobs)] = torch.tensor(request.logprobs)
        scores = hooks.scores
        if normal:
            scores = {request: [x.log_softmax(-1) for x in kept] for request, kept in scores.items()}
        return GenerateOutput(
            sequences,
            logprobs,
            _by_step(scores, requests, vocab_size) if keep_scores else None,
            _by_step(hooks.logits, requests, vocab_size) if keep_logits else None,
        )

    def _run(
        self, answers: Sequence[Answer], hooks: LogitsHooks, criteria: Sequence[StoppingCriterion]
    ) -> Iterator[list[int | None]]:
        """Runs answers, and yields each step's tokens: None for an answer that has ended or waits for a slot.

        A stopping criterion that is true of an answer ends it.
        """
        longest = max(len(answer.request.prompt_ids) + answer.request.max_tokens for answer in answers)
        most = INVARIANT_ROWS if self.model.batch_invariant else MAX_BATCH_SIZE
        engine = self.engine(min(_power_of_2(len(answers)), most), max(_power_of_2(longest), MIN_WINDOW))
        index = {answer: number for number, answer in enumerate(answers)}
        for updates in engine.run(answers):
            tokens: list[int | None] = [None] * len(answers)
            for update in updates:
                if update.answer.request.finish_reason == "error" and update.finished:
                    raise RuntimeError(f"row {index[update.answer]}: {update.answer.request.stop_reason}")
                tokens[index[update.answer]] = update.token_id
            if all(token is None for token in tokens):
                continue
            for criterion in criteria:
                ids = hooks.ids([answer.read_tokens for answer in answers])
                ended = torch.as_tensor(criterion(ids, None)).expand(len(answers)).tolist()
                for answer, token, end in zip(answers, tokens, ended, strict=True):
                    if end and token is not None:
                        engine.finish(answer)
            yield tokens

    def engine(self, max_batch_size: int, max_seq_len: int) -> Engine:
        """The engine that every call of `generate` runs through, for so many requests and so long sequences at least.

        One that is too small, or whose model was moved to another device, is replaced as soon as it is idle. Raises as
        Engine.
        """
        if self._shared is None:
            self._shared = SharedEngine(self)
        return self._shared.get(max_batch_size, max_seq_len)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model begins without an engine."""
        return {**self.__dict__, "_shared": None}


def _callables(name: str, given: Any) -> list[Any]:
    """One callable, several, or none, as a list."""
    listed = [given] if callable(given) else given or []
    if not isinstance(listed, list | tuple) or not all(map(callable, listed)):
        raise TypeError(f"{name} must be a callable or a list of them; it is {given!r}")
    return [*listed]


def _constrained(allowed: Callable[[int, Tensor], Sequence[int]]) -> LogitsProcessor:
    """A processor that leaves each row the tokens that `allowed` names. Raises ValueError where it names none."""

    def constrain(ids: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -torch.inf)
        for row, text in enumerate(ids):
            tokens = [*allowed(row, text)]
            if not tokens:
                raise ValueError(f"prefix_allowed_tokens_fn allows row {row} no token: name one at least, or the end")
            kept[row, tokens] = scores[row, tokens]
        return kept

    return constrain


def _options(model: Generation, given: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's settings, under those of generation_config, under the keywords; None counts as not said."""
    known = (*_LENGTHS, *GENERATE, *_TOKENS, *_OUTPUTS, "do_sample")
    reject_unknown("generate", kwargs, (*known, *GENERATE_CHANGING, *GENERATE_IDLE, *GENERATE_NOTES))
    config = GenerationSettings.of(given)
    refuse_unsupported(kwargs, keywords=True)
    options: dict[str, Any] = {}
    for source in (model.generation_config, config, kwargs):
        refuse_unsupported(source)
        options |= {name: value for name, value in source.items() if value is not None and name in known}
    if options.get("pad_token_id") == -1:
        del options["pad_token_id"]  # some checkpoints' way to say that there is none
    return options


def _params(options: Mapping[str, Any], explicit: Mapping[str, Any]) -> SamplingParams:
    sampled = options.get("do_sample", False)
    idle = [name for name in _SAMPLED_ONLY if explicit.get(name) is not None]
    if idle and not sampled:
        warnings.warn(
            f"{', '.join(idle)} have no effect: decoding is greedy until do_sample=True is given", stacklevel=3
        )
    settings = {name: options[name] for name in GENERATE if name in options}
    if sampled:
        settings.setdefault("top_k", DEFAULT_TOP_K)
    return SamplingParams.from_kwargs(do_sample=sampled, **settings)


def _lengths(given: Mapping[str, Any], columns: int) -> tuple[int, int]:
    """The most and the least new tokens; max_length and min_length count the prompt's columns too, as elsewhere."""
    options = dict(given)
    for name in _LENGTHS:
        if name in options:
            options[name] = check_int(name, options[name], int(name.startswith("max")))
    most = options.get("max_new_tokens", options.get("max_length", columns + DEFAULT_MAX_NEW_TOKENS) - columns)
    if most < 1:
        raise ValueError(
            f"the prompt has {columns} tokens and max_length is {options['max_length']}: "
            "nothing would be generated; give max_new_tokens"
        )
    least = options.get("min_new_tokens", max(0, options.get("min_length", 0) - columns))
    if least > most:
        raise ValueError(f"min_new_tokens (or min_length) asks for {least} new tokens, and at most {most} may come")
    return most, least


def _prompts(ids: Tensor, mask: Tensor | None, vocab_size: int, pad: int | None) -> list[list[int]]:
    """Each row's real tokens. Without a mask, a padding id that is no end token marks padding, as in transformers."""
    check_batch("input_ids", ids)
    if mask is None:
        mask = torch.ones_like(ids) if pad is None else ids != pad
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, and input_ids {list(ids.shape)}")
    prompts = [row[real].tolist() for row, real in zip(ids, mask.to(ids.device).bool(), strict=True)]
    for index, prompt in enumerate(prompts):
        check_prompt(f"row {index} of input_ids", prompt, vocab_size)
    return prompts


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Ragged rows as one [B, L] int64 tensor."""
    width = max(map(len, rows))
    return torch.tensor([[*row] + [pad] * (width - len(row)) for row in rows], dtype=torch.int64)


def _by_step(
    kept: Mapping[Request, Sequence[Tensor]], requests: Sequence[Request], vocab_size: int
) -> tuple[Tensor, ...]:
    """For each step [B * n, V] float32 of what was kept of every request; -inf for those that had ended."""
    gone = torch.full((vocab_size,), -torch.inf)
    steps = max(len(kept.get(request, ())) for request in requests)
    rows = [[*kept.get(request, ())] for request in requests]
    return tuple(
        torch.stack([row[step] if step < len(row) else gone.to(rows[0][0].device) for row in rows])
        for step in range(steps)
    )


def _power_of_2(count: int) -> int:
    """The smallest that is not under `count`."""
    return 1 << (count - 1).bit_length()


def _token_ids(name: str, value: Any, vocab_size: int) -> list[int]:
    """One id, several, or none, as a list. Raises ValueError for an id outside the vocabulary."""
    ids = as_list(value)
    check_ids(name, ids, vocab_size)
    return ids
