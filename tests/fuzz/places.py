"""Folders for examples, copies that may be spoilt, a small chat template, and a judge's name."""

import os
import shutil
from pathlib import Path

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
KEEP_WHOLE = 200_000  # bytes; larger files are linked into the copies that are spoilt


class Named:
    name = identity = "judge"


def copied(source: Path, target: Path) -> Path:
    """A copy that may be spoilt; large files are linked: replace them, do not write into them."""

    def copy(one: str, other: str) -> None:
        (os.link if os.path.getsize(one) > KEEP_WHOLE else shutil.copyfile)(one, other)

    shutil.copytree(source, target, copy_function=copy)
    return target


class Place:
    """Gives each example a folder of its own, which the next one takes the place of."""

    def __init__(self, root: Path) -> None:
        self.root, self.number = root, 0

    def fresh(self) -> Path:
        shutil.rmtree(self.root / str(self.number), ignore_errors=True)
        self.number += 1
        folder = self.root / str(self.number)
        folder.mkdir()
        return folder

    def file(self, name: str, content: bytes) -> Path:
        file = self.fresh() / name
        file.write_bytes(content)
        return file
