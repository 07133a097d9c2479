"""The record of a run: where and how it was measured, the floors, every round of every row. JSON; CSV from it."""

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
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from .timing import Floor

FORMAT = 1  # of the file: a reader refuses any other
COLUMNS = (
    *("op", "shape", "dtype", "rows", "context", "engine", "us", "us_low", "us_high", "bytes", "operations"),
    *("GB/s", "TFLOP/s", "floor", "share", "cache", "note", "device", "commit", "date"),
)
PACKAGES = ("torch", "triton", "numpy", "transformers", "flashinfer-python", "liger-kernel", "gemlite")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def stamp(argv: Sequence[str] = sys.argv) -> dict[str, Any]:
    """Where, when, with what and by which command, as it is found now."""
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
        "command": shlex.join(["python", *argv]),
        "device": device_name(),
        "driver": gpu.pop("driver_version", None),
        "clocks": gpu or {"threads": torch.get_num_threads(), **busy},
        "python": platform.python_version(),
        **{package: version for package in PACKAGES if (version := _version(package))},
    }


@dataclasses.dataclass(frozen=True)
class Figure:
    """One op at one shape, done by one engine; or, with no rounds, the note that says why there is no time."""

    op: str
    shape: str
    dtype: str
    rows: int
    context: int | None
    engine: str
    bytes: int = 0
    operations: int = 0
    cold: bool = False
    rounds: Sequence[float] = ()  # microseconds
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.shape, self.dtype, self.engine

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The median in the middle."""
        low, median, high = statistics.quantiles(self.rounds, n=4) if len(self.rounds) > 1 else [self.rounds[0]] * 3
        return low, median, high

    @property
    def microseconds(self) -> float:
        return self.quartiles[1]

    @property
    def rates(self) -> tuple[float, float]:
        """Bytes and operations a second."""
        return self.bytes / self.microseconds * 1e6, self.operations / self.microseconds * 1e6

    def share(self, floor: Floor) -> tuple[str, float] | None:
        """The floor that binds and the share of it; None for reads that a cache may have served."""
        name, share = floor.share(self.dtype, self.bytes, self.operations, self.microseconds)
        return (name, share) if self.cold or name == "matmul" else None


@dataclasses.dataclass(frozen=True)
class Record:
    stamp: dict[str, Any]
    floor: Floor
    figures: Sequence[Figure]

    def save(self, path: str | Path) -> None:
        write_json(path, dataclasses.asdict(self) | {"format": FORMAT, "floor": self.floor._asdict()})

    def save_csv(self, path: str | Path) -> None:
        """A row for each figure; rounds are in the JSON."""
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for x in self.figures:
                measured: list[Any] = [""] * 10
                if x.rounds:
                    low, median, high = x.quartiles
                    floor, share = x.share(self.floor) or ("", "")
                    rate, products = x.rates
                    cache = "cold" if x.cold else "warm"
                    measured = [median, low, high, x.bytes, x.operations, rate / 1e9, products / 1e12, floor, share]
                    measured.append(cache)
                context = "" if x.context is None else x.context
                made = (self.stamp["device"], self.stamp["commit"], self.stamp["date"])
                writer.writerow([x.op, x.shape, x.dtype, x.rows, context, x.engine, *measured, x.note, *made])


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def load(path: str | Path) -> Record:
    """A record that `save` wrote. Raises ValueError, with a sentence, for any other file."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is no JSON: name a record that --json wrote") from None
    if not isinstance(content, dict) or not {"stamp", "floor", "figures"} <= content.keys():
        raise ValueError(f"{path} is no record of bench/kernels.py: name one that --json wrote")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a record of format {content.get('format')}, and this version reads {FORMAT}: measure again"
        )
    try:
        figures = [Figure(**figure) for figure in content["figures"]]
        return Record(content["stamp"], Floor(**content["floor"]), figures)
    except TypeError:
        raise ValueError(f"{path} is a damaged record: measure again") from None


def compare(before: Record, after: Record) -> list[str]:
    """Lines: what is not the same about the two runs, then each row that both have, and whether its change is noise.

    Noise is a change of the median that leaves the middle halves of the rounds overlapping, or is no larger than what
    the floors of the two runs, which no code changed, differ by. Raises ValueError for two devices, or nothing common.
    """
    one, two = before.stamp, after.stamp
    if one["device"] != two["device"]:
        raise ValueError(
            f"the records are of two devices, {one['device']} and {two['device']}: their times do not compare"
        )
    if any(size != two["shapes"].get(name) for name, size in one["shapes"].items() if name != "of"):
        raise ValueError("the records are of two models' shapes: measure both with the same --config")
    old = {figure.key: figure for figure in before.figures if figure.rounds}
    pairs = [(old[x.key], x) for x in after.figures if x.rounds and x.key in old]
    if not pairs:
        raise ValueError("the records have no row in common: measure the same ops, shapes, dtypes and engines")

    lines = []
    for name in sorted((one.keys() | two.keys()) - {"date", "command", "clocks", "seed"}):
        if one.get(name) != two.get(name):
            lines.append(f"{name}: {one.get(name)} -> {two.get(name)}")
    floors = [(f"{name} floor", getattr(before.floor, name), getattr(after.floor, name)) for name in ("read", "copy")]
    products = before.floor.matmul.keys() & after.floor.matmul.keys()
    floors += [(f"matmul floor, {x}", before.floor.matmul[x], after.floor.matmul[x]) for x in sorted(products)]
    drift = max(max(a, b) / min(a, b) for _, a, b in floors)
    lines.append("; ".join(f"{name} {b / a:.3f} times as fast" for name, a, b in floors))
    lines.append(f"{'op':24}{'shape':25}{'dtype':10}{'engine':14}{'us before':>11}{'us after':>11}{'faster':>9}")
    for a, b in pairs:
        ratio = a.microseconds / b.microseconds
        overlap = a.quartiles[0] <= b.quartiles[2] and b.quartiles[0] <= a.quartiles[2]
        noise = "rounds overlap" if overlap else "as the floors drift" if max(ratio, 1 / ratio) <= drift else ""
        lines.append(
            f"{b.op:24}{b.shape:25}{b.dtype:10}{b.engine:14}{a.microseconds:11.2f}{b.microseconds:11.2f}{ratio:8.3f}x"
            + f"  noise: {noise}" * bool(noise)
        )
    lost = len(old) - len(pairs)
    new = sum(bool(x.rounds) for x in after.figures) - len(pairs)
    lines.append(
        f"{len(pairs)} rows compared" + f", {lost} only before" * bool(lost) + f", {new} only after" * bool(new)
    )
    return lines
