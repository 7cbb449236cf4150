"""What goes wrong on the command line is one sentence, and an exit code says whose fault it is."""

import errno
from pathlib import Path

import pytest

from ringfence.cli import entry
from ringfence.errors import RingfenceError
from ringfence.model.default import make_cache


class Interrupted(RingfenceError):
    pass


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RingfenceError("rows.jsonl:3: not JSON"), 2, "error: rows.jsonl:3: not JSON"),
        (Interrupted("the same command resumes"), 130, "the same command resumes"),
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError(errno.EACCES, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left"),
        (MemoryError(), 2, "out of memory"),
    ],
)
def test_each_error_has_its_code(error, code, words, monkeypatch, capfd):
    def fail(**_):
        raise error

    monkeypatch.setattr(entry, "app", fail)
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == code
    said = capfd.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_an_error_of_our_own_is_kept_in_a_log_without_keys(monkeypatch, capfd):
    monkeypatch.setenv("MY_API_KEY", "verysecretvalue")

    def fail(**_):
        raise KeyError("no verysecretvalue")

    monkeypatch.setattr(entry, "app", fail)
    with pytest.raises(SystemExit) as caught:
        entry.main()
    said = capfd.readouterr().err
    assert caught.value.code == 1
    assert "an error of ringfence itself: KeyError" in said
    assert "Traceback" not in said
    log = Path(said.rsplit("traceback is in ", 1)[1].strip())
    text = log.read_text()
    log.unlink()
    assert "Traceback" in text
    assert "verysecretvalue" not in text + said


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RingfenceError, match="RINGFENCE_CACHE"):
            make_cache(place)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(RingfenceError, match=r"read-only.*RINGFENCE_CACHE"):
        make_cache(tmp_path)
