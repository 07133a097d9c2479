"""What a benchmark found, row by row, with the stamp of its run. Every program of bench/ writes this one format."""

import csv
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FORMAT = 2  # of the file; a reader refuses any other
PACKAGES = ("torch", "triton", "numpy", "transformers", "flashinfer-python", "liger-kernel", "gemlite")


@dataclasses.dataclass(frozen=True)
class Row:
    """A check, a measurement, or the reason why there is neither.

    part: the benchmark that made it, or the part of bench.gpu. name: unique within the part.
    state: "pass" or "FAIL" for a check, "figure" for a measurement, "not run" with the reason in `note`.
    rounds: the measured values, in `unit`.
    about: what tables and plots group rows by (op, shape, engine, ...), and what follows from the rounds (share, ...).
    """

    part: str
    name: str
    state: str
    note: str = ""
    rounds: Sequence[float] = ()
    unit: str = ""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def value(self) -> float:
        """The median round."""
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """25%, 50% and 75% of the rounds; of one or two rounds the smallest, the median and the largest."""
        if len(self.rounds) < 3:  # statistics.quantiles would extrapolate
            return min(self.rounds), self.value, max(self.rounds)
        low, median, high = statistics.quantiles(self.rounds, n=4)
        return low, median, high

    def __str__(self) -> str:
        figure = ""
        if self.rounds:
            figure = f"{self.value:.4g} {self.unit} ({min(self.rounds):.4g} to {max(self.rounds):.4g})"
        share = f"{self.about['share']:.1%} of the {self.about['bound']} ceiling" if "bound" in self.about else ""
        rate = f"{self.about['tokens/s']:.0f} tokens/s" if "tokens/s" in self.about else ""
        sheet = f"{self.about['of data sheet']:.1%} of the data sheet" if "of data sheet" in self.about else ""
        note = "; ".join(filter(None, (rate, share, sheet, self.note)))
        return f"{self.state:8}{self.part:12}{self.name:57} {figure:>34}  {note}".rstrip()


class Part:
    """Makes the rows of one part."""

    def __init__(self, name: str):
        self.name = name

    def check(self, name: str, error: str | Callable[[], str], **about: Any) -> Row:
        """Passes if `error`, or what it returns, is empty. An exception that it raises is a failure as well."""
        try:
            found = error if isinstance(error, str) else error()
        except Exception as raised:
            found = first_line(raised)
        return Row(self.name, name, "FAIL" if found else "pass", found, about=about)

    def figure(self, name: str, rounds: Sequence[float], unit: str, note: str = "", **about: Any) -> Row:
        return Row(self.name, name, "figure", note, list(rounds), unit, about)

    def missing(self, name: str, why: str, **about: Any) -> Row:
        return Row(self.name, name, "not run", why, about=about)


def first_line(error: BaseException) -> str:
    """An exception as the note of a row."""
    return f"{type(error).__name__}: {''.join(str(error).strip().splitlines()[:1])}"


def append(path: Path, row: Row) -> None:
    """Adds a row to a file of one JSON object per line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows that `append` wrote, without the last one if its process was killed while writing it."""
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            yield Row(**json.loads(line))
        except ValueError:
            return


@dataclasses.dataclass(frozen=True)
class Record:
    """The rows of a run; `stamp` names the machine, the versions, the command and the commit."""

    stamp: dict[str, Any]
    rows: Sequence[Row]

    def save(self, path: str | Path) -> None:
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    def save_csv(self, path: str | Path) -> None:
        """One line per row, with the median and quartiles of its rounds and a column for each key of `about`."""
        keys = list(dict.fromkeys(key for row in self.rows for key in row.about))
        made = [self.stamp.get(name) for name in ("device", "commit", "date")]
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            measured = ("low quartile", "median", "high quartile", "unit")
            writer.writerow(["part", "name", "state", *measured, *keys, "note", "device", "commit", "date"])
            for row in self.rows:
                figures = [*row.quartiles, row.unit] if row.rounds else [""] * 4
                about = [row.about.get(key, "") for key in keys]
                writer.writerow([row.part, row.name, row.state, *figures, *about, row.note, *made])


def load(path: str | Path) -> Record:
    """A record that `save` wrote. Raises ValueError for any other file."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or "stamp" not in content:
        raise ValueError(f"{path} is not a record of bench/: {_of_another(path, content)}")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} has record format {content.get('format')}, this version reads {FORMAT}: measure again"
        )
    try:
        return Record(content["stamp"], [Row(**row) for row in content["rows"]])
    except (KeyError, TypeError):
        raise ValueError(f"{path} is a damaged record: measure again") from None


def _of_another(path: str | Path, content: Any) -> str:
    """Which tool reads a file that is not a record. content: None if it is not JSON."""
    if isinstance(content, dict) and {"benchmarks", "machine_info"} <= content.keys():
        return "it is one of pytest-benchmark, which `pytest-benchmark compare` reads"
    if isinstance(content, dict) and "traceEvents" in content:
        return "it is a trace of a profiler, which chrome://tracing and Perfetto read"
    first = content
    if content is None:
        try:
            first = json.loads(Path(path).read_text("utf-8").partition("\n")[0])
        except ValueError:
            return "it is not JSON; name one that a program of bench/ wrote"
    keys = first.keys() if isinstance(first, dict) else set()
    if {"definition", "workload"} <= keys:
        return "it is of the common form, which flashinfer-bench and `python -m bench.common_form run` read"
    if {"part", "name", "state"} <= keys:
        return "it has the rows of one part of bench.gpu; name the gpu.json beside it"
    return "name one that a program of bench/ wrote"


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def stamp() -> dict[str, Any]:
    """The machine, the versions, the command, the commit and the date of this run."""
    import torch

    commit = _output("git", "rev-parse", "--short", "HEAD")
    if commit and _output("git", "status", "--porcelain", "--untracked-files=no"):
        commit += " and changes"
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,temperature.gpu,power.limit"
    found = _output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader") if torch.cuda.is_available() else ""
    gpu = dict(zip(asked.split(","), found.splitlines()[0].split(", "), strict=False)) if found else {}
    busy = {"load average": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or None,
        "command": shlex.join(["python", *_program(), *sys.argv[1:]]),
        "device": device_name(),
        "driver": gpu.pop("driver_version", None),
        "clocks": gpu or {"threads": torch.get_num_threads(), **busy},
        "python": platform.python_version(),
        **{package: version for package in PACKAGES if (version := version_of(package))},
    }


def _program() -> list[str]:
    """How this program was started: `-m bench.ops`, or a path."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name] if spec else sys.argv[:1]


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
