"""The output of a batch: one answer a line, as a JSON object in OpenAI's batch format, in the order they are ready."""

from __future__ import annotations

import os
import secrets
from collections.abc import Container
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from ..common.files import has_file
from ..common.shown import shown
from ..server.json_response import encoded
from .answer import Answer
from .request import parse_object

_BEGINNING = b'{"id": "batch_req_'


class Output:
    """A file of answers, which grows by whole lines.

    What an earlier run has left is kept, but for a last line that it was killed in the middle of.

    Args:
        known: the custom_ids of the requests.
        model: the model's name, which answers that are no errors have.

    Attributes:
        answered: the custom_ids of the answers.
        errors: how many answers are errors.
        first_error: the first of them.

    Raises OSError if another process writes to the file, and ValueError if it is no output of these requests and this
    model.
    """

    def __init__(self, path: Path, known: Container[str], model: str):
        self.answered: set[str] = set()
        self.errors, self.first_error = 0, ""
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OSError(f"another process is writing to {path}: wait for its end") from None
        try:
            if has_file(path):
                os.truncate(path, self._read(path, known, model))
            self._file = path.open("ab")
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:
            self._unlock()

    def write(self, answer: Answer) -> None:
        """Appends an answer; it is with the operating system when this returns."""
        line = {
            "id": f"batch_req_{secrets.token_hex(12)}",
            "custom_id": answer.custom_id,
            "response": {
                "status_code": answer.status,
                "request_id": f"req_{secrets.token_hex(12)}",
                "body": answer.body,
            },
            "error": None,
        }
        self._file.write(encoded(line, separators=(", ", ": ")) + b"\n")
        self._file.flush()
        self._count(answer)

    def _count(self, answer: Answer) -> None:
        self.answered.add(answer.custom_id)
        if answer.error:
            self.errors += 1
            self.first_error = self.first_error or f"{shown(answer.custom_id)}: {answer.error}"

    def _read(self, path: Path, known: Container[str], model: str) -> int:
        """Counts what is there. Returns the number of bytes in whole lines."""
        size = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and line[: len(_BEGINNING)] == _BEGINNING[: len(line)]:
                    break
                answer = _answer(line)
                if answer is None:
                    raise ValueError(f"{path}, line {number} is no answer of a batch: name another file for the output")
                if answer.custom_id not in known:
                    what = f"{path}, line {number} answers {shown(answer.custom_id)}, which the input does not have"
                    raise ValueError(f"{what}: name another file for the output")
                if (name := answer.body.get("model", model)) != model:
                    what = f"{path}, line {number} is an answer of {shown(name)}, and this model is {model!r}"
                    raise ValueError(f"{what}: name another file for the output")
                if answer.custom_id in self.answered:
                    what = f"{path}, line {number} answers {shown(answer.custom_id)}, as an earlier line does"
                    raise ValueError(f"{what}: remove one of them")
                self._count(answer)
                size += len(line)
        return size

    def _unlock(self) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


def _answer(line: bytes) -> Answer | None:
    """The answer in a line that `write` has written; None if it was not."""
    try:
        content = parse_object(line)
        response = content["response"]
        found = Answer(content["custom_id"], response["status_code"], response["body"])
        return found if line.endswith(b"\n") and found.tokens >= 0 and (found.error or found.status) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
