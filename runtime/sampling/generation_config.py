"""generation_config.json, and objects like transformers' GenerationConfig: a model's default settings.

A setting that would change the tokens and that this runtime does not implement is an error from every source: a
keyword, a GenerationConfig, generation_config.json. One that would change nothing here is an error as a keyword, so
that no caller waits for its effect; in the other sources it is ignored, as they contain many settings that their author
never chose.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.files import has_file, read_json
from ..common.neutral import GENERATE_CHANGING, GENERATE_IDLE, check_neutral
from ..common.shown import shown

GENERATION_CONFIG = "generation_config.json"


class GenerationSettings(dict[str, Any]):
    """Generation settings by name, and as attributes; the attribute of a setting that is not given is None."""

    @classmethod
    def of(cls, given: Any) -> "GenerationSettings":
        """From a dictionary, or an object with to_dict such as transformers' GenerationConfig; None means no settings.

        Entries that are None are dropped.
        """
        if given is not None and not is_config(given):
            raise TypeError(f"generation_config must be a dictionary or an object with to_dict; it is {shown(given)}")
        values = given if isinstance(given, Mapping) else {} if given is None else given.to_dict()
        return cls({name: value for name, value in values.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def is_config(given: Any) -> bool:
    """Whether this can be a generation_config."""
    return isinstance(given, Mapping) or hasattr(given, "to_dict")


def refuse_unsupported(settings: Mapping[str, Any], *, keywords: bool = False) -> None:
    """Raises ValueError for an unsupported setting at another value than its neutral ones.

    keywords: the settings are keywords of a call, where settings that would change nothing here count too.
    """
    check_neutral("generate", settings, {**GENERATE_CHANGING, **(GENERATE_IDLE if keywords else {})})


def read_generation_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's generation_config.json, {} if there is none. Raises ValueError for a damaged one."""
    path = folder / GENERATION_CONFIG
    return read_json(path) if has_file(path) else {}
