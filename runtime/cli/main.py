"""The command line, `internlm3 COMMAND`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .parser import command_parser
from .terminal import tolerate_other_encodings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status: 0, 1 after an error, 2 for bad usage, 130 after Ctrl-C."""
    _open_closed_streams()
    args = command_parser().parse_args(argv)
    # How long OpenMP threads spin before they sleep. With less they sleep between two products of a decode step, which
    # makes it 1.3 times as long on an idle EPYC of two cores. With GNU OpenMP's default of 300000 they keep the cores
    # of a busy machine from other work, which makes it 2.6 times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    tolerate_other_encodings()
    try:
        if sys.stdout is None:
            raise OSError("standard output is closed: an answer has nowhere to go")
        return args.run(args) or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe (`internlm3 ... | head`). Keep Python from reporting it again at exit.
        sys.stdout = None
        return 1
    except (ValueError, TypeError, OSError, MemoryError, ImportError) as error:
        print(f"internlm3: error: {error}", file=sys.stderr)
        return 1


def _open_closed_streams() -> None:
    """Opens the null device in place of closed standard input (`<&-`) and error (`2>&-`), which are None.

    Each gets its own number again, 0 or 2. Else the next file that is opened would get it, and error messages of
    libraries in C.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 (for as long as the process runs)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main())
