"""The parts of `python -m bench.gpu`: each module's `rows` yields what it finds.

Its arguments are `small`, of a dry run, and `name`, of a model in `bench.models`, if the part is of a model's shapes.
"""
