"""Reads JSON whose fields may be wrong. Every error names the file and the field."""

import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
KINDS = {str: "a string", dict: "an object", list: "an array", int: "an integer", bool: "true or false"}


class Fields(NamedTuple):
    """A JSON object. place: where it is in its file, such as "spec"; "" for the whole file."""

    file: str
    place: str
    content: dict[str, Any]

    def error(self, field: str, what: str) -> ValueError:
        return ValueError(f"{self.file}: {self._place(field)}: {what}")

    def _place(self, field: str) -> str:
        return f"{self.place}.{field}" if self.place else field

    def get(self, field: str, kind: type[T]) -> T:
        """A required field. Raises ValueError if it is missing or of another kind; a string must not be empty."""
        if field not in self.content:
            raise self.error(field, "is missing")
        value = self.content[field]
        if type(value) is not kind or value == "":
            raise self.error(field, f"must be {KINDS[kind]}, and is {json.dumps(value)[:60]}")
        return value

    def find(self, field: str, kind: type[T]) -> T | None:
        """An optional field: None if it is missing or null."""
        return None if self.content.get(field) is None else self.get(field, kind)

    def inner(self, field: str) -> "Fields":
        """The object in a required field."""
        return Fields(self.file, self._place(field), self.get(field, dict))


def read_text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def parse(text: str, file: str) -> Fields:
    """The JSON object of a text. file: its name, for errors."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object")
    return Fields(file, "", content)
