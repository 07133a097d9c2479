"""from_pretrained and save_pretrained: a model, its configuration and its generation config in one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..checkpoint.load import load_model, resolve_device, resolve_dtype
from ..checkpoint.save import save_weights
from ..common.hub import locate
from ..common.neutral import LOAD_MODEL, SAVE, without_neutral
from ..model.config import InternLM3Config
from ..model.model import LanguageModel
from ..sampling.generation_config import GENERATION_CONFIG, GenerationSettings, read_generation_config
from .generate_options import settings_of

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(LanguageModel):
    """A language model that is loaded and saved as in transformers.

    Attributes:
        generation_config: the checkpoint's generation_config.json, the defaults of `generate`: a dictionary whose
            entries are attributes too. A dictionary or transformers' GenerationConfig can be assigned to it.
    """

    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__(config, **factory)
        self.generation_config = {}

    @property
    def generation_config(self) -> GenerationSettings:
        return self._generation_config

    @generation_config.setter
    def generation_config(self, given: Any) -> None:
        self._generation_config = settings_of(given)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: InternLM3Config | str | os.PathLike[str] | Any = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        use_safetensors: bool | None = None,
        batch_invariant: bool = False,
        progress: bool = True,
        **unknown: Any,
    ) -> Model:
        """Loads a model from a local folder or the hub.

        Host memory stays below the size of the model plus one shard.

            >>> model = InternLM3ForCausalLM.from_pretrained("internlm/internlm3-8b-instruct")

        Args:
            pretrained_model_name_or_path: a folder with config.json and weights, or a hub repository "owner/name".
            config: use this configuration instead of the checkpoint's: an InternLM3Config or transformers' own, a
                folder or repository with a config.json, or the path of such a file.
            revision, token, cache_dir, local_files_only: as in huggingface_hub.
            dtype (or torch_dtype): "auto" (the default: as the checkpoint says), "bfloat16", "float16" or "float32".
            device_map: "auto" (the default: the GPU if there is one), or a device; this runtime runs on one device.
            device: the same as device_map.
            use_safetensors: True refuses pickled weights, which otherwise are read if there is nothing else.
            batch_invariant: on a GPU, an answer is bit-identical whatever else is decoded with it; decoding a single
                request is slower, and prefixes are reused in whole chunks of 512 tokens instead of pages of 64.
            progress: show progress bars of download and loading.

        Raises:
            FileNotFoundError: a file of the checkpoint is missing.
            ValueError: files that are damaged, or contradict each other or config.json; the message names them.
            TypeError: an unknown keyword, or a config that is none.
            MemoryError: the weights don't fit into the free memory of the device.
        """
        known = Pretrained.from_pretrained.__kwdefaults__ or ()
        without_neutral("from_pretrained", unknown, LOAD_MODEL, known=known)
        if use_safetensors not in (None, True):
            raise ValueError(f"use_safetensors={use_safetensors!r} is not supported; it can only be True here")
        target = resolve_device(_one_of(device=device, device_map=device_map))
        wanted = _one_of(dtype=resolve_dtype(dtype), torch_dtype=resolve_dtype(torch_dtype))
        hub: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        folder = locate(pretrained_model_name_or_path, progress=progress, **hub)
        # Before the weights: small files with errors come first.
        generation_config = GenerationSettings.of(read_generation_config(folder))
        model = load_model(
            cls,
            folder,
            config=_configuration(config, hub),
            dtype=wanted,
            device=target,
            batch_invariant=batch_invariant,
            use_safetensors=bool(use_safetensors),
            progress=progress,
        )
        model.generation_config = generation_config
        return model

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", **unknown: Any
    ) -> None:
        """Writes config.json, generation_config.json and safetensors shards with their index, in the hub's format.

        All files are written before the first of them is moved into place: after an error the folder is as before.
        Shards of an earlier save that the new index does not name are removed.

        Raises:
            ValueError: max_shard_size is no size.
            OSError: the disk is full, or the folder cannot be written.
        """
        without_neutral("save_pretrained", unknown, SAVE, known=("save_directory", "max_shard_size"))
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        folder = Path(save_directory)
        json_files = {"config.json": self.config.to_dict()}
        if self.generation_config or (folder / GENERATION_CONFIG).is_file():
            json_files[GENERATION_CONFIG] = self.generation_config
        save_weights(self, folder, json_files, max_shard_size=max_shard_size)


def _configuration(given: Any, hub: Mapping[str, Any]) -> InternLM3Config | None:
    """What `config` of from_pretrained names. Raises TypeError for anything that names none."""
    if given is None or isinstance(given, InternLM3Config):
        return given
    if isinstance(given, str | os.PathLike):
        return InternLM3Config.from_pretrained(given, **hub)
    if hasattr(given, "to_dict"):
        return InternLM3Config.from_dict(given.to_dict())
    raise TypeError(f"config must be an InternLM3Config, or a path or repository with one; it is {given!r:.60}")


def _one_of(**names: Any) -> Any:
    """The value of an argument with two names, None if neither is given. Raises ValueError if they differ."""
    given = {name: value for name, value in names.items() if value is not None}
    value = next(iter(given.values()), None)
    if any(other != value for other in given.values()):
        raise ValueError(f"{' and '.join(f'{name}={other!r}' for name, other in given.items())}: give one of them")
    return value
