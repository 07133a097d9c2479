"""Draw a record as SVG: shares of a ceiling, times by context length and by batch size, the ops of a decode step."""

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .models import shapes_of
from .record import Record, Row

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")  # Okabe and Ito's
Lines = dict[tuple[str, str], list[Row]]  # by engine, and the rest of the shape
LAYERS = 48
NO_LINES = "no lines are drawn: no op has two context lengths or batch sizes; pass several to --context or --batch"
NOTHING = f"nothing is drawn: no row has a share of a ceiling, and {NO_LINES.partition(': ')[2]}"
# The ops of a decode step of InternLM3-8B at batch size 1, and how often each runs.
STEP = {
    ("embed", "batch 1"): 1,
    ("rms_norm_qkv_rope_cache", "batch 1, context 1024"): LAYERS,
    ("paged_attention", "batch 1, context 1024"): LAYERS,
    ("linear_add", "batch 1, o_proj"): LAYERS,
    ("rms_norm_swiglu", "batch 1"): LAYERS,
    ("linear_add", "batch 1, down_proj"): LAYERS,
    ("rms_norm_linear", "batch 1, lm_head"): 1,
    ("sample", "batch 1, recommended"): 1,
    ("advance", "batch 1"): 1,
}


def check(folder: str) -> None:
    """Raises ValueError if nothing can be drawn there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'internlm3[plots]', or matplotlib")
    if not Path(folder).absolute().parent.is_dir() or (Path(folder).exists() and not Path(folder).is_dir()):
        raise ValueError(f"--plot {folder} can't be written: name a folder inside one that exists")


def draw(record: Record, folder: str | Path) -> list[Path]:
    """Draws what the record has enough rows for, a share or a line of two points. Returns the files."""
    import matplotlib

    matplotlib.use("svg")
    # The same record gives the same file: no random ids, and text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "internlm3", "svg.fonttype": "none", "font.size": 9})
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    rows = [row for row in record.rows if row.rounds and {"op", "shape", "engine"} <= row.about.keys()]
    engines = dict.fromkeys(row.about["engine"] for row in rows)
    colours = dict(zip(engines, itertools.cycle(COLOURS), strict=False))
    drawn = []

    def save(name: str, size: tuple[float, float], paint: Callable[[Any], bool]) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=size)
        if paint(figure.subplots()):
            figure.text(0.01, -0.1 / size[1], _source(record), fontsize=7, color="#555555", va="top")
            figure.savefig(folder / name, metadata={"Date": None}, bbox_inches="tight")
            drawn.append(folder / name)

    for dtype in dict.fromkeys(row.about["dtype"] for row in rows):
        mine = [row for row in rows if row.about["dtype"] == dtype]
        shares = [row for row in mine if "share" in row.about]
        shapes = {(row.about["op"], row.about["shape"]) for row in shares}
        height = 1.2 + 0.16 * (len(shares) + len(shapes))
        save(f"share-{dtype}.svg", (8, height), partial(_shares, rows=shares, colours=colours))
        for op in dict.fromkeys(row.about["op"] for row in mine):
            of_op = [row for row in mine if row.about["op"] == op]
            for what, label in (("context", "context length"), ("tokens", "batch size, or tokens of a chunk")):
                lines = by(what, of_op)
                paint = _times(f"{op}, {dtype}", label, lines, what, colours)
                save(f"{op.replace(' ', '_')}-{what}-{dtype}.svg", (7, 4.2), paint)
    save("decode_step-ops.svg", (8, 3), lambda axes: _waterfall(axes, rows))
    return drawn


def _source(record: Record) -> str:
    stamp = record.stamp
    shapes = shapes_of(stamp)["of"]
    return f"{stamp['device']}, commit {stamp['commit']}, {stamp['date'][:10]}; shapes of {shapes}"


def by(what: str, rows: Iterable[Row]) -> Lines:
    """Lines of at least two points, by "context" or by "tokens"; the batch sizes and chunks are separate lines."""
    lines: Lines = {}
    for row in rows:
        if row.about.get(what) is None:
            continue
        first, *rest = row.about["shape"].split(", ")
        words = [first, *(word for word in rest if not word.startswith("context "))]
        if what == "tokens":
            words = [first.split()[0], *rest]
        line = lines.setdefault((row.about["engine"], ", ".join(words)), [])
        if all(point.about[what] != row.about[what] for point in line):
            line.append(row)
    return {key: sorted(line, key=lambda row: row.about[what]) for key, line in lines.items() if len(line) > 1}


def _shares(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> bool:
    """Bars: for each op and shape, the share of its ceiling that each engine reached."""
    places, labels, place = [], [], 0.0
    for op, shape in dict.fromkeys((row.about["op"], row.about["shape"]) for row in rows):
        bars = [row for row in rows if (row.about["op"], row.about["shape"]) == (op, shape)]
        places.append(place + (len(bars) - 1) / 2)
        labels.append(f"{op}, {shape} ({bars[0].about['bound']})")
        for row in bars:
            axes.barh(place, 100 * row.about["share"], 0.9, color=colours[row.about["engine"]])
            place += 1
        place += 1
    for engine in dict.fromkeys(row.about["engine"] for row in rows):
        axes.barh(0, 0, color=colours[engine], label=engine)
    axes.set_yticks(places, labels)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(100, color="#555555", linewidth=0.8)
    axes.set_xlabel("% of the ceiling (read or matmul) that bounds it")
    if rows:
        axes.legend(fontsize=8)
    return bool(rows)


def _times(title: str, label: str, lines: Lines, what: str, colours: dict[str, str]) -> Callable[[Any], bool]:
    """Medians with their quartiles on logarithmic axes; the ceiling as a dashed line."""

    def paint(axes: Any) -> bool:
        if not lines:
            return False
        shapes = list(dict.fromkeys(shape for _, shape in lines))
        markers = dict(zip(shapes, itertools.cycle("o^sDv"), strict=False))
        for (engine, shape), line in lines.items():
            places = [row.about[what] for row in line]
            low, median, high = zip(*(row.quartiles for row in line), strict=True)
            name = f"{engine}, {shape}" if len(shapes) > 1 else engine
            axes.plot(places, median, color=colours[engine], marker=markers[shape], markersize=4, label=name)
            axes.fill_between(places, low, high, color=colours[engine], alpha=0.2, linewidth=0)
        for shape in shapes:
            line = next(line for (_, of), line in lines.items() if of == shape)
            if all("share" in row.about for row in line):
                least = [row.value * row.about["share"] for row in line]
                name = "_" if shape != shapes[0] else "ceiling"  # labels with an underscore are left out of the legend
                places = [row.about[what] for row in line]
                axes.plot(places, least, color="#555555", linestyle="--", linewidth=0.8, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row.about[what] for line in lines.values() for row in line})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_title(title + (f", {shapes[0]}" if len(shapes) == 1 else ""))
        axes.set_xlabel(label)
        axes.set_ylabel(next(iter(lines.values()))[0].unit)
        axes.legend(fontsize=8)
        return True

    return paint


def _waterfall(axes: Any, rows: Sequence[Row]) -> bool:
    """The ops of a decode step end to end, and the captured step below them."""
    ours = {(row.about["op"], row.about["shape"]): row.value for row in rows if row.about["engine"] == "triton"}
    known = {key: ours[key] * count / 1e3 for key, count in STEP.items() if key in ours}
    start = 0.0
    for (op, shape), milliseconds in known.items():
        axes.barh(f"{op}, {shape}", milliseconds, left=start, color=COLOURS[0])
        start += milliseconds
    ours_whole = ("internlm3", "batch 1, context 1024")
    step = [row.value for row in rows if (row.about["engine"], row.about["shape"]) == ours_whole]
    if step:
        axes.barh("the captured step", step[0], color=COLOURS[1])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    return len(known) == len(STEP)
