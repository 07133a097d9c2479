"""Warnings that point at the line of whoever called this package."""

import sys
import warnings
from pathlib import Path

RUNTIME = str(Path(__file__).parents[1])


def warn_caller(message: str) -> None:
    """A UserWarning at the innermost line outside the runtime."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(RUNTIME):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
