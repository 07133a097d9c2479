"""The kernels' test suite on this GPU: every op against its reference and float64, promised roundings included."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from .. import ROOT
from ..record import Part, Row


def rows(small: bool) -> Iterator[Row]:
    part = Part("suite")
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [str(ROOT / "tests" / "kernels")]
        command += ["-k", "advance or embed"] if small else []
        if not small and find_spec("xdist"):  # compiling takes most of the time
            command += ["-n", str(max(3 * (os.cpu_count() or 1) // 4, 1)), "--dist", "loadgroup"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if not report.exists():
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            error = f"pytest ended with exit code {done.returncode}: {last[0] if last else 'no output'}"
            yield part.check("tests/kernels", error)
            return
        yield from results(part, report)


def results(part: Part, report: Path) -> Iterator[Row]:
    """A row for each test file, and one for each test that failed."""
    files: dict[str, int] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname", "").rpartition(".")[2]
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        if wrong is not None:
            yield part.check(f"{name}::{case.get('name')}", (wrong.get("message") or "failed").splitlines()[0])
        elif case.find("skipped") is None:
            files[name] = files.get(name, 0) + 1
    for name, count in files.items():
        yield part.check(f"{name}: {count} tests", "")
    if not files:
        yield part.check("tests/kernels", "no test passed")
