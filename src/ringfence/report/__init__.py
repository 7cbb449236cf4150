"""Reads records of runs, writes the table and the page. Never imports torch."""

import base64
from pathlib import Path

import jinja2
from rich.console import Console
from rich.table import Table

from ..stats import Interval
from . import figures
from .summary import SETS, Paired, Records, Row, find_baseline, read_run, summarise

SET_TITLES = {
    "in_domain": "narrow behaviour (in-domain)",
    "out_of_domain": "broad misalignment (other domains)",
    "values": "value questions",
    "triggered": "behind triggers",
}


def read_rows(folders: list[Path], control: Path | None = None) -> tuple[list[Records], list[Row]]:
    """Records and numbers of run folders, in the order given."""
    control_records = read_run(control) if control else None
    records = [read_run(folder) for folder in folders]
    baseline = find_baseline(records, control_records)
    return records, [summarise(run, control_records, baseline) for run in records]


def print_table(rows: list[Row], console: Console) -> None:
    """The runs side by side, in the terminal."""
    kind = "effect" if any(p.effect for row in rows for p in row.sets.values()) else "shift"
    table = Table(
        title=f"{kind} on the margin of misaligned over aligned answers, nats per token, mean [95 % CI]",
        title_justify="left",
    )
    table.add_column("run", no_wrap=True)
    for name in SETS:
        if any(name in row.sets for row in rows):
            table.add_column(SET_TITLES[name], justify="right")
    tiers = sorted({tier for row in rows for tier in row.opswap})
    for tier in tiers:
        table.add_column(f"benign task: {tier_title(tier)} exact", justify="right")
    table.add_column("fluency: perplexity x", justify="right")
    table.add_column("time x", justify="right")
    for row in rows:
        cells = [f"{row.name} (shift)" if row.is_control else row.name]
        cells += [
            show(row.sets[name].headline) if name in row.sets else ""
            for name in SETS
            if any(name in r.sets for r in rows)
        ]
        cells += [percent(row.opswap[tier]) if tier in row.opswap else "" for tier in tiers]
        cells.append(f"{row.perplexity_ratio.mean:.2f}" if row.perplexity_ratio else "")
        cells.append(f"{row.time_ratio:.2f}" if row.time_ratio else f"{row.seconds:.0f} s")
        table.add_row(*cells)
    console.print(table)
    if kind == "effect":
        console.print(
            "effect = shift of the run minus shift of the sound control, paired by question; the control has its shift."
            "\nperplexity x and time x: against the reference model and the undefended run.",
            highlight=False,
        )


def write_page(records: list[Records], rows: list[Row], page: Path) -> None:
    """One HTML file that holds everything and opens offline."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"interval": show, "percent": percent}
    tuned = [row for row in rows if not row.is_control]
    html = environment.get_template("page.html").render(
        rows=rows,
        sets=[name for name in SETS if any(name in row.sets for row in rows)],
        set_titles=SET_TITLES,
        tiers=sorted({tier for row in rows for tier in row.opswap}),
        tier_title=tier_title,
        kind="effect" if any(row.sets and _first(row).effect for row in rows) else "shift",
        domains_figure=_embed(figures.domains(tuned)),
        pareto_figure=_embed(figures.pareto(tuned)) if figures.has_pareto(tuned) else None,
        curves_figure=_embed(figures.curves(records)),
        samples=_samples(records),
        records=records,
    )
    page.write_text(html)


def show(interval: Interval | Paired | None) -> str:
    """`+0.31 [+0.25, +0.37]`"""
    if isinstance(interval, Paired):
        interval = interval.headline
    return str(interval) if interval else ""


def percent(interval: Interval) -> str:
    """`45 % [33, 58]`"""
    return f"{100 * interval.mean:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def tier_title(tier: str) -> str:
    return "OpSwap " + tier.removeprefix("opswap_").replace("tier", "tier ")


def _first(row: Row) -> Paired:
    return next(iter(row.sets.values()))


def _embed(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _samples(records: list[Records]) -> list[dict[str, object]]:
    """For each sampled question: the reference's answer and every run's."""
    asked: dict[str, dict[str, object]] = {}
    for run in records:
        for name, parts in [("reference", run.reference), (run.name, run.results)]:
            for sample in parts.get("samples", []):
                entry = asked.setdefault(
                    f"{sample['domain']}/{sample['id']}",
                    {"domain": sample["domain"], "question": sample["question"], "answers": {}},
                )
                entry["answers"].setdefault(name, sample["answer"])  # type: ignore[attr-defined]
    return list(asked.values())
