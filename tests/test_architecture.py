"""The package itself: imports go one way, files are short, what needs no torch does not load it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "ringfence"
FLOORS, LINES = 12, 450
HEAVY = {"torch", "transformers", "peft", "datasets", "matplotlib", "scipy.stats"}


@cache
def modules() -> dict[str, Path]:
    """By dotted name below `ringfence`; the package itself is ``."""
    return {_name(file): file for file in SOURCE.rglob("*.py")}


def _name(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(name: str, also_late: bool = False) -> set[str]:
    """Modules of ringfence that a module imports when loaded; `also_late`: or when it runs."""
    file = modules()[name]
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in statements(ast.parse(file.read_text()), also_late):
        if not isinstance(node, ast.ImportFrom):
            continue
        told = [part for part in (node.module or "").split(".") if part]
        if not node.level and told[0] != "ringfence":
            continue
        base = [*package[: len(package) - node.level + 1], *told] if node.level else told[1:]
        for each in node.names:
            inner = ".".join([*base, each.name])
            found.add(inner if inner in modules() else ".".join(base))
    return found - {name}


def statements(tree: ast.AST, also_late: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        is_late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not is_for_types and (also_late or not is_late):
            yield node
            yield from statements(node, also_late)


_FLOORS: dict[str, int] = {}


def floor_of(name: str, above: tuple[str, ...] = ()) -> int:
    """0 for a module that imports no other, else one more than the highest that it imports."""
    if name in above:
        raise AssertionError(
            f"imports go in a circle: {' -> '.join([*above[above.index(name) :], name])}"
        )
    if name not in _FLOORS:
        _FLOORS[name] = max(
            (floor_of(each, (*above, name)) + 1 for each in imports(name)), default=0
        )
    return _FLOORS[name]


def test_imports_go_one_way_over_few_floors() -> None:
    floors = {name: floor_of(name) for name in modules()}
    assert len(floors) > 100
    assert max(floors.values()) > 5  # the graph is really read
    highest = {name: floor for name, floor in floors.items() if floor > FLOORS}
    assert not highest


ROOMS = [
    {"", "errors", "stats", "processes", "util", "shipped"},
    {"runfolder"},
    {"text"},
    {"model"},
    {"prepare", "defenses"},
    {"training"},
    {"evaluate", "diagnose"},
    {"report"},
    {"run"},
    {"cli", "__main__"},
]


def test_no_room_imports_from_above() -> None:
    level = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
    upwards = [
        f"{name} imports {other}"
        for name in modules()
        if name
        for other in imports(name, also_late=True)
        if level[other.split(".")[0]] > level[name.split(".")[0]]
    ]
    assert not upwards


def test_files_are_short() -> None:
    long = {
        name: size
        for name, file in modules().items()
        if (size := len(file.read_text().splitlines())) > LINES
    }
    assert not long


def test_no_private_name_is_imported() -> None:
    private = [
        f"{file.name}: {each.name}"
        for file in [*modules().values(), *TESTS.rglob("*.py")]
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom)
        if node.level or (node.module or "").split(".")[0] in ("ringfence", "helpers")
        for each in node.names
        if each.name.startswith("_")
    ]
    assert not private


def test_no_test_module_is_imported() -> None:
    """What tests share is in tests/helpers; conftest.py has fixtures and hooks alone."""
    imported = {
        f"{file.name}: {part}"
        for file in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(each.name for each in node.names)]
        for part in name.split(".")
        if part == "conftest" or part.startswith("test_")
    }
    assert not imported


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["gate"],
        ["report"],
        ["card"],
        ["export"],
        ["schema"],
        ["diagnose"],
        ["judge", "calibrate"],
    ],
)
def test_help_brings_no_heavy_library(command: list[str]) -> None:
    assert not heavy(f"run({[*command, '--help']!r})")


def test_the_schema_brings_no_heavy_library() -> None:
    assert not heavy("run(['schema'])")


def test_decisions_bring_no_heavy_library() -> None:
    assert not heavy("import ringfence.report.gate, ringfence.report.card, ringfence.report.export")


def heavy(code: str) -> set[str]:
    """Heavy libraries loaded after the code, in its own process; `run` is the command line."""
    script = f"""
import contextlib, io, sys

def run(arguments):
    from ringfence.cli import main
    sys.argv = ["ringfence", *arguments]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main()

{code}
print(sorted({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(ast.literal_eval(done.stdout.splitlines()[-1]))
