"""Reads questions from a terminal, with history, editing and several lines if prompt_toolkit is installed."""

import contextlib
import os
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path

_PROMPT = "> "
# Pasted lines arrive faster than anyone types: a line that arrives within this time belongs to the one before.
_PASTED_WITHIN = 0.05  # seconds


def tolerate_other_encodings() -> None:
    """Replaces characters that a terminal cannot show, and bytes that are no characters, instead of failing."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def reader() -> Callable[[], str]:
    """A function that returns the next input: what is typed or pasted at a terminal, otherwise the next line of stdin.

    It raises EOFError at the end, and KeyboardInterrupt at Ctrl-C.
    """
    if not sys.stdin.isatty():
        return input
    try:
        return _prompt_toolkit()
    except ImportError:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - line editing in input()
        return _plain


def _prompt_toolkit() -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history: History = FileHistory(path)
    except OSError:
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(history=history, multiline=True, key_bindings=keys)
    return lambda: session.prompt(_PROMPT, prompt_continuation="  ")


def history_file() -> Path:
    """The file that keeps questions from one run to the next."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "internlm3" / "history"


def _plain() -> str:
    lines = [input(_PROMPT)]
    while _waits():
        lines.append(input())
    return "\n".join(lines)


def _waits() -> bool:
    """Whether another line is already waiting in stdin. Always False on Windows, which cannot tell."""
    if os.name != "posix":
        return False
    return bool(select.select([sys.stdin], [], [], _PASTED_WITHIN)[0])


def command_of(text: str) -> tuple[str, str] | None:
    """(command, argument) of "/word argument"; None if the text is not a command."""
    match = re.fullmatch(r"(/[a-z]+)(?:\s+(.*))?", text.strip(), flags=re.DOTALL)
    return (match[1], match[2] or "") if match else None
