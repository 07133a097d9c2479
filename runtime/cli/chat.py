"""A conversation in a terminal: turns, commands, and what becomes of them when an answer is stopped or fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..common.keywords import nearest
from .terminal import command_of, reader

if TYPE_CHECKING:
    from ..api.outputs import Chunk

Messages = list[dict[str, str]]

HELP = """\
/help          this list
/clear         begins anew (/reset too)
/undo          takes the last question and its answer back
/system TEXT   sets the system prompt; without TEXT shows it
/quit          ends (/exit and Ctrl-D too)
Ctrl-C stops an answer. With prompt_toolkit installed, Alt-Enter breaks a line and arrows go through old questions."""


class Chat:
    """Question and answer until the input ends.

    Args:
        answer: streams the answer to a conversation.
        messages: how the conversation begins: a system prompt, or turns that there have been already.
    """

    def __init__(self, answer: Callable[[Messages], Iterator[Chunk]], messages: Messages):
        self._answer = answer
        self.messages = list(messages)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _say(HELP),
            "/clear": lambda _: self._clear(),
            "/reset": lambda _: self._clear(),
            "/undo": lambda _: self._undo(),
            "/system": self._system,
            "/quit": lambda _: None,
            "/exit": lambda _: None,
        }

    def run(self) -> None:
        _say("/help lists the commands, /quit or Ctrl-D ends, Ctrl-C stops an answer.")
        read, interactive = reader(), sys.stdin.isatty()
        while True:
            try:
                text = read()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if not interactive:
                    raise
                _say("\n/quit or Ctrl-D ends")
                continue
            command = command_of(text)
            if command and command[0] in ("/quit", "/exit"):
                return
            if command:
                self._command(*command)
            elif text.strip():
                self._turn(text)

    def _turn(self, question: str) -> None:
        """A question that can't be answered, or whose answer is stopped before it begins, is taken back."""
        asked = [*self.messages, {"role": "user", "content": question}]
        try:
            text, stopped = show(self._answer(asked))
        except ValueError as error:
            _say(f"{error} (/undo takes a turn back, /reset begins anew)")
            return
        if text or not stopped:
            self.messages = [*asked, {"role": "assistant", "content": text}]
        if stopped:
            _say("[stopped]" if text else "[stopped before the answer began: the question is taken back]")

    def _command(self, name: str, text: str) -> None:
        if name in self._commands:
            self._commands[name](text)
            return
        match = nearest(name, self._commands)
        _say(f"there is no {name}; " + (f"did you mean {match}?" if match else "/help lists the commands"))

    def _clear(self) -> None:
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        _say("the conversation begins anew")

    def _undo(self) -> None:
        asked = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            _say("there is nothing to take back")
            return
        _say(f"taken back: {self.messages[asked[-1]]['content']}")
        del self.messages[asked[-1] :]

    def _system(self, text: str) -> None:
        leads = bool(self.messages) and self.messages[0]["role"] == "system"
        if text:
            self.messages[: int(leads)] = [{"role": "system", "content": text}]
        _say(f"system prompt: {self.messages[0]['content'] if leads or text else 'none'}")


def show(chunks: Iterator[Chunk]) -> tuple[str, bool]:
    """Prints an answer as it comes, then its figures; returns its text, and whether Ctrl-C stopped it.

    Raises ValueError, with what is wrong, where an error ended it.
    """
    text, chunk, stopped = "", None, False
    try:
        for chunk in chunks:
            text += chunk.text
            print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    if chunk is not None:
        failed = chunk.finish_reason == "error"
        # The line's end belongs to a whole answer; behind one that was broken off it only keeps the terminal tidy.
        print(file=sys.stderr if stopped or failed else sys.stdout, flush=True)
        _say(
            f"[prompt {chunk.prompt_tokens} tokens, {chunk.prompt_tps:.1f} tokens/s; "
            f"answer {chunk.decode_tokens} tokens, {chunk.decode_tps:.1f} tokens/s; "
            f"peak memory {chunk.peak_memory:.2f} GB]"
            + (f" [{chunk.cached_tokens} of the prompt's tokens reused]" if chunk.cached_tokens else "")
        )
        if failed:
            raise ValueError(chunk.stop_reason)
    return text, stopped


def _say(text: str) -> None:
    """What is no answer goes to standard error."""
    print(text, file=sys.stderr, flush=True)
