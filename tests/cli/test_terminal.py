"""Input and output of a terminal: pasted lines, history, wrapped answers, what is typed meanwhile."""

import contextlib
import io
import itertools
import os
import re
import select
import signal
import subprocess
import sys
import threading
import unicodedata

import pytest

from internlm3.runtime.cli import terminal
from internlm3.runtime.cli.terminal import Wrapped


@pytest.mark.skipif(os.name != "posix", reason="a terminal of one's own is POSIX's")
@pytest.mark.parametrize("toolkit", [True, False])
def test_a_paste_is_one_question(tmp_path, toolkit):
    """Four lines at once are one input, with prompt_toolkit and without; the next run knows it, with prompt_toolkit."""
    import pty

    if toolkit:
        pytest.importorskip("prompt_toolkit")
    code = f"""
import sys
if not {toolkit}:
    sys.modules["prompt_toolkit"] = None
from internlm3.runtime.cli.terminal import history_file, reader
read = reader()
sys.stderr.write("ready\\n")
for _ in range(2):
    sys.stderr.write(ascii(read()) + "\\n")
sys.stderr.write(f"{{history_file().exists()}}\\n")
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    # prompt_toolkit reads other characters than ASCII in a locale that has none as surrogates.
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"} if toolkit else {"PYTHONUTF8": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
                               env=environment, start_new_session=True)  # fmt: skip
    os.close(theirs)
    assert process.stderr.readline() == b"ready\n"
    drain = threading.Thread(target=_drain, args=(ours,), daemon=True)
    drain.start()
    lines = b"def f():\r    return 1\r\rprint(f())"
    os.write(ours, b"\x1b[200~" + lines + b"\x1b[201~\r" if toolkit else lines.replace(b"\r", b"\n") + b"\n")
    assert process.stderr.readline() == b"'def f():\\n    return 1\\n\\nprint(f())'\n"
    os.write(ours, "Café\r".encode() if toolkit else "Café\n".encode())
    assert process.stderr.readline() == b"'Caf\\xe9'\n"
    assert process.stderr.readline().strip() == str(toolkit).encode()
    assert process.wait() == 0
    process.stderr.close()
    if toolkit:
        assert "print(f())" in (tmp_path / "internlm3" / "history").read_text()
        assert (tmp_path / "internlm3" / "history").stat().st_mode & 0o077 == 0


def _drain(terminal):
    """Reads what the program writes to its terminal, so that it never waits."""
    try:
        while os.read(terminal, 4096):
            pass
    except OSError:
        pass
    os.close(terminal)


# -------------------------------------------------------------------- wrapping


def columns_of(line):
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


def wrapped(monkeypatch, capsys, pieces, columns):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    printed = Wrapped()
    for piece in pieces:
        printed.write(piece)
    printed.finish()
    return capsys.readouterr().out


WORDS = "It was the best of times, it was the worst of times, it was the age of wisdom and of foolishness"
CODE = "def f(x):\n    if x:\n        return [x, x]\n\n    return None  # nothing\n"
CHINESE = "上海的五个景点：外滩、豫园和 Shanghai Tower，以及南京路步行街。"


@pytest.mark.parametrize("columns", [1, 13, 20, 37, 80, 500])
@pytest.mark.parametrize("text", [WORDS, CHINESE, f"{WORDS}\n\n{CHINESE} {WORDS}"], ids=["words", "Chinese", "both"])
def test_words_wrap_at_spaces(monkeypatch, capsys, text, columns):
    """However the text comes: no line is too long, no word is broken, and nothing else is lost than those spaces."""
    longest = max(map(len, re.findall(r"[!-~]+", text)))
    shown = {
        wrapped(monkeypatch, capsys, pieces, columns) for pieces in (text, [text], [text[:7], text[7:90], text[90:]])
    }
    assert len(shown) == 1
    lines = shown.pop().split("\n")
    assert all(columns_of(line) <= max(columns, longest) for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    if text == WORDS:
        assert [word for line in lines for word in line.split()] == text.split()
        assert all(columns_of(f"{line} {after.split()[0]}") > columns for line, after in itertools.pairwise(lines))


def test_what_fits_is_as_it_came(monkeypatch, capsys):
    for text in (CODE, WORDS, CHINESE, "  two  spaces \n\n", "\ttab", "", "é e\u0301 🙂"):
        assert wrapped(monkeypatch, capsys, text, 200) == text
        assert wrapped(monkeypatch, capsys, [text], columns_of(text) + 8) == text
    assert wrapped(monkeypatch, capsys, ["e\u0301" * 5, " ab"], 8) == "e\u0301" * 5 + " ab"  # two code points, a column
    assert wrapped(monkeypatch, capsys, ["abc", "def ghi"], 6) == "abcdef\nghi"
    assert wrapped(monkeypatch, capsys, ["a" * 20 + " b c"], 8) == "a" * 20 + " b c"  # 20 end in column 4


def test_nothing_wraps_where_no_terminal_is(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "10")
    printed = Wrapped()
    printed.write(WORDS[:50])
    assert capsys.readouterr().out == WORDS[:50]  # at once
    printed.write(WORDS[50:])
    printed.finish()
    assert capsys.readouterr().out == WORDS[50:]


# -------------------------------------------------------------------- what is typed during an answer

CHAT = """
import select, sys, time
from types import SimpleNamespace
sys.modules["prompt_toolkit"] = sys.modules["readline"] = None  # which echo what is typed themselves
from internlm3.runtime.cli.chat import Chat

def answer(messages):
    for word in ("one", " two", " three"):
        yield SimpleNamespace(
            text=word, finish_reason=None, prompt_tokens=1, decode_tokens=1, prompt_tps=1, decode_tps=1, peak_memory=1,
            cached_tokens=0, drafted=0, accepted=0,
        )
        if word == " two":
            print("<typing>", flush=True)
            # Until the terminal has the line that the test typed, which nobody reads here.
            while not select.select([sys.stdin], [], [], 0.01)[0] or HOW == "wait":
                pass
            if HOW == "fail":
                raise RuntimeError("broken")

chat = Chat(answer, [])
chat.run()
print("<asked>", [message["content"] for message in chat.messages if message["role"] == "user"])
"""


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, code):
        import pty

        self._ours, self.theirs = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "80"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, env=environment,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        self.shown = ""

    def until(self, text):
        """Reads what is shown until it has this text; returns what came since the last call."""
        begin = len(self.shown)
        while text not in self.shown[begin:]:
            ready, _, _ = select.select([self._ours], [], [], 60)
            assert ready, f"hangs after {self.shown!r}"
            self.shown += os.read(self._ours, 4096).decode()
        return self.shown[begin:]

    def type(self, text):
        os.write(self._ours, text.encode())

    def echoes(self):
        import termios

        return bool(termios.tcgetattr(self.theirs)[3] & termios.ECHO)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self.theirs)


def _own_terminal():
    """Makes stdin the controlling terminal, whose Ctrl-C reaches the process."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for inherited in (signal.SIGQUIT, signal.SIGHUP):  # ignored under nohup
        signal.signal(inherited, signal.SIG_DFL)


@pytest.fixture
def start():
    with contextlib.ExitStack() as stack:

        def start(how):
            begun = Terminal(CHAT.replace("HOW", repr(how)))
            stack.callback(begun.close)
            begun.until("> ")
            begun.type("question\n")
            begun.until("<typing>")
            assert not begun.echoes()
            return begun

        yield start


@pytest.mark.skipif(os.name != "posix", reason="a terminal of one's own is POSIX's")
def test_what_is_typed_during_an_answer_is_not_mixed_into_it(start):
    chat = start("go on")
    chat.type("typed\nmore")
    answer = chat.until("> ")
    assert "three" in answer and "typed" not in answer and "more" not in answer
    chat.type("/quit\n")
    assert "/quit" in chat.until("<asked> ['question']")  # it echoes again
    assert chat.process.wait(60) == 0


@pytest.mark.skipif(os.name != "posix", reason="a terminal of one's own is POSIX's")
def test_the_terminal_is_restored_on_every_way_out(start):
    chat = start("wait")
    chat.type("\x03")
    assert "[stopped]" in chat.until("> ")
    chat.type("next\n")
    chat.until("<typing>")
    assert not chat.echoes()
    chat.process.terminate()
    assert chat.process.wait(60) == -signal.SIGTERM and chat.echoes()
    for way, status in ((signal.SIGHUP, -signal.SIGHUP), (signal.SIGQUIT, -signal.SIGQUIT)):
        chat = start("wait")
        chat.process.send_signal(way)
        assert chat.process.wait(60) == status and chat.echoes()
    chat = start("fail")
    chat.type("typed\n")
    assert chat.until("broken") and chat.process.wait(60) == 1 and chat.echoes()


def test_typing_is_left_alone_where_no_terminal_is(monkeypatch):
    for stdin in (None, io.StringIO()):
        monkeypatch.setattr("sys.stdin", stdin)
        before = signal.getsignal(signal.SIGTERM)
        with terminal.typing_discarded():
            assert signal.getsignal(signal.SIGTERM) is before
