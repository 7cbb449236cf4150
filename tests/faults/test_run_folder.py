"""Folders and files of other people are left alone; a folder of ours has one writer."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ringfence.errors import RecipeError
from ringfence.runfolder.folder import (
    MARKER,
    begin_checkpoint,
    check_checkpoints,
    check_folder,
    claim,
    drop_checkpoints,
    end_checkpoint,
    hold,
    kind_of,
    last_checkpoint,
)
from ringfence.util.files import check_new


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize(
    "name", ["checkpoints/precious.bin", "adapter/notes.txt", "recipe.yaml", ".hidden"]
)
@pytest.mark.parametrize("kind", ["run", "evaluation", "diagnosis", "reference"])
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(tmp_path, name, kind):
    folder = tmp_path / "mine"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("precious")
    before = contents(folder)
    with (
        pytest.raises(RecipeError, match=f"{folder}: .*not written by ringfence"),
        hold(folder, kind),
    ):
        pass
    assert contents(folder) == before


def test_training_into_a_folder_of_somebody_else_is_refused_before_the_rows_are_read(tmp_path):
    from ringfence.run.config import parse_recipe
    from ringfence.run.pipeline import run_recipe
    from ringfence.run.prepare import prepare
    from ringfence.run.train import train_run

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "precious.bin").write_text("precious")
    recipe = parse_recipe({"output": str(tmp_path), "data": {"train": "no-such-file.jsonl"}})
    for start in (prepare, train_run, run_recipe):
        with pytest.raises(RecipeError, match="not written by ringfence"):
            start(recipe)
    assert contents(tmp_path) == {"checkpoints/precious.bin": b"precious"}


def test_a_claimed_folder_is_ours_and_of_one_kind(tmp_path):
    claim(tmp_path / "a" / "run", "run")
    assert kind_of(tmp_path / "a" / "run") == "run"
    claim(tmp_path / "a" / "run", "run")
    claim(tmp_path / "a" / "run", "diagnosis")
    assert kind_of(tmp_path / "a" / "run") == "run"
    with pytest.raises(RecipeError, match="run, not evaluation"):
        check_folder(tmp_path / "a" / "run", "evaluation")


def test_an_empty_folder_is_taken_and_a_damaged_marker_is_told(tmp_path):
    claim(tmp_path, "run")
    for text in (
        "",
        "[]",
        "{}",
        '{"ringfence": 1, "kind": "run"}',
        '{"ringfence": "1", "kind": []}',
        "{",
    ):
        (tmp_path / MARKER).write_text(text)
        with pytest.raises(Exception, match=MARKER) as caught:
            claim(tmp_path, "run")
        assert "write" in str(caught.value)


def test_only_checkpoints_of_ours_are_read_and_deleted(tmp_path):
    for step in (2, 4, 9):
        begin_checkpoint(tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_text("x")
        if step != 9:
            end_checkpoint(tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-4", 4)
    assert not (tmp_path / "checkpoint-2").exists()
    check_checkpoints(tmp_path)
    foreign = tmp_path / "checkpoint-77"
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text("{}")
    with pytest.raises(RecipeError, match="checkpoint-77 was not written by ringfence"):
        check_checkpoints(tmp_path)
    assert last_checkpoint(tmp_path)[1] == 4
    drop_checkpoints(tmp_path)
    assert contents(tmp_path) == {"checkpoint-77/trainer_state.json": b"{}"}


HOLDER = """
import sys, time
from pathlib import Path
from ringfence.runfolder.folder import hold
with hold(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_writes_and_a_killed_one_holds_nothing(tmp_path, holder):
    with (
        pytest.raises(
            RecipeError, match=f"process {holder.pid} on .* since .*wait for it"
        ) as caught,
        hold(tmp_path, "run"),
    ):
        pass
    assert str(tmp_path) in str(caught.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with hold(tmp_path, "run"), hold(tmp_path, "run"):
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()


def test_who_waits_goes_on_when_the_other_has_ended(tmp_path, holder):
    waiting = textwrap.dedent("""
        import sys
        from pathlib import Path
        from ringfence.runfolder.folder import hold
        with hold(Path(sys.argv[1]), "run", wait=True):
            print("mine", flush=True)
    """)
    second = subprocess.Popen(
        [sys.executable, "-c", waiting, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert f"waiting for process {holder.pid}" in second.stderr.readline()
    time.sleep(0.2)
    assert second.poll() is None
    holder.kill()
    assert second.communicate(timeout=20)[0] == "mine\n"


def test_another_rank_takes_no_lock(tmp_path, holder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with hold(tmp_path, "run"):
        pass


def test_a_file_that_exists_is_not_overwritten(tmp_path):
    (tmp_path / "mine.svg").write_text("precious")
    (tmp_path / "link.svg").symlink_to("nowhere")
    check_new(tmp_path / "new.svg")
    for name, words in [
        ("mine.svg", "exists already"),
        ("link.svg", "exists already"),
        ("no/such.svg", "no folder"),
    ]:
        with pytest.raises(RecipeError, match=words):
            check_new(tmp_path / name)
    with pytest.raises(RecipeError, match="a folder"):
        check_new(tmp_path)
