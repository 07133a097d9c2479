"""One table of machines and models from records that people send: the decode steps that each measured."""

from collections.abc import Iterable

from . import tables
from .models import shapes_of
from .record import Record

STEPS = ("batch 1, context 1024", "batch 1, context 32768", "batch 16, context 1024")


def newest(records: Iterable[Record]) -> list[Record]:
    """For each machine and model, by name, its newest record with decode steps, else its newest with ceilings.

    Records of a dry run and those with neither are left out. Raises ValueError if none is left.
    """
    found: dict[tuple[str, str], Record] = {}

    def order(record: Record) -> tuple[bool, str]:
        return any(row.part == "decode" and row.rounds for row in record.rows), record.stamp["date"]

    for record in records:
        measured = any("ceiling" in row.about for row in record.rows) or order(record)[0]
        key = record.stamp["device"], shapes_of(record.stamp)["of"]
        if measured and not record.stamp.get("dry run") and (key not in found or order(found[key]) < order(record)):
            found[key] = record
    if not found:
        raise ValueError(
            "no record has decode steps or ceilings of a machine: send OUT/gpu.json of python -m bench.gpu"
        )
    return [found[key] for key in sorted(found)]


def table(records: Iterable[Record]) -> str:
    """Machines and models (down) and their decode steps (across): ms, tokens/s, shares of the memory bandwidth.

    In Markdown.
    """
    lines = []
    for record in newest(records):
        stamp = record.stamp
        known = {row.about.get("shape"): row for row in record.rows if row.part == "decode" and row.rounds}
        ceilings = {row.name: f"{row.value:.4g} {row.unit}" for row in record.rows if "ceiling" in row.about}
        made = f"{stamp['date'][:10]}, {stamp.get('commit')}"
        read = ceilings.get("read", "-")
        steps = (", ".join(tables.step_figures(row, stamp["device"])) for row in map(known.get, STEPS))
        lines.append([stamp["device"], shapes_of(stamp)["of"], made, read, *steps])
    return tables.table(["machine", "model", "date, commit", "reads", *STEPS], lines)
