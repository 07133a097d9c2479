"""A record as text: the table of ops for a terminal, everything else as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from .data_sheets import with_rates
from .record import Record, Row


def columns(op: str, shape: str, dtype: str) -> str:
    """The first columns of a table of ops, wide enough for every shape."""
    return f"{op:24}{shape:38}{dtype:10}"


OPS_HEADER = (
    f"{columns('op', 'shape', 'dtype')}{'engine':14} {'us':>10}{'quartiles':>20}{'MB':>9}{'GFLOP':>8}{'GB/s':>8}"
    f"{'TFLOP/s':>9}{'of ceiling':>15}  L2"
)


def op_line(row: Row) -> str:
    """A row of bench.ops, under OPS_HEADER."""
    about = row.about
    head = f"{columns(about['op'], about['shape'], about['dtype'])}{about['engine']:14} "
    if not row.rounds:
        return f"{head} {row.note}"
    low, median, high = row.quartiles
    spread = "..".join(f"{x:.2f}" if x < 1000 else f"{x:.0f}" for x in (low, high))
    share = f"{about['share']:.1%} {about['bound']}" if "share" in about else "-"
    return (
        f"{head}{median:10.2f}{spread:>20}{about['bytes'] / 1e6:9.2f}{about['flops'] / 1e9:8.2f}"
        f"{about['GB/s']:8.1f}{about['TFLOP/s']:9.3f}{share:>15}  {'cold' if about['cold'] else 'warm'}"
    )


def ceilings(rows: Iterable[Row]) -> str:
    """What this machine reaches at most, in one line."""
    known = [row for row in rows if "ceiling" in row.about]
    notes = (f" ({row.note.removeprefix('read, ')})" * bool(row.note) for row in known)
    return "ceilings: " + "; ".join(
        f"{row.name} {row.value:.4g} {row.unit}{note}" for row, note in zip(known, notes, strict=True)
    )


def text(record: Record) -> str:
    lines = ["; ".join(f"{key} {value}" for key, value in record.stamp.items())]
    lines += [ceilings(record.rows)] if any("ceiling" in row.about for row in record.rows) else []
    ops = [row for row in record.rows if row.part == "ops"]
    others = [row for row in record.rows if row.part != "ops" and "ceiling" not in row.about]
    return "\n".join(
        [
            *lines,
            *([OPS_HEADER] if ops else []),
            *map(op_line, ops),
            *(str(with_rates(row, record.stamp["device"])) for row in others),
        ]
    )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _by(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], Row]:
    return {tuple(row.about[name] for name in names): row for row in rows if all(name in row.about for name in names)}


def _share(row: Row) -> str:
    """Of a ceiling; nothing in a record without ceilings."""
    return f", {row.about['share']:.0%}" if "share" in row.about else ""


def decode_table(rows: Sequence[Row]) -> str:
    """Decode steps by context length (down) and batch size (across): median, and share of the read ceiling."""
    known = _by([row for row in rows if row.part == "decode" and row.rounds], "context", "tokens")
    contexts, batches = (sorted({key[i] for key in known}) for i in (0, 1))

    def cell(context: int, batch: int) -> str:
        row = known.get((context, batch))
        return f"{row.value:.2f} ms{_share(row)}" if row else "-"

    lines = [[str(context), *(cell(context, batch) for batch in batches)] for context in contexts]
    return table(["context", *(f"batch {batch}" for batch in batches)], lines)


def step_figures(row: Row | None, device: str) -> list[str]:
    """A decode step that `device` measured: ms, tokens/s, and the shares of the memory bandwidth that are known."""
    if row is None:
        return ["-"]
    about = with_rates(row, device).about
    figures = [f"{row.value:.2f} ms", f"{about['tokens/s']:.0f} tokens/s"]
    shares = {"share": "of measured", "of data sheet": "of data sheet"}
    return figures + [f"{about[name]:.0%} {words}" for name, words in shares.items() if name in about]


def steps_table(rows: Sequence[Row], device: str) -> str:
    """Every decode step of any engine (down): ms, tokens/s, and shares of the memory bandwidth."""
    steps = [row for row in rows if row.rounds and row.about.get("op") == "decode step"]
    lines = [[row.part, row.name, ", ".join(step_figures(row, device))] for row in steps]
    return table(["part", "decode step", "figures"], lines)


def peers_table(rows: Sequence[Row]) -> str:
    """Decode steps by engine (down, ours first) and shape (across), each with its time as a multiple of ours."""
    of_peers = [row for row in rows if row.part == "peers" and "engine" in row.about]
    shapes = list(dict.fromkeys(row.about["shape"] for row in of_peers))
    engines = list(dict.fromkeys(row.about["engine"] for row in of_peers))
    known = _by([row for row in of_peers if row.rounds], "engine", "shape")

    def cell(engine: str, shape: str) -> str:
        row, ours = known.get((engine, shape)), known.get(("internlm3", shape))
        if row is None:
            return "not run"
        times = f", {row.value / ours.value:.2f} x" if ours and engine != "internlm3" else ""
        return f"{row.value:.2f} ms{times}"

    return table(["decode step", *shapes], [[engine, *(cell(engine, shape) for shape in shapes)] for engine in engines])


def first_token_table(rows: Sequence[Row]) -> str:
    """Time to first token by length of the prompt (across): median, and share of the matmul ceiling."""
    known = sorted(_by([row for row in rows if row.part == "first_token"], "tokens").items())
    cells = [f"{row.value:.1f} ms{_share(row)}" for _, row in known]
    return table(["prompt", *(f"{tokens} tokens" for (tokens,), _ in known)], [["time to first token", *cells]])


def _figure(row: Row) -> str:
    share = f", {row.about['share']:.1%} of {row.about['bound']}" if "share" in row.about else ""
    return f"{row.value:.4g} {row.unit} ({min(row.rounds):.4g} to {max(row.rounds):.4g}{share})"


def markdown(record: Record) -> str:
    """All rows, by part, under the tables of decode steps and first tokens."""
    parts: dict[str, list[Row]] = {}
    for row in record.rows:
        parts.setdefault(row.part, []).append(row)
    head = "".join(f"- {key}: {value}\n" for key, value in record.stamp.items() if value)
    dry = "**A dry run on a CPU: its figures mean nothing.**\n\n" if record.stamp.get("dry run") else ""
    text = f"# Results\n\n{dry}{head}"
    if "decode" in parts:
        text += f"\n## Decode steps, and their share of the read ceiling\n\n{decode_table(record.rows)}"
    steps = [row for part in ("decode", "quantised", "peers") for row in parts.get(part, ())]
    if any(row.rounds for row in steps):
        about = "Decode steps in tokens a second, and their shares of the memory bandwidth"
        text += f"\n## {about}\n\n{steps_table(steps, record.stamp['device'])}"
    if "peers" in parts:
        text += f"\n## Decode steps of other implementations\n\n{peers_table(record.rows)}"
    if "first_token" in parts:
        text += f"\n## Time to first token\n\n{first_token_table(record.rows)}"
    for part, rows in parts.items():
        lines = [[row.name, _figure(row) if row.rounds else row.state, row.note] for row in rows]
        text += f"\n## {part}\n\n{table(['', '', ''], lines)}"
    return text
