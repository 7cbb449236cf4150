"""Disks that are full, names that cannot be: one sentence, before anything is read."""

import errno
import os
from pathlib import Path

import pytest

from ringfence.errors import RingfenceError
from ringfence.runfolder import check_folder, check_new, told_if_full, write_whole


def test_outputs_that_cannot_be_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name, words in [
        ("file", "a file, where a folder"),
        ("file/below", "a file, where a folder"),
        ("link", "does not exist"),
        ("x" * 300, "File name too long"),
        ("x" * 300 + "/y", "File name too long"),
        ("a\0b", "NUL"),
    ]:
        with pytest.raises(RingfenceError, match=words) as caught:
            check_folder(tmp_path / name, "run")
        assert "\n" not in str(caught.value)
        assert "\0" not in str(caught.value)
    for name, words in [("x" * 300, "File name too long"), ("a\0b", "NUL")]:
        with pytest.raises(RingfenceError, match=words):
            check_new(tmp_path / name)


def test_a_read_only_place_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    for place in (tmp_path, tmp_path / "new" / "run"):
        with pytest.raises(RingfenceError, match="read-only"):
            check_folder(place, "run")


def full(*_args, **_more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    write_whole(file, "before")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RingfenceError, match="cannot be written: No space left"):
        write_whole(file, "after")
    monkeypatch.undo()
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["results.json"]


def test_what_libraries_say_of_a_full_disk_is_one_sentence(tmp_path):
    for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("I/O error: No space left on device")):
        with pytest.raises(RingfenceError, match=f"{tmp_path}: cannot be written"), told_if_full(tmp_path):
            raise error
    with pytest.raises(KeyError), told_if_full(tmp_path):
        raise KeyError("ours")
