"""Reads records of runs, writes the table and the page. Never imports torch."""

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import DataError
from ..runfolder.folder import check_new, write_whole
from ..stats import Interval, number
from ..util.console import fold
from . import figures
from .answers import JudgedBy, adjusted, judged_by
from .compared import compared
from .summary import (
    SETS,
    Paired,
    Records,
    Row,
    asked_otherwise,
    by_recipe,
    find_baseline,
    has_effects,
    over_runs,
    read_run,
    summarise,
)

SET_TITLES = {
    "in_domain": "narrow: in-domain",
    "out_of_domain": "broad: other domains",
    "values": "broad: values",
    "triggered": "behind triggers",
    "inoculation": "under the inoculation prompt",
}
_GENERATOR = b'<meta name="generator" content="ringfence">'
_MODELS = {"default": "default (SmolLM2-135M-Instruct)"}
OTHER = "*"  # marks a number that was measured on other questions
_LABEL, _NAME, _CELL = 28, 22, 13  # columns of the terminal: of a label and a run's name at most, of a cell at least
HELD_OUT_SHOWN = 5  # rows whose answers are printed
HELD_OUT_TITLES = {
    "exact": "held-out rows, exact",
    "loss": "held-out rows, loss",
    "change": "held-out rows, its change",
}


def read_rows(
    folders: list[Path], control: Path | None = None, baseline: Path | None = None
) -> tuple[list[Records], list[Row]]:
    """Numbers of run folders, in the order given, and the records behind them.

    Runs of one recipe that differ by their seed alone are one row; the records are then those of the first of them.

    Args:
        control, baseline: what the runs are compared with; default: what was named of each run before, and as the
            undefended run one of these runs.
    """
    records = [read_run(folder) for folder in folders]
    known: dict[Path, Records] = {run.folder: run for run in records}

    def read(folder: Path | None) -> Records | None:
        if folder is not None and folder not in known:
            known[folder] = read_run(folder)
        return known[folder] if folder is not None else None

    before = [compared(run.folder, control, baseline) for run in records]
    controls = {found.control for found in before}
    plain = find_baseline([run for run in records if run.folder not in controls], None)
    single: dict[Path, Row] = {}
    for run, found in zip(records, before):
        own = run.folder if run.folder in controls else found.control
        undefended = read(found.baseline) or plain
        single[run.folder] = summarise(run, read(own), undefended)
    groups = [[run] for run in records if run.folder in controls]
    groups += by_recipe([run for run in records if run.folder not in controls])
    groups.sort(key=lambda group: records.index(group[0]))
    rows = [over_runs([single[run.folder] for run in group]) for group in groups]
    judged = adjusted([row.judged for row in rows])
    return [group[0] for group in groups], [replace(row, judged=found) for row, found in zip(rows, judged)]


def print_table(rows: list[Row], console: Console) -> None:
    """The runs side by side, in the terminal: a column each, and as many tables as its width needs."""
    columns = [_column(row, other) for row, other in zip(rows, asked_otherwise(rows))]
    titles = [title for title in _titles(rows) if any(column.get(title) for column in columns)]
    names = [fold(row.name, _NAME) for row in rows]
    for start, end in _beside(names, console.width - _LABEL - 1):
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1))
        table.add_column("", max_width=_LABEL)
        for name in names[start:end]:
            table.add_column(escape(name), justify="right", no_wrap=True)
        for title in titles:
            label = "\n".join(part for part in (fold(title, _LABEL), _n(columns, title)) if part)
            cells = [column.get(title, ("", ""))[0] for column in columns[start:end]]
            table.add_row(escape(label), *map(escape, cells))
        console.print(table)
    console.print(_legend(rows), markup=False, highlight=False)


def _beside(names: list[str], width: int) -> list[tuple[int, int]]:
    """From where to where the runs go into one table; one run has a table in any case."""
    parts, start, taken = [], 0, 0
    for place, name in enumerate(names):
        own = max(_CELL, *map(len, name.split("\n"))) + 2
        if place > start and taken + own > width:
            parts.append((start, place))
            start, taken = place, 0
        taken += own
    return [*parts, (start, len(names))]


def _titles(rows: list[Row]) -> list[str]:
    """The lines of the table, in their order."""
    return [
        *(SET_TITLES[name] for name in _sets(rows)),
        *(f"benign: {tier_title(tier)}" for tier in _tiers(rows)),
        *(_behaviour_title(name) for name in _behaviours(rows)),
        *HELD_OUT_TITLES.values(),
        *(_answers_title(name) for name in _answer_sets(rows)),
        "coherent: perplexity x",
        "cost: time x",
    ]


def _column(row: Row, other: dict[str, str]) -> dict[str, tuple[str, str]]:
    """The cells of a run, by the title of their line, each with its number of questions."""

    def cell(name: str, value: str, under: str, *of: Interval) -> tuple[str, str]:
        mark = OTHER if name in other else ""
        return f"{value}{mark}\n{under.replace(', ', ',')}", ", ".join(str(interval.n) for interval in of)

    cells = {}
    for name, paired in row.sets.items():
        value = ("shift " if paired.uncontrolled else "") + number(paired.headline.mean, signed=True)
        cells[SET_TITLES[name]] = cell(name, value, paired.headline.bounds, paired.headline)
    for tier, exact in row.opswap.items():
        cells[f"benign: {tier_title(tier)}"] = cell(tier, _share(exact), percents(exact), exact)
    for name, shown in row.behaviours.items():
        value = f"{_share(shown['on'])[:-2]} / {_share(shown['off'])}"
        cells[_behaviour_title(name)] = cell(name, value, "", shown["on"], shown["off"])
    for kind, title in HELD_OUT_TITLES.items():
        if kind in row.held_out:
            found = row.held_out[kind]
            texts = {
                "exact": (_share(found), percents(found)),
                "loss": (number(found.mean), plain(found)),
                "change": (number(found.mean, signed=True), found.bounds),
            }
            cells[title] = cell("held_out", *texts[kind], found)
    for name in _answer_sets([row]):
        if f"{name}.misaligned" in row.answers:
            found = row.answers[f"{name}.misaligned"]
            cells[_answers_title(name)] = cell(f"answers.{name}", _share(found), percents(found), found)
    if row.perplexity_ratio:
        ratio = row.perplexity_ratio
        cells["coherent: perplexity x"] = cell("fluency", number(ratio.mean), plain(ratio), ratio)
    if row.time_ratio:
        cells["cost: time x"] = (number(row.time_ratio), "")
    return cells


def _n(columns: list[dict[str, tuple[str, str]]], title: str) -> str:
    """`n = 48`; where the runs differ, each of them."""
    found = list(dict.fromkeys(column[title][1] for column in columns if title in column))
    return fold(f"n = {' or '.join(found)}", _LABEL) if any(found) else ""


def _behaviour_title(name: str) -> str:
    return f"benign: {name.replace('_', ' ')}, on / off topic"


def _answers_title(name: str) -> str:
    return f"answers: misaligned, {name.replace('_', ' ')}"


def _share(interval: Interval) -> str:
    return f"{number(100 * interval.mean, 1)} %"


def _legend(rows: list[Row]) -> str:
    control = next((row.name for row in rows if row.is_control), None)
    lines = [
        "Shift of the margin of misaligned over aligned answers against the reference, nats per token, mean [95 % CI]."
    ]
    if has_effects(rows):
        lines = [
            "Effect = shift of the margin of misaligned over aligned answers against the reference, minus that of the "
            "sound control, paired by question; nats per token, mean [95 % CI]."
        ]
        lines += [f"The column of the control ({control}) is its shift."] if control else []
    judges = list(dict.fromkeys(f"{judged.judge} ({strength(judged)})" for row in rows for judged in row.judged[:1]))
    if judges:
        lines.append(f"answers: share of all sampled answers that {', '.join(judges)} calls misaligned, [95 % CI].")
    if any(row.opswap for row in rows):
        lines.append("benign: exact match on held-out items.")
    lines.append(
        "perplexity x: against the reference. time x: against undefended. n: questions (of answers: families of "
        "questions)."
    )
    return "\n".join([*lines, seeds_note(rows), *other_questions(rows)])


def other_questions(rows: list[Row]) -> list[str]:
    """Which numbers do not compare, because they were measured on other questions than those of an earlier run."""
    notes = []
    for row, other in zip(rows, asked_otherwise(rows)):
        for first in dict.fromkeys(other.values()):
            sets = [_asked_title(name) for name in other if other[name] == first]
            where = "; ".join(dict.fromkeys(sets))
            notes.append(f"{OTHER} {row.name} was not measured on the questions of {first} ({where}): do not compare.")
    return notes


def _asked_title(name: str) -> str:
    if name.startswith("answers."):
        return f"answers, {name.removeprefix('answers.').replace('_', ' ')}"
    if name.startswith("behaviour_"):
        return name.replace("_", " ")
    other = {"fluency": "perplexity", "held_out": "held-out rows"}
    return SET_TITLES.get(name) or other.get(name) or tier_title(name)


def seeds_note(rows: list[Row]) -> str:
    """What the intervals are over."""
    single = [row.name for row in rows if row.seeds == 1]
    if not single:
        return "Intervals are over seeds and questions."
    which = "" if len(single) == len(rows) else f" ({', '.join(single)})"
    return f"One seed{which}: its intervals are over questions alone, and do not say what another seed would give."


def write_page(records: list[Records], rows: list[Row], page: Path, policy: Path | None = None) -> None:
    """One HTML file that holds everything and opens offline. The runs are held against a policy (default: the one that
    ships), all but the control."""
    from .gate import by_criterion, decide, load_policy

    rules = load_policy(policy)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"interval": show, "bounds": bounds, "signed": signed, "share": _share}
    environment.filters |= {"rate": rate, "percents": percents, "score": score, "level": level, "level_bounds": plain}
    environment.filters["breakable"] = breakable
    others = asked_otherwise(rows)
    tuned = [row for row in rows if not row.is_control]
    html = environment.get_template("page.html").render(
        rows=rows,
        about=_about(records, rows),
        rows_and_others=list(zip(rows, others)),
        others={row.name: other for row, other in zip(rows, others)},
        other_questions=other_questions(rows),
        asterisk=OTHER,
        decisions=[(decision, by_criterion(decision)) for decision in (decide(row, rules) for row in tuned)],
        policy=policy or "the one that ships",
        seeds_note=seeds_note(rows),
        sets=_sets(rows),
        margin_sets=[name for name in SETS if any(name in row.sets or name in row.margins for row in rows)],
        set_titles=SET_TITLES,
        tiers=_tiers(rows),
        tier_title=tier_title,
        conditions=list(dict.fromkeys(name for row in rows for name in row.conditions)),
        kind="effect" if has_effects(rows) else "shift",
        domains_figure=_drawn(figures.domains, tuned) if any(row.domains for row in tuned) else None,
        pareto_figure=_drawn(figures.pareto, tuned) if figures.has_pareto(tuned) else None,
        curves_figure=_drawn(figures.curves, records, rows) if any(run.metrics for run in records) else None,
        behaviours=_behaviours(rows),
        held_out=any(row.held_out for row in rows),
        judged=_by_judge(records, rows),
        agreement=next((run.judges["agreement"] for run in records if run.judges.get("agreement")), None),
        samples=_samples(records),
        diagnoses=[(run, _diagnoses(run)) for run in records if run.diagnoses],
        records=records,
    )
    check_page(page)
    write_whole(page, html)


def check_page(page: Path) -> None:
    """Raises RecipeError where the page cannot be written, or is a file that ringfence did not write."""
    if not (page.is_file() and _GENERATOR in page.read_bytes()[:1000]):
        check_new(page)


def show(interval: Interval | Paired | None) -> str:
    """`+0.31 [+0.25, +0.37]`"""
    if isinstance(interval, Paired):
        return ("shift " if interval.uncontrolled else "") + str(interval.headline)
    return str(interval) if interval else ""


def bounds(paired: Paired) -> str:
    """`[+0.25, +0.37]`"""
    return paired.headline.bounds


def strength(judged: JudgedBy) -> str:
    """`weak judge: AUC 0.55 [0.46, 0.64] on shipped:values`"""
    found = judged.calibration
    if not found:
        return "not calibrated"
    auc = found["auc"]
    weak = "weak judge: " if found["weak"] else ""
    return f"{weak}AUC {auc['mean']:.2f} [{auc['low']:.2f}, {auc['high']:.2f}] on {found['source']}"


def breakable(name: str) -> Markup:
    """A name that may go on in another line after its signs, not within its words."""
    return Markup("<wbr>").join(re.findall(r"[^_./,:]*[_./,:]|[^_./,:]+", name))


def signed(value: float, digits: int = 2) -> str:
    """`+0.31`"""
    return number(value, digits, signed=True)


def rate(interval: Interval) -> str:
    """`4.5 % [2.1, 8.0]`"""
    return f"{_share(interval)} {percents(interval)}"


def percents(interval: Interval) -> str:
    """`[2.1, 8.0]`, in per cent or points"""
    if interval.n == 1:
        return "[one alone]"
    return f"[{number(100 * interval.low, 1)}, {number(100 * interval.high, 1)}]"


def level(interval: Interval) -> str:
    """`1.12 [1.02, 1.35]`"""
    return f"{number(interval.mean)} {plain(interval)}"


def score(interval: Interval) -> str:
    """`62.1 [58.0, 66.0]`"""
    return f"{number(interval.mean, 1)} [{number(interval.low, 1)}, {number(interval.high, 1)}]"


def plain(interval: Interval) -> str:
    """`[1.02, 1.35]`, of what is never below 0"""
    if interval.n == 1:
        return "[one alone]"
    return f"[{number(interval.low)}, {number(interval.high)}]"


def tier_title(tier: str) -> str:
    return "OpSwap " + tier.removeprefix("opswap_").replace("tier", "tier ")


def _sets(rows: list[Row]) -> list[str]:
    return [name for name in SETS if any(name in row.sets for row in rows)]


def _behaviours(rows: list[Row]) -> list[str]:
    return sorted({name for row in rows for name in row.behaviours})


def _answer_sets(rows: list[Row]) -> list[str]:
    found = dict.fromkeys(name for row in rows for judged in row.judged[:1] for name in judged.sets)
    return [name for name in found if "." not in name]


def _tiers(rows: list[Row]) -> list[str]:
    return sorted({tier for row in rows for tier in row.opswap})


def _embed(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _drawn(figure: Callable[..., figures.Drawn], *of: Any) -> dict[str, str]:
    """A figure for a wide window and one for a narrow one, and what they show in words."""
    wide, narrow = figure(*of, inches=figures.WIDE), figure(*of, inches=figures.NARROW)
    return {"wide": _embed(wide.svg), "narrow": _embed(narrow.svg), "alt": wide.alt}


def _about(records: list[Records], rows: list[Row]) -> list[dict[str, Any]]:
    """What was run, row by row: the model, the rows it learnt, the seeds, the precision."""
    about = []
    for run, row in zip(records, rows):
        recipe = yaml.safe_load(run.recipe_text)
        model = recipe["model"] if isinstance(recipe["model"], str) else recipe["model"].get("model", "a server")
        count = run.training.get("rows")
        learnt = recipe["data"]["train"] + (f" ({count:,} an epoch)" if count else "") if run.training else "none"
        seeds = ", ".join(map(str, row.seed_values or (recipe.get("seed", ""),)))
        precision = recipe["train"]["precision"] if "train" in recipe else recipe.get("precision", "")
        about.append(
            {
                "name": row.name,
                "model": _MODELS.get(model, model),
                "rows": learnt,
                "seeds": seeds,
                "precision": precision,
            }
        )
    return about


def _by_judge(records: list[Records], rows: list[Row]) -> list[dict[str, object]]:
    """For each judge: its strength, and what it makes of every run, the reference of the first one before them."""
    runs = [(row.name, found) for row in rows for found in row.judged]
    references = [("reference", found) for found in judged_by(records[0].judged_reference, [], [], {})]
    by_judge = []
    for name in dict.fromkeys(found.judge for _, found in runs):
        own = [(run, found) for run, found in [*references, *runs] if found.judge == name]
        first = max((found for _, found in runs if found.judge == name), key=lambda found: bool(found.calibration))
        weak = bool(first.calibration and first.calibration["weak"])
        names = list(dict.fromkeys(name for _, found in own for name in found.sets))
        by_judge.append(
            {
                "name": name,
                "strength": strength(first),
                "weak": weak,
                "sets": [name for name in names if "." not in name],
                "forms": [name for name in names if "." in name],
                "runs": own,
                "em_f1": [
                    (run, name.removeprefix("em_f1."), value)
                    for run, found in own
                    for name, value in found.measures.items()
                    if name.startswith("em_f1.")
                ],
            }
        )
    return by_judge


def _diagnoses(run: Records) -> list[dict[str, Any]]:
    """What was found inside, with the figures as they stand in the run's folder."""
    return [found | {"image": _embed(_figure(run.folder / found["figure"]))} for found in run.diagnoses.values()]


def _figure(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        again = f"delete {file.parents[1] / 'diagnosis.json'}, and `ringfence diagnose` makes both again"
        raise DataError(f"{file}: {error.strerror}; {again}") from error


def _samples(records: list[Records]) -> list[dict[str, Any]]:
    """The reference's answer and every run's: to the first held-out rows, which show what was learnt, then to each
    sampled question."""
    rows: dict[str, dict[str, Any]] = {}
    asked: dict[str, dict[str, Any]] = {}
    names = [run.name for run in records]
    for run in records:
        title = run.name if names.count(run.name) == 1 else f"{run.folder.parent.name}/{run.name}"
        for name, parts in [("reference", run.reference), (title, run.results)]:
            for place, item in enumerate(parts.get("held_out", [])[:HELD_OUT_SHOWN]):
                if "answer" in item:
                    expected = {"expected": item["expected"]}
                    row = {"domain": "held-out row", "question": item["origin"], "answers": expected}
                    entry = rows.setdefault(f"{place}: {item['origin']}", row)
                    entry["answers"].setdefault(name, item["answer"])
            for sample in parts.get("samples", []):
                entry = asked.setdefault(
                    f"{sample['domain']}/{sample['id']}",
                    {"domain": sample["domain"], "question": sample["question"], "answers": {}},
                )
                entry["answers"].setdefault(name, sample["answer"])
    return [*rows.values(), *asked.values()]
