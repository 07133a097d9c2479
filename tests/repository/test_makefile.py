"""What `make demo` shows in a fresh clone: what is installed and how much of it, and no commands."""

import os
import shutil
import subprocess

import pytest

from bench import ROOT

# A Python whose venv has a pip that reports as pip does, and the command internlm3.
PYTHON = """#!/bin/sh
case "$*" in *"-m venv"*)
    mkdir -p .venv/bin
    cat > .venv/bin/python <<'END'
#!/bin/sh
echo "Collecting big"
echo "  Downloading big-1.0-py3-none-any.whl (915.6 MB)"
echo "  Downloading small-1.0-py3-none-any.whl (22 kB)"
test -e no_network && echo "ERROR: no network" >&2 && exit 1
echo "Installing collected packages: big, small"
echo "Successfully installed big-1.0 small-1.0"
END
    printf '#!/bin/sh\\necho "the demo: $*"\\n' > .venv/bin/internlm3
    chmod +x .venv/bin/*
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs make in a fresh clone: (exit status, lines of standard output, standard error)."""
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "ARGS", "TRITON"))}

    def make(*words):
        done = subprocess.run(
            ["make", f"PYTHON={python}", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    return make


def test_the_demo_says_what_is_installed_and_shows_no_command(make):
    status, shown, errors = make("demo", "ARGS=-p hi")
    assert status == 0 and errors == ""
    installed = ["  Downloading big-1.0-py3-none-any.whl (915.6 MB)", "  Installing 2 packages"]
    assert shown[1:3] == installed == shown[4:6] and shown[6:] == [".venv is ready.", "the demo: demo -p hi"]
    assert "PyTorch" in shown[0] and all("GB" in shown[line] for line in (0, 3))
    assert make("demo") == (0, ["the demo: demo"], "")


def test_a_failed_installation_fails(make, tmp_path):
    (tmp_path / "no_network").touch()
    status, shown, errors = make("demo")
    assert status == 2 and "ERROR: no network" in errors and not any("demo" in line for line in shown)
    assert not (tmp_path / ".venv" / ".ready").exists()
    (tmp_path / "no_network").unlink()
    assert make("demo")[1][-1] == "the demo: demo"
