"""transformers' `generate`: its options become requests to the engine, and their tokens its tensors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_batch
from ..common.shown import shown
from ..engine.answer import Answer
from ..engine.engine import Engine
from ..engine.hooks import LogitsHooks
from ..engine.request import Request, check_prompt
from ..engine.shared import SharedEngine
from ..model.config import InternLM3Config
from ..model.model import invariant_rows
from ..sampling.generation_config import is_config
from ..sampling.logits_processors import LogitsProcessor, early_processors, processors
from ..tokenization.text_stream import TextStream
from .generate_options import GenerateOptions, read_options
from .model_outputs import GenerateOutput
from .pretrained import Pretrained

MAX_BATCH_SIZE = 64  # more requests wait
MIN_WINDOW = 1024  # an engine's least max_seq_len, so that a few calls of growing length don't make one each

# (ids [N, L], None) -> whether all rows end, or [N] which of them.
StoppingCriterion = Callable[[Tensor, None], bool | Tensor]


class Generation(Pretrained):
    """A pretrained language model with transformers' `generate`."""

    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__(config, **factory)
        self._shared = SharedEngine()

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
        """Generates token ids that continue prompts. Arguments, their meaning and their defaults are transformers'.

        A setting is looked up in the keywords, then in `generation_config`, then in the checkpoint's
        generation_config.json. A keyword that is None turns its setting off: eos_token_id=None ends at the maximum
        length only. N is B * num_return_sequences.

            >>> ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
            >>> model.generate(ids, max_new_tokens=32, do_sample=True, top_p=0.9, temperature=0.7)

        Args:
            input_ids (or inputs): [B, T] integers, the prompts; rows may be padded on either side.
            attention_mask: [B, T], zero at padding. By default a pad token that is no end token marks padding. A
                generation_config may be given here by position.
            generation_config: settings in a dictionary, or in an object with to_dict such as a GenerationConfig.
            logits_processor: a callable or a list of them, (ids [N, L], scores [N, V] float32) -> scores. They run
                after penalties and masks, before temperature and filters, and get every row of the call: its prompt as
                given, and its answer, padded once it has ended.
            prefix_allowed_tokens_fn: (row, ids [L] of that row) -> the tokens that may come next.
            stopping_criteria: a callable or a list of them, (ids [N, L], None) -> bool or bool [N]. They run after
                every step; a row for which one is true ends.
            streamer: an object with put(ids) and end(); gets the prompts first, then every step's tokens.
            tokenizer: needed by stop_strings, which are searched in the decoded text of prompt and answer; one that
                ends in the prompt counts for nothing.
            return_dict_in_generate: return a GenerateOutput.
            output_scores, output_logits: keep every step's scores or logits in it.
            renormalize_logits: the scores are log-probabilities.
            kwargs: settings.

                Length: max_new_tokens (20), or max_length, which counts the prompt; min_new_tokens, or min_length;
                eos_token_id, one id or a list; pad_token_id; stop_strings; forced_eos_token_id;
                exponential_decay_length_penalty.

                Sampling: do_sample (False: greedy), and with it temperature (1.0), top_k (50), top_p (1.0), min_p,
                typical_p, seed; num_return_sequences (1).

                Penalties and constraints: repetition_penalty (1.0), presence_penalty, frequency_penalty, logit_bias,
                sequence_bias, bad_words_ids, no_repeat_ngram_size, suppress_tokens, begin_suppress_tokens.

                `SamplingParams` documents each. Other settings of transformers are accepted at the values that mean
                nothing here: see runtime/common/neutral.py.

        Returns:
            [N, T + longest answer] ids, prompts included, padded with pad_token_id; or a GenerateOutput.

        Raises:
            TypeError: an unknown keyword, or an argument of the wrong type.
            ValueError: a bad, unsupported or contradictory setting, an empty prompt, a token id that the model does not
                have.
            RuntimeError: logits that are not numbers, as float16 may give.
        """
        ids = _input_ids(input_ids, inputs)
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            if generation_config is not None or not is_config(attention_mask):
                raise TypeError(
                    "attention_mask must be a tensor [B, T], or in its place a generation_config, given once; it is "
                    f"{shown(attention_mask)}"
                )
            generation_config, attention_mask = attention_mask, None
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise TypeError(f"streamer must be an object with put(ids) and end(); it is {shown(streamer)}")
        flags = {
            "return_dict_in_generate": return_dict_in_generate,
            "output_scores": output_scores,
            "output_logits": output_logits,
            "renormalize_logits": renormalize_logits,
        }
        given_flags = {name: flag for name, flag in flags.items() if flag is not None}
        options = read_options(
            self.config, self.generation_config, generation_config, {**kwargs, **given_flags}, columns=ids.shape[1]
        )
        prompts = _prompts(ids, attention_mask, self.config.vocab_size, options.padding_id)
        params, most, eos = options.params, options.max_new_tokens, options.eos_token_ids
        if params.stops and tokenizer is None:
            raise ValueError("stop_strings needs tokenizer=, to search the text that the tokens spell")

        criteria = _callables("stopping_criteria", stopping_criteria)
        prefix = [*map(_constrained, _callables("prefix_allowed_tokens_fn", prefix_allowed_tokens_fn))]
        own = processors(params, begin=ids.shape[1], most=most, ends=eos, prefix=prefix)
        given = ids.repeat_interleave(params.n, dim=0)
        hooks = LogitsHooks(
            given.cpu().long(),
            options.pad_token_id,
            early_processors(params),
            [*own, *_callables("logits_processor", logits_processor)],
            keep_logits=options.output_logits,
            keep_scores=options.output_scores,
        )
        requests = hooks.requests = [
            Request(prompt, params, most, frozenset(eos), answer, hooks if hooks.needed else None)
            for prompt in prompts
            for answer in range(params.n)
        ]
        if streamer is not None:
            streamer.put(given.cpu())  # a row for each answer, as in transformers
        streams = [
            TextStream(
                tokenizer,
                params.stops,
                skip_special_tokens=False,
                prompt_ids=request.prompt_ids,
                stops_begin_in_prompt=True,
            )
            if params.stops
            else None
            for request in requests
        ]
        answers = [*map(Answer, requests, streams)]
        with closing(self._run(answers, hooks, criteria)) as run:
            for tokens in run:
                if streamer is not None:
                    padded = [options.pad_token_id if token is None else token for token in tokens]
                    streamer.put(torch.tensor(padded, dtype=torch.int64, device="cpu"))
        if streamer is not None:
            streamer.end()
        return _output(given, requests, hooks, options, self.config.vocab_size)

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The scores of the tokens that `generate` chose.

            >>> out = model.generate(ids, return_dict_in_generate=True, output_scores=True)
            >>> logprobs = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)

        Args:
            sequences, scores: of a GenerateOutput: [N, T + S] ids, and S tensors [N, V]. Its logits serve, too.
            beam_indices: None, since there is no beam search.
            normalize_logits: make log-probabilities of the scores.

        Returns:
            [N, S] float32; 0 after a row's end.

        Raises:
            ValueError: beam_indices, or scores that are not of these sequences.
        """
        if beam_indices is not None:
            raise ValueError("beam_indices must be None: this runtime has no beam search")
        if not scores or scores[0].shape[0] != len(sequences) or len(scores) > sequences.shape[1]:
            shapes = [list(step.shape) for step in scores or ()]
            raise ValueError(
                f"sequences {list(sequences.shape)} and scores of {len(shapes)} steps {shapes[:1]} are not of one "
                "call: generate returns both with return_dict_in_generate and output_scores"
            )
        by_step = torch.stack([*scores], dim=1)
        chosen = sequences[:, -len(scores) :].to(by_step.device)
        found = (by_step.log_softmax(-1) if normalize_logits else by_step).gather(2, chosen[:, :, None])[:, :, 0]
        return found.masked_fill(by_step.isneginf().all(-1), 0.0)

    def _run(
        self, answers: Sequence[Answer], hooks: LogitsHooks, criteria: Sequence[StoppingCriterion]
    ) -> Generator[list[int | None], None, None]:
        """Runs answers, and yields each step's tokens: None for an answer that has ended or waits for a slot.

        A stopping criterion that is true of an answer ends it.
        """
        longest = max(len(answer.request.prompt_ids) + answer.request.max_tokens for answer in answers)
        most = invariant_rows(self.model.device) if self.model.batch_invariant else MAX_BATCH_SIZE
        engine = self.engine(min(_power_of_2(len(answers)), most), max(_power_of_2(longest), MIN_WINDOW))
        index = {answer: number for number, answer in enumerate(answers)}
        try:
            with closing(engine.run(answers)) as run:
                for updates in run:
                    tokens: list[int | None] = [None] * len(answers)
                    for update in updates:
                        if update.answer.request.finish_reason == "error" and update.finished:
                            raise RuntimeError(f"row {index[update.answer]}: {update.answer.request.stop_reason}")
                        tokens[index[update.answer]] = update.token_id
                    if all(token is None for token in tokens):
                        continue
                    for criterion in criteria:
                        ids = hooks.ids([answer.read_tokens for answer in answers])
                        met = torch.as_tensor(criterion(ids, None), dtype=torch.bool, device="cpu")
                        ended = met.expand(len(answers)).tolist()
                        for answer, token, end in zip(answers, tokens, ended, strict=True):
                            if end and token is not None:
                                engine.finish(answer)
                    yield tokens
        finally:
            for answer in answers:
                answer.request.hooks = None  # which lead back to it: what they kept is freed with the call

    def engine(self, max_batch_size: int, max_seq_len: int) -> Engine:
        """The engine of all calls of `generate`, for at least `max_batch_size` requests at a time.

        One that is too small, or whose model was moved to another device, is replaced as soon as it is idle. Raises as
        Engine.
        """
        return self._shared.get(self, max_batch_size, max_seq_len)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model begins without an engine."""
        return {name: value for name, value in self.__dict__.items() if name != "_shared"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._shared = SharedEngine()


def _input_ids(input_ids: Tensor | None, inputs: Tensor | None) -> Tensor:
    """The one of two names that is given, checked: [B, T] integers."""
    if (input_ids is None) == (inputs is None):
        raise ValueError("generate needs input_ids (or inputs, and not both): [B, T] integers")
    ids = inputs if input_ids is None else input_ids
    if not isinstance(ids, Tensor):
        raise TypeError(f"input_ids must be a tensor [B, T] of integers; it is a {type(ids).__name__}")
    check_batch("input_ids", ids)
    return ids


def _prompts(ids: Tensor, mask: Tensor | None, vocab_size: int, padding_id: int | None) -> list[list[int]]:
    """Each row's tokens without padding. Without a mask, `padding_id` marks padding, as in transformers."""
    if mask is None:
        mask = torch.ones_like(ids) if padding_id is None else ids != padding_id
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, and input_ids {list(ids.shape)}")
    prompts = [row[real].tolist() for row, real in zip(ids, mask.to(ids.device).bool(), strict=True)]
    for index, prompt in enumerate(prompts):
        check_prompt(f"row {index} of input_ids", prompt, vocab_size)
    return prompts


def _callables(name: str, given: Any) -> list[Any]:
    """One callable, several, or none, as a list."""
    listed = [given] if callable(given) else [] if given is None else given
    if not isinstance(listed, list | tuple) or not all(map(callable, listed)):
        raise TypeError(f"{name} must be a callable or a list of them; it is {given!r}")
    return [*listed]


def _constrained(allowed: Callable[[int, Tensor], Sequence[int]]) -> LogitsProcessor:
    """A processor that allows each row only the tokens that `allowed` returns. Raises ValueError if there is none."""

    def constrain(ids: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -torch.inf)
        for row, text in enumerate(ids):
            tokens = [*allowed(row, text)]
            if not tokens:
                raise ValueError(f"prefix_allowed_tokens_fn allows row {row} no token: return at least one")
            kept[row, tokens] = scores[row, tokens]
        return kept

    return constrain


def _output(
    given: Tensor, requests: Sequence[Request], hooks: LogitsHooks, options: GenerateOptions, vocab_size: int
) -> Tensor | GenerateOutput:
    """What `generate` returns once all requests have ended. given: [N, T] the prompts."""
    longest = max(len(request.token_ids) for request in requests)
    generated = torch.full((len(requests), longest), options.pad_token_id, dtype=torch.int64, device="cpu")
    logprobs = torch.zeros(generated.shape, dtype=torch.float32, device="cpu")
    for row, request in enumerate(requests):
        generated[row, : len(request.token_ids)] = torch.tensor(request.token_ids, dtype=torch.int64, device="cpu")
        logprobs[row, : len(request.logprobs)] = torch.tensor(request.logprobs, dtype=torch.float32, device="cpu")
    sequences = torch.cat([given, generated.to(given)], dim=1)
    if not options.return_dict:
        return sequences
    scores = hooks.scores
    if options.renormalize:
        scores = {request: [x.log_softmax(-1) for x in kept] for request, kept in scores.items()}
    return GenerateOutput(
        sequences,
        logprobs,
        _by_step(scores, requests, vocab_size) if options.output_scores else None,
        _by_step(hooks.logits, requests, vocab_size) if options.output_logits else None,
    )


def _by_step(
    kept: Mapping[Request, Sequence[Tensor]], requests: Sequence[Request], vocab_size: int
) -> tuple[Tensor, ...]:
    """For each step [N, V] float32 of what was kept of every request; -inf for those that had ended."""
    rows = [[*kept.get(request, ())] for request in requests]
    steps = max(map(len, rows))
    ended = torch.full((vocab_size,), -torch.inf, dtype=torch.float32, device="cpu")
    return tuple(
        torch.stack([row[step] if step < len(row) else ended.to(rows[0][0].device) for row in rows])
        for step in range(steps)
    )


def _power_of_2(count: int) -> int:
    """The smallest power of 2 that is at least `count`."""
    return 1 << (count - 1).bit_length()
