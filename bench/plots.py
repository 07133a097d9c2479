"""Draw a record: the share of the floor by op, time by context and by rows, peers and quartiles with them. SVG."""

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .record import Figure, Record

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")  # Okabe and Ito's
Lines = dict[tuple[str, str], list[Figure]]  # by engine and what else tells lines apart


def check(folder: str) -> None:
    """Raises ValueError, with a sentence, where nothing could be drawn there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'internlm3[plots]', or matplotlib")
    if not Path(folder).absolute().parent.is_dir() or (Path(folder).exists() and not Path(folder).is_dir()):
        raise ValueError(f"--plot {folder} can't be written: name a folder, in one that there is")


def draw(record: Record, folder: str | Path) -> list[Path]:
    """The files drawn, those for which the record has enough: a share, or one line of two points."""
    import matplotlib

    matplotlib.use("svg")
    # One record, one file: no ids by chance, and words as text.
    matplotlib.rcParams.update({"svg.hashsalt": "internlm3", "svg.fonttype": "none", "font.size": 9})
    Path(folder).mkdir(exist_ok=True)
    timed = [figure for figure in record.figures if figure.rounds]
    names = list(dict.fromkeys(figure.engine for figure in timed))
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    drawn = []
    for dtype in dict.fromkeys(figure.dtype for figure in timed):
        mine = [figure for figure in timed if figure.dtype == dtype]
        drawn += _shares(record, mine, colours, Path(folder) / f"share-{dtype}.svg")
        for op in dict.fromkeys(figure.op for figure in mine):
            of_op = [figure for figure in mine if figure.op == op]
            for what, lines, x in (
                ("context", by_context(of_op), lambda f: f.context),
                ("rows", by_rows(of_op), _rows),
            ):
                drawn += _times(
                    record, f"{op}, {dtype}", what, lines, x, colours, Path(folder) / f"{op}-{what}-{dtype}.svg"
                )
    return drawn


def _rows(figure: Figure) -> int:
    return figure.rows


def _grouped(figures: Sequence[Figure], name: Callable[[Figure], str], x: Callable[[Figure], Any]) -> Lines:
    """Lines of at least two places, in their order."""
    lines: Lines = {}
    for figure in figures:
        lines.setdefault((figure.engine, name(figure)), []).append(figure)
    return {key: sorted(line, key=x) for key, line in lines.items() if len({x(figure) for figure in line}) > 1}


def by_context(figures: Sequence[Figure]) -> Lines:
    held = [figure for figure in figures if figure.context is not None]
    return _grouped(held, lambda figure: figure.shape.split(", ")[0], lambda figure: figure.context)


def by_rows(figures: Sequence[Figure]) -> Lines:
    """Decode's rows and a chunk's tokens are lines of their own."""

    def name(figure: Figure) -> str:
        count, *rest = figure.shape.split(", ")
        return ", ".join(["rows" if "row" in count else "tokens", *rest])

    return _grouped(figures, name, _rows)


def _source(record: Record) -> str:
    stamp = record.stamp
    return f"{stamp['device']}, commit {stamp['commit']}, {stamp['date'][:10]}; shapes of {stamp['shapes']['of']}"


def _save(figure: Any, record: Record, path: Path) -> list[Path]:
    figure.text(0.01, -0.1 / figure.get_figheight(), _source(record), fontsize=7, color="#555555", va="top")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    return [path]


def _shares(record: Record, figures: Sequence[Figure], colours: dict[str, str], path: Path) -> list[Path]:
    """Bars: of each op at each shape, by each engine, the share of the floor that binds it."""
    from matplotlib.figure import Figure as Canvas

    known = [(figure, share) for figure in figures if (share := figure.share(record.floor))]
    if not known:
        return []
    rows = list(dict.fromkeys((figure.op, figure.shape) for figure, _ in known))
    engines = list(dict.fromkeys(figure.engine for figure, _ in known))
    canvas = Canvas(figsize=(8, 1.2 + 0.16 * (len(known) + len(rows))))
    axes = canvas.subplots()
    places, labels, place = [], [], 0.0
    for row in rows:
        bars = [(figure, share) for figure, share in known if (figure.op, figure.shape) == row]
        places.append(place + (len(bars) - 1) / 2)
        labels.append(f"{row[0]}, {row[1]} ({bars[0][1][0]})")
        for figure, (_, share) in bars:
            axes.barh(place, 100 * share, 0.9, color=colours[figure.engine])
            place += 1
        place += 1
    for engine in engines:
        axes.barh(0, 0, color=colours[engine], label=engine)
    axes.set_yticks(places, labels)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(100, color="#555555", linewidth=0.8)
    axes.set_xlabel("% of the floor that binds")
    axes.legend(fontsize=8)
    return _save(canvas, record, path)


def _times(
    record: Record,
    title: str,
    what: str,
    lines: Lines,
    x: Callable[[Figure], Any],
    colours: dict[str, str],
    path: Path,
) -> list[Path]:
    """Lines of medians amid their quartiles, both axes logarithmic, and what the floor allows, dashed."""
    from matplotlib.figure import Figure as Canvas

    if not lines:
        return []
    canvas = Canvas(figsize=(7, 4.2))
    axes = canvas.subplots()
    kinds = list(dict.fromkeys(kind for _, kind in lines))
    styles = dict(zip(kinds, itertools.cycle("o^sDv"), strict=False))
    for (engine, kind), line in lines.items():
        places = [x(figure) for figure in line]
        low, median, high = zip(*(figure.quartiles for figure in line), strict=True)
        label = f"{engine}, {kind}" if len(kinds) > 1 else engine
        axes.plot(places, median, color=colours[engine], marker=styles[kind], markersize=4, label=label)
        axes.fill_between(places, low, high, color=colours[engine], alpha=0.2, linewidth=0)
    for kind in kinds:
        line = next(line for (_, name), line in lines.items() if name == kind)
        shares = [figure.share(record.floor) for figure in line]
        if all(shares):
            least = [f.microseconds * share for f, (_, share) in zip(line, shares, strict=True)]
            label = None if kind != kinds[0] else "floor"
            axes.plot([x(f) for f in line], least, color="#555555", linestyle="--", linewidth=0.8, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({x(figure) for line in lines.values() for figure in line})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_title(title + (f", {kinds[0]}" if len(kinds) == 1 else ""))
    axes.set_xlabel("tokens held" if what == "context" else "rows")
    axes.set_ylabel("us")
    axes.legend(fontsize=8)
    return _save(canvas, record, path)
