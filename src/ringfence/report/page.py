"""Reads records of runs, writes the table and the page. Never imports torch."""

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from ..errors import DataError
from ..evaluate.measures.answers import judged_by, strength
from ..evaluate.measures.pairs import SET_TITLES, SETS, Paired
from ..runfolder.record import Records
from ..stats import Interval
from ..util.files import check_new, write_whole
from ..util.intervals import percents, rate, score, share, signed
from . import figures
from .gate import by_criterion, decide, load_policy
from .notes import OTHER, legends, other_questions, seeds_note
from .summary import Summary, asked_otherwise, has_effects, titles

_GENERATOR = b'<meta name="generator" content="ringfence">'
_MODELS = {"default": "default (SmolLM2-135M-Instruct)"}
HELD_OUT_SHOWN = 5  # rows whose answers are printed


def write_page(
    records: list[Records], rows: list[Summary], page: Path, policy: Path | None = None
) -> None:
    """One HTML file that holds everything and opens offline. All runs but the control are judged by
    a policy (default: the shipped one)."""
    rules = load_policy(policy)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"interval": _interval, "breakable": breakable, "signed": signed}
    environment.filters |= {"share": share, "percents": percents, "rate": rate, "score": score}
    others = asked_otherwise(rows)
    tuned = [row for row in rows if not row.is_control]
    decisions = [decide(row, rules) for row in tuned]
    has_domains = any(row.pairs.domains for row in tuned)
    has_curves = any(run.metrics for run in records)
    agreements = [run.judges["agreement"] for run in records if run.judges.get("agreement")]
    html = environment.get_template("page.html").render(
        rows=rows,
        about=_about(records, rows),
        cells=[
            (row, other, {cell.title: cell for cell in row.cells})
            for row, other in zip(rows, others)
        ],
        legends=legends(rows, but=("pairs",)),
        others={row.name: other for row, other in zip(rows, others)},
        other_questions=other_questions(rows),
        asterisk=OTHER,
        decisions=[(decision, by_criterion(decision)) for decision in decisions],
        policy=policy or "the shipped one",
        seeds_note=seeds_note(rows),
        titles=titles(rows),
        margin_sets=[name for name in SETS if any(_has(row, name) for row in rows)],
        set_titles=SET_TITLES,
        conditions=list(dict.fromkeys(name for row in rows for name in row.pairs.conditions)),
        kind="effect" if has_effects(rows) else "shift",
        domains_figure=_drawn(figures.domains, tuned) if has_domains else None,
        pareto_figure=_drawn(figures.pareto, tuned) if figures.has_pareto(tuned) else None,
        curves_figure=_drawn(figures.curves, records, rows) if has_curves else None,
        judged=_by_judge(records, rows),
        agreement=next(iter(agreements), None),
        samples=_samples(records),
        diagnoses=[(run, _diagnoses(run)) for run in records if run.diagnoses],
        records=records,
    )
    check_page(page)
    write_whole(page, html)


def _has(row: Summary, name: str) -> bool:
    return name in row.sets or name in row.pairs.margins


def _interval(found: Interval | Paired | None) -> str:
    """`+0.31 [+0.25, +0.37]`"""
    return str(found) if found else ""


def breakable(name: str) -> Markup:
    """A name that may break after its punctuation, not within its words."""
    return Markup("<wbr>").join(re.findall(r"[^_./,:]*[_./,:]|[^_./,:]+", name))


def check_page(page: Path) -> None:
    """Raises RecipeError if the page cannot be written, or is a file not written by ringfence."""
    if not (page.is_file() and _GENERATOR in page.read_bytes()[:1000]):
        check_new(page)


def _embed(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _drawn(figure: Callable[..., figures.Drawn], *of: Any) -> dict[str, str]:
    """A figure for a wide window and one for a narrow one, and what they show in words."""
    wide, narrow = figure(*of, inches=figures.WIDE), figure(*of, inches=figures.NARROW)
    return {"wide": _embed(wide.svg), "narrow": _embed(narrow.svg), "alt": wide.alt}


def _about(records: list[Records], rows: list[Summary]) -> list[dict[str, Any]]:
    """What was run, row by row: the model, the rows it learnt, the seeds, the precision."""
    about = []
    for run, row in zip(records, rows):
        recipe = yaml.safe_load(run.recipe_text)
        model = recipe["model"]
        if not isinstance(model, str):
            model = model.get("model", "a server")
        learnt, count = "none", run.training.get("rows")
        if run.training:
            learnt = recipe["data"]["train"] + (f" ({count:,} an epoch)" if count else "")
        seeds = ", ".join(map(str, row.seed_values or (recipe.get("seed", ""),)))
        precision = (
            recipe["train"]["precision"] if "train" in recipe else recipe.get("precision", "")
        )
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


def _by_judge(records: list[Records], rows: list[Summary]) -> list[dict[str, object]]:
    """For each judge: its strength, and its view of the first run's reference and of every run."""
    runs = [(row.name, found) for row in rows for found in row.found.get("answers", [])]
    references = [
        ("reference", found) for found in judged_by(records[0].judged_reference, [], [], {})
    ]
    by_judge = []
    for name in dict.fromkeys(found.judge for _, found in runs):
        own = [(run, found) for run, found in [*references, *runs] if found.judge == name]
        judged = [found for _, found in runs if found.judge == name]
        first = max(judged, key=lambda found: bool(found.calibration))
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
    """What was found inside, with the figures as they are in the run's folder."""
    return [
        found | {"image": _embed(_figure(run.folder / found["figure"]))}
        for found in run.diagnoses.values()
    ]


def _figure(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        record = file.parents[1] / "diagnosis.json"
        again = f"delete {record}, and `ringfence diagnose` recreates both"
        raise DataError(f"{file}: {error.strerror}; {again}") from error


def _samples(records: list[Records]) -> list[dict[str, Any]]:
    """The reference's answer and every run's: to the first held-out rows, which show what was
    learnt, then to each sampled question."""
    rows: dict[str, dict[str, Any]] = {}
    asked: dict[str, dict[str, Any]] = {}
    names = [run.name for run in records]
    for run in records:
        title = run.name if names.count(run.name) == 1 else f"{run.folder.parent.name}/{run.name}"
        for name, parts in [("reference", run.reference), (title, run.results)]:
            for place, item in enumerate(parts.get("held_out", [])[:HELD_OUT_SHOWN]):
                if "answer" in item:
                    expected = {"expected": item["expected"]}
                    row = {
                        "domain": "held-out row",
                        "question": item["origin"],
                        "answers": expected,
                    }
                    entry = rows.setdefault(f"{place}: {item['origin']}", row)
                    entry["answers"].setdefault(name, item["answer"])
            for sample in parts.get("samples", []):
                entry = asked.setdefault(
                    f"{sample['domain']}/{sample['id']}",
                    {"domain": sample["domain"], "question": sample["question"], "answers": {}},
                )
                entry["answers"].setdefault(name, sample["answer"])
    return [*rows.values(), *asked.values()]
