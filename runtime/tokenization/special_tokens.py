"""Special and added tokens of a tokenizer: attributes such as `pad_token` and `pad_token_id`, and adding tokens."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..common.checks import as_int
from .added_tokens import AddedToken
from .tokenizer_files import EXTRA_TOKENS, NAMED_TOKENS
from .vocabulary import Vocabulary


class NamedToken:
    """The text of a special token as an attribute, None if there is none. Set from a text or an AddedToken."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, tokenizer: Any, owner: type) -> str | None:
        return vars(tokenizer)[f"_{self._name}"]

    def __set__(self, tokenizer: Any, token: Any) -> None:
        vars(tokenizer)[f"_{self._name}"] = None if token is None else AddedToken.parse(token, self._name).content


class NamedTokenId:
    """The id of a special token as an attribute. Setting it makes the token of that id the special one."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name, self._token = name, name.removesuffix("_id")

    def __get__(self, tokenizer: "SpecialTokens", owner: type) -> Any:  # int, or None if there is no such token
        token = getattr(tokenizer, self._token)
        return None if token is None else tokenizer._special_id(token, self._token)

    def __set__(self, tokenizer: "SpecialTokens", id: Any) -> None:
        number = None if id is None else as_int(id)
        token = tokenizer._vocabulary.token(number) if number is not None and number >= 0 else ""
        if id is not None and not token:
            raise ValueError(f"{self._name} must be the id of a token, or None; got {id!r}")
        setattr(tokenizer, self._token, token or None)


class SpecialTokens(ABC):
    """The part of a tokenizer that knows which tokens are special, with transformers' attributes and methods.

    Attributes:
        additional_special_tokens: special tokens without a name of their own.
    """

    bos_token = NamedToken()
    eos_token = NamedToken()
    unk_token = NamedToken()
    pad_token = NamedToken()
    sep_token = NamedToken()
    cls_token = NamedToken()
    mask_token = NamedToken()
    bos_token_id = NamedTokenId()
    eos_token_id = NamedTokenId()
    unk_token_id = NamedTokenId()
    pad_token_id = NamedTokenId()
    sep_token_id = NamedTokenId()
    cls_token_id = NamedTokenId()
    mask_token_id = NamedTokenId()
    additional_special_tokens: list[str]
    _vocabulary: Vocabulary

    @abstractmethod
    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any: ...

    @abstractmethod
    def __len__(self) -> int: ...

    # Which tokens are special

    def _special_id(self, token: str, name: str) -> int:
        id = self._vocabulary.find(token)
        if id is None:
            raise ValueError(f"{name} is {token!r}, which has no id: add it first, with add_tokens({token!r})")
        return id

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end an answer: those of eos_token and, if the checkpoint has it, `<|im_end|>`."""
        ids = self.eos_token_id, self._vocabulary.added.ids.get("<|im_end|>")
        return sorted({id for id in ids if id is not None})

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in NAMED_TOKENS if getattr(self, name) is not None}

    @property
    def extra_special_tokens(self) -> list[str]:
        """transformers 5's name for `additional_special_tokens`."""
        return self.additional_special_tokens

    @property
    def all_special_ids(self) -> list[int]:
        named = {self._special_id(token, name) for name, token in self.special_tokens_map.items()}
        additional = {self._special_id(token, "additional_special_tokens") for token in self.additional_special_tokens}
        return sorted(named | additional | {id for id, token in self._vocabulary.added.by_id.items() if token.special})

    @property
    def all_special_tokens(self) -> list[str]:
        return self.convert_ids_to_tokens(self.all_special_ids)

    # Added tokens

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(sorted(self._vocabulary.added.by_id.items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return dict(self._vocabulary.added.ids)

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens: token -> id, in the order of ids."""
        return {token.content: id for id, token in self.added_tokens_decoder.items()}

    def add_tokens(self, tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens after the last id; known ones keep their ids. Returns the number of new tokens.

        Args:
            tokens: a text, an AddedToken, or a list of either.
            special_tokens: the texts among them become special tokens.
        """
        before = len(self)
        for given in tokens if isinstance(tokens, (list, tuple)) else [tokens]:
            token = AddedToken(given, special=special_tokens) if isinstance(given, str) else given
            self._vocabulary.add(AddedToken.parse(token, "add_tokens"))
        return len(self) - before

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Makes tokens special ones, adding those that the vocabulary lacks. Returns the number of new tokens.

            >>> tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<tool>"]})

        Args:
            special_tokens_dict: "pad_token" or another named token -> a text or an AddedToken;
                "additional_special_tokens" or "extra_special_tokens" -> a list of them.
            replace_extra_special_tokens: that list replaces the tokenizer's; False extends it.

        Raises ValueError for another key, or a value that is no token.
        """
        listed: list[AddedToken] = []
        named: dict[str, AddedToken] = {}
        for name, value in special_tokens_dict.items():
            if name in NAMED_TOKENS:
                named[name] = AddedToken.parse(value, name)
            elif name not in EXTRA_TOKENS:
                raise ValueError(f"{name!r} is no special token: known are {', '.join((*NAMED_TOKENS, *EXTRA_TOKENS))}")
            elif not isinstance(value, (list, tuple)):
                raise ValueError(f"{name} must be a list of tokens, not {value!r:.40}")
            else:
                listed += [AddedToken.parse(token, name) for token in value]
        for name, token in named.items():
            setattr(self, name, token)
        kept = [] if replace_extra_special_tokens and listed else self.additional_special_tokens
        self.additional_special_tokens = [*dict.fromkeys([*kept, *(token.content for token in listed)])]
        return self.add_tokens([replace(token, special=True) for token in (*named.values(), *listed)])
