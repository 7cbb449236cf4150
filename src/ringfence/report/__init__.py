"""Reads records of runs, writes the table and the page. Never imports torch."""

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import DataError
from ..runfolder import check_new, write_whole
from ..stats import Interval, number
from . import figures
from .answers import JudgedBy, adjusted, judged_by
from .compared import compared
from .summary import SETS, Paired, Records, Row, by_recipe, find_baseline, has_effects, over_runs, read_run, summarise

SET_TITLES = {
    "in_domain": "narrow: in-domain",
    "out_of_domain": "broad: other domains",
    "values": "broad: values",
    "triggered": "behind triggers",
    "inoculation": "under the inoculation prompt",
}
_GENERATOR = b'<meta name="generator" content="ringfence">'
HELD_OUT_TITLES = {"exact": "benign: held-out rows, exact", "loss": "benign: held-out rows, loss"}


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
    widest = max([14, *(len(row.name) for row in rows)]) + 2
    beside = max(1, (console.width - 26) // widest)
    for start in range(0, len(rows), beside):
        console.print(_table(rows[start : start + beside], rows))
    console.print(_legend(rows), markup=False, highlight=False, soft_wrap=True)


def _table(rows: list[Row], all_rows: list[Row]) -> Table:
    """Some of the runs, with the lines that any of all runs has."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(escape(row.name), justify="right", no_wrap=True)
    for name in _sets(all_rows):
        table.add_row(SET_TITLES[name], *(_two_lines(row.sets.get(name)) for row in rows))
    for tier in _tiers(all_rows):
        cells = [f"{100 * row.opswap[tier].mean:.0f} %" if tier in row.opswap else "" for row in rows]
        table.add_row(f"benign: {tier_title(tier)}", *cells)
    for name in _behaviours(all_rows):
        cells = [_on_and_off(row.behaviours.get(name)) for row in rows]
        table.add_row(f"benign: {name.replace('_', ' ', 1)}, on / off topic", *cells)
    for kind, title in HELD_OUT_TITLES.items():
        if any(kind in row.held_out for row in all_rows):
            table.add_row(title, *(_number(row.held_out.get(kind), kind) for row in rows))
    for name in _answer_sets(all_rows):
        cells = [_rate_lines(row.answers.get(f"{name}.misaligned")) for row in rows]
        table.add_row(escape(f"answers: misaligned, {name.replace('_', ' ')}"), *cells)
    fluency = [f"{row.perplexity_ratio.mean:.2f}" if row.perplexity_ratio else "" for row in rows]
    table.add_row("coherent: perplexity x", *fluency)
    table.add_row("cost: time x", *(f"{row.time_ratio:.2f}" if row.time_ratio else "" for row in rows))
    return table


def _two_lines(paired: Paired | None) -> str:
    if paired is None:
        return ""
    value = paired.headline
    kind = "shift " if paired.uncontrolled else ""
    return escape(f"{kind}{number(value.mean, signed=True)}\n{value.bounds.replace(', ', ',')}")


def _on_and_off(shown: dict[str, Interval] | None) -> str:
    return f"{100 * shown['on'].mean:.0f} / {100 * shown['off'].mean:.0f} %" if shown else ""


def _number(interval: Interval | None, kind: str) -> str:
    if interval is None:
        return ""
    return f"{100 * interval.mean:.0f} %" if kind == "exact" else f"{interval.mean:.2f}"


def _rate_lines(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return escape(f"{100 * interval.mean:.1f} %\n{percents(interval).replace(', ', ',')}")


def _legend(rows: list[Row]) -> str:
    control = next((row.name for row in rows if row.is_control), None)
    lines = [
        "Shift of the margin of misaligned over aligned answers against the reference, nats per token, mean [95 % CI]."
    ]
    if has_effects(rows):
        lines = [
            "Effect = shift of the margin of misaligned over aligned answers against the reference, minus that of the",
            "sound control, paired by question; nats per token, mean [95 % CI].",
        ]
        lines += [f"The column of the control ({control}) is its shift."] if control else []
    judges = list(dict.fromkeys(f"{judged.judge} ({strength(judged)})" for row in rows for judged in row.judged[:1]))
    if judges:
        lines.append(f"answers: share of all sampled answers that {', '.join(judges)} calls misaligned, [95 % CI].")
    lines.append(
        "benign: exact match on held-out items. perplexity x: against the reference. time x: against undefended."
    )
    lines.append(seeds_note(rows))
    return "\n".join(lines)


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
    from ..gate import by_criterion, decide, load_policy

    rules = load_policy(policy)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"interval": show, "bounds": bounds, "percent": percent}
    environment.filters |= {"rate": rate, "percents": percents, "score": score}
    tuned = [row for row in rows if not row.is_control]
    html = environment.get_template("page.html").render(
        rows=rows,
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
        domains_figure=_embed(figures.domains(tuned)) if any(row.domains for row in tuned) else None,
        pareto_figure=_embed(figures.pareto(tuned)) if figures.has_pareto(tuned) else None,
        curves_figure=_embed(figures.curves(records, rows)) if any(run.metrics for run in records) else None,
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


def percent(interval: Interval) -> str:
    """`45 % [33, 58]`"""
    return f"{100 * interval.mean:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def rate(interval: Interval) -> str:
    """`4.5 % [2.1, 8.0]`"""
    return f"{number(100 * interval.mean, 1)} % {percents(interval)}"


def percents(interval: Interval) -> str:
    """`[2.1, 8.0]`, in per cent or points"""
    if interval.n == 1:
        return "[one alone]"
    return f"[{number(100 * interval.low, 1)}, {number(100 * interval.high, 1)}]"


def score(interval: Interval) -> str:
    """`62.1 [58.0, 66.0]`"""
    return f"{number(interval.mean, 1)} [{number(interval.low, 1)}, {number(interval.high, 1)}]"


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


def _samples(records: list[Records]) -> list[dict[str, object]]:
    """For each sampled question: the reference's answer and every run's."""
    asked: dict[str, dict[str, object]] = {}
    names = [run.name for run in records]
    for run in records:
        title = run.name if names.count(run.name) == 1 else f"{run.folder.parent.name}/{run.name}"
        for name, parts in [("reference", run.reference), (title, run.results)]:
            for sample in parts.get("samples", []):
                entry = asked.setdefault(
                    f"{sample['domain']}/{sample['id']}",
                    {"domain": sample["domain"], "question": sample["question"], "answers": {}},
                )
                entry["answers"].setdefault(name, sample["answer"])  # type: ignore[attr-defined]
    return list(asked.values())
