"""The files of a tokenizer and the settings in them, read with clear errors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from .batch_encoding import check_side
from .files import read_json

VOCAB_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
NO_LIMIT = int(1e30)  # what a checkpoint writes for "no maximum length"
# The settings of tokenizer_config.json that mean something here, with the defaults of InternLM3's own class.
SETTINGS: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
    "additional_special_tokens": (),
    "added_tokens_decoder": {},
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": True,
    "clean_up_tokenization_spaces": False,
    "padding_side": "right",
    "truncation_side": "right",
    "model_max_length": NO_LIMIT,
    "chat_template": None,
}
# Settings that change ids or text, and that InternLM3 never turns on.
_UNSUPPORTED = (
    "sp_model_kwargs",
    "spaces_for_interleaved_special_tokens",
    "spaces_between_special_tokens",
    "split_special_tokens",
)


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed by special_tokens_map.json, added_tokens.json and chat_template.jinja.

    `auto_map` (remote code) is left out: nothing of a checkpoint is ever executed.
    """
    config = {**_read_optional(directory / SPECIAL_TOKENS_FILE), **_read_optional(directory / CONFIG_FILE)}
    config.pop("auto_map", None)
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{directory / CONFIG_FILE}: {name}={config[name]!r} is not supported")
    if "added_tokens_decoder" not in config:
        config["added_tokens_decoder"] = _older_added_tokens(directory / ADDED_TOKENS_FILE, config)
    if (directory / TEMPLATE_FILE).is_file():
        config["chat_template"] = (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
    return config


def complete_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over the defaults. Raises ValueError for a setting of a wrong kind."""
    settings = {**SETTINGS, **given}
    for name in ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"):
        if not isinstance(settings[name], bool):
            raise ValueError(f"{name} must be true or false, not {settings[name]!r}")
    for kind in ("bos", "eos"):
        if settings[f"add_{kind}_token"] and settings[f"{kind}_token"] is None:
            raise ValueError(f"add_{kind}_token is true and {kind}_token is null")
    for name in ("padding_side", "truncation_side"):
        check_side(name, settings[name])
    limit = settings["model_max_length"]
    if not isinstance(limit, (int, float)) or not 1 <= limit < float("inf"):
        raise ValueError(f"model_max_length must be a positive number, not {limit!r}")
    if not isinstance(settings["chat_template"], (str, type(None))):
        raise ValueError(f"chat_template must be one Jinja string, not {settings['chat_template']!r:.40}")
    if not isinstance(settings["added_tokens_decoder"], dict):
        raise ValueError(f"added_tokens_decoder must be a dict, not {settings['added_tokens_decoder']!r:.40}")
    additional = settings["additional_special_tokens"] or ()
    if not isinstance(additional, (list, tuple)):
        raise ValueError(f"additional_special_tokens must be a list of tokens, not {additional!r:.40}")
    return {**settings, "model_max_length": int(limit), "additional_special_tokens": additional}


def load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a tokenizer needs its SentencePiece model")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path} is no SentencePiece model, or it is damaged; fetch it again ({error})") from error
    return processor


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _older_added_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """added_tokens_decoder from the older added_tokens.json, {content: id}; named tokens among them are special."""
    special = [config.get(name) for name in NAMED_TOKENS] + list(config.get("additional_special_tokens") or ())
    contents = {token.get("content") if isinstance(token, dict) else token for token in special}
    return {
        str(id): {"content": content, "special": content in contents} for content, id in _read_optional(path).items()
    }
