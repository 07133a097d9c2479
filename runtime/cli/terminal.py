"""A terminal: questions are read from it, with history and editing if prompt_toolkit is installed; answers wrap."""

import atexit
import contextlib
import os
import re
import select
import shutil
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

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

    def prompt() -> str:
        # It keeps bytes that the locale cannot read as surrogates. UTF-8 is typed where a locale says nothing of it.
        return (
            session.prompt(_PROMPT, prompt_continuation="  ").encode(errors="surrogateescape").decode(errors="replace")
        )

    return prompt


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


class Wrapped:
    """Prints text to stdout as it comes. On a terminal a word that does not fit into the line begins the next one.

    A word is printed when it ends, so `finish` prints the last one.
    """

    def __init__(self) -> None:
        self._column = 0
        self._space = ""  # after the last word printed
        self._word = ""

    def write(self, text: str) -> None:
        if sys.stdout is None or not sys.stdout.isatty():
            print(text, end="", flush=True)
            return
        columns = shutil.get_terminal_size().columns
        for character in text:
            if character == "\n":
                self._end_word(columns)
                print(self._space)
                self._column, self._space = 0, ""
            elif character in " \t":
                self._end_word(columns)
                self._space += character
            elif _width(character) == 2:  # a line may break before and after it
                self._end_word(columns)
                self._word = character
                self._end_word(columns)
            else:
                self._word += character
        print(end="", flush=True)

    def finish(self) -> None:
        """Prints what is held back."""
        if self._word or self._space:
            self._end_word(shutil.get_terminal_size().columns)
            print(self._space, end="", flush=True)
            self._space = ""

    def _end_word(self, columns: int) -> None:
        if not self._word:
            return
        needed = sum(map(_width, self._space + self._word))
        if self._column > 0 and self._column + needed > columns:
            print()
            self._column, self._space = 0, ""
            needed = sum(map(_width, self._word))
        print(self._space + self._word, end="")
        # The terminal itself breaks a word that is longer than a line.
        self._column = (self._column + needed - 1) % columns + 1 if needed else self._column
        self._space = self._word = ""


def _width(character: str) -> int:
    """Columns that a character takes; of a tab, the most."""
    if character == "\t":
        return 8
    if unicodedata.category(character) in ("Mn", "Me", "Cf", "Cc"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


@contextlib.contextmanager
def typing_discarded() -> Iterator[None]:
    """Inside, what is typed at the terminal is neither shown nor kept. Ctrl-C still raises KeyboardInterrupt.

    The terminal's settings are restored on every way out, a signal that ends the process included.
    """
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    terminal = saved = None
    with contextlib.suppress(AttributeError, OSError, ValueError, termios.error):  # no stdin; no terminal
        terminal = sys.stdin.fileno()
        saved = termios.tcgetattr(terminal)
    if terminal is None or saved is None:
        yield
        return
    silent = [*saved]
    silent[3] &= ~termios.ECHO
    main = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    fatal = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT) if main else ()
    ends = [each for each in fatal if signal.getsignal(each) is signal.SIG_DFL]

    def restore() -> None:
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(terminal, termios.TCSAFLUSH, saved)  # which drops what was typed

    def restore_and_end(number: int, _: FrameType | None) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    atexit.register(restore)  # should Ctrl-C come just before `finally`
    try:
        for number in ends:
            signal.signal(number, restore_and_end)
        termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
        yield
    finally:
        restore()
        for number in ends:
            signal.signal(number, signal.SIG_DFL)
        atexit.unregister(restore)
