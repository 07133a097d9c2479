"""What bench/gpu.py found, as tables and drawings beside its record, and in the READMEs.

    python bench/report.py OUT/gpu.json              OUT/gpu.md; SVGs too where matplotlib is
    python bench/report.py OUT/gpu.json --readme     the performance of both READMEs, between their marks

A dry run's record is refused for a README: its figures mean nothing.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .rows import Row

ROOT = Path(__file__).parents[1]
MARKS = "<!-- bench/report.py writes what a GPU measured from here -->\n", "<!-- to here -->\n"
# The languages of a README, and what they say above its table.
ABOVE = {
    "README.md": (
        "On {device} ({versions}; commit {commit}, {date}), InternLM3-8B's shapes, random weights, bfloat16.\n"
        "A captured decode step with the recommended sampling, and its share of what this card was measured to read;\n"
        "the same step by others, with how many times as long they take; a request's first token, and its share of\n"
        "what the card multiplies:"
    ),
    "README.zh-CN.md": (
        "在 {device} 上（{versions}；提交 {commit}，{date}），InternLM3-8B 的形状，随机权重，bfloat16。\n"
        "依次为：采用推荐采样的一个已捕获解码步，及其占此卡实测读取上限的比例；其他实现的同一步，及其耗时是我们的多少倍；\n"
        "一个请求的首个 token，及其占此卡乘法上限的比例："
    ),
}
LAYERS = 48
# The ops of a step, and how often each runs.
STEP = {
    "embed, 1 row": 1,
    "rms_norm_qkv_rope_cache, 1 row, 1024 held": LAYERS,
    "paged_attention, 1 row, 1024 held": LAYERS,
    "linear_add, 1 row, o": LAYERS,
    "rms_norm_swiglu, 1 row": LAYERS,
    "linear_add, 1 row, down": LAYERS,
    "rms_norm_linear, 1 row, head": 1,
    "sample, 1 row, recommended": 1,
    "advance, 1 row": 1,
}


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Stamp and rows of a record. Raises ValueError, with a sentence, for any other file."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return content["stamp"], [Row(**row) for row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no record of bench/gpu.py: name the gpu.json that it wrote") from None


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _figure(row: Row) -> str:
    share = f", {row.about['share']:.1%}" if "share" in row.about else ""
    return f"{row.value:.4g} {row.unit} ({min(row.rounds):.4g} to {max(row.rounds):.4g}{share})"


def _by(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], Row]:
    return {tuple(row.about[name] for name in names): row for row in rows if all(name in row.about for name in names)}


def decode_table(rows: Sequence[Row]) -> str:
    """A step by tokens held (down) and rows (across): milliseconds at the median, and the share of the read ceiling."""
    known = _by([row for row in rows if row.part == "decode" and row.rounds], "context", "rows")
    contexts, counts = (sorted({key[i] for key in known}) for i in (0, 1))
    cells = [
        [
            str(context),
            *(
                f"{known[context, n].value:.2f} ms, {known[context, n].about['share']:.0%}"
                if (context, n) in known
                else "-"
                for n in counts
            ),
        ]
        for context in contexts
    ]
    return table(["held", *(f"{n} row{'s' * (n > 1)}" for n in counts)], cells)


def peers_table(rows: Sequence[Row]) -> str:
    """A step by engine (down) and shape (across), ours first, each with how many times as fast ours is."""
    of_peers = [row for row in rows if row.part == "peers" and "engine" in row.about]
    shapes = list(dict.fromkeys((row.about["context"], row.about["rows"]) for row in of_peers))
    engines = list(dict.fromkeys(row.about["engine"] for row in of_peers))
    known = _by([row for row in of_peers if row.rounds], "engine", "context", "rows")

    def cell(engine: str, shape: tuple[int, int]) -> str:
        row, ours = known.get((engine, *shape)), known.get(("internlm3", *shape))
        if row is None:
            return "not run"
        times = f", {row.value / ours.value:.2f} x" if ours and engine != "internlm3" else ""
        return f"{row.value:.2f} ms{times}"

    head = ["a step by", *(f"{count} row{'s' * (count > 1)}, {context} held" for context, count in shapes)]
    return table(head, [[engine, *(cell(engine, shape) for shape in shapes)] for engine in engines])


def prompts_table(rows: Sequence[Row]) -> str:
    """A request's first token by tokens of its prompt (across): milliseconds, and the share of the matmul ceiling."""
    known = sorted(_by([row for row in rows if row.part == "prompt"], "tokens").items())
    cells = [f"{row.value:.1f} ms, {row.about['share']:.0%}" for _, row in known]
    return table(["prompt", *(f"{tokens} tokens" for (tokens,), _ in known)], [["first token", *cells]])


def listed(rows: Iterable[Row]) -> str:
    return table(["", "", ""], [[row.name, _figure(row) if row.rounds else row.state, row.note] for row in rows])


def markdown(stamp: dict[str, Any], rows: Sequence[Row]) -> str:
    """All tables: what was checked, what this card allows, and every figure beside it."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.part, []).append(row)
    head = "".join(f"- {key}: {value}\n" for key, value in stamp.items() if value)
    dry = "**A dry run on a CPU: its figures mean nothing.**\n\n" if stamp.get("dry run") else ""
    text = f"# What a GPU found\n\n{dry}{head}"
    if any(row.part == "decode" for row in rows):
        text += f"\n## A step, and the share of the read ceiling that it is\n\n{decode_table(rows)}"
    if any(row.part == "peers" for row in rows):
        text += f"\n## The same step by others\n\n{peers_table(rows)}"
    if any(row.part == "prompt" for row in rows):
        text += f"\n## A request's first token\n\n{prompts_table(rows)}"
    for part, own in parts.items():
        text += f"\n## {part}\n\n{listed(own)}"
    return text


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The drawings for which there are rows: kernels' shares, a step by context and by rows, and its waterfall."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "internlm3", "svg.fonttype": "none", "font.size": 9})
    from matplotlib.figure import Figure

    drawn = []

    def drawing(name: str, height: float, paint: Callable[[Any], bool]) -> None:
        canvas = Figure(figsize=(8, height))
        if paint(canvas.subplots()):
            canvas.savefig(folder / name, metadata={"Date": None}, bbox_inches="tight")
            drawn.append(folder / name)

    ours = [row for row in rows if row.part == "kernels" and row.about.get("engine") == "triton" and row.rounds]

    def shares(axes: Any) -> bool:
        known = [row for row in ours if "share" in row.about]
        axes.barh([row.name for row in known], [100 * row.about["share"] for row in known], color="#0072b2")
        axes.invert_yaxis()
        axes.axvline(100, color="#555555", linewidth=0.8)
        axes.set_xlabel("% of the floor that binds")
        return bool(known)

    def lines(x: str, fixed: str, value: int) -> Callable[[Any], bool]:
        def paint(axes: Any) -> bool:
            steps = [row for row in rows if row.part in ("decode", "peers") and row.rounds and fixed in row.about]
            steps = [row for row in steps if row.about[fixed] == value and x in row.about]
            if not steps:
                return False
            for engine in dict.fromkeys(row.about["engine"] for row in steps):
                line = sorted((row.about[x], row.value) for row in steps if row.about["engine"] == engine)
                axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=engine)
            axes.set_xscale("log", base=2)
            axes.set_xlabel("tokens held" if x == "context" else "rows")
            axes.set_ylabel("ms a step")
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=7)
            return True

        return paint

    def waterfall(axes: Any) -> bool:
        times = {row.name.removesuffix(", triton"): row.value / 1e3 for row in ours}
        ops = [(name, times[name] * count) for name, count in STEP.items() if name in times]
        start = 0.0
        for name, milliseconds in ops:
            axes.barh(name, milliseconds, left=start, color="#0072b2")
            start += milliseconds
        whole = [
            row.value
            for row in rows
            if row.part == "decode" and row.rounds and {"rows": 1, "context": 1024}.items() <= row.about.items()
        ]
        if whole:
            axes.barh("the step, in a graph", statistics.median(whole), color="#d55e00")
        axes.invert_yaxis()
        axes.set_xlabel("ms")
        return len(ops) == len(STEP)

    drawing("gpu-kernels.svg", 1 + 0.2 * len(ours), shares)
    drawing("gpu-context.svg", 4, lines("context", "rows", 1))
    drawing("gpu-rows.svg", 4, lines("rows", "context", 1024))
    drawing("gpu-step.svg", 3, waterfall)
    return drawn


def into_readme(text: str, above: str, stamp: dict[str, Any], rows: Sequence[Row]) -> str:
    """A README's text with the tables of a step between its marks. Raises ValueError where it has no marks."""
    begin, end = (text.find(mark) for mark in MARKS)
    if not 0 <= begin < end:
        raise ValueError("the README lacks the marks between which a GPU's figures stand")
    versions = ", ".join(f"{name} {stamp[name]}" for name in ("driver", "torch", "triton") if stamp.get(name))
    about = {"device": stamp["device"], "versions": versions, "commit": stamp["commit"], "date": stamp["date"][:10]}
    tables = "\n".join([above.format(**about) + "\n", decode_table(rows), peers_table(rows), prompts_table(rows)])
    return f"{text[:begin]}{MARKS[0]}\n{tables}\n{text[end:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("record", type=Path, help="the gpu.json of bench/gpu.py")
    parse.add_argument("--readme", action="store_true", help="write the READMEs' figures instead")
    options = parse.parse_args(arguments)
    try:
        stamp, rows = load(options.record)
        if options.readme:
            if stamp.get("dry run"):
                raise ValueError(f"{options.record} is of a dry run on a CPU: its figures mean nothing")
            for name, above in ABOVE.items():
                text = into_readme((ROOT / name).read_text("utf-8"), above, stamp, rows)
                (ROOT / name).write_text(text, "utf-8")
            return 0
    except ValueError as error:
        parse.error(str(error))
    options.record.with_suffix(".md").write_text(markdown(stamp, rows), "utf-8")
    print(options.record.with_suffix(".md"))
    if importlib.util.find_spec("matplotlib") is None:
        print("no drawings: matplotlib is not installed (pip install 'internlm3[plots]')")
        return 0
    for path in draw(rows, options.record.parent):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
