"""Identifies a model or adapter by a digest of all that it is made of."""

import hashlib
import time
from contextlib import suppress
from pathlib import Path

from ..errors import RingfenceError
from ..util.files import write_whole
from ..util.journal import digest
from .default import cache_folder, resolve
from .files import adapter_base, load_config

_LARGE, _SETTLED = 2**24, 2.0  # bytes; seconds


def fingerprint(source: str) -> str:
    """What identifies a model or adapter: a digest of the files in its folder (weights, configs,
    tokenizer, chat template), and of its base if it is an adapter; or the revision of a hub id.

    Raises:
        ModelError: there is no such model.
    """
    folder = Path(resolve(source))
    if not folder.is_dir():
        return str(load_config(source)._commit_hash)
    total = hashlib.sha256()
    for file in _content(folder):
        total.update(file.relative_to(folder).as_posix().encode() + _digest_of(file))
    base = adapter_base(folder)
    if base:
        total.update(fingerprint(base).encode())
    return total.hexdigest()[:16]


def _content(folder: Path) -> list[Path]:
    """The files that a model is made of, including additional chat templates."""
    files = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return sorted(
        f for f in files if f.is_file() and f.suffix != ".md" and not f.name.startswith(".")
    )


def _digest_of(file: Path) -> bytes:
    """SHA-256 of a file. A large file's is kept in the cache folder, keyed by whatever shows that
    the file has not been written since; its change time, unlike its modification time, cannot be
    set back."""
    about = file.stat()
    if about.st_size < _LARGE:
        return _sha256(file)
    known = [str(file.resolve()), about.st_dev, about.st_ino, about.st_size]
    known += [about.st_mtime_ns, about.st_ctime_ns]
    kept = cache_folder() / "fingerprints" / digest(known)
    with suppress(OSError, ValueError):
        found = bytes.fromhex(kept.read_text("utf-8"))
        if len(found) == hashlib.sha256().digest_size:
            return found
    found = _sha256(file)
    # A later write within one tick of the clock would not show.
    if time.time() - about.st_ctime > _SETTLED:
        with suppress(RingfenceError):  # a cache that cannot be written only costs time
            write_whole(kept, found.hex(), is_shared=True)
    return found


def _sha256(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
