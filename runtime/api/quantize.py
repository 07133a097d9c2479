"""Quantising a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..checkpoint.gguf.folder import locate
from ..checkpoint.load import resolve_device
from ..checkpoint.quantise.calibration import shipped_text
from ..checkpoint.quantise.checkpoint import quantise_checkpoint
from ..checkpoint.quantise.rounding import GROUPS, Form
from ..engine.request import check_prompt
from ..model.config import InternLM3Config
from ..tokenization.tokenizer import InternLM3Tokenizer

FORM_OF_BITS: dict[str, Form] = {"4": "int4", "8": "int8", "fp8": "fp8"}
_MOST = 16384  # tokens of a calibration text


def quantize(
    id_or_path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: str,
    *,
    group: int | None = None,
    symmetric: bool = False,
    calibration: str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> None:
    """Writes a quantised checkpoint in the form of compressed-tensors.

    Args:
        id_or_path: a folder, or a hub repository "owner/name".
        target: a folder that does not exist, or is empty.
        bits: "4", "8" or "fp8". The head gets 8 bits.
        group: for 4 bits, the number of inputs that share a scale: 32, 64 or 128; None: 128. Where it does not divide a
            layer's inputs, the largest smaller one that does.
        symmetric: for 4 bits, no zero points: less exact, and read by transformers too.
        calibration: for 4 bits, a text by which weights are scaled before they are rounded, of which the first 16384
            tokens are used; None: the one that ships.
        device, revision, local_files_only, progress: as LLM.

    Raises:
        ValueError: an argument is wrong, or the checkpoint is quantised already or damaged.
        FileNotFoundError, FileExistsError, OSError: files, as their messages say.
    """
    form = FORM_OF_BITS[bits]
    if form != "int4" and (group is not None or calibration is not None or symmetric):
        raise ValueError(f"groups, symmetric integers and a calibration text are for 4 bits, and bits is {bits}")
    folder = locate(id_or_path, revision=revision, local_files_only=local_files_only, progress=progress)
    ids = None
    if form == "int4":
        tokenizer = InternLM3Tokenizer.from_pretrained(folder)
        ids = tokenizer.encode(shipped_text() if calibration is None else calibration)[:_MOST]
        check_prompt("the calibration text", ids, InternLM3Config.from_file(folder / "config.json").vocab_size)
    quantise_checkpoint(
        folder,
        Path(target).expanduser(),
        form,
        group=GROUPS[0] if group is None else group,
        symmetric=symmetric,
        calibration=ids,
        device=resolve_device(device),
        progress=progress,
    )
