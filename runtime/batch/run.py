"""Runs a batch: what the output does not have yet is answered and appended to it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from ..common.progress import hides_bar
from ..common.shown import shown
from .answer import Answer
from .output import Output
from .request import BatchRequest, Unanswered, custom_ids

AnswerAll = Callable[[Iterable[BatchRequest], Callable[[Answer], None]], None]


def run_batch(source: Path, out: Path, model: str, answer_all: AnswerAll) -> bool:
    """Answers the requests in `source` that have no answer in `out` yet, and reports on standard error.

    An answer of status 500 or more is the machine's fault, and not written, so that the next run asks again.

    Args:
        model: the model's name in requests.
        answer_all: takes requests, and a function to which it gives each answer. It is not called if none is left.

    Returns whether all requests have their answer in `out` now.

    Raises ValueError, before anything is computed, if a line of either file is wrong; OSError if one can't be read or
    written; and what `answer_all` raises.
    """
    known = custom_ids(source)
    if out.exists() and out.samefile(source):
        raise ValueError(f"{out} is the input: name another file for the output")
    with Output(out, known, model) as output:
        batch = _Run(output, len(known))
        try:
            if len(output.answered) < len(known):
                answer_all(Unanswered(source, output.answered), batch.write)
        finally:
            batch.close()
            print(batch.report(out), file=sys.stderr)
    return len(output.answered) == len(known)


class _Run:
    """What happens in one run."""

    def __init__(self, output: Output, count: int):
        self._output, self._count = output, count
        self._earlier = len(output.answered)
        self._start, self._tokens = time.perf_counter(), 0
        self._failed, self._first_failure = 0, ""
        self._bar = tqdm(total=count, initial=self._earlier, unit=" requests", disable=hides_bar(True))

    def write(self, answer: Answer) -> None:
        self._bar.update()
        if answer.status >= 500:
            self._failed += 1
            self._first_failure = self._first_failure or f"{shown(answer.custom_id)}: {answer.error}"
            return
        self._output.write(answer)
        self._tokens += answer.tokens

    def close(self) -> None:
        self._bar.close()

    def report(self, out: Path) -> str:
        output, seconds = self._output, time.perf_counter() - self._start
        answered = len(output.answered)
        lines = [f"{out}: {answered:,} of {self._count:,} requests are answered"]
        if output.errors:
            lines.append(f"{output.errors:,} of the answers are errors; the first is that of {output.first_error}")
        if self._failed:
            lines.append(f"{self._failed:,} requests failed; the first was {self._first_failure}")
        if answered < self._count:
            lines.append("the same command goes on with those that have no answer")
        if new := answered - self._earlier:
            per_second = f"{self._tokens / seconds:.1f} tokens/s, loading included"
            lines.append(f"{new:,} answers, {self._tokens:,} tokens in {seconds:.1f} s: {per_second}")
        return "\n".join(f"internlm3: {line}" for line in lines)
