"""A tokenizer as llguidance sees it: the bytes of every token, and how a text is cut into tokens."""

from __future__ import annotations

from itertools import accumulate

from ..tokenization.tokenizer import InternLM3Tokenizer

# A text is cut as it is after this: at its start a tokenizer may put a space, which belongs to no grammar.
_BEFORE = "\n"


class TokenTable:
    """What llguidance asks of a tokenizer.

    An added token, such as `<|im_end|>`, is no text: only a grammar that names it permits it. The end of an answer is a
    token of its own, after the vocabulary: which tokens end an answer depends on the request.

    Args:
        vocab_size: of the model, V. Ids below it that the tokenizer lacks are never permitted.

    Attributes:
        eos_token_id: the end's token, V.
        tokens: the bytes of tokens 0 to V. Those that are no text begin with 0xFF, as llguidance expects.
        special_token_ids: of the latter.
    """

    bos_token_id = None

    def __init__(self, tokenizer: InternLM3Tokenizer, vocab_size: int):
        self._tokenizer = tokenizer
        table = tokenizer.token_bytes()[:vocab_size]
        table += [None] * (vocab_size + 1 - len(table))
        self.eos_token_id = vocab_size
        self.tokens = [token or self._special(id) for id, token in enumerate(table)]
        self.special_token_ids = [id for id, token in enumerate(table) if not token]
        self._ids = {token: id for id, token in enumerate(table) if token}
        self._longest = max(map(len, self._ids))

    def _special(self, id: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(id) if id < len(self._tokenizer) else ""
        return b"\xff" + (name or f"<|unused {id}|>").encode()

    def __call__(self, text: str) -> list[int]:
        """The ids of a text, as it is cut inside another one. Their bytes are the text's.

        llguidance permits only these where a grammar leaves no choice. If a tokenizer changes a text, or cuts it across
        its beginning, the ids are those of the longest tokens.
        """
        ids = self._tokenizer.encode(_BEFORE + text, add_special_tokens=False)
        wanted = text.encode()
        sizes = accumulate(len(self.tokens[id]) for id in reversed(ids))
        count = next((count for count, size in enumerate(sizes, start=1) if size == len(wanted)), 0)
        ids = ids[len(ids) - count :]
        return ids if b"".join(self.tokens[id] for id in ids) == wanted else self._longest_tokens(wanted)

    def _longest_tokens(self, text: bytes) -> list[int]:
        """The ids of a text, each token as long as can be; as far as tokens spell it."""
        ids = []
        while text:
            sizes = range(min(self._longest, len(text)), 0, -1)
            size = next((size for size in sizes if text[:size] in self._ids), None)
            if size is None:
                break
            ids.append(self._ids[text[:size]])
            text = text[size:]
        return ids
