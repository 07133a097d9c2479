"""Commands that talk with a model: chat, generate, demo."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .chat import Chat, show
from .load import load
from .sampling_switches import given_settings
from .terminal import typing_discarded

if TYPE_CHECKING:
    from ..api.llm import LLM
    from ..api.outputs import Chunk

DEMO_QUESTION = "What is the capital of France?"


def generate(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise ValueError("the prompt is empty: give one with -p, or on standard input with -p -")
    if args.raw and (args.system or args.thinking):
        raise ValueError("--raw continues the bare text: it has no room for --system or --thinking")
    llm = load(args)
    if args.raw:
        chunks = llm.stream(prompt, _preset(args), **given_settings(args))
    else:
        chunks = _answer(llm, [*_system(args), {"role": "user", "content": prompt}], args)
    _, stopped = show(chunks)
    return 130 if stopped else 0


def chat(args: argparse.Namespace) -> None:
    llm = load(args)
    Chat(lambda messages: _answer(llm, messages, args), _system(args)).run()


def demo(args: argparse.Namespace) -> int:
    from ..checkpoint.demo_model import demo_model_checkpoint

    args.model = str(demo_model_checkpoint(progress=sys.stderr.isatty()))
    llm = load(args, progress=True)
    question = args.prompt or DEMO_QUESTION
    print(f"> {question}")
    messages = [*_system(args), {"role": "user", "content": question}]
    chats = sys.stdin.isatty() and args.prompt is None
    with typing_discarded() if chats else contextlib.nullcontext():
        text, stopped = show(_answer(llm, messages, args))
    if stopped:
        return 130
    if chats:
        messages.append({"role": "assistant", "content": text})
        Chat(lambda messages: _answer(llm, messages, args), messages).run()
    return 0


def _preset(args: argparse.Namespace) -> Any:
    from ..sampling.params import RECOMMENDED

    return RECOMMENDED if args.recommended else None


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _answer(llm: LLM, messages: list[dict[str, str]], args: argparse.Namespace) -> Iterator[Chunk]:
    return llm.stream(messages, _preset(args), thinking=args.thinking, **given_settings(args))
