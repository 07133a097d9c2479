"""The command line's switches for sampling settings, made from the table of settings."""

from __future__ import annotations

import argparse
from typing import Any

from ..sampling.settings import SETTINGS, Setting
from . import command_line

# Further names; a switch of every alias would be too many.
_SHORT = {"max_tokens": ("-n",), "temperature": ("--temp",)}


def add_switches(group: argparse._ArgumentGroup) -> None:
    """Adds a switch for every setting that has one: top_p becomes --top-p."""
    for setting in SETTINGS:
        if setting.help is not None:
            _add_switch(group, setting)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that the command line gave, by name."""
    settings = {setting.name: getattr(args, setting.name, None) for setting in SETTINGS}
    if settings["logit_bias"] is not None:
        settings["logit_bias"] = dict(settings["logit_bias"])
    return {name: value for name, value in settings.items() if value is not None}


def _add_switch(group: argparse._ArgumentGroup, setting: Setting) -> None:
    name = setting.name.replace("_", "-")
    if setting.name in ("skip_special_tokens", "speculation"):  # those that are on by default
        group.add_argument(
            f"--no-{name}", dest=setting.name, action="store_false", default=None, help=setting.help
        )  # fmt: skip
    else:
        names = (*_SHORT.get(setting.name, ()), f"--{name}")
        group.add_argument(*names, dest=setting.name, default=None, help=setting.help, **_OPTIONS[setting.type])


def _sequence(text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected token ids with commas between them, not {text!r}") from None


def _sequence_bias(text: str) -> tuple[list[int], float]:
    sequence, _, bias = text.partition("=")
    try:
        return _sequence(sequence), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected token ids, = and a number, not {text!r}") from None


def _bias(text: str) -> tuple[int, float]:
    sequence, bias = _sequence_bias(text)
    if len(sequence) != 1:
        raise argparse.ArgumentTypeError(f"expected one token id, = and a number, not {text!r}: see --sequence-bias")
    return sequence[0], bias


# How the command line reads a setting of each type.
_OPTIONS: dict[str, dict[str, Any]] = {
    "integer": {"type": int},
    "number": {"type": float},
    "bool": {"action": "store_true"},
    "strings": {"type": command_line.text, "action": "append"},
    "token ids": {"type": int, "nargs": "+", "metavar": "ID"},
    "token biases": {"type": _bias, "action": "append", "metavar": "ID=BIAS"},
    "sequences": {"type": _sequence, "action": "append", "metavar": "ID,ID"},
    "sequence biases": {"type": _sequence_bias, "action": "append", "metavar": "ID,ID=BIAS"},
    "text": {"type": command_line.text},
    "texts": {"type": command_line.text, "action": "append"},
    "JSON schema": {"type": command_line.text, "metavar": "JSON"},
    "start and factor": {"type": float, "nargs": 2, "metavar": ("START", "FACTOR")},
}
