"""Texts that a model might be asked for and what it might answer, from files of this repository or made up.

They say how much of an answer repeats its prompt or itself, which is what speculation gains by. Tokens are those of a
stand-in: words in parts of up to six letters, with the space before them, and single signs.
"""

import json
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from . import ROOT

FIRST_ID = 100


class Workload(NamedTuple):
    """A prompt and its answer, as texts."""

    name: str
    prompt: str
    answer: str


def workloads() -> list[Workload]:
    return [_code_edit(), _json_rewrite(), _table_to_json(), _half_quoted(), _summary(), _prose()]


def encode(workload: Workload, vocab_size: int, most: int = 1200) -> tuple[list[int], list[int]]:
    """The token ids of prompt and answer, of which `most` at most: each part gets the next id when it first occurs."""
    ids: dict[str, int] = {}
    room = vocab_size - FIRST_ID

    def encoded(text: str) -> list[int]:
        parts = re.findall(r" ?[^\W\d_]{1,6}|\d|\n *|[^\w\n]|_", text)
        return [FIRST_ID + ids.setdefault(part, len(ids)) % room for part in parts]

    return encoded(workload.prompt), encoded(workload.answer)[:most]


def _read(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def _paragraphs(path: str) -> list[str]:
    """The prose of a Markdown file, without lists, tables, code and headings."""
    blocks = re.sub(r"```.*?```", "", _read(path), flags=re.DOTALL).split("\n\n")
    return [block.replace("\n", " ") for block in blocks if re.match(r"[A-Z`]", block)]


def _sentences(path: str) -> list[str]:
    return [each for block in _paragraphs(path) for each in re.split(r"(?<=[.:?]) ", block)]


def _records(count: int) -> list[dict[str, object]]:
    rng = random.Random(1)
    names = ["Ada Byron", "Alan Mathison", "Grace Murray", "Edsger Wybe", "Barbara Jane", "Donald Ervin", "Tony Hoare"]
    cities = ["London", "Paris", "New York", "Rotterdam", "Los Angeles", "Milwaukee", "Colombo"]
    return [
        {
            "name": f"{rng.choice(names)} {rng.randrange(10, 99)}",
            "city": rng.choice(cities),
            "joined": f"20{rng.randrange(10, 26)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}",
            "amount": rng.randrange(100, 99999),
            "active": rng.random() < 0.5,
        }
        for _ in range(count)
    ]


def _code_edit() -> Workload:
    """A whole file again, with a method renamed and two comments changed."""
    before = _read("runtime/engine/pages.py")
    after = before.replace("_find_run", "_first_run").replace("least recently used first", "the oldest come first")
    after = after.replace("Adds one user to each page.", "Marks each page as used once more.")
    return Workload("code edit", f"Rename _find_run to _first_run in this file:\n{before}\n", after)


def _json_rewrite() -> Workload:
    """Records again, with two keys renamed."""
    before = json.dumps(_records(14), indent=2)
    after = before.replace('"joined"', '"member_since"').replace('"amount"', '"balance"')
    return Workload("JSON rewrite", f"Rename joined to member_since, and amount to balance:\n{before}\n", after)


def _table_to_json() -> Workload:
    records = _records(14)
    lines = [" | ".join(str(value) for value in record.values()) for record in records]
    table = "\n".join([" | ".join(records[0]), *lines])
    return Workload("table to JSON", f"Write this table as JSON:\n{table}\n", json.dumps(records, indent=2))


def _half_quoted() -> Workload:
    """Sentences of a page, and others between them."""
    quoted, own = _sentences("runtime/README.md")[4::3], _sentences("tests/README.md")
    answer = " ".join(f"{a} {b}" for a, b in zip(quoted, own, strict=False))
    return Workload("half quoted", "Answer from this page:\n" + "\n".join(_paragraphs("runtime/README.md")), answer)


def _summary() -> Workload:
    return Workload("summary", f"Summarise this page:\n{_read('README.md')}", _read("CHANGELOG.md"))


def _prose() -> Workload:
    return Workload("prose", "Explain the kernels.\n", " ".join(_paragraphs("kernels/README.md")))


def lookup_steps(prompt: Sequence[int], answer: Sequence[int], drafts: int) -> int:
    """How many steps transformers' prompt lookup takes for an answer. Raises ImportError without transformers."""
    import torch
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    generator = PromptLookupCandidateGenerator(
        num_output_tokens=drafts, max_matching_ngram_size=2, max_length=len(prompt) + len(answer) + 1
    )
    text = torch.tensor([[*prompt, *answer]])
    have, steps = len(prompt), 0
    while have < text.shape[1]:
        candidates, _ = generator.get_candidates(text[:, :have])
        drafted, right = candidates[0, have:], text[0, have:]
        count = min(len(drafted), len(right))
        wrong = (drafted[:count] != right[:count]).nonzero()
        have += 1 + (int(wrong[0]) if len(wrong) else count)
        steps += 1
    return steps
