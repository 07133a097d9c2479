"""Input and output of a terminal: pasted lines, history, other encodings."""

import os
import subprocess
import sys
import threading

import pytest


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
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
                               env=environment, start_new_session=True)  # fmt: skip
    os.close(theirs)
    assert process.stderr.readline() == b"ready\n"
    drain = threading.Thread(target=_drain, args=(ours,), daemon=True)
    drain.start()
    lines = b"def f():\r    return 1\r\rprint(f())"
    os.write(ours, b"\x1b[200~" + lines + b"\x1b[201~\r" if toolkit else lines.replace(b"\r", b"\n") + b"\n")
    assert process.stderr.readline() == b"'def f():\\n    return 1\\n\\nprint(f())'\n"
    os.write(ours, b"next\r" if toolkit else b"next\n")
    assert process.stderr.readline() == b"'next'\n"
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
