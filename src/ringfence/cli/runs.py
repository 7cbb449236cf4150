"""Commands that train and measure."""

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RingfenceError
from ..processes import is_main
from ..runfolder.names import ANSWERS, PAGE, RESULTS
from .app import out, write_report

RecipeFile = Annotated[
    Path | None, typer.Argument(help="Recipe in YAML; without it, the defaults.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe: key.path=value ...")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        metavar="",
        help="Check everything and show what would be done, without training.",
    ),
]


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml"),
    data: Annotated[
        str | None,
        typer.Option(
            help="Your rows: a file or hub data set. A tenth is held out to measure what the "
            "others teach."
        ),
    ] = None,
) -> None:
    """Write a commented recipe."""
    from ..run.recipes import commented_recipe
    from ..text.held_out import SHARE, explain, is_own, split
    from ..text.rows import load_rows
    from ..util.files import check_new, write_whole

    check_new(path)
    rows = load_rows(data) if data else []
    write_whole(path, commented_recipe(str(path), data, len(rows)))
    if data and is_own(data):
        print(explain(data, len(rows), len(split(rows, SHARE, 0)[1])))
    print(f"{path} written. Next: ringfence run {path} --dry-run")


def run(recipe: RecipeFile = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train, evaluate and report, by the recipe. Resumes an interrupted run."""
    from ..run.pipeline import run_recipe

    loaded = load_recipe_of(recipe, overrides)
    if dry_run:
        return show_plan(loaded)
    done = run_recipe(loaded)
    if is_main():
        write_report([done.folder], None, done.folder / PAGE)


def train(recipe: RecipeFile = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train only."""
    from ..run.train import train_run

    loaded = load_recipe_of(recipe, overrides)
    if dry_run:
        return show_plan(loaded)
    print(train_run(loaded).weights)


def evaluate(
    target: Annotated[
        str, typer.Argument(help="A run folder, or any model: a folder, a hub id, an adapter.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes: evaluate.key=value ...")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="The model before fine-tuning. Default: the base of an adapter; else none."
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="URL of an OpenAI-compatible server; TARGET is the model's name there."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write, if TARGET is a model.")
    ] = None,
) -> None:
    """Measure a trained run, or any model, against its reference. Resumes if it was interrupted."""
    from ..evaluate.results import read_results
    from ..run.evaluate import evaluate_target

    folder = evaluate_target(target, overrides or [], reference, endpoint, output)
    if not read_results(folder / RESULTS)["parts"] and not (folder / ANSWERS).is_file():
        raise RingfenceError(
            f"{target}: nothing was measured: evaluate asks for no questions, rows or answers"
        )
    write_report([folder], None, folder / PAGE)


def demo(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            metavar="",
            help="Undefended and TReFT on 40 rows; under 3 minutes.",
        ),
    ] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--all", metavar="", help="All rows, and KL, interleave and TReFT, too; over an hour."
        ),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the demo's runs.")] = Path("runs/demo"),
) -> None:
    """Fine-tune the embedded model on shipped data: sound control, undefended, defenses: auto.
    About ten minutes on two CPU cores."""
    from ..run.demo import Size, run_demo

    if quick and everything:
        raise RingfenceError("--quick or --all, not both")
    size: Size = "quick" if quick else "all" if everything else "few"
    folders, control = run_demo(output if size == "few" else output / size, size)
    write_report(folders, control, folders[0].parent / PAGE)


def schema() -> None:
    """Print the JSON schema of recipes."""
    file = resources.files("ringfence") / "shipped" / "recipe.schema.json"
    print(file.read_text("utf-8"), end="")


def load_recipe_of(recipe: Path | None, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    from ..run.config import load_recipe

    changes = list(overrides or [])
    # `ringfence run train.epochs=2`: no file, only overrides.
    if recipe is not None and "=" in str(recipe) and not recipe.is_file():
        changes.insert(0, str(recipe))
        recipe = None
    return load_recipe(recipe, changes)


def show_plan(recipe) -> None:  # type: ignore[no-untyped-def]
    from ..run.dry_run import dry_run

    dry_run(recipe, out)
