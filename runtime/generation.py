"""The plain decode loop, one token of every unfinished row a step, and transformers' `generate` on top of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cache import KVCache
from .files import read_json
from .keywords import reject_unknown
from .model import Decoder, LanguageModel
from .pages import Pages, pages_of
from .request import Request, check_prompt
from .rope import inverse_frequencies
from .sampling import Sampler, SamplingParams, top_logprobs
from .text import TextStream
from .token_ids import check_ids

GENERATION_CONFIG = "generation_config.json"
# A longer prompt goes through the model in pieces of this many tokens, which bounds the memory for activations and
# keeps them in a CPU's caches (2048 tokens at once took 1.05 times as long on an EPYC, 2026-11-25).
PREFILL_CHUNK = 512
DEFAULT_MAX_NEW_TOKENS = 20  # transformers' own
DEFAULT_TOP_K = 50  # likewise, where sampling is asked for

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Step:
    """One step's logits [B, V] and what `Sampler.scores` made of them, of the rows that were running."""

    rows: list[Request]
    logits: Tensor
    scores: Tensor | None


class Batch:
    """Rows that are decoded together. A row's tokens do not depend on the others (see README, Reproducibility).

    Rows leave the batch when they finish; a caller ends one early with `row.finish(...)`.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: Sequence[Request],
        eos_token_ids: Iterable[int],
        logits_processor: Sequence[LogitsProcessor] = (),
        keep_scores: bool = False,
    ):
        self._model = model
        self._eos = frozenset(eos_token_ids)
        self._logits_processor = logits_processor
        self._keep_scores = keep_scores
        self._cache: KVCache | None = None
        self._sampler = Sampler(
            [(row.params, row.prompt_ids, row.answer) for row in rows],
            vocab_size=model.config.vocab_size,
            device=model.device,
            eos_token_ids=self._eos,
        )
        self.rows = list(rows)

    @torch.inference_mode()
    def step(self) -> Step:
        """The next token of every row that is still running."""
        logits = self._prefill() if self._cache is None else self._decode(self._cache)
        processed = logits
        if self._logits_processor:
            history = _padded([row.prompt_ids + row.token_ids for row in self.rows]).to(logits.device)
            processed = logits.to(torch.float32, copy=True)  # a processor may write into it
            for process in self._logits_processor:
                processed = process(history, processed)
        scores = self._sampler.scores(processed) if self._keep_scores else None
        tokens, logprobs = self._sampler(processed)
        if self._logits_processor:
            logprobs = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        step = Step(self.rows, logits, scores)
        self._note_alternatives(logits)
        for row, token, logprob in zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            self._stop(row, token)
        return step

    def drop_finished(self) -> None:
        """Frees what finished rows held."""
        kept = [index for index, row in enumerate(self.rows) if row.finish_reason is None]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in kept]
        if self.rows and self._cache is not None:
            self._cache.keep(kept)
            self._sampler.keep(kept)

    def _note_alternatives(self, logits: Tensor) -> None:
        for index, row in enumerate(self.rows):
            if row.params.logprobs:
                ids, logprobs = top_logprobs(logits[index : index + 1], row.params.logprobs)
                row.top_logprobs.append(dict(zip(ids[0].tolist(), logprobs[0].tolist(), strict=True)))

    def _stop(self, row: Request, token: int) -> None:
        if token in (row.params.stop_token_ids or ()):
            row.finish("stop", token)
        elif token in self._eos and not row.params.ignore_eos:
            row.finish("stop")
        elif len(row.token_ids) >= row.max_tokens:
            row.finish("length")

    def _prefill(self) -> Tensor:
        """Every prompt by itself, and each but once: a row's numbers are those that it would have alone."""
        model = self._model
        needed = [pages_of(len(row.prompt_ids) + row.max_tokens) for row in self.rows]
        pages = Pages(model.config, sum(needed), model.dtype, model.device)
        filled: dict[tuple[int, ...], tuple[KVCache, Tensor]] = {}
        caches, logits = [], []
        for row, count in zip(self.rows, needed, strict=True):
            held, prompt = [pages.take(count)], tuple(row.prompt_ids)
            if prompt in filled:
                first, last_logits = filled[prompt]
                cache = first.copy(held)
            else:
                cache = KVCache(pages, held)
                last_logits = self._fill(cache, torch.tensor([prompt], device=model.device))
                filled[prompt] = cache, last_logits
            caches.append(cache)
            logits.append(last_logits)
        self._cache = KVCache.join(caches)
        return torch.cat(logits)

    def _fill(self, cache: KVCache, ids: Tensor) -> Tensor:
        """The prompt's tokens [1, T] into its cache; the last one's logits [1, V]."""
        model = self._model
        # By the whole prompt's length, which the first chunk does not show.
        cache.inv_freq = inverse_frequencies(model.config, ids.shape[1], model.device)[None]
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            logits = model(chunk, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1]

    def _decode(self, cache: KVCache) -> Tensor:
        ids = torch.tensor([row.token_ids[-1:] for row in self.rows], device=self._model.device)
        positions = torch.tensor([[length] for length in cache.lengths], device=self._model.device)
        return self._model(ids, position_ids=positions, past_key_values=cache).logits[:, -1]


@dataclass
class GenerateOutput:
    """What `generate` returns with return_dict_in_generate.

    sequences: [B * n, T + longest] prompt and answer. logprobs: [B * n, longest] float32 log-probability of each
    chosen token under the model's own softmax, 0 behind a row's end. logits, scores: a [B * n, V] float32 tensor for
    each step, before and after penalties, temperature and filters; -inf for rows that had ended.
    """

    sequences: Tensor
    logprobs: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None


# Settings of transformers that this runtime has only one value of.
_ONLY: dict[str, Any] = {"num_beams": 1, "use_cache": True, "num_beam_groups": 1, "early_stopping": False}
_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
_SAMPLED_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
_SAMPLING = (
    *_SAMPLED_ONLY,
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop_strings",
    "num_return_sequences",
)
_TOKENS = ("eos_token_id", "pad_token_id")


class Generation(LanguageModel):
    """A language model with transformers' `generate`.

    Attributes:
        generation_config: the checkpoint's generation_config.json as read, where `generate` starts from.
    """

    def __init__(self, decoder: Decoder, **factory: Any):
        super().__init__(decoder, **factory)
        self.generation_config: dict[str, Any] = {}

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Sequence[LogitsProcessor] | LogitsProcessor | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        output_logits: bool = False,
        **kwargs: Any,
    ) -> Tensor | GenerateOutput:
        """Continues prompts; names and meanings are those of transformers' `generate`.

        Settings come from the checkpoint's generation_config.json, then `generation_config` (a dictionary or an object
        with to_dict), then keywords: do_sample (False: greedy), temperature, top_k, top_p, min_p, typical_p,
        repetition_penalty, presence_penalty, frequency_penalty, logit_bias, seed, num_return_sequences, stop_strings
        (with tokenizer), eos_token_id (one or a list), pad_token_id, max_new_tokens or max_length (20 new ones where
        nothing is said), min_new_tokens or min_length.

        Args:
            input_ids (or inputs): [B, T] integers, padded on either side.
            attention_mask: [B, T], zero at padding.
            logits_processor: callables (ids [B, L], logits [B, V]) -> logits, called before all other settings, on the
                rows still running; ragged rows are padded on the left with 0.
            streamer: an object with put(ids) and end(), given the prompt first and then every step's tokens.
            output_scores, output_logits: keep them in the GenerateOutput that return_dict_in_generate asks for.

        Returns:
            [B * num_return_sequences, T + longest answer] ids, padded with pad_token_id; or a GenerateOutput.

        Raises:
            TypeError: an unknown keyword. ValueError: a bad or contradictory setting, an empty prompt, a bad id.
        """
        if (input_ids is None) == (inputs is None):
            raise ValueError("generate needs input_ids (or inputs, and not both): [B, T] integers")
        ids = inputs if input_ids is None else input_ids
        if not isinstance(ids, Tensor):
            raise TypeError(f"input_ids must be a tensor [B, T] of integers; it is a {type(ids).__name__}")
        options = _options(self, generation_config, kwargs)
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
        rows = [Request(prompt, params, most, answer) for prompt in prompts for answer in range(params.n)]
        processors = [logits_processor] if callable(logits_processor) else logits_processor or []
        if not isinstance(processors, list | tuple) or not all(map(callable, processors)):
            raise TypeError(f"logits_processor must be a callable or a list of them; it is {logits_processor!r}")
        batch = Batch(self, rows, eos, processors, keep_scores=output_scores)
        spelled = {row: TextStream(tokenizer, texts, skip_special_tokens=False) for row in rows} if texts else {}
        scores: list[Tensor] = []
        logits: list[Tensor] = []
        if streamer is not None:
            streamer.put(ids.cpu())
        while batch.rows:
            step = batch.step()
            for row in step.rows if texts else ():
                spelled[row].push(row.token_ids[-1])
                if spelled[row].stopped is not None:
                    row.finish("stop", spelled[row].stopped)
            if output_scores and step.scores is not None:
                scores.append(_of_all(rows, step.rows, step.scores))
            if output_logits:
                logits.append(_of_all(rows, step.rows, step.logits.float()))
            if streamer is not None:
                running = set(step.rows)
                streamer.put(torch.tensor([row.token_ids[-1] if row in running else pad for row in rows]))
            batch.drop_finished()
        if streamer is not None:
            streamer.end()

        answers = _padded([row.token_ids for row in rows], pad, left=False)
        sequences = torch.cat([ids.repeat_interleave(params.n, dim=0), answers.to(ids)], dim=1)
        if not return_dict_in_generate:
            return sequences
        logprobs = torch.zeros(answers.shape)
        for index, row in enumerate(rows):
            logprobs[index, : len(row.logprobs)] = torch.tensor(row.logprobs)
        return GenerateOutput(
            sequences, logprobs, tuple(scores) if output_scores else None, tuple(logits) if output_logits else None
        )


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a checkpoint, {} where it has none. Raises ValueError where it is damaged."""
    path = folder / GENERATION_CONFIG
    return read_json(path) if path.is_file() else {}


def _options(model: Generation, given: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's settings, under those of generation_config, under the keywords; None counts as not said."""
    known = (*_LENGTHS, *_SAMPLING, *_TOKENS, "do_sample", *_ONLY)
    reject_unknown("generate", kwargs, known)
    config = given.to_dict() if hasattr(given, "to_dict") else given or {}
    if not isinstance(config, Mapping):
        raise TypeError(f"generation_config must be a dictionary or an object with to_dict; it is {given!r}")
    options: dict[str, Any] = {}
    for source in (model.generation_config, config, kwargs):
        options |= {name: value for name, value in source.items() if value is not None and name in known}
    if options.get("pad_token_id") == -1:
        del options["pad_token_id"]  # some checkpoints' way to say that there is none
    for name, only in _ONLY.items():
        if options.pop(name, only) != only:
            raise ValueError(
                f"{name} can only be {only} here: this runtime samples or is greedy, one token after the other"
            )
    return options


def _params(options: Mapping[str, Any], explicit: Mapping[str, Any]) -> SamplingParams:
    sampled = options.get("do_sample", False)
    idle = [name for name in _SAMPLED_ONLY if explicit.get(name) is not None]
    if idle and not sampled:
        warnings.warn(
            f"{', '.join(idle)} have no effect: decoding is greedy until do_sample=True is given", stacklevel=3
        )
    settings = {name: options[name] for name in _SAMPLING if name in options}
    if sampled:
        settings.setdefault("top_k", DEFAULT_TOP_K)
    return SamplingParams.from_kwargs(do_sample=sampled, **settings)


def _lengths(options: Mapping[str, Any], columns: int) -> tuple[int, int]:
    """The most and the least new tokens; max_length and min_length count the prompt's columns too, as elsewhere."""
    for name in _LENGTHS:
        low, value = int(name.startswith("max")), options.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must be an integer >= {low}; got {value!r}")
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
    if ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ValueError(f"input_ids must be integers [B, T] and not empty; it is {list(ids.shape)} of {ids.dtype}")
    if mask is None:
        mask = torch.ones_like(ids) if pad is None else ids != pad
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, and input_ids {list(ids.shape)}")
    prompts = [row[real].tolist() for row, real in zip(ids, mask.to(ids.device).bool(), strict=True)]
    for index, prompt in enumerate(prompts):
        check_prompt(f"row {index} of input_ids", prompt, vocab_size)
    return prompts


def _padded(rows: Sequence[Sequence[int]], pad: int = 0, left: bool = True) -> Tensor:
    """Ragged rows as one [B, L] int64 tensor."""
    width = max(map(len, rows))
    filled = [
        [pad] * (width - len(row)) + list(row) if left else list(row) + [pad] * (width - len(row)) for row in rows
    ]
    return torch.tensor(filled, dtype=torch.int64)


def _of_all(rows: Sequence[Request], running: Sequence[Request], values: Tensor) -> Tensor:
    """[B * n, V] of the running rows' values; -inf for rows that have ended."""
    full = values.new_full((len(rows), values.shape[1]), -torch.inf)
    place = {row: index for index, row in enumerate(rows)}
    full[[place[row] for row in running]] = values
    return full


def _token_ids(name: str, value: int | Sequence[int] | None, vocab_size: int) -> list[int]:
    """One id, several, or none, as a list. Raises ValueError for what is no id of the vocabulary."""
    ids: list[Any] = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    check_ids(name, ids, vocab_size)
    return ids
