"""Lines that a person types: with history, editing and several lines at once where prompt_toolkit is installed."""

import contextlib
import os
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path

_PROMPT = "> "
# What is pasted comes faster than anybody types: lines that are there already belong to the one before.
_PASTED_WITHIN = 0.05  # seconds


def tolerate_other_encodings() -> None:
    """Characters that a terminal cannot show, or bytes that are none, are replaced: no answer ends for one of them."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def reader() -> Callable[[], str]:
    """A function that gives the next input: what was typed or pasted at a terminal, or else the next line.

    It raises EOFError at the end, and KeyboardInterrupt at Ctrl-C.
    """
    if not sys.stdin.isatty():
        return input
    try:
        return _prompt_toolkit()
    except ImportError:
        with contextlib.suppress(ImportError):  # Windows has none
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
    """Where questions are kept from one run to the next."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "internlm3" / "history"


def _plain() -> str:
    lines = [input(_PROMPT)]
    while _waits():
        lines.append(input())
    return "\n".join(lines)


def _waits() -> bool:
    """Whether a further line lies in standard input already. Windows cannot tell."""
    if os.name != "posix":
        return False
    return bool(select.select([sys.stdin], [], [], _PASTED_WITHIN)[0])


def command_of(text: str) -> tuple[str, str] | None:
    """A slash, a word, and what stands behind them; None for what is no command."""
    match = re.fullmatch(r"(/[a-z]+)(?:\s+(.*))?", text.strip(), flags=re.DOTALL)
    return (match[1], match[2] or "") if match else None
