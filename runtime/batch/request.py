"""The input of a batch: one request a line, as a JSON object in OpenAI's batch format."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import has_file
from ..common.shown import shown

_FIELDS = {"custom_id": str, "method": str, "url": str, "body": dict}
_KINDS = {str: "a string", dict: "an object"}


@dataclass(frozen=True)
class BatchRequest:
    """A request of a batch, whose method is POST.

    Attributes:
        custom_id: what tells it from the others of its file.
        url: where it goes, such as "/v1/chat/completions".
    """

    custom_id: str
    url: str
    body: dict[str, Any]


def custom_ids(path: Path) -> set[str]:
    """The custom_id of every request in a file.

    Raises ValueError, naming the line, for what is no request and for a custom_id that an earlier line has.
    """
    if not has_file(path):
        raise FileNotFoundError(f"there is no file {path}")
    lines: dict[str, int] = {}
    for number, request in _numbered(path):
        first = lines.setdefault(request.custom_id, number)
        if first != number:
            raise ValueError(f"{path}, line {number}: its custom_id {shown(request.custom_id)} is that of line {first}")
    if not lines:
        raise ValueError(f"{path} has no requests")
    return {*lines}


@dataclass(frozen=True)
class Unanswered:
    """The requests of a file but for those whose custom_id is in `answered`. Each is read when it is asked for."""

    path: Path
    answered: Collection[str]

    def __iter__(self) -> Iterator[BatchRequest]:
        return (request for _, request in _numbered(self.path) if request.custom_id not in self.answered)


def _numbered(path: Path) -> Iterator[tuple[int, BatchRequest]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                yield number, _request(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def _request(line: bytes) -> BatchRequest:
    fields = parse_object(line)
    for name, kind in _FIELDS.items():
        if name not in fields:
            raise ValueError(f"it has no {name}; a request has {', '.join(_FIELDS)}")
        if not isinstance(fields[name], kind):
            raise ValueError(f"{name} must be {_KINDS[kind]}; got {shown(fields[name])}")
    if unknown := fields.keys() - _FIELDS.keys():
        raise ValueError(f"unknown field {shown(min(unknown))}; a request has {', '.join(_FIELDS)}")
    if fields["method"] != "POST":
        raise ValueError(f'method must be "POST"; got {shown(fields["method"])}')
    return BatchRequest(fields["custom_id"], fields["url"], fields["body"])


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line. Raises ValueError for anything else."""
    try:
        content = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"it must be a JSON object; got {shown(content)}")
    return content
