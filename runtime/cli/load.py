"""The model of a command."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..api.llm import LLM


def load(args: argparse.Namespace, *, progress: bool | None = None, **options: Any) -> LLM:
    """progress: what LLM says on standard error while it loads; None: only if that is a terminal. options: of LLM."""
    from ..api.llm import LLM
    from .threads import leave_busy_cores

    leave_busy_cores()
    progress = sys.stderr.isatty() if progress is None else progress
    return LLM(**llm_options(args), progress=progress, **options)


def llm_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of LLM that the group "model" of the switches gives."""
    return {
        "model": args.model,
        "dtype": args.dtype,
        "device": args.device,
        "max_seq_len": args.max_seq_len,
        "quantization": args.quantization,
        "revision": args.revision,
        "local_files_only": args.local_files_only,
    }
