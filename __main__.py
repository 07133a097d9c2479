"""`python -m internlm3` is the command `internlm3`."""

import sys

from .runtime.cli.main import main

sys.exit(main())
