"""A solution: an author's source files, and which function of them computes a definition's outputs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import user_kernels
from ..cases import Arguments
from ..integrity import Watch
from .definition import Definition, results_of, takes
from .fields import parse, read_text

LANGUAGES = ("python", "pytorch", "triton")


class CompileError(Exception):
    """Why an author's files can't be loaded."""


class Solution(NamedTuple):
    file: str
    name: str
    sources: dict[str, str]  # contents by relative path
    entry: str  # a path of sources
    function: str
    into_outputs: bool  # takes the outputs as last arguments and writes them, or returns them


def read(path: str, definition: Definition) -> Solution:
    """Reads a solution; runs nothing of it. Raises ValueError, which names the file and the field."""
    whole = parse(read_text(path), path)
    of = whole.get("definition", str)
    if of != definition.name:
        raise whole.error("definition", f"is {of!r}, and {definition.file} defines {definition.name!r}")
    spec = whole.inner("spec")
    field = "languages" if "languages" in spec.content else "language"
    languages = spec.get("languages", list) if field == "languages" else [spec.get("language", str)]
    for language in languages:
        if language not in LANGUAGES:
            raise spec.error(field, f"{language} can't run here: {', '.join(LANGUAGES)} can")
    sources: dict[str, str] = {}
    for i, source in enumerate(whole.get("sources", list)):
        place = f"sources[{i}]"
        if not isinstance(source, dict):
            raise whole.error(place, "must be an object")
        file = whole._replace(place=place, content=source)
        name = file.get("path", str)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or name in sources:
            raise file.error("path", f"{name!r} must be a relative path without .., and no other source's")
        sources[name] = file.get("content", str)
    entry, _, function = spec.get("entry_point", str).partition("::")
    if entry not in sources or not entry.endswith(".py") or not function.isidentifier():
        raise spec.error("entry_point", f"must be FILE.py::FUNCTION with a file of sources: {', '.join(sources)}")
    style = spec.find("destination_passing_style", bool)
    into_outputs = style is None or style
    if into_outputs and any(x.shape is None for x in definition.outputs.values()):
        raise spec.error("destination_passing_style", f"{definition.file} has an output that is a number: return it")
    return Solution(path, whole.get("name", str), sources, entry, function, into_outputs)


class Loaded(NamedTuple):
    """A solution whose files have run. watching: what looks at a call of it (see `Watch.calls`)."""

    solution: Solution
    definition: Definition
    function: Callable[..., Any]
    watching: Callable[[bool], AbstractContextManager[list[str]]]

    def new_outputs(self, axes: dict[str, int], device: torch.device) -> list[Tensor]:
        """Outputs to be written; none if the solution returns its own."""
        specs = self.definition.outputs.values() if self.solution.into_outputs else ()
        return [torch.empty(spec.sizes(axes), dtype=spec.dtype, device=device) for spec in specs]

    def call(self, given: Arguments, outputs: list[Tensor], device: torch.device) -> tuple[Any, ...]:
        """The outputs, written or returned."""
        returned = self.function(*given.values(), *outputs)
        return tuple(outputs) if outputs else results_of(returned, self.definition, device)


@contextmanager
def loaded(solution: Solution, definition: Definition, watch: Watch) -> Iterator[Loaded]:
    """Runs the files, which are in a folder for as long as the block lasts. Raises CompileError or ValueError.

    What the files change of what checks and times them is put back, and every call reports it.
    """
    with TemporaryDirectory(prefix="solution-") as folder:
        paths = [Path(folder, name) for name in solution.sources]
        for path, content in zip(paths, solution.sources.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, "utf-8")
        entry = Path(folder, solution.entry)
        before, modules = [*sys.path], {*sys.modules}
        sys.path[:0] = [folder, str(entry.parent)]
        try:
            function = getattr(_run(entry), solution.function, None)
            place = f"{solution.file}: spec.entry_point"
            if not callable(function):
                raise ValueError(f"{place}: {solution.entry} has no function {solution.function!r}")
            names = [*definition.inputs, *(definition.outputs if solution.into_outputs else ())]
            if not takes(function, len(names)):
                raise ValueError(f"{place}: {solution.function} does not take {', '.join(names)} by position")
            watching = user_kernels.watching(watch, [str(path) for path in paths])
            yield Loaded(solution, definition, function, watching)
        finally:
            sys.path[:] = before
            for name in {*sys.modules} - modules:
                if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                    del sys.modules[name]


def _run(path: Path) -> Any:
    try:
        return user_kernels.run_file(path, f"solution_{path.stem}")
    except Exception as error:
        raise CompileError(f"{path.name}: {type(error).__name__}: {error}") from None
