"""InternLM3's tokenizer, with the interface of transformers' tokenizers."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..chat_template.render import PUBLISHED_TEMPLATE
from ..common.files import write, write_json
from ..common.hub import locate
from ..common.keywords import reject_unknown
from ..common.neutral import DETOKENIZE, LOAD_TOKENIZER, SAVE, TOKENIZE, without_neutral
from ..common.shown import one_line, shown
from .added_tokens import AddedToken, parse_added_tokens
from .batch_encoding import BatchEncoding, Batcher, id_list, text_pairs
from .conversations import Conversations
from .detokenizer import Detokenizer
from .special_tokens import SpecialTokens
from .tokenizer_files import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    JSON_FILE,
    NAMED_TOKENS,
    SETTINGS,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    complete_settings,
    load_vocabulary,
    read_config,
    vocabulary_file,
)


class InternLM3Tokenizer(SpecialTokens, Conversations):
    """Text to ids and back, with the methods of transformers' tokenizers.

    Example:
        >>> tokenizer = InternLM3Tokenizer.from_pretrained("internlm/internlm3-8b-instruct")
        >>> tokenizer.decode(tokenizer("Hello")["input_ids"], skip_special_tokens=True)
        'Hello'

    Args:
        vocab_file: the SentencePiece model, `tokenizer.model`, or a `tokenizer.json`.
        settings: keys of tokenizer_config.json: bos_token, eos_token, unk_token, pad_token, sep_token, cls_token,
            mask_token, additional_special_tokens (or extra_special_tokens), added_tokens_decoder, add_bos_token,
            add_eos_token, add_prefix_space (affects only decoding), clean_up_tokenization_spaces, padding_side,
            truncation_side, model_max_length, chat_template (Jinja, or several of them by name), chat_control_tokens.

    Raises:
        FileNotFoundError: no such vocab_file.
        TypeError: an unknown setting; the message names the nearest known one.
        ValueError: a damaged vocab_file, a setting of a wrong type, or a token that has no id in the vocabulary or
            added_tokens_decoder.
    """

    def __init__(self, vocab_file: str | Path, **settings: Any) -> None:
        reject_unknown("InternLM3Tokenizer", settings, SETTINGS)
        added_tokens = parse_added_tokens(settings.get("added_tokens_decoder") or {})
        self._vocabulary = load_vocabulary(Path(vocab_file), added_tokens)
        # As in transformers: a file that defines bos and eos itself decides, unless a setting overrides it.
        frame = self._vocabulary.frame
        if frame is not None and settings.keys() & {"add_bos_token", "add_eos_token"}:
            settings = {"add_bos_token": False, **settings}
        elif frame is not None:
            settings |= {"add_bos_token": bool(frame[0]), "add_eos_token": bool(frame[1])}
        settings = complete_settings(settings)
        self.add_bos_token: bool = settings["add_bos_token"]
        self.add_eos_token: bool = settings["add_eos_token"]
        self.add_prefix_space: bool = settings["add_prefix_space"]
        self.clean_up_tokenization_spaces: bool = settings["clean_up_tokenization_spaces"]
        self.padding_side: str = settings["padding_side"]
        self.truncation_side: str = settings["truncation_side"]
        self.model_max_length: int = settings["model_max_length"]
        self.chat_template = settings["chat_template"] or PUBLISHED_TEMPLATE
        self.chat_control_tokens = settings["chat_control_tokens"]
        self._extra_config: dict[str, Any] = {}

        for name in NAMED_TOKENS:
            setattr(self, name, None if settings[name] is None else self._known(settings[name], name))
        self.additional_special_tokens = [
            self._known(token, "additional_special_tokens") for token in settings["additional_special_tokens"]
        ]

        if frame is not None:
            self._check_frame("before", frame[0], "bos_token", self.bos_token)
            self._check_frame("after", frame[1], "eos_token", self.eos_token)

    def _check_frame(self, where: str, ids: list[int], name: str, token: str | None) -> None:
        """Raises ValueError for a tokenizer.json that puts other tokens than bos_token and eos_token around a text."""
        tokens = self.convert_ids_to_tokens(ids)
        if tokens not in ([], [token]):
            raise ValueError(
                f"{self._vocabulary.file_name} puts {tokens} {where} a text, which is not {name} {token!r}"
            )

    def _known(self, given: Any, name: str) -> str:
        """Makes a special token an added token. Raises ValueError if the files give it no id."""
        token = AddedToken.parse(given, name)
        if self._vocabulary.find(token.content) is None:
            raise ValueError(
                f"{name} {shown(token.content)} has no id: neither {self._vocabulary.file_name} nor "
                "added_tokens_decoder has it. Fetch the tokenizer's files again, or add it with add_tokens after "
                "loading without it"
            )
        self._vocabulary.add(token)
        return token.content

    def __repr__(self) -> str:
        special = ", ".join(f"{name}={getattr(self, name)!r}" for name in NAMED_TOKENS)
        return f"InternLM3Tokenizer({self._vocabulary.file_name!r}, vocab_size={self.vocab_size}, {special})"

    # Files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> "InternLM3Tokenizer":
        """Loads a tokenizer from a folder or a hub repository "owner/name".

        Code of a checkpoint is never executed: `auto_map` and `trust_remote_code` are ignored.

        Args:
            revision, token, cache_dir, local_files_only: as in huggingface_hub.
            overrides: settings of the constructor, in place of the files'.

        Raises:
            FileNotFoundError: no such folder or repository, or no vocabulary file in it.
            TypeError, ValueError: as the constructor; the message names the folder.
        """
        overrides = without_neutral("InternLM3Tokenizer.from_pretrained", overrides, LOAD_TOKENIZER, known=SETTINGS)
        directory = locate(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            weights=False,
        )
        config = read_config(directory)
        settings = {name: config.pop(name) for name in SETTINGS if name in config}
        try:
            tokenizer = cls(vocabulary_file(directory), **{**settings, **overrides})
        except ValueError as error:
            raise ValueError(f"tokenizer of {directory}: {one_line(str(error), 250)}") from error
        tokenizer._extra_config = config
        return tokenizer

    def save_pretrained(self, save_directory: str | os.PathLike[str], **unknown: Any) -> tuple[str, ...]:
        """Writes tokenizer.model (or .json), tokenizer_config.json, special_tokens_map.json; returns their paths.

        Each file is written atomically. Files of an older tokenizer that would take precedence are removed.
        """
        without_neutral("InternLM3Tokenizer.save_pretrained", unknown, SAVE, known=("save_directory",))
        special = {**self.special_tokens_map, "additional_special_tokens": self.additional_special_tokens}
        config = {
            "tokenizer_class": "InternLM3Tokenizer",
            **self._extra_config,
            **{name: getattr(self, name) for name in SETTINGS if name != "extra_special_tokens"},
            "added_tokens_decoder": self._vocabulary.added.to_json(),
        }
        paths = [Path(save_directory) / CONFIG_FILE, Path(save_directory) / SPECIAL_TOKENS_FILE]
        vocabulary = self.save_vocabulary(save_directory)
        for path, content in zip(paths, (config, special), strict=True):
            write_json(path, content)
        for name in {JSON_FILE, ADDED_TOKENS_FILE, TEMPLATE_FILE} - {self._vocabulary.file_name}:
            (Path(save_directory) / name).unlink(missing_ok=True)
        return (*vocabulary, *map(str, paths))

    def save_vocabulary(self, directory: str | os.PathLike[str], filename_prefix: str | None = None) -> tuple[str]:
        """Writes the vocabulary as `[<prefix>-]tokenizer.model`, or .json; returns its path."""
        name = self._vocabulary.file_name
        path = Path(directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        before = [self.bos_token] if self.add_bos_token and self.bos_token else []
        after = [self.eos_token] if self.add_eos_token and self.eos_token else []
        write(path, self._vocabulary.save(before, after))
        return (str(path),)

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of pieces, without added tokens."""
        return self._vocabulary.pieces

    def __len__(self) -> int:
        """One more than the largest id."""
        return len(self._vocabulary)

    def get_vocab(self) -> dict[str, int]:
        """All tokens: token -> id."""
        return self._vocabulary.ids()

    def token_bytes(self) -> list[bytes | None]:
        """For each id the bytes that its token adds inside a text; None for an added token and for what is no text.

        A token may be a part of a character. At the start of a text a space may be left out (see `decode`).
        """
        return self._vocabulary.token_bytes()

    # Text to ids

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, without bos and eos."""
        return self._vocabulary.tokenize(text)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or the ids of a list. Added tokens take precedence; unknown ones get the id of unk."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        id = self._vocabulary.find(tokens)
        return self.unk_token_id if id is None else id

    def encode(self, text: str, text_pair: str | None = None, **options: Any) -> Any:
        """The `input_ids` of one text. Options as in calling the tokenizer."""
        return self(text, text_pair, **options)["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_token_type_ids: bool = False,
        **unknown: Any,
    ) -> BatchEncoding:
        """Encodes a text or a list of texts (each with its pair, if given).

        Args:
            add_special_tokens: put bos before and eos after each text, if `add_bos_token` and `add_eos_token` are set.
            padding: True or "longest", "max_length", or False.
            truncation: True or "longest_first", "only_first", "only_second", or False.
            max_length: tokens per row, bos and eos included; None: the checkpoint's model_max_length, if it has one.
            return_tensors: "pt" for int64 tensors [rows, length], also for one text; None for lists.

        Raises:
            TypeError: a text that is not a string, or an unknown keyword.
            ValueError: options that contradict each other, padding without a pad token, rows of different lengths
                with return_tensors, text that is not valid Unicode.
        """
        known = InternLM3Tokenizer.__call__.__kwdefaults__ or ()
        without_neutral("calling InternLM3Tokenizer", unknown, TOKENIZE, known=known)
        encoded = [
            (self._vocabulary.encode(first), None if second is None else self._vocabulary.encode(second))
            for first, second in text_pairs(text, text_pair)
        ]
        return self._batcher(add_special_tokens).batch(
            encoded,
            {},
            isinstance(text, str),
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            padding_side=padding_side,
            return_tensors=return_tensors,
            return_attention_mask=return_attention_mask,
            return_token_type_ids=return_token_type_ids,
        )

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pads rows that are encoded already, as a collate function does.

        Args:
            encoded_inputs: a list of encodings, or one encoding with a list of rows, or with a single row: lists,
                tensors or arrays by name, `input_ids` among them. Columns other than `input_ids`, `attention_mask`,
                `token_type_ids` and `special_tokens_mask` stay as they are.
            padding: True or "longest", "max_length", or False.
            max_length: tokens of a row with "max_length"; None: the checkpoint's model_max_length, if it has one.
            pad_to_multiple_of: round the length up to a multiple of this.
            return_attention_mask: add `attention_mask` if there is none, and pad it; False leaves it as it is.
            return_tensors: "pt", "np", or None: as the rows came in.
            verbose: accepted for transformers' sake; there is nothing to print.

        Raises ValueError for an encoding without `input_ids`, and as calling the tokenizer does.
        """
        return self._batcher(add_special_tokens=False).pad(
            encoded_inputs,
            padding=padding,
            max_length=max_length,
            multiple=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

    def _batcher(self, add_special_tokens: bool) -> Batcher:
        return Batcher(
            bos=[self.bos_token_id] if add_special_tokens and self.add_bos_token else [],
            eos=[self.eos_token_id] if add_special_tokens and self.add_eos_token else [],
            pad_token_id=lambda: self.pad_token_id,
            padding_side=self.padding_side,
            truncation_side=self.truncation_side,
            max_length=self.model_max_length,
        )

    # Ids to text

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of several; "" for an unused row of the embedding."""
        if isinstance(ids, int):
            return self._vocabulary.token(*id_list(ids))
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._vocabulary.token(id) for id in id_list(ids) if id not in skipped]

    def detokenizer(self, clean_up_tokenization_spaces: bool | None = None) -> Detokenizer:
        """Makes one text of tokens that come one by one. None: clean up spaces if the checkpoint asks for it."""
        clean_up = clean_up_tokenization_spaces
        return Detokenizer(
            self._vocabulary.speller(drop_first_space=self.add_prefix_space),
            clean_up=self.clean_up_tokenization_spaces if clean_up is None else clean_up,
        )

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text of tokens: added tokens as they are, runs of pieces as the vocabulary's library decodes them."""
        return self.detokenizer(clean_up_tokenization_spaces=False).text(tokens)

    def decode(
        self,
        ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **unknown: Any,
    ) -> str:
        """The text of a sequence of ids (a list, a 1-D tensor or array, or one id).

        Raises:
            TypeError: ids that are not integers, or more than one sequence.
            ValueError: a negative id.
        """
        known = ("skip_special_tokens", "clean_up_tokenization_spaces")
        without_neutral("decode", unknown, DETOKENIZE, known=known)
        tokens = self.convert_ids_to_tokens(id_list(ids), skip_special_tokens)
        return self.detokenizer(clean_up_tokenization_spaces).text(tokens)

    def batch_decode(self, sequences: Iterable[Any], **options: Any) -> list[str]:
        """The text of each sequence in a list of lists or tensors, or of each row of a 2-D tensor."""
        return [self.decode(ids, **options) for ids in sequences]
