"""The files of a checkpoint: found in a folder or on the hub, read with clear errors, written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]
WEIGHT_FILES = ["*.safetensors"]


def locate(
    id_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """The folder of a checkpoint: `id_or_path` itself if it is one, else its snapshot from the Hugging Face hub.

    Only data is downloaded (JSON, Jinja, SentencePiece, safetensors; pickled .bin weights where there is nothing else),
    never code. `weights=False` leaves the weights out. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured.

    Raises:
        FileNotFoundError: no such folder, no such repository or revision, or no network and nothing in the cache.
        NotADirectoryError: `id_or_path` is a file.
    """
    name = os.fspath(id_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file: give the folder that holds config.json and the weights")
    parts = name.split("/")
    if len(parts) != 2 or not all(part and part[0] not in "~." for part in parts) or os.path.isabs(name):
        raise FileNotFoundError(f"there is no folder {name!r} (and a hub repository would be named owner/name)")

    # Imported here: a local folder, the common case, does not wait for it.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(patterns: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=patterns,
            )
        )

    try:
        folder = snapshot(SMALL_FILES + WEIGHT_FILES if weights else SMALL_FILES)
        if weights and not any(folder.glob("*.safetensors")):
            folder = snapshot([*SMALL_FILES, "*.bin"])
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError) as error:
        at = f" at revision {revision!r}" if revision else ""
        hint = "nothing of it is in the cache" if local_files_only else "check the name, the network and HF_TOKEN"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"{name!r} is no local folder, and the hub gave no repository of that name{at}: {hint} ({reason[0]})"
        ) from error
    return folder


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
