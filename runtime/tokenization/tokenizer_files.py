"""Reads the files of a tokenizer, and checks the settings in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.checks import is_number
from ..common.files import has_file, read_json, read_text
from ..common.shown import one_line, shown
from .added_tokens import AddedToken, parse_added_tokens, parse_pairs
from .batch_encoding import NO_LIMIT, check_side
from .vocabulary import Vocabulary
from .vocabulary_sentencepiece import SentencePieceVocabulary

VOCAB_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")  # transformers' older and newer key of one list
# The settings of tokenizer_config.json that are used, with the defaults of InternLM3's published class.
SETTINGS: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
    "sep_token": None,
    "cls_token": None,
    "mask_token": None,
    "additional_special_tokens": (),
    "extra_special_tokens": (),  # transformers 5's name of the same list; or a dict, name -> token
    "added_tokens_decoder": {},
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": True,
    "clean_up_tokenization_spaces": False,
    "padding_side": "right",
    "truncation_side": "right",
    "model_max_length": NO_LIMIT,
    "chat_template": None,
    "chat_control_tokens": None,
}
SWITCHES = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces")
_TEMPLATE = {"name", "template"}
# Settings that change ids or text, and that InternLM3 does not use.
_UNSUPPORTED = (
    "sp_model_kwargs",
    "spaces_for_interleaved_special_tokens",
    "spaces_between_special_tokens",
    "split_special_tokens",
    "do_lower_case",
)


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed from the other files of the folder.

    These are special_tokens_map.json, tokenizer.json, added_tokens.json and chat_template.jinja. `auto_map` (remote
    code) is left out: code of a checkpoint is never executed.

    Raises:
        ValueError: a damaged file, an unsupported setting, or two files that give a token different ids.
    """
    config = {**_settings_of(directory / SPECIAL_TOKENS_FILE), **_settings_of(directory / CONFIG_FILE)}
    config.pop("auto_map", None)
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{directory / CONFIG_FILE}: {name}={shown(config[name])} is not supported")
    config["added_tokens_decoder"] = _added_tokens(directory, config)
    if vocabulary_file(directory).name == JSON_FILE:
        # As in transformers: that file defines bos and eos itself.
        config = {name: value for name, value in config.items() if name not in ("add_bos_token", "add_eos_token")}
    if has_file(directory / TEMPLATE_FILE):
        config["chat_template"] = read_text(directory / TEMPLATE_FILE)
    return config


def vocabulary_file(directory: Path) -> Path:
    """tokenizer.json if there is one, as in transformers: a tokenizer.model beside it may be the base model's."""
    return directory / (JSON_FILE if has_file(directory / JSON_FILE) else VOCAB_FILE)


def load_vocabulary(path: Path, added_tokens: Mapping[int, AddedToken]) -> Vocabulary:
    """The vocabulary in a file. Raises FileNotFoundError if there is none, ValueError if it is damaged."""
    if not has_file(path):
        raise FileNotFoundError(f"{path} is missing: a tokenizer needs its SentencePiece model, or a {JSON_FILE}")
    if path.suffix != ".json":
        return SentencePieceVocabulary(path, added_tokens)
    # Imported here, since InternLM3's published checkpoint does not need that library.
    from .vocabulary_json import JsonVocabulary

    return JsonVocabulary(path, added_tokens)


def check_settings(given: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the key, for a setting of a wrong type. null is allowed everywhere."""
    settings = {**SETTINGS, **{name: value for name, value in given.items() if value is not None}}
    for name in SWITCHES:
        if not isinstance(settings[name], bool):
            raise ValueError(f"{name} must be true or false, not {shown(settings[name])}")
    for name in NAMED_TOKENS:
        if settings[name] is not None:
            AddedToken.parse(settings[name], name)
    for name in ("padding_side", "truncation_side"):
        check_side(name, settings[name])
    limit = settings["model_max_length"]
    if not is_number(limit) or not 1 <= limit < float("inf"):
        raise ValueError(f"model_max_length must be a positive number, not {shown(limit)}")
    tokens = settings["chat_control_tokens"] or []
    if not isinstance(tokens, (list, tuple)) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"chat_control_tokens must be a list of strings, not {shown(tokens)}")
    _special_tokens(settings)
    _templates(settings["chat_template"])
    parse_added_tokens(settings["added_tokens_decoder"])


def complete_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, overridden by `given`. Raises ValueError for a setting of a wrong type.

    null means: no token for a token that may be absent, off for a switch (both as in transformers), else the default.
    """
    check_settings(given)
    settings = {**SETTINGS, **{name: value for name, value in given.items() if value is not None}}
    settings |= {name: None for name in NAMED_TOKENS if given.get(name, "") is None}
    settings |= {name: False for name in SWITCHES if given.get(name, "") is None}
    for kind in ("bos", "eos"):
        if settings[f"add_{kind}_token"] and settings[f"{kind}_token"] is None:
            raise ValueError(f"add_{kind}_token is true and {kind}_token is null")
    return {
        **settings,
        "model_max_length": int(settings["model_max_length"]),
        "additional_special_tokens": _special_tokens(settings),
        "chat_template": _templates(settings["chat_template"]),
    }


def _settings_of(path: Path) -> dict[str, Any]:
    """The settings in a file, {} if there is none. Raises ValueError, naming file and key, for one of a wrong type."""
    values = _read_optional(path)
    try:
        check_settings(values)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(str(error))}") from None
    return values


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if has_file(path) else {}


def _templates(given: Any) -> str | dict[str, str] | None:
    """One template, or a dict of several by name, which a file has as a list of {"name": ..., "template": ...}."""
    if isinstance(given, list) and all(isinstance(entry, dict) and entry.keys() >= _TEMPLATE for entry in given):
        given = {entry["name"]: entry["template"] for entry in given}
    strings = [*given, *given.values()] if isinstance(given, dict) else [given]
    if given is not None and not all(isinstance(string, str) for string in strings):
        raise ValueError(
            f"chat_template must be a Jinja string, or a list of {{'name', 'template'}}, not {shown(given)}"
        )
    return given


def _special_tokens(settings: Mapping[str, Any]) -> list[Any]:
    """The special tokens without a name of their own."""
    tokens: dict[str, AddedToken] = {}
    for key in EXTRA_TOKENS:
        given = settings.get(key) or ()
        if isinstance(given, dict) and key == "extra_special_tokens":
            given = list(given.values())
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"{key} must be a list of tokens, not {shown(given)}")
        tokens |= {AddedToken.parse(token, key).content: token for token in given}
    return list(tokens.values())


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The added tokens of tokenizer_config.json, tokenizer.json and added_tokens.json together."""
    entries = _read_optional(directory / JSON_FILE).get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{directory / JSON_FILE}: added_tokens must be a list of objects, not {shown(entries)}")
    named = [config[name] for name in NAMED_TOKENS if config.get(name) is not None]
    special = {AddedToken.parse(token, "").content for token in [*named, *_special_tokens(config)]}
    sources = {
        CONFIG_FILE: (config.get("added_tokens_decoder") or {}).items(),
        JSON_FILE: [(entry.get("id"), entry) for entry in entries],
        ADDED_TOKENS_FILE: [
            (id, {"content": content, "special": content in special})
            for content, id in _read_optional(directory / ADDED_TOKENS_FILE).items()
        ],
    }
    by_id: dict[int, AddedToken] = {}
    origin: dict[str, tuple[int, str]] = {}
    for source, pairs in sources.items():
        try:
            tokens = parse_pairs(pairs, "added_tokens")
        except ValueError as error:
            raise ValueError(f"{directory / source}: {one_line(str(error))}") from None
        for id, token in tokens.items():
            content = by_id.setdefault(id, token).content
            known, first = origin.setdefault(token.content, (id, source))
            if content != token.content:
                known, first = id, origin[content][1]
            if (known, content) != (id, token.content):
                raise ValueError(
                    f"{directory}: {first} gives {shown(content)} the id {known}, and {source} gives "
                    f"{shown(token.content)} the id {id}: one of them is stale; fix or remove it"
                )
    return by_id
