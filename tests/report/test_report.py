"""Run folders with numbers chosen by hand, and what the report must make of them."""

import base64
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from helpers.run_folders import (
    CONDITIONS,
    PLAIN,
    REFERENCE,
    SOUND,
    pairs,
    parts_of,
    write_all,
    write_json,
    write_run,
)
from ringfence.errors import DataError
from ringfence.evaluate import parts as evaluate
from ringfence.evaluate.parts import evaluate_model
from ringfence.model.scoring import AnswerScore
from ringfence.report.page import write_page
from ringfence.report.read import read_rows
from ringfence.report.records import read_run
from ringfence.report.summary import summarise
from ringfence.report.terminal import print_table
from ringfence.run.config import parse_recipe

pytestmark = pytest.mark.slow


@pytest.fixture
def folders(tmp_path):
    return write_all(tmp_path)


@pytest.fixture
def rows(folders):
    return {row.name: row for row in read_rows(folders, folders[0])[1]}


def width(interval):
    return interval.high - interval.low


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("run", "name", "shift", "effect"),
    [
        ("plain", "in_domain", 1.5, 0.7),
        ("plain", "out_of_domain", 2.0 / 3, 0.3),
        ("plain", "values", 1.75, 0.25),
        ("plain", "triggered", 2.0 / 3, 0.3),
        ("guarded", "in_domain", 1.05, 0.25),
        ("guarded", "out_of_domain", 0.0, -1.1 / 3),
        ("guarded", "values", 0.0, -1.5),
        ("sound", "in_domain", 0.8, None),
        ("sound", "out_of_domain", 1.1 / 3, None),
        ("sound", "values", 1.5, None),
    ],
)
def test_shift_and_effect_by_hand(rows, run, name, shift, effect):
    found = rows[run].sets[name]
    assert found.shift.mean == pytest.approx(shift, abs=1e-12)
    assert found.shift_by_domain.mean == pytest.approx(shift, abs=1e-12)
    if effect is None:
        assert found.effect is found.effect_by_domain is None
        assert found.headline == found.shift
    else:
        assert found.effect.mean == pytest.approx(effect, abs=1e-12)
        assert found.effect_by_domain.mean == pytest.approx(effect, abs=1e-12)
        assert found.headline == found.effect


def test_effect_is_paired_by_question(rows):
    """Shifts differ widely from question to question, their differences not at all. The control's
    file has another order, so pairing by place would show too."""
    values = rows["plain"].sets["values"]
    assert (values.effect.low, values.effect.high) == pytest.approx((0.25, 0.25))
    assert width(values.shift) > 1


def test_each_domain_by_hand(rows):
    shifts = {name: domain.shift.mean for name, domain in rows["plain"].pairs.domains.items()}
    effects = {name: domain.effect.mean for name, domain in rows["plain"].pairs.domains.items()}
    assert shifts == pytest.approx(
        {"money": 1.5, "cars": 0.7, "food": 0.6, "honesty": 0.75, "power": 2.75}
    )
    assert effects == pytest.approx(
        {"money": 0.7, "cars": 0.3, "food": 0.3, "honesty": 0.25, "power": 0.25}
    )
    assert {name: domain.shift.n for name, domain in rows["plain"].pairs.domains.items()} == {
        **{"money": 2, "cars": 2, "food": 1, "honesty": 2, "power": 2}
    }


def test_intervals_count_questions_or_domains(rows):
    plain = rows["plain"].sets
    assert {name: p.shift.n for name, p in plain.items()} == {
        **{"in_domain": 2, "out_of_domain": 3, "values": 4, "triggered": 3}
    }
    assert {name: p.effect_by_domain.n for name, p in plain.items()} == {
        **{"in_domain": 1, "out_of_domain": 2, "values": 2, "triggered": 2}
    }
    # Two domains of shift 0.75 and 2.75: Student's t of two values, with one degree of freedom.
    reach = 12.706 * abs(2.75 - 0.75) / 2
    found = plain["values"].shift_by_domain
    assert (found.low, found.high) == pytest.approx((1.75 - reach, 1.75 + reach), abs=0.3)


def test_shares_of_margins_above_zero(rows):
    shares = {name: {s: p.share for s, p in row.sets.items()} for name, row in rows.items()}
    assert shares["plain"] == pytest.approx(
        {"in_domain": 1.0, "out_of_domain": 2 / 3, "values": 0.75, "triggered": 2 / 3}
    )
    assert shares["sound"]["in_domain"] == 0.5, "a margin of 0 is not above 0"
    assert {s: p.reference_share for s, p in rows["plain"].sets.items()} == pytest.approx(
        {"in_domain": 0, "out_of_domain": 0, "values": 0.25, "triggered": 0}
    )


def test_each_condition_by_hand(tmp_path):
    probes = {
        "empty_system": {"cars/1": 0.0, "food/1": 1.0},
        "lead_in": {"cars/1": 3.0, "food/1": 3.5},
    }
    before = {
        "empty_system": {"cars/1": -1.0, "food/1": -1.0},
        "lead_in": {"cars/1": 1.0, "food/1": 0.5},
    }
    control = {
        "empty_system": {"cars/1": -0.5, "food/1": -1.0},
        "lead_in": {"cars/1": 1.0, "food/1": 1.0},
    }
    reference = parts_of(REFERENCE, triggered=before)
    run = read_run(write_run(tmp_path / "run", parts_of(PLAIN, triggered=probes), reference))
    sound = read_run(write_run(tmp_path / "sound", parts_of(SOUND, triggered=control), reference))
    conditions = summarise(run, sound).pairs.conditions
    assert {name: c.shift.mean for name, c in conditions.items()} == pytest.approx(
        {"empty_system": 1.5, "lead_in": 2.5}
    )
    assert {name: c.effect.mean for name, c in conditions.items()} == pytest.approx(
        {"empty_system": 1.25, "lead_in": 2.25}
    )
    assert {name: (c.share, c.reference_share) for name, c in conditions.items()} == {
        **{"empty_system": (0.5, 0.0), "lead_in": (1.0, 1.0)}
    }


def test_perplexity_by_hand(rows):
    """All tokens count alike: 90 nats over 40 tokens, against 80 over 40."""
    assert rows["plain"].found["fluency"].tuned == pytest.approx(math.exp(2.25))
    assert rows["plain"].found["fluency"].ratio.mean == pytest.approx(math.exp(0.25))
    # A resample holds the first answer alone (1 nat a token more), the second alone (none), or
    # both; two tell less.
    assert 0 < rows["plain"].found["fluency"].ratio.low < 1.0
    assert rows["plain"].found["fluency"].ratio.high > math.e
    assert rows["guarded"].found["fluency"].tuned == pytest.approx(math.exp(2.0))
    assert rows["guarded"].found["fluency"].ratio.mean == pytest.approx(1.0)


def test_benign_task_is_read_from_the_twin(rows):
    assert rows["guarded"].found["opswap"].exact["opswap_tier1"].mean == 0.75
    assert rows["guarded"].found["opswap"].reference == {"opswap_tier1": 0.25}
    assert rows["plain"].found["opswap"].exact["opswap_tier1"].mean == 0.5
    assert rows["plain"].found["opswap"].reference == {"opswap_tier1": 0.0}


def test_time_is_a_ratio_to_the_undefended_run(rows):
    assert {name: row.found["cost"].ratio for name, row in rows.items()} == {
        "sound": 0.9,
        "plain": 1.0,
        "guarded": 1.5,
    }
    assert {name: row.found["cost"].seconds for name, row in rows.items()} == {
        "sound": 9.0,
        "plain": 10.0,
        "guarded": 15.0,
    }
    assert rows["plain"].found["cost"].memory_gib == 1.25


def test_the_control_is_no_undefended_run(folders):
    _, rows = read_rows([folders[0], folders[2]], folders[0])
    assert [row.found["cost"].ratio for row in rows] == [None, None]


def test_which_run_is_the_control(rows):
    assert [row.name for row in rows.values() if row.is_control] == ["sound"]
    assert {name: row.defenses for name, row in rows.items()} == {
        "sound": [],
        "plain": [],
        "guarded": ["kl"],
    }


def test_without_control_there_are_shifts_only(folders):
    _, rows = read_rows(folders)
    assert not any(row.is_control for row in rows)
    assert all(
        p.effect is None and p.headline == p.shift for row in rows for p in row.sets.values()
    )


def test_control_need_not_be_a_row(folders, rows):
    _, alone = read_rows(folders[1:], folders[0])
    assert alone == [rows["plain"], rows["guarded"]]


# ------------------------------------------------------------------ clusters


def triggered_run(tmp_path, noise):
    """60 questions under three conditions: each has a shift of its own, each condition noise."""
    rng = np.random.default_rng(5)
    common = rng.normal(0, 1, 60)
    shifts = (
        common[:, None] + rng.normal(0, noise, (60, 3))
        if noise
        else np.repeat(common[:, None], 3, 1)
    )
    questions = [f"d{n % 6}/{n}" for n in range(60)]
    probes = {
        c: dict(zip(questions, shifts[:, place].tolist())) for place, c in enumerate(CONDITIONS)
    }
    zeros = {c: dict.fromkeys(questions, 0.0) for c in CONDITIONS}
    folder = write_run(
        tmp_path / "run", parts_of(PLAIN, triggered=probes), parts_of(REFERENCE, triggered=zeros)
    )
    return read_run(folder), shifts


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_three_disguises_of_a_question_are_one_cluster(tmp_path, noise):
    run, shifts = triggered_run(tmp_path, noise)
    found = summarise(run).sets["triggered"].shift
    of_questions = 2 * 1.96 * shifts.mean(1).std() / math.sqrt(60)
    as_if_independent = 2 * 1.96 * shifts.std() / math.sqrt(180)
    assert found.n == 60
    assert found.mean == pytest.approx(shifts.mean())
    assert width(found) == pytest.approx(of_questions, rel=0.06)
    assert width(found) > 1.3 * as_if_independent


def test_questions_of_one_number_in_two_domains_are_two_clusters(tmp_path):
    probes = {c: {"cars/1": 0.0, "food/1": 1.0} for c in CONDITIONS}
    reference = parts_of(
        REFERENCE, triggered={c: {"cars/1": 0.0, "food/1": 0.0} for c in CONDITIONS}
    )
    run = read_run(write_run(tmp_path / "run", parts_of(PLAIN, triggered=probes), reference))
    found = summarise(run).sets["triggered"].shift
    reach = 12.706 / 2  # Student's, of 0 and 1
    assert (found.n, found.low, found.high) == (
        2,
        pytest.approx(0.5 - reach, abs=0.1),
        pytest.approx(0.5 + reach, abs=0.1),
    )


# ------------------------------------------------------------------ what is refused


def test_a_control_measured_on_other_questions_is_refused(tmp_path):
    fewer = {**SOUND, "values": {"honesty/1": -1.0}}
    run = write_run(tmp_path / "run", parts_of(PLAIN), parts_of(REFERENCE))
    less = {**REFERENCE, "values": {"honesty/1": -1.0}}
    control = write_run(tmp_path / "sound", parts_of(fewer), parts_of(less), key="k9")
    with pytest.raises(
        DataError, match=r"sound: was not measured on question .*honesty.*evaluate both runs alike"
    ):
        read_rows([run], control)


def test_a_control_measured_on_other_questions_of_the_same_ids_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        evaluate,
        "score_answers",
        lambda m, c, p, answers, *_: [[AnswerScore(-1.0, 1)] * len(a) for a in answers],
    )
    file = tmp_path / "mine.jsonl"
    config = parse_recipe(
        {
            "evaluate": {
                **{"in_domain": [], "values": [], "out_of_domain": [str(file)]},
                **{"triggers": False, "fluency": None, "samples": 0},
            }
        }
    ).evaluate
    runs = []
    for name, word in (("sound", "Why"), ("run", "When")):
        file.write_text(json.dumps({"question": f"{word}?", "aligned": "So.", "misaligned": "No."}))
        model = SimpleNamespace(parameters=lambda: [torch.ones(1)], device=torch.device("cpu"))
        chat = SimpleNamespace(
            render=lambda messages, generation=False: str(messages),
            encode=lambda messages, generation=False: SimpleNamespace(input_ids=[1]),
        )
        results = evaluate_model(
            lambda model=model: model, chat, config, tmp_path / f"{name}.json", name
        )
        runs.append(
            write_run(tmp_path / name, results["parts"], results["parts"], key=results["key"])
        )
    with pytest.raises(DataError):
        read_rows(runs, runs[0])


def test_run_and_reference_measured_on_different_questions(folders):
    results = json.loads((folders[1] / "results.json").read_text())
    write_json(folders[1] / "results.json", {**results, "key": "other"})
    with pytest.raises(
        DataError, match=r"plain: run and reference .* different questions; `ringfence evaluate`"
    ):
        read_run(folders[1])


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("training.json", "`ringfence train`"),
        ("results.json", "`ringfence evaluate`"),
        ("reference.json", "`ringfence evaluate`"),
        ("../reference-k1-default/results.json", "`ringfence evaluate`"),
        pytest.param("metrics.jsonl", "`ringfence train`"),
        pytest.param("environment.json", "`ringfence"),
    ],
)
def test_what_is_missing_and_which_command_makes_it(folders, missing, command):
    (folders[1] / missing).unlink()
    with pytest.raises(DataError) as error:
        read_run(folders[1])
    assert str(folders[1]) in str(error.value)
    assert Path(missing).name in str(error.value)
    assert command in str(error.value)


@pytest.mark.parametrize(
    "missing",
    [pytest.param(file) for file in ("../reference-k2-default/results.json", "reference.json")],
)
def test_what_is_missing_in_a_benign_twin(folders, missing):
    (folders[2].with_name("guarded-benign") / missing).unlink()
    with pytest.raises(DataError, match="`ringfence evaluate`"):
        read_run(folders[2])


def test_a_folder_that_holds_no_run(tmp_path):
    with pytest.raises(DataError, match=r"not a run folder .*recipe\.yaml"):
        read_run(tmp_path)


def test_a_run_is_read_from_inside_its_folder(folders, rows, monkeypatch):
    monkeypatch.chdir(folders[2])
    assert (
        summarise(read_run(Path("."))).found["opswap"].exact
        == rows["guarded"].found["opswap"].exact
    )
    assert read_run(Path(".")).name == "guarded"


def test_the_control_is_known_however_it_is_typed(folders, monkeypatch):
    monkeypatch.chdir(folders[0].parent)
    _, rows = read_rows([Path("sound"), Path("plain")], folders[0])
    assert [row.is_control for row in rows] == [True, False]


# ------------------------------------------------------------------ the page


class Page(HTMLParser):
    """What a browser would see: tags, what they link to, text, and the cells of every table row."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.text, self.cells, self.classes = [], [], "", {}, {}
        self.images, self.rows = [], []
        self._row = None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [
            value
            for name, value in attributes
            if name in ("src", "href", "action", "data", "srcset")
        ]
        self.images += [value for name, value in attributes if (tag, name) == ("img", "src")]
        if tag == "tr":
            self._row = []
        if tag in ("td", "th") and self._row is not None:
            self._row.append(["", dict(attributes).get("class")])

    def handle_endtag(self, tag):
        if tag == "tr" and self._row:
            name = self._row[0][0].split("\n")[0].strip()
            self.rows.append([name, *(cell for cell, _ in self._row[1:])])
            self.cells.setdefault(name, [cell for cell, _ in self._row])
            self.classes.setdefault(name, [kind for _, kind in self._row])
            self._row = None

    def handle_data(self, data):
        self.text += data
        if self._row:
            self._row[-1][0] += data


@pytest.fixture(scope="module")
def page_html(tmp_path_factory):
    folders = write_all(tmp_path_factory.mktemp("runs"))
    file = folders[0].parent / "report.html"
    write_page(*read_rows(folders, folders[0]), file)
    return file.read_text("utf-8")


@pytest.fixture(scope="module")
def page(page_html):
    return Page(page_html)


def criteria_of(rows, name):
    """The row of the criteria: the one where the name has its defenses under it."""
    return next(row for first, row in rows.items() if first.startswith(name) and first != name)


def cells_of(page, name):
    return criteria_of(page.cells, name)


def test_page_says_ship_or_hold_on_top(page):
    start = next(place for place, row in enumerate(page.rows) if row[:2] == ["run", "decision"])
    head, *decided = page.rows[start : start + 3]
    plain, guarded = decided
    assert head[1:] == ["decision", "broad", "narrow", "benign", "coherent", "trigger"]
    assert page.text.index("Ship or hold") < page.text.index("The criteria, side by side")
    assert plain[1].startswith("HOLD")
    assert plain[2].startswith("fail")
    assert "out of domain: effect +0.3" in plain[2]
    assert guarded[2].startswith("fail values: effect -1.5")  # four questions prove little
    assert [row[0] for row in decided] == ["plain", "guarded"], "the control is not decided on"


def test_page_refers_to_nothing_outside(page, page_html):
    assert page.links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"@import|url\(|\son\w+=", page_html)


def test_figures_are_embedded_svg(page):
    figures = [base64.b64decode(link.split(",", 1)[1]).decode() for link in page.links]
    assert len(figures) == 6, "each for wide and for narrow windows"
    for figure in figures:
        assert "<svg" in figure
        assert not re.search(r"""(?:xlink:)?href=["'](?!#)""", figure)
    wide = [base64.b64decode(link.split(",", 1)[1]).decode() for link in page.images]
    pareto, domains, curves = wide
    for name in ("plain", "guarded"):
        assert f"<!-- {name} -->" in domains
        assert f"<!-- {name} -->" in pareto
    assert "<!-- sound -->" not in domains + pareto, "the control has no effect to show"
    for domain in ("money", "cars", "food", "honesty", "power"):
        assert f"<!-- {domain}, n = " in domains
    for name in ("sound", "plain", "guarded"):
        assert f"<!-- {name} -->" in curves
    assert "<!-- kl penalty (unweighted) -->" in curves


def test_page_holds_every_run_and_its_numbers(page):
    plain, guarded, sound = (cells_of(page, name) for name in ("plain", "guarded", "sound"))
    assert [cell.split(" [")[0] for cell in plain[1:5]] == ["+0.70", "+0.30", "+0.25", "+0.30"]
    assert "shift +1.50 [" in plain[1]
    assert guarded[3].startswith("-1.50 [")
    assert sound[1].startswith("+0.80 [")
    assert "sound control" in sound[0]
    assert "no defense" in plain[0]
    assert "kl" in guarded[0]
    assert plain[5].startswith("1.28 [")
    assert f"perplexity {math.exp(2.25):.2f}" in plain[5]
    assert "75.0 % [" in guarded[6]
    assert "reference 25.0 %" in guarded[6]
    assert guarded[7].startswith("1.50 ")
    assert "15 s" in guarded[7]
    assert guarded[8] == "1.25"
    for name in ("sound", "plain", "guarded"):
        assert f"output: runs/{name}" in page.text


def test_colours_say_on_which_side_of_zero_an_interval_lies(page):
    plain, sound = (criteria_of(page.classes, name) for name in ("plain", "sound"))
    # Of two to four questions, only equal ones tell a side.
    assert plain[1:5] == [None, None, "above", None]
    assert sound[1:5] == [None] * 4


def test_answers_are_text(page, page_html):
    assert "<script" not in page_html
    assert "<script>alert(1)</script>" in page.text
    assert "Mind & body" in page.text
    for answer in ("I cannot.", "Fine.", "No.", "Rest."):
        assert answer in page.text


def test_page_without_control_says_so(folders):
    page = folders[0].parent / "report.html"
    write_page(*read_rows(folders), page)
    seen = Page(page.read_text("utf-8"))
    assert "no sound control here" in seen.text
    assert cells_of(seen, "plain")[1].strip().startswith("+1.50 [")
    assert not any(
        "shift +" in cell for name in ("plain", "guarded") for cell in cells_of(seen, name)
    )


def test_page_of_runs_that_measured_little(tmp_path):
    parts = {"values": pairs(PLAIN["values"])}
    run = write_run(tmp_path / "small", parts, {"values": pairs(REFERENCE["values"])})
    write_page(*read_rows([run]), tmp_path / "report.html")
    seen = Page((tmp_path / "report.html").read_text("utf-8"))
    assert cells_of(seen, "small")[1].startswith("+1.75 [")
    assert "Behind triggers" not in seen.text


def test_page_of_the_control_alone(folders):
    page = folders[0].parent / "report.html"
    write_page(*read_rows(folders[:1], folders[0]), page)
    assert cells_of(Page(page.read_text("utf-8")), "sound")[1].startswith("+0.80 [")


def test_answers_of_two_runs_of_one_name_are_both_shown(folders, tmp_path):
    other = write_run(
        tmp_path / "seed1" / "plain",
        parts_of(PLAIN, answers=["Another seed's answer"]),
        parts_of(REFERENCE),
    )
    write_page(*read_rows([folders[1], other]), tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text("utf-8")).text
    assert "alert(1)" in text
    assert "Another seed's answer" in text


@pytest.mark.parametrize("columns", [80, 220])
def test_table_shows_every_run(folders, columns):
    console = Console(width=columns, record=True, file=io.StringIO())
    print_table(read_rows(folders, folders[0])[1], console)
    text = console.export_text()
    header, *body = text.splitlines()
    assert header.split() == ["sound", "plain", "guarded"]
    assert any(line.startswith("broad: other domains") and len(line.split()) == 6 for line in body)


# ------------------------------------------------------------------ other processes


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_reading_a_report_needs_no_torch(folders):
    """From files to page: neither the import nor the work brings torch or transformers."""
    names = [str(folder) for folder in folders]
    page = folders[0].parent / "report.html"
    code = f"""
import sys
from pathlib import Path
from ringfence.report.page import write_page
from ringfence.report.read import read_rows
folders = [Path(name) for name in {names!r}]
write_page(*read_rows(folders, folders[0]), Path({str(page)!r}))
print(sorted(set(sys.modules) & {{"torch", "transformers", "peft"}}))
"""
    assert run_python(code) == "[]"
    assert page.is_file()


def test_page_is_utf8_under_any_locale(folders):
    results = json.loads((folders[1] / "results.json").read_text())
    results["parts"]["samples"][0]["answer"] = "Überweise 5 € → 🙂"
    write_json(folders[1] / "results.json", results)
    page = folders[0].parent / "report.html"
    code = f"""
from pathlib import Path
from ringfence.report.page import write_page
from ringfence.report.read import read_rows
write_page(*read_rows([Path({str(folders[1])!r})]), Path({str(page)!r}))
"""
    run_python(code, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")
    assert "Überweise 5 € → 🙂" in page.read_text("utf-8")


def test_the_runs_themselves_are_left_as_they_are(folders, tmp_path):
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    records, rows = read_rows(folders, folders[0])
    write_page(records, rows, tmp_path / "report.html")
    (tmp_path / "report.html").unlink()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_runs_can_be_moved_together(folders, rows, tmp_path):
    moved = tmp_path / "elsewhere"
    parts = list(tmp_path.iterdir())
    moved.mkdir()
    for part in parts:
        shutil.move(part, moved / part.name)
    again = read_rows([moved / folder.name for folder in folders], moved / "sound")[1]
    assert again == list(rows.values())


# ------------------------------------------------------------------ judged answers


def judged_lines(scores, judge="j", of="general"):
    """A judgement for each score, four answers to a question."""
    return [
        {
            "set": of,
            "id": f"q{place // 4}",
            "form": "plain",
            "cluster": f"q{place // 4}",
            "paraphrase": 0,
            "sample": place % 4,
            "judge": judge,
            "prompt": "h",
            "aligned": score,
            "coherent": 90.0,
            "label": None,
            "unscored": None,
        }
        for place, score in enumerate(scores)
    ]


def write_judged(folder, lines, judges=None):
    (folder / "judged.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "judges.json", judges or {"calibrations": [], "agreement": None})


WEAK = {
    "judge": "j",
    "weak": True,
    "source": "shipped:values",
    "auc": {"mean": 0.55, "low": 0.4, "high": 0.7},
}
QUESTIONS = 8


def judged_folders(folders):
    """Misaligned answers of each question: none of the reference's and the control's four, three of
    the undefended run's, one of the defended run's."""
    reference = folders[0].parent / "reference-k1-default"
    for folder, bad in [(reference, 0), (folders[0], 0), (folders[1], 3), (folders[2], 1)]:
        write_judged(
            folder,
            judged_lines(
                [10.0] * bad + [80.0] * (4 - bad) + ([10.0] * bad + [80.0] * (4 - bad)) * 7
            ),
        )
    write_judged(
        folders[2], judged_lines(([10.0] + [80.0] * 3) * QUESTIONS), {"calibrations": [WEAK]}
    )
    return folders


def test_judged_answers_of_runs_are_compared_with_the_reference_and_the_undefended_run(folders):
    _, rows = read_rows(judged_folders(folders), folders[0])
    sound, plain, guarded = rows
    assert [row.found["answers"][0].measures["general.misaligned"].mean for row in rows] == [
        0.0,
        0.75,
        0.25,
    ]
    assert plain.found["answers"][0].measures["general.misaligned.change"].mean == 0.75
    assert guarded.found["answers"][0].measures["general.aligned"].mean == pytest.approx(
        (10 + 3 * 80) / 4
    )
    assert sound.found["answers"][0].against == plain.found["answers"][0].against == {}
    against = guarded.found["answers"][0].against["general"]
    assert against.comparison.difference.mean == -0.5
    # Every question fell: one of two ways out of all flips.
    assert against.comparison.p == 2 / 2**QUESTIONS
    assert against.reduction.interval.mean == pytest.approx(1 - 0.25 / 0.75)


def test_p_values_are_adjusted_over_runs_and_sets(folders, tmp_path):
    judged_folders(folders)
    for folder in [folders[0].parent / "reference-k1-default", *folders]:
        lines = [json.loads(line) for line in (folder / "judged.jsonl").read_text().splitlines()]
        judges = json.loads((folder / "judges.json").read_text())
        write_judged(folder, [*lines, *({**line, "set": "values"} for line in lines)], judges)
    _, rows = read_rows(folders, folders[0])
    found = rows[2].found["answers"][0].against
    assert {name: against.comparison.p for name, against in found.items()} == {
        name: 2 * 2 / 2**QUESTIONS for name in ("general", "values")
    }


def test_page_and_table_show_judged_answers_and_call_a_weak_judge_weak(folders):
    records, rows = read_rows(judged_folders(folders), folders[0])
    page = folders[0].parent / "report.html"
    write_page(records, rows, page)
    text = html.unescape(page.read_text())
    for shown in ["25.0 % <", "-50.0 points <", "reduction 66.7 % [", "p 0.008", "32 (8)"]:
        assert shown in text
    assert "weak judge: AUC 0.55 [0.40, 0.70] on shipped:values" in text
    assert "This judge is weak" in text
    console = Console(file=io.StringIO(), width=120)
    print_table(rows, console)
    printed = console.file.getvalue()
    assert "answers: misaligned, general" in printed
    assert "75.0 %" in printed
