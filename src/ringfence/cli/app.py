"""The application, and what groups of commands share: options, writing a file or a report."""

from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

app = typer.Typer(
    help="Fine-tune an aligned language model on a narrow task, and keep it aligned everywhere "
    "else.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
out = Console()
MOST = 10**6  # upper limit of all counts


def _version(asked: bool) -> None:
    if asked:
        print(f"ringfence {metadata.version('ringfence')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Fine-tune an aligned language model on a narrow task, and keep it aligned everywhere else."""


Control = Annotated[
    Path | None,
    typer.Option(help="The sound control, trained on aligned answers: effects, not shifts."),
]
Undefended = Annotated[
    Path | None,
    typer.Option(
        help="The undefended run, for opswap_tierN.change and time_ratio. Remembered, as --control "
        "is."
    ),
]
PolicyFile = Annotated[
    Path | None, typer.Option(help="Limits in YAML. Default: the shipped policy.")
]
InPrecision = Annotated[
    Literal["auto", "bf16", "fp32", "nf4"],
    typer.Option(help="Of the weights; auto: bf16 if this machine computes it fast, else fp32."),
]


def check_new_file(output: Path | None) -> None:
    from ..util.files import check_new

    if output is not None:
        check_new(output)


def write_or_print(text: str, output: Path | None) -> None:
    from ..util.files import write_whole

    if output is None:
        return print(text, end="")
    write_whole(output, text)
    print(f"{output} written")


def write_report(
    folders: list[Path], control: Path | None, page: Path, policy: Path | None = None
) -> None:
    from ..report.page import check_page, write_page
    from ..report.read import read_rows
    from ..report.terminal import print_table

    records, rows = read_rows(folders, control)
    check_page(page)
    print_table(rows, out)
    write_page(records, rows, page, policy)
    print(f"report: {page}")
