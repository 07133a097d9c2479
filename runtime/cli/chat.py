"""A conversation in a terminal: questions, commands, and answers that are stopped or fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..common.keywords import nearest
from .terminal import Wrapped, command_of, reader, typing_discarded

if TYPE_CHECKING:
    from ..api.outputs import Chunk

Messages = list[dict[str, str]]

HELP = """\
/help          this list
/clear         starts a new conversation (also /reset)
/undo          removes the last question and its answer
/system TEXT   sets the system prompt; without TEXT shows it
/quit          quits (also /exit and Ctrl-D)
Ctrl-C stops an answer. With prompt_toolkit installed, Alt-Enter starts a new line and arrow keys recall questions."""


class Chat:
    """Reads questions and prints answers until the input ends.

    Args:
        answer: streams the answer to a conversation.
        messages: the conversation so far, such as a system prompt.
    """

    def __init__(self, answer: Callable[[Messages], Iterator[Chunk]], messages: Messages):
        self._answer = answer
        self.messages = list(messages)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _report(HELP),
            "/clear": lambda _: self._clear(),
            "/reset": lambda _: self._clear(),
            "/undo": lambda _: self._undo(),
            "/system": self._system,
            "/quit": lambda _: None,
            "/exit": lambda _: None,
        }

    def run(self) -> None:
        """Returns at /quit or the end of the input."""
        _report("/help lists the commands, /quit or Ctrl-D quits, Ctrl-C stops an answer.")
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
                _report("\n/quit or Ctrl-D quits")
                continue
            command = command_of(text)
            if command and command[0] in ("/quit", "/exit"):
                return
            if command:
                self._command(*command)
            elif text.strip():
                self._turn(text)

    def _turn(self, question: str) -> None:
        """Answers a question. It is removed again if it fails, or is stopped before the answer begins."""
        asked = [*self.messages, {"role": "user", "content": question}]
        try:
            with typing_discarded():
                text, stopped = show(self._answer(asked))
        except ValueError as error:
            _report(f"{error} (/undo removes a turn, /reset starts a new conversation)")
            return
        if text or not stopped:
            self.messages = [*asked, {"role": "assistant", "content": text}]
        if stopped:
            _report("[stopped]" if text else "[stopped before the answer began: the question is removed]")

    def _command(self, name: str, text: str) -> None:
        if name in self._commands:
            self._commands[name](text)
            return
        match = nearest(name, self._commands)
        _report(f"there is no {name}; " + (f"did you mean {match}?" if match else "/help lists the commands"))

    def _clear(self) -> None:
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        _report("a new conversation")

    def _undo(self) -> None:
        asked = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            _report("there is nothing to remove")
            return
        _report(f"removed: {self.messages[asked[-1]]['content']}")
        del self.messages[asked[-1] :]

    def _system(self, text: str) -> None:
        leads = bool(self.messages) and self.messages[0]["role"] == "system"
        if text:
            self.messages[: int(leads)] = [{"role": "system", "content": text}]
        _report(f"system prompt: {self.messages[0]['content'] if leads or text else 'none'}")


def show(chunks: Iterator[Chunk]) -> tuple[str, bool]:
    """Prints an answer as it streams, then whether a limit cut it, and its statistics.

    Returns the text, and whether Ctrl-C stopped it. Raises ValueError with the reason if an error ended the answer.
    """
    text, chunk, stopped, printed = "", None, False, Wrapped()
    try:
        for chunk in chunks:
            text += chunk.text
            printed.write(chunk.text)
    except KeyboardInterrupt:
        stopped = True
    finally:
        printed.finish()
    if chunk is not None:
        failed = chunk.finish_reason == "error"
        # A complete answer ends with a line break. After an incomplete one it only keeps the terminal tidy.
        print(file=sys.stderr if stopped or failed else sys.stdout, flush=True)
        if chunk.finish_reason == "length":
            limits = "the limit of --max-tokens or of the context (--max-seq-len)"
            _report(f"[cut off after {chunk.decode_tokens} tokens, {limits}]")
        _report(
            f"[prompt {chunk.prompt_tokens} tokens, {chunk.prompt_tps:.1f} tokens/s; "
            f"answer {chunk.decode_tokens} tokens, {chunk.decode_tps:.1f} tokens/s; "
            f"peak memory {chunk.peak_memory:.2f} GB]"
            + (f" [{chunk.cached_tokens} of the prompt's tokens reused]" if chunk.cached_tokens else "")
            + (f" [{chunk.accepted} of {chunk.drafted} drafted tokens were right]" if chunk.drafted else "")
        )
        if failed:
            raise ValueError(chunk.stop_reason)
    return text, stopped


def _report(text: str) -> None:
    """Prints to stderr, which has everything but answers."""
    print(text, file=sys.stderr, flush=True)
