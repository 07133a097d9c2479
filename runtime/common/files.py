"""Files of a checkpoint: read with clear errors, written whole or not at all."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_DRAFT = re.compile(r"\..+\.(?:json|model|safetensors)\.(\d+)")


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


def draft_of(path: Path) -> Path:
    """Where this process writes what is to become `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def remove_dead_drafts(folder: Path) -> None:
    """Removes the drafts of processes that have ended: one that was killed could not do so itself."""
    for path in folder.iterdir():
        match = _DRAFT.fullmatch(path.name)
        if match and not _runs(int(match[1])):
            with suppress(PermissionError):  # Windows': somebody writes it
                path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if process == os.getpid() or os.name != "posix":
        return process == os.getpid()
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a draft's path beside `path`, moved into place when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_dead_drafts(path.parent)
    draft = draft_of(path)
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    with whole(path) as draft:
        draft.write_bytes(content)


def json_bytes(content: dict[str, Any]) -> bytes:
    """A JSON object as a file holds it: readable, and in UTF-8."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object whole or not at all."""
    write(path, json_bytes(content))
