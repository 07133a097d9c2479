"""A GGUF file as the folder of a checkpoint: small files in the place of its settings, and a link to it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ...common import hub
from ...common.files import write_json
from ...model.config import InternLM3Config
from ...sampling.generation_config import GENERATION_CONFIG
from .reader import GGUFHeader
from .settings import config_of, generation_of
from .vocabulary import write_tokenizer
from .weights import GGUFWeights

SUFFIX = ".gguf"
_LINK = SUFFIX  # a name that no file of a checkpoint has: one may have GGUF files beside its own weights
_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def locate(id_or_path: str | os.PathLike[str], **options: Any) -> Path:
    """The folder of a checkpoint, as `hub.locate` finds it; a GGUF file has a temporary one, by `folder_of`.

    Args:
        id_or_path: a folder, a hub repository "owner/name", a GGUF file, or one of a hub repository,
            "owner/name:file.gguf".
        options: those of `hub.locate`.

    Raises:
        As `hub.locate`, and ValueError for a GGUF file that this runtime does not read.
    """
    name = hub.name_of(id_or_path)
    path = Path(name).expanduser()
    if not name.endswith(SUFFIX) or path.is_dir():
        return hub.locate(name, **options)
    if not path.is_file():
        path = hub.locate_file(name, **{key: value for key, value in options.items() if key != "weights"})
    return folder_of(path)


def file_of(folder: Path) -> Path | None:
    """The GGUF file that a folder stands for, None for the folder of a checkpoint."""
    link = folder / _LINK
    return link.readlink() if link.is_symlink() else None


def weights_of(folder: Path, config: InternLM3Config) -> GGUFWeights | None:
    """The weights of the GGUF file that a folder stands for, None for the folder of a checkpoint."""
    path = file_of(folder)
    if path is None:
        return None
    return GGUFWeights.of(GGUFHeader.read(path), config.num_attention_heads, config.num_key_value_heads)


def folder_of(path: Path) -> Path:
    """A new temporary folder for a GGUF file: its configuration and tokenizer in the files of a checkpoint.

    It has the name of the file, so that errors which name files of the folder say which GGUF file they came from.
    """
    header = GGUFHeader.read(path.absolute())
    config, generation = config_of(header), generation_of(header)
    temporary = tempfile.TemporaryDirectory(prefix="internlm3-gguf-")
    _folders.append(temporary)
    folder = Path(temporary.name, header.path.name)
    folder.mkdir()
    write_json(folder / "config.json", config)
    write_json(folder / GENERATION_CONFIG, generation)
    write_tokenizer(header, folder)
    (folder / _LINK).symlink_to(header.path)
    return folder
