"""The parts of `python -m bench.gpu`: each module's `rows(small)` yields what it finds."""
