"""The command line and LLM in a process whose standard streams are closed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from internlm3 import InternLM3Tokenizer
from internlm3.tests.support.checkpoints import make
from internlm3.tests.support.tokenizers import TRAINED, train, write_checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="closes streams in a POSIX shell")
LIBRARY = """
import os, sys
from internlm3 import LLM
llm = LLM(sys.argv[1], device="cpu")  # with progress bars
assert len(llm.generate(["a", "b"], max_tokens=2)) == 2
os._exit(7)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("closed") / "tiny", train(TRAINED["plain"]))
    make(vocab_size=len(InternLM3Tokenizer.from_pretrained(folder)), max_position_embeddings=64).save_pretrained(folder)
    return folder


def shell(command: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs a command of a shell, in which $0, $1, ... are Python and the arguments."""
    line = ["sh", "-c", command, sys.executable, *map(str, arguments)]
    return subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)


@pytest.mark.parametrize(
    ("command", "status", "printed", "says"),
    [
        ("generate $1 -p hi --max-tokens 3 2>&-", 0, True, ""),
        ("generate $1 -p - <&-", 1, False, "internlm3: error: the prompt is empty"),
        ("generate $1 -p hi >&-", 1, False, "internlm3: error: standard output is closed"),
        ("chat $1 <&-", 0, False, "/help lists the commands"),
    ],
)
def test_commands(folder, command, status, printed, says):
    done = shell(f"$0 -m internlm3.runtime.cli.main {command}", folder)
    assert done.returncode == status, done.stderr
    assert bool(done.stdout.strip()) == printed
    assert done.stderr.decode().startswith(says) and b"Traceback" not in done.stderr


def test_llm_without_standard_error(folder):
    """As in a service, or under pythonw: sys.stderr is None."""
    assert shell('$0 -c "$2" $1 2>&- <&-', folder, LIBRARY).returncode == 7
