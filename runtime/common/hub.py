"""Finds the folder of a checkpoint, and fetches from the Hugging Face hub only the files that this runtime reads."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import read_json
from .progress import hides_bar
from .shown import shown

NOTES = ("config.json", "generation_config.json", "quantize_config.json")
TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json", "chat_template.jinja")  # fmt: skip
# Weights in one file, or in the shards that an index names. Pickled weights are read if there is nothing else.
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# AutoGPTQ's names for both, with the bits and the group size; read if there is nothing else.
GPTQ_WEIGHTS = "gptq_model-*bit-*g.safetensors*"


def weight_names(folder: Path) -> tuple[tuple[str, str], ...]:
    """WEIGHTS, and the names of that kind that AutoGPTQ gave to files of this folder."""
    _, suffix = WEIGHTS[0][1].split(".safetensors")
    singles = sorted({path.name.removesuffix(suffix) for path in folder.glob(GPTQ_WEIGHTS)})
    return (*WEIGHTS, *((single, single + suffix) for single in singles))


def name_of(id_or_path: object) -> str:
    """A checkpoint's name as text. Raises TypeError for what names none."""
    name = os.fspath(id_or_path) if isinstance(id_or_path, (str, os.PathLike)) else None
    if not isinstance(name, str):
        raise TypeError(f"a checkpoint is named by a string or a Path, not by {shown(id_or_path)}")
    return name


def locate(
    id_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    weights: bool = True,
    progress: bool = True,
) -> Path:
    """The folder of a checkpoint: `id_or_path` if it is a folder, else a snapshot from the Hugging Face hub.

    Fetches only files that this runtime reads, and never code. Honours HF_ENDPOINT, HF_HOME, HF_TOKEN and
    HF_HUB_OFFLINE.

    Args:
        id_or_path: a folder, or a hub repository "owner/name".
        revision, token, cache_dir, local_files_only: as in huggingface_hub.
        weights: fetch the weights too.
        progress: show progress bars on a terminal.

    Raises:
        FileNotFoundError: no such folder, repository or revision; or no network and nothing in the cache.
        NotADirectoryError: `id_or_path` is a file.
        OSError: a fetched file cannot be written.
    """
    name = name_of(id_or_path)
    if not name:
        raise FileNotFoundError("no checkpoint is named: give a folder, or a hub repository as owner/name")
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except OSError as error:
        raise type(error)(f"{shown(name)} cannot be read ({error.strerror})") from None
    if exists:
        raise NotADirectoryError(f"{folder} is a file: give the folder that contains config.json and the weights")
    parts = name.split("/")
    if len(parts) != 2 or not all(part and part[0] not in "~." for part in parts) or os.path.isabs(name):
        raise FileNotFoundError(f"there is no folder {name!r} (and a hub repository would be named owner/name)")

    return _fetch(name, _options(revision, token, cache_dir, local_files_only), weights, progress)


def locate_file(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> Path:
    """One file of a repository on the hub, "owner/name:file". Arguments and errors are those of `locate`."""
    repository, _, file = name.partition(":")
    if not file or repository.count("/") != 1:
        raise FileNotFoundError(
            f"there is no file {name!r} (and one of a hub repository would be named owner/name:file)"
        )
    hub = _options(revision, token, cache_dir, local_files_only)
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, tqdm_class=_bar(progress), **hub))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise FileNotFoundError(f"the repository {repository!r} on the hub has no file {file!r}") from None
        raise _explained(error, name, hub) from error


def _options(
    revision: str | None, token: str | None, cache_dir: str | os.PathLike[str] | None, local_files_only: bool
) -> dict[str, Any]:
    """As huggingface_hub names them."""
    return {
        "revision": revision,
        "token": token,
        "cache_dir": None if cache_dir is None else Path(cache_dir),
        "local_files_only": local_files_only,
    }


def _bar(progress: bool) -> type:
    """The class of the progress bars of downloads."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": hides_bar(progress)})

    return Bar


def _fetch(name: str, hub: dict[str, Any], weights: bool, progress: bool) -> Path:
    # Imported here, since it is slow to import and a local folder does not need it.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    bar = _bar(progress)

    def fetch(patterns: Iterable[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*patterns], tqdm_class=bar, **hub))

    def exactly(files: Iterable[str]) -> list[str]:
        return [glob.escape(file) for file in files]

    try:
        folder = fetch(exactly((*NOTES, *TOKENIZER, *(WEIGHTS[0] if weights else ()))))
        for others in (exactly(WEIGHTS[1]), [GPTQ_WEIGHTS]) if weights else ():
            if not any(_have(folder, *names) for names in weight_names(folder)):
                fetch(others)
        for single, index in weight_names(folder) if weights else ():
            if not _have(folder, single) and _have(folder, index):
                fetch(exactly(_shards(folder / index)))
            if _have(folder, single, index):
                break
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise _explained(error, name, hub) from error
    return folder


def _have(folder: Path, *names: str) -> bool:
    return any((folder / name).is_file() for name in names)


def _shards(index: Path) -> set[str]:
    """The files in its own folder that an index names. The loader reports any other names."""
    weight_map = read_json(index).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    return {file for file in files if isinstance(file, str) and Path(file).name == file}


def _explained(error: Exception, name: str, hub: dict[str, Any]) -> OSError:
    """The error to raise for one of huggingface_hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {hub['revision']!r}" if hub["revision"] else ""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, RevisionNotFoundError):
        problem = f"its repository on the hub has no revision {hub['revision']!r}"
    elif isinstance(error, GatedRepoError):
        problem = "its repository on the hub asks for consent: accept its terms there, and set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError | HFValidationError):
        problem = "the hub has no repository of that name, or it is private: check the name and HF_TOKEN"
    elif hub["local_files_only"] or constants.HF_HUB_OFFLINE:
        problem = f"nothing of it{at} is in the cache, and the hub may not be asked"
    elif isinstance(error, LocalEntryNotFoundError | HfHubHTTPError | ConnectionError | TimeoutError):
        problem = f"the hub cannot be reached, nor is all of it{at} in the cache: check the network, or set HF_ENDPOINT"
    else:
        return OSError(f"{name!r} could not be fetched from the hub ({reason})")
    return FileNotFoundError(f"{name!r} is no local folder, and {problem} ({reason})")
