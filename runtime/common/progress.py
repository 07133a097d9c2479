"""Progress bars, which appear on standard error if that is a terminal."""

import sys


def hides_bar(wanted: bool) -> bool | None:
    """tqdm's argument `disable`. None lets tqdm find out whether standard error is a terminal.

    tqdm fails if standard error is closed (`2>&-`, a service, pythonw): then a bar is always hidden.
    """
    return None if wanted and sys.stderr is not None else True
