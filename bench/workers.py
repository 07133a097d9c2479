"""Measure in a process of its own, of this checkout or another."""

import json
import os
import subprocess
import sys
from typing import Any


def ask(script: str, *arguments: str, checkout: str | None = None) -> Any:
    """What the script prints last, which is JSON. It imports `checkout`, a folder named internlm3, where one is given.

    Ends this process with its errors where it fails.
    """
    environment = dict(os.environ)
    if checkout:
        environment["PYTHONPATH"] = os.path.dirname(os.path.abspath(checkout))
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{checkout or script} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
