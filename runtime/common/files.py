"""Reads files of a checkpoint with clear errors, and writes them atomically."""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_DRAFT = re.compile(r"\..+\.(?:json|model|safetensors)\.(\d+)")


def has_file(path: Path) -> bool:
    """Whether there is a file of this name.

    Raises OSError, naming it, for something of this name that is no file to read: a link that leads nowhere or in a
    circle, a folder. Its settings would be missing without a word.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.is_symlink():
            return False
        raise FileNotFoundError(f"{path} is a link to a missing file; fetch it again, or remove the link") from None
    except OSError as error:
        raise type(error)(f"{path} cannot be read ({error.strerror}); fetch it again, or remove it") from None
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is a {'folder' if stat.S_ISDIR(mode) else 'device or pipe'}, and should be a file")
    return True


def read_text(path: Path) -> str:
    """The text in `path`. Raises ValueError, naming the file, if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError, naming the file, if it contains anything else."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a JSON object; it contains a {type(content).__name__}")
    return content


def draft_of(path: Path) -> Path:
    """The temporary file, unique to this process, that is renamed to `path` once it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def remove_dead_drafts(folder: Path) -> None:
    """Removes the temporary files of processes that have ended, such as one that was killed."""
    for path in folder.iterdir():
        match = _DRAFT.fullmatch(path.name)
        if match and not _runs(int(match[1])):
            with suppress(PermissionError):  # on Windows: another process has it open
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
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which is renamed to `path` if the block succeeds, and else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_dead_drafts(path.parent)
    draft = draft_of(path)
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    with atomic(path) as draft:
        draft.write_bytes(content)


def share(path: Path) -> None:
    """Gives a file the permissions of any new file: safetensors lets only the owner read those that it writes."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def json_bytes(content: dict[str, Any]) -> bytes:
    """The content of a JSON file: indented, in UTF-8."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object atomically."""
    write(path, json_bytes(content))
