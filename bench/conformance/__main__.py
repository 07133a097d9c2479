"""A small InternLM3 with known logits, for authors of any runtime: is it right at every position?

    python -m bench.conformance write FOLDER
    python -m bench.conformance check LOGITS.npy --run prompts

`write` makes a checkpoint with its tokenizer, and the token ids of a sequence. `check` compares the logits that a
runtime computed with the expected ones. bench/README.md describes both.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..options import output
from .check import ALLOWED, check, read
from .folder import write
from .runs import RUNS


def _npy(text: str) -> str:
    """The path of a file that numpy writes, which adds .npy to any other name."""
    if not text.endswith(".npy"):
        raise argparse.ArgumentTypeError(f"{text} must end in .npy")
    return output(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = made.add_subparsers(dest="command", required=True)
    add = commands.add_parser("write", help="make the folder").add_argument
    add("folder", type=Path, metavar="FOLDER", help="a new or empty folder")
    add = commands.add_parser("check", help="check a runtime's logits").add_argument
    add("logits", type=Path, metavar="LOGITS", help=".npy or .json: a row for each place")
    add("--run", choices=RUNS, required=True, help="what was run")
    add("--dtype", choices=ALLOWED, default="float32", help="what the runtime computes in (float32)")
    add = commands.add_parser("ours", help="compute the logits by this runtime").add_argument
    add("folder", type=Path, metavar="FOLDER", help="what `write` made")
    add("--run", choices=("prompts", "decode"), required=True, help="what to run")
    add("--dtype", choices=ALLOWED, default="float32", help="what to compute in (float32)")
    add("--out", type=_npy, required=True, metavar="LOGITS.npy", help="where to write them")
    commands.add_parser("record", help="compute the expected logits again, which takes a quarter of an hour")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parse = parser()
    options = parse.parse_args(arguments)
    try:
        if options.command == "write":
            write(options.folder)
        elif options.command == "ours":
            from internlm3 import InternLM3ForCausalLM

            from .generated import generated

            model = InternLM3ForCausalLM.from_pretrained(options.folder, dtype=options.dtype)
            np.save(options.out, generated(model, options.run).numpy())
        elif options.command == "record":
            from .record import record

            record()
        else:
            report = check(read(options.logits, options.dtype), options.run, options.dtype)
            print(*report.lines(), sep="\n")
            return 1 if report.wrong else 0
    except (ValueError, OSError) as error:
        parse.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
