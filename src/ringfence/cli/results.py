"""Commands that read results, and load no model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import RingfenceError
from ..runfolder.names import PAGE
from .app import Control, PolicyFile, Undefended, check_new_file, out, write_or_print, write_report

RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]


def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, one row each.")],
    control: Annotated[
        Path | None,
        typer.Option(help="The sound control, trained on aligned answers: effects, not shifts."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page to write. Default: report.html in the folder, or report-NAMES.html next "
            "to several."
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="Limits in YAML, for SHIP or HOLD on the page. Default: the shipped policy."
        ),
    ] = None,
) -> None:
    """Compare runs: a table here, and one HTML page that opens offline."""
    write_report(folders, control, output or page_of(folders), policy)


def gate(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="A run folder, or several of one recipe with different seeds."),
    ] = None,
    policy: PolicyFile = None,
    control: Control = None,
    undefended: Undefended = None,
    print_policy: Annotated[
        bool, typer.Option("--print-policy", metavar="", help="Print the shipped policy.")
    ] = False,
) -> None:
    """Print SHIP or HOLD, with every rule's number and limit, and write gate.json. Exit code 0 =
    SHIP, 3 = HOLD."""
    from ..report.gate import HOLD, default_policy_text, gate_run, print_decision

    if print_policy:
        return print(default_policy_text(), end="")
    if not folders:
        raise RingfenceError("gate: name a run folder, or --print-policy")
    decision = gate_run(folders[0], policy, control, undefended, folders[1:])
    print_decision(decision, out)
    if not decision.ship:
        raise typer.Exit(HOLD)


def export(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.")],
    form: Annotated[
        Literal["json", "csv"], typer.Option("--format", help="One JSON or one CSV.")
    ] = "csv",
    output: Annotated[
        Path | None, typer.Option(help="The file to write. Default: printed.")
    ] = None,
    control: Control = None,
    undefended: Undefended = None,
) -> None:
    """Write all numbers of runs as one long table."""
    from ..report.export import export_runs

    check_new_file(output)
    write_or_print(export_runs(folders, form, control, undefended), output)


def card(
    folder: RunFolder,
    control: Control = None,
    policy: PolicyFile = None,
    undefended: Undefended = None,
    output: Annotated[
        Path | None, typer.Option(help="The file to write. Default: printed.")
    ] = None,
) -> None:
    """Write the model card of a run in the hub's format."""
    from ..report.card import run_card

    check_new_file(output)
    write_or_print(run_card(folder, control, policy, undefended), output)


def page_of(folders: list[Path]) -> Path:
    """Several runs get their own page, next to the first one, whose page stays as it is."""
    first = folders[0].resolve()
    if len(folders) == 1:
        return first / PAGE
    names = "-".join(dict.fromkeys(folder.resolve().name for folder in folders))
    return first.parent / f"report-{names[:150]}.html"
