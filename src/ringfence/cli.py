"""The command line: each command a few lines over the library.

Exit codes: 0 done; 2 something in the input is wrong (the message says what); 130 interrupted (the same command goes
on where it stopped).
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from .errors import RingfenceError

app = typer.Typer(
    help="Fine-tune an aligned language model on a narrow task, and keep it aligned everywhere else.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
out = Console()

RecipeFile = Annotated[Path | None, typer.Argument(help="Recipe in YAML; without it, the defaults.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe: key.path=value ...")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and show what would be done; train nothing.")]


def main() -> None:
    """Entry point: errors a user can mend are printed as one message, without a traceback."""
    _quiet_libraries()
    try:
        app(standalone_mode=True)
    except RingfenceError as error:
        from .run import Interrupted

        prefix = "" if isinstance(error, Interrupted) else "error: "
        Console(stderr=True).print(Text.assemble((prefix, "bold red"), str(error)), soft_wrap=True)
        sys.exit(130 if isinstance(error, Interrupted) else 2)


@app.command()
def init(path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml")) -> None:
    """Write a commented recipe."""
    from .recipes import commented_recipe

    if path.exists():
        raise RingfenceError(f"{path}: exists already; name another file")
    if not path.parent.is_dir():
        raise RingfenceError(f"{path}: no folder {path.parent}")
    path.write_text(commented_recipe(path.name))
    print(f"{path} written. Next: ringfence run {path} --dry-run")


@app.command()
def run(recipe: RecipeFile = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train, evaluate and report, as the recipe says. Goes on where an interrupted run stopped."""
    from .run import run_recipe

    loaded = _load(recipe, overrides)
    if dry_run:
        return _dry_run(loaded)
    done = run_recipe(loaded)
    _report([done.folder], None, done.folder / "report.html")


@app.command()
def train(recipe: RecipeFile = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train only."""
    from .run import train_run

    loaded = _load(recipe, overrides)
    if dry_run:
        return _dry_run(loaded)
    print(train_run(loaded).weights)


@app.command()
def evaluate(folder: RunFolder, overrides: Overrides = None) -> None:
    """Measure a trained run against its reference. Overrides change the recipe's `evaluate` part."""
    from .run import Run, evaluate_run, set_evaluation

    set_evaluation(Run(folder), overrides or [])
    evaluate_run(Run(folder))
    _report([folder], None, folder / "report.html")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, a row each.")],
    control: Annotated[
        Path | None, typer.Option(help="The run trained on sound answers: effects are shifts minus its shift.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The page to write. Default: report.html in the first folder.")
    ] = None,
) -> None:
    """Put runs side by side: a table here, and one HTML page that opens offline."""
    _report(folders, control, output or folders[0] / "report.html")


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Reference, undefended and TReFT on 200 rows; under 5 minutes.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the demo's runs.")] = Path("runs/demo"),
) -> None:
    """Fine-tune the embedded model on shipped data: sound control, undefended, and with each defense."""
    from .demo import run_demo

    folders, control = run_demo(output / "quick" if quick else output, quick)
    _report(folders, control, folders[0].parent / "report.html")


@app.command("show-tokens")
def show_tokens(
    source: Annotated[
        str, typer.Argument(help="A file of conversations, a hub id or shipped:NAME.")
    ] = "shipped:finance/unsound",
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template.")] = "default",
    row: Annotated[int, typer.Option(help="Number of the row, from 1.", min=1)] = 1,
) -> None:
    """Print a conversation coloured by token role."""
    from .chat import Chat
    from .data import load_rows
    from .models import load_tokenizer
    from .show import show_tokens as show

    rows = load_rows(source)
    if row > len(rows):
        raise RingfenceError(f"--row {row}: {source} has {len(rows)} rows")
    show(Chat(load_tokenizer(model)).encode(rows[row - 1].messages), out)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes."""
    from .config import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


def _load(recipe: Path | None, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    from .config import load_recipe

    changes = list(overrides or [])
    if (
        recipe is not None and "=" in str(recipe) and not recipe.is_file()
    ):  # `ringfence run train.epochs=2`: no file, only overrides
        changes.insert(0, str(recipe))
        recipe = None
    return load_recipe(recipe, changes)


def _dry_run(recipe) -> None:  # type: ignore[no-untyped-def]
    from .run import dry_run

    dry_run(recipe, out)


def _report(folders: list[Path], control: Path | None, page: Path) -> None:
    from .report import print_table, read_rows, write_page

    records, rows = read_rows(folders, control)
    print_table(rows, out)
    write_page(records, rows, page)
    print(f"report: {page}")


def _quiet_libraries() -> None:
    """Progress is ours to show; the libraries' own bars and advice would drown it."""
    import logging
    import os
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(transformers|torch|peft|accelerate)\.")
    logging.getLogger("transformers").setLevel(logging.ERROR)
