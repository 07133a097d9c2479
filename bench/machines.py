"""One table of machines from records that people send: the decode steps that each machine measured."""

from collections.abc import Iterable

from . import tables
from .record import Record, Row

STEPS = ("batch 1, context 1024", "batch 1, context 32768", "batch 16, context 1024")
# Bytes per second that a card's data sheet states for its memory, by a part of its name; the longest match counts.
DATA_SHEETS = {
    "A100-SXM4-40GB": 1.555e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100 80GB PCIe": 1.935e12,
    "B200": 8.0e12,
    "H100 80GB HBM3": 3.35e12,
    "H100 PCIe": 2.0e12,
    "H200": 4.8e12,
    "L40S": 0.864e12,
    "MI300X": 5.3e12,
    "RTX 3090": 0.936e12,
    "RTX 4090": 1.008e12,
    "RTX 5090": 1.792e12,
}


def data_sheet(device: str) -> float | None:
    known = [name for name in DATA_SHEETS if name in device]
    return DATA_SHEETS[max(known, key=len)] if known else None


def newest(records: Iterable[Record]) -> list[Record]:
    """For each machine, by name, its newest record with decode steps, else its newest with ceilings.

    Records of a dry run and those with neither are left out. Raises ValueError if none is left.
    """
    found: dict[str, Record] = {}

    def order(record: Record) -> tuple[bool, str]:
        return any(row.part == "decode" and row.rounds for row in record.rows), record.stamp["date"]

    for record in records:
        measured = any("ceiling" in row.about for row in record.rows) or order(record)[0]
        device = record.stamp["device"]
        if (
            measured
            and not record.stamp.get("dry run")
            and (device not in found or order(found[device]) < order(record))
        ):
            found[device] = record
    if not found:
        raise ValueError(
            "no record has decode steps or ceilings of a machine: send OUT/gpu.json of python -m bench.gpu"
        )
    return [found[device] for device in sorted(found)]


def _step(row: Row | None, device: str) -> str:
    if row is None:
        return "-"
    milliseconds, about = row.value, row.about
    shares = [f"{about['share']:.0%} of measured"] if "share" in about else []
    sheet = data_sheet(device)
    if sheet and "bytes" in about:
        shares.append(f"{about['bytes'] / sheet / milliseconds * 1e3:.0%} of data sheet")
    return ", ".join([f"{milliseconds:.2f} ms", f"{about['tokens'] / milliseconds * 1e3:.0f} tokens/s", *shares])


def table(records: Iterable[Record]) -> str:
    """Machines (down) and their decode steps (across): ms, tokens/s, shares of the memory bandwidth. In Markdown."""
    lines = []
    for record in newest(records):
        stamp = record.stamp
        known = {row.about.get("shape"): row for row in record.rows if row.part == "decode" and row.rounds}
        ceilings = {row.name: f"{row.value:.4g} {row.unit}" for row in record.rows if "ceiling" in row.about}
        made = f"{stamp['date'][:10]}, {stamp.get('commit')}"
        read = ceilings.get("read", "-")
        lines.append([stamp["device"], made, read, *(_step(known.get(shape), stamp["device"]) for shape in STEPS)])
    return tables.table(["machine", "date, commit", "reads", *STEPS], lines)
