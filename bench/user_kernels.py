"""A user's kernels: a Python file with functions named like ops, which take and return what the ops do.

Linear ops get quantised weights too if the file imports QuantisedWeight, by which it says that it knows them.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from internlm3 import kernels
from internlm3.kernels import reference
from internlm3.kernels.quantised import QuantisedWeight

from . import ROOT, interpreter
from .integrity import Watch
from .options import unknown
from .timing import Call

OWN = ("internlm3", "bench")  # the packages of this checkout


class Op(NamedTuple):
    """A user's function in the place of an op, and called as that is.

    by_name: it names its arguments as the op does. Others, such as an autograd.Function's apply, get them by position.
    """

    function: Callable[..., Any]
    meant: inspect.Signature  # of the op
    by_name: bool

    def bound(self, *args: Any, **kwargs: Any) -> Call:
        """A call with these arguments of the op."""
        given = self.meant.bind(*args, **kwargs)
        if self.by_name:
            return functools.partial(self.function, **given.arguments)
        return functools.partial(self.function, *given.args, **given.kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.bound(*args, **kwargs)()


class UserFile(NamedTuple):
    """A file that has run.

    quantised: whether its ops take quantised weights.
    files: the paths of its code: the file, and the modules beside it that it imports.
    """

    ops: dict[str, Op]
    quantised: bool
    files: list[str]


def watching(watch: Watch, paths: Collection[str]) -> Callable[[bool], AbstractContextManager[list[str]]]:
    """To be called after files were loaded: puts back what they changed, and returns what looks at a call of them."""
    changed = watch.mend()

    @contextlib.contextmanager
    def watched(first: bool) -> Iterator[list[str]]:
        with watch.calls(paths, first) as found:
            yield found
        found[:0] = [changed] * bool(changed)

    return watched


class NotPython(Exception):
    """A file whose name does not end in .py."""


def check_ops(path: str, has: Collection[str], wanted: Collection[str]) -> None:
    """Raises ValueError if a file that has some ops has none of those that are wanted: nothing of it would run."""
    if wanted and not {*has} & {*wanted}:
        raise ValueError(f"{path} has no {' or '.join(wanted)} to test: it has {', '.join(has)}")


def run_file(path: str | Path, name: str) -> ModuleType:
    """Runs a file as a module of this name. Raises NotPython, or whatever the file raises."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise NotPython(path)
    interpreter.mend_if_chosen()
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton looks there for a kernel's source
    spec.loader.exec_module(module)
    interpreter.mend_if_chosen()  # a file may choose it by itself
    return module


def load(path: str) -> UserFile:
    """Runs the file, which may import modules beside it, and packages that it is in by relative imports.

    Raises ValueError if it can't be run, or has no op.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"{path} does not exist: name a Python file with a function named like an op")
    before = {*sys.modules}
    try:
        module = _run(file)
    except NotPython:
        raise ValueError(f"{path} is not a Python file: its name must end in .py") from None
    except (Exception, SystemExit) as error:
        relative = isinstance(error, ImportError) and "relative import" in str(error)
        hint = ": a file without __init__.py beside it is in no package" * relative
        raise ValueError(f"{path} raises {type(error).__name__} when it is run: {error}{hint}") from None
    quantised = any(x is QuantisedWeight for x in vars(module).values())
    return UserFile(_ops(path, module), quantised, [str(file), *_beside(file.parent, {*sys.modules} - before)])


def _run(file: Path) -> ModuleType:
    """Runs it as Python runs a script; if it is in a package, as a module of that."""
    folder, names = file.parent, [file.stem]
    # First on the path, as a script's folder is. That of this checkout comes last: see bench/__init__.py.
    sys.path.insert(len(sys.path) if folder == ROOT else 0, str(folder))
    while (folder / "__init__.py").is_file() and folder != ROOT:
        names.insert(0, folder.name)
        folder = folder.parent
    if len(names) == 1:
        return run_file(file, f"user_{file.stem}")
    sys.path.insert(1, str(folder))
    importlib.import_module(".".join(names[:-1]))
    return run_file(file, ".".join(names))


def _beside(folder: Path, names: Collection[str]) -> list[str]:
    """The files of those modules that are in this folder or below it, and neither installed nor of this checkout."""
    files = (getattr(sys.modules[name], "__file__", None) for name in names if name.partition(".")[0] not in OWN)
    paths = (Path(file) for file in files if file)
    return [str(path) for path in paths if folder in path.parents and "site-packages" not in path.parts]


def _ops(path: str, module: ModuleType) -> dict[str, Op]:
    """The ops of a file by name. Raises ValueError if it has none, or something else of such a name."""
    ops, ours = {}, []
    for name in kernels.__all__:
        x = vars(module).get(name)
        if x is None or isinstance(x, ModuleType):
            continue
        if isinstance(x, type) or not callable(x):
            what = "a class: a function is needed, such as the apply of an autograd.Function"
            what = what if isinstance(x, type) else f"of type {type(x).__name__}: a function is needed"
            raise ValueError(f"{path}: {name} is {what}")
        if str(getattr(x, "__module__", "")).partition(".")[0] in OWN:
            ours.append(name)
        else:
            ops[name] = _taking(name, x, path)
    if not ops:
        raise ValueError(f"{path} has no function named like an op{_found(module, ours)}")
    return ops


def _found(module: ModuleType, ours: Sequence[str]) -> str:
    """What a file without an op has."""
    if ours:
        return f": its {ours[0]} is this project's own, imported"
    functions = [
        name
        for name, x in vars(module).items()
        if callable(x) and not name.startswith("_") and getattr(x, "__module__", "") == module.__name__
    ]
    return f"; it has {', '.join(functions)}; {unknown('op', functions[0], kernels.__all__)}" if functions else ""


def _taking(name: str, function: Callable[..., Any], path: str) -> Op:
    """The function as the op of this name. Raises ValueError if it can't take the arguments that the op must have."""
    meant = inspect.signature(getattr(reference, name))
    required = [key for key, x in meant.parameters.items() if x.default is x.empty]
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # native code that does not say
        return Op(function, meant, False)
    if all(x.kind is not x.VAR_POSITIONAL for x in signature.parameters.values()):
        with contextlib.suppress(TypeError):
            signature.bind(**dict.fromkeys(required))
            return Op(function, meant, True)
    with contextlib.suppress(TypeError):
        signature.bind(*required)
        return Op(function, meant, False)
    wanted = ", ".join(meant.parameters)
    raise ValueError(f"{path}: {name}{signature} does not take the arguments of the op: {name}({wanted})")
