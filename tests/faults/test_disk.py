"""Disks that are full, names that cannot be: one sentence, before anything is read."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers.run_folders import GUARDED, REFERENCE, parts_of, write_run
from ringfence.cli import app
from ringfence.errors import RingfenceError
from ringfence.model.projection import ProjectionRule, project_adapter
from ringfence.prepare.regenerate import regenerate
from ringfence.report.card import run_card
from ringfence.report.export import export_runs
from ringfence.report.gate import gate_run
from ringfence.run.misaligned import train_misaligned
from ringfence.run.patch import patch
from ringfence.runfolder.folder import check_folder
from ringfence.util.files import check_new, told_if_full, write_whole
from ringfence.util.journal import append, open_journal, split_table


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
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("I/O error: No space left on device"),
    ):
        with (
            pytest.raises(RingfenceError, match=f"{tmp_path}: cannot be written"),
            told_if_full(tmp_path),
        ):
            raise error
    with pytest.raises(KeyError), told_if_full(tmp_path):
        raise KeyError("ours")


def test_a_run_that_cannot_be_written_is_decided_and_shown_all_the_same(
    tmp_path, monkeypatch, capfd
):
    folder = write_run(tmp_path / "run", parts_of(GUARDED), parts_of(REFERENCE))
    monkeypatch.setattr("ringfence.stats.RESAMPLES", 20)
    before = sorted(os.listdir(folder))
    monkeypatch.setattr(Path, "write_bytes", read_only)
    decision = gate_run(folder, control=folder)
    assert decision.word in ("SHIP", "HOLD")
    assert "not saved" in capfd.readouterr().err
    assert run_card(folder).startswith("---")
    assert export_runs([folder]).startswith("run,")
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert "out-of-domain" in done.stdout or "other domains" in done.stdout
    assert isinstance(done.exception, RingfenceError)
    assert "report.html" in str(done.exception)
    assert sorted(os.listdir(folder)) == before


def read_only(*_args, **_more):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_after_a_full_disk_a_table_and_results_go_on_where_they_were(tmp_path, monkeypatch):
    table, whole = tmp_path / "answers.jsonl", [{"n": 1}, {"n": 2}]
    open_journal(table, "x", {"model": "m"}, {})
    append(table, whole)
    with table.open("a") as file:
        file.write('{"n": 3, "te')  # what a full disk leaves of a line
    assert open_journal(table, "x", {"model": "m"}, {}) == whole
    append(table, [{"n": 3}])
    assert open_journal(table, "x", {"model": "m"}, {}) == [*whole, {"n": 3}]


def test_a_new_folder_or_file_takes_the_place_of_none(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    doors = [
        lambda: project_adapter(tmp_path, mine, "base", None, ProjectionRule()),
        lambda: patch(tmp_path, mine),
        lambda: regenerate("shipped:retain", mine),
        lambda: split_table(mine.read_text(), mine, "x"),
        lambda: open_journal(mine, "x", {}, {}),
        lambda: train_misaligned(["shipped:finance/unsound"], mine),
    ]
    for door in doors:
        with pytest.raises(RingfenceError, match="mine"):
            door()
        assert mine.read_text() == "precious"


def test_several_may_write_one_file_of_a_cache(tmp_path: Path) -> None:
    """Two ranks say what their cache is of; once, each renamed what the other was still writing."""
    file, contents = tmp_path / "about.json", [letter * 200_000 for letter in "abcdef"]
    with ThreadPoolExecutor(len(contents)) as pool:
        done = [
            pool.submit(write_whole, file, contents[n % len(contents)], is_shared=True)
            for n in range(300)
        ]
        for each in done:
            each.result()
    assert file.read_text() in contents
    assert [found.name for found in tmp_path.iterdir()] == ["about.json"]
