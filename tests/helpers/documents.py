"""Code blocks of the documentation, and copies of the package to which they are added."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ringfence

ROOT = Path(__file__).parents[2]


def block_with(document: str, text: str) -> str:
    """The first Python block of a document that holds a text."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / document).read_text("utf-8"), flags=re.DOTALL
    )
    return next(block for block in blocks if text in block)


def draw_nothing(_: Any, file: Any, **__: Any) -> None:
    """For `Figure.savefig`: drawing takes longer than all else of a report."""
    file.write(b"<svg/>")


def copy_of_the_package(folder: Path) -> Path:
    package = folder / "ringfence"
    shutil.copytree(
        Path(ringfence.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    return package


def change_once(file: Path, old: str, new: str) -> None:
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))


def run_copy(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the copy of the package that is in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment
    )
