"""Show a record, compare two, or turn one into CSV, Markdown, plots or the READMEs' figures. Measures nothing.

    python -m bench.report run.json                                        the table
    python -m bench.report run.json --csv run.csv --plot plots             every row as CSV; SVGs (needs matplotlib)
    python -m bench.report before.json after.json                          what changed, and which changes are noise
    python -m bench.report a100.json h100.json h200.json                   a table: the newest of each machine and model
    python -m bench.report OUT/gpu.json --markdown gpu.md                  all tables of python -m bench.gpu
    python -m bench.report OUT/gpu.json --readme .                         writes the tables of the READMEs in a folder

A record of a dry run or of another model is refused for the READMEs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machines, plots, tables
from .compare import compare
from .models import INTERNLM3, shapes, shapes_of
from .options import output
from .record import Record, load
from .roofline import Roofline

MARKS = "<!-- bench/report.py writes what a GPU measured from here -->\n", "<!-- to here -->\n"
# The text above the tables, by README.
ABOVE = {
    "README.md": (
        "InternLM3-8B's shapes with random weights in bfloat16 on one {device} ({versions}; commit {commit}, {date}).\n"
        "First a captured decode step with the recommended sampling, and its share of the card's measured memory\n"
        "bandwidth; then the same step by other implementations, and how many times as long it takes; then the time\n"
        "to first token, and its share of the card's measured matmul rate:"
    ),
    "README.zh-CN.md": (
        "InternLM3-8B 的形状，随机权重，bfloat16，单张 {device}（{versions}；提交 {commit}，{date}）。\n"
        "依次为：采用推荐采样的一个已捕获解码步，及其占此卡实测显存带宽的比例；其他实现的同一步，及其耗时是我们的多少倍；\n"
        "首个 token 的延迟，及其占此卡实测矩阵乘法速率的比例："
    ),
}


def into_readme(text: str, above: str, record: Record) -> str:
    """A README's text with new tables between its marks. Raises ValueError if it has no marks."""
    begin, end = (text.find(mark) for mark in MARKS)
    if not 0 <= begin < end:
        raise ValueError("the README lacks the marks around a GPU's figures")
    stamp = record.stamp
    versions = ", ".join(f"{name} {stamp[name]}" for name in ("driver", "torch", "triton") if stamp.get(name))
    about: dict[str, Any] = {"device": stamp["device"], "commit": stamp["commit"], "date": stamp["date"][:10]}
    made = (tables.decode_table, tables.peers_table, tables.first_token_table)
    text_above = above.format(versions=versions, **about) + "\n"
    ceilings = [tables.ceilings(record.rows) + "\n"] if Roofline.of(record.rows) else []
    body = "\n".join([text_above, *ceilings, *(table(record.rows) for table in made)])
    return f"{text[:begin]}{MARKS[0]}\n{body}\n{text[end:]}"


def _loaded(paths: Sequence[str]) -> list[Record]:
    """The records; of more than two those that can be read, and a line for each other. Raises ValueError."""
    records = []
    for path in paths:
        try:
            records.append(load(path))
        except ValueError as error:
            if len(paths) <= 2:
                raise
            print(f"left out: {error}", file=sys.stderr)
    if not records:
        raise ValueError("none of the records can be read")
    return records


def _readmes(folder: Path, record: Record) -> dict[Path, str]:
    """The READMEs of a folder, by path, with the record's tables. Raises ValueError if one can't have them."""
    try:
        return {folder / name: into_readme((folder / name).read_text("utf-8"), above, record)
                for name, above in ABOVE.items()}  # fmt: skip
    except OSError as error:
        raise ValueError(f"--readme {folder}: {error.filename} can't be read: {error.strerror}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("records", nargs="+", metavar="RECORD", help="one, two of a machine and model, or of several")
    parse.add_argument("--csv", metavar="OUT", type=output, help="write one line per row")
    parse.add_argument("--markdown", metavar="OUT", type=output, help="write all tables")
    parse.add_argument("--plot", metavar="DIR", help="draw SVGs; needs matplotlib")
    parse.add_argument("--readme", metavar="DIR", type=Path, help="write the performance tables of the READMEs there")
    options = parse.parse_args(arguments)
    try:
        if options.plot:
            plots.check(options.plot)
        record, *after = records = _loaded(options.records)
        devices = {each.stamp["device"] for each in records}
        models = {shapes_of(each.stamp)["of"] for each in records if any(row.part == "decode" for row in each.rows)}
        several = len(options.records) > 2 or len(devices) > 1 or len(models) > 1
        if several and (options.csv or options.markdown or options.plot or options.readme):
            raise ValueError("the table of several machines or models is only printed: name one record")
        if several:
            print(machines.table(records), end="")
        elif after:
            print("\n".join(compare(record, after[0])))
        elif options.readme:
            if record.stamp.get("dry run"):
                raise ValueError(f"{options.records[0]} is of a dry run on a CPU: its figures mean nothing")
            if shapes_of(record.stamp) != shapes(INTERNLM3):
                of = shapes_of(record.stamp)["of"]
                raise ValueError(f"{options.records[0]} is of {of}: the READMEs have figures of InternLM3-8B")
            for path, text in _readmes(options.readme, record).items():
                path.write_text(text, "utf-8")
                print(path)
        else:
            print(tables.text(record))
    except ValueError as error:
        parse.error(str(error))
    if options.csv:
        record.save_csv(options.csv)
    if options.markdown:
        Path(options.markdown).write_text(tables.markdown(record), "utf-8")
    if options.plot:
        drawn = plots.draw(record, options.plot)
        print("\n".join(map(str, drawn)) or plots.NOTHING)
        if drawn and not any("-context-" in path.name or "-tokens-" in path.name for path in drawn):
            print(plots.NO_LINES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
