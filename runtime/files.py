"""Files of a checkpoint: read with clear errors, written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """The text in `path`. Raises ValueError, naming the file, where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError, naming the file, where it holds anything else."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(content).__name__}")
    return content


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a draft's path beside `path`, moved into place when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    with whole(path) as draft:
        draft.write_bytes(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object, readable and in UTF-8, whole or not at all."""
    write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
