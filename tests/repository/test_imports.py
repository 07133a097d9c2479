"""Who may import whom. Every import of the tree is read, also those for type checkers and those inside functions."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = {"kernels": set(), "runtime": {"kernels"}, "tests": {"kernels", "runtime"}, "bench": {"kernels", "runtime"}}
# The folders of the runtime, each with those that it may import from.
ROOMS = {
    "common": set(),
    "sampling": {"common"},
    "model": {"common"},
    "checkpoint": {"common", "model", "sampling"},
    "chat_template": {"common"},
    "tokenization": {"common", "chat_template"},
    "structured": {"common", "sampling", "tokenization"},
    "tools": {"common", "sampling", "chat_template", "tokenization"},
    "engine": {"common", "sampling", "model"},
    "compat": {"common", "sampling", "model", "checkpoint", "tokenization", "engine"},
    "api": {
        "common", "sampling", "model", "checkpoint", "chat_template", "tokenization", "structured", "tools", "engine",
    },
    "server": {"common", "sampling", "tokenization", "tools", "engine", "api"},
    "replicas": {"api", "server"},
    "batch": {"common", "api", "server", "replicas"},
    "cli": {"common", "sampling", "model", "checkpoint", "api", "server", "batch", "replicas"},
}  # fmt: skip
# The only files of the runtime that import kernels: the model runs them, hooks penalise and filter on the host, the
# state needs the limit of a small top-k, and the warm-up the list of launches to compile. The rest is about quantised
# weights, whose layout the kernels define.
MEETS_KERNELS = {
    "engine/draft_rows", "engine/hooks", "engine/state", "engine/warm_up", "model/model", "model/quantised_linear",
    "checkpoint/weight_files", "checkpoint/quantise/rounded_files", "checkpoint/gguf/weights",
    "checkpoint/quantised/integers", "checkpoint/quantised/quantised_files",
}  # fmt: skip


def modules(path: Path) -> set[tuple[str, ...]]:
    """The full names of the modules that a file imports."""
    package = ("internlm3", *path.relative_to(ROOT).with_suffix("").parts[:-1])
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # The x of `from . import x` may be a module or something in one.
            inside = {(*base, alias.name) for alias in node.names}
            found |= {name for name in inside if is_module(name)} or {base}
    return found


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, by names below its root: "kernels.cpu"; "" for the root."""
    return {".".join(name[1:]) for name in modules(path) if name[0] == "internlm3"}


def is_module(name: tuple[str, ...]) -> bool:
    path = ROOT.joinpath(*name[1:])
    return name[0] == "internlm3" and len(name) > 1 and (path.is_dir() or path.with_suffix(".py").is_file())


def files(floor: str) -> list[Path]:
    return sorted(path for path in (ROOT / floor).rglob("*.py") if path.stem != "__init__")


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parts)


def test_no_room_imports_upwards():
    for room, below in ROOMS.items():
        for path in files(f"runtime/{room}"):
            reached = {name.split(".")[1] for name in imports(path) if name.startswith("runtime.")}
            assert reached <= below | {room, "version"}, f"{path.relative_to(ROOT)} imports {sorted(reached - below)}"
    assert {path.name for path in (ROOT / "runtime").iterdir() if path.is_dir() and path.name[0] != "_"} == ROOMS.keys()


def test_no_floor_imports_upwards():
    """kernels imports nothing else, runtime only kernels. Only tests and bench import tests, bench or the root."""
    for floor, below in FLOORS.items():
        for path in sorted((ROOT / floor).rglob("*.py")):
            reached = {name.partition(".")[0] for name in imports(path)}
            allowed = below | {floor} | ({""} if floor in ("tests", "bench") else set())
            assert reached <= allowed, f"{path.relative_to(ROOT)} imports {sorted(reached - allowed)}"


def test_only_these_rooms_meet_the_kernels():
    reach = [path for path in files("runtime") if any(name.startswith("kernels") for name in imports(path))]
    meets = {path.relative_to(ROOT / "runtime").with_suffix("").as_posix() for path in reach}
    assert meets == MEETS_KERNELS


def test_no_circle():
    """No file imports one that imports it, directly or through others."""
    graph = {
        dotted(path.with_suffix("")): {name for name in imports(path) if name.startswith(f"{floor}.")}
        for floor in ("kernels", "runtime")
        for path in files(floor)
    }
    assert all(names <= graph.keys() for names in graph.values())
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for below in graph[name]:
                visit(below, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_transformers_is_an_oracle_and_no_part():
    for path in (*files("kernels"), *files("runtime")):
        assert all(name[0] != "transformers" for name in modules(path)), path
