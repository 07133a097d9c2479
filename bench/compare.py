"""Two records of one machine: which rows changed, and which changes are noise."""

from collections.abc import Iterator

from .models import shapes_of
from .record import Record, Row

BUSY = 1.0  # load average: one other program that always runs


def compare(before: Record, after: Record) -> list[str]:
    """Lines of text: how the runs differ, then every row that both have.

    A change is called noise if the middle halves of the rounds overlap, or if it is no larger than the difference
    between the ceilings of the two runs, which no change of the code explains.
    Raises ValueError if the records are of two devices or two models' shapes, or have no row in common.
    """
    one, two = before.stamp, after.stamp
    if one["device"] != two["device"]:
        raise ValueError(
            f"the records are of two devices, {one['device']} and {two['device']}: times can't be compared"
        )
    shapes = [{key: x for key, x in shapes_of(stamp).items() if key != "of"} for stamp in (one, two)]
    if shapes[0] != shapes[1]:
        raise ValueError("the records are of two models' shapes: measure both with the same --config or --model")
    old, new = (dict(_measured(record)) for record in (before, after))
    common = [key for key in new if key in old and "ceiling" not in new[key].about]
    if not common:
        raise ValueError("the records have no row in common: measure the same ops, shapes, dtypes and engines")

    names = sorted((one.keys() | two.keys()) - {"date", "command", "clocks", "seed", "shapes"})
    lines = [*_busy(before, "before"), *_busy(after, "after")]
    lines += [f"{name}: {one.get(name)} -> {two.get(name)}" for name in names if one.get(name) != two.get(name)]
    drift = 1.0
    for key, row in new.items():
        if "ceiling" in row.about and key in old:
            faster = row.value / old[key].value
            drift = max(drift, faster, 1 / faster)
            lines.append(f"ceiling {row.name}: {faster:.3f} times as fast")
    lines.append(f"{'':74}{'before':>11}{'after':>11}{'faster':>9}")
    for key in common:
        a, b = old[key], new[key]
        ratio = b.value / a.value if b.unit.endswith("/s") else a.value / b.value
        overlap = a.quartiles[0] <= b.quartiles[2] and b.quartiles[0] <= a.quartiles[2]
        noise = "rounds overlap" if overlap else "as the ceilings drift" if max(ratio, 1 / ratio) <= drift else ""
        line = f"{b.name:70}{b.unit:>4}{a.value:11.2f}{b.value:11.2f}{ratio:8.3f}x"
        lines.append(line + f"  noise: {noise}" * bool(noise))
    lost, added = (sum("ceiling" not in rows[key].about for key in rows.keys() - other.keys())
                   for rows, other in ((old, new), (new, old)))  # fmt: skip
    lines.append(
        f"{len(common)} rows compared" + f", {lost} only before" * bool(lost) + f", {added} only after" * bool(added)
    )
    return lines


def _busy(record: Record, which: str) -> Iterator[str]:
    """A warning if other programs ran when a record was begun."""
    load = (record.stamp.get("clocks") or {}).get("load average", 0.0)
    if load > BUSY:
        yield f"warning: {which} was measured under load (load average {load:.1f}): a change may be that of the load"


def _measured(record: Record) -> Iterator[tuple[tuple[str, str], Row]]:
    return (((row.part, row.name), row) for row in record.rows if row.rounds)
