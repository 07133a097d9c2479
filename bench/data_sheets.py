"""What a decode step's time is in tokens a second, and as a share of what its card's data sheet states.

Others publish figures of these kinds; the ceiling that a record measured is its own.
"""

import dataclasses

from .record import Row

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


def bandwidth(device: str) -> float | None:
    """Bytes per second by the data sheet of the card with this name, or None if it is not known."""
    known = [name for name in DATA_SHEETS if name in device]
    return DATA_SHEETS[max(known, key=len)] if known else None


def with_rates(row: Row, device: str) -> Row:
    """A decode step measured on `device`, with "tokens/s" and "of data sheet" in its `about`; other rows unchanged."""
    about = dict(row.about)
    if not row.rounds or about.get("op") != "decode step":
        return row
    seconds = row.value / 1e3
    about["tokens/s"] = about["tokens"] / seconds
    sheet = bandwidth(device)
    if sheet and "bytes" in about:
        about["of data sheet"] = about["bytes"] / sheet / seconds
    return dataclasses.replace(row, about=about)
