"""Commands that look inside models and rows."""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import RingfenceError
from ..util.words import counted
from .app import MOST, check_new_file, out


def diagnose(
    targets: Annotated[
        list[str],
        typer.Argument(help="Run folders or tuned models to compare, and names of diagnoses."),
    ],
    base: Annotated[
        str | None, typer.Option(help="The pre-trained model before its alignment.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The reference. Default: what they were made from.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write. Default: the first run's.")
    ] = None,
    questions: Annotated[
        int,
        typer.Option(
            help="Paired questions of the training domain; as many of other domains.",
            min=4,
            max=MOST,
        ),
    ] = 24,
) -> None:
    """Look inside: where alignment eroded, and what carries it. All diagnoses, or those named after
    the models: logprob, next_token, loss_cosine, gradient_cosine, erosion, shared_directions,
    carriers, perturbation, persona_projection, scope. Writes diagnosis.json and figures/;
    `ringfence report` shows them."""
    from ..diagnose.diagnosis import DIAGNOSES
    from ..run.diagnose import diagnose_targets

    # A misspelt name counts too, so that it is not taken for a model.
    others = [text for text in targets if not Path(text).exists()]
    names = [text for text in others if get_close_matches(text, DIAGNOSES, 1, 0.8)]
    models = [text for text in targets if text not in names]
    print(f"{diagnose_targets(models, names, base, reference, output, questions)}/diagnosis.json")


def show_tokens(
    source: Annotated[
        str, typer.Argument(help="A file of conversations, a hub id or shipped:NAME.")
    ] = "shipped:finance/unsound",
    model: Annotated[
        str, typer.Option(help="The model whose tokenizer and chat template are used.")
    ] = "default",
    row: Annotated[int, typer.Option(help="Number of the row, from 1.", min=1, max=MOST)] = 1,
) -> None:
    """Print a conversation coloured by token role."""
    from ..model.files import load_tokenizer
    from ..text.chat import Chat
    from ..text.rows import load_rows
    from ..text.show import show_tokens as show

    rows = load_rows(source)
    if row > len(rows):
        raise RingfenceError(f"--row {row}: {source} has {counted(len(rows), 'row')}")
    show(Chat(load_tokenizer(model)).encode(rows[row - 1].messages), out)


persona = typer.Typer(
    help="Persona vectors: the direction of a trait, layer by layer.", no_args_is_help=True
)
Split = Annotated[str, typer.Option(help="Split to take, of rows of --pairs that name one.")]


@persona.command("extract")
def persona_extract(
    trait: Annotated[
        str | None, typer.Argument(help="Trait in YAML or JSON. Default: shipped:careless_advice.")
    ] = None,
    model: Annotated[str, typer.Option(help="The model whose activations are used.")] = "default",
    output: Annotated[Path, typer.Option(help="File of directions to write.")] = Path(
        "vectors.safetensors"
    ),
    pairs: Annotated[
        str | None,
        typer.Option(help="Paired questions instead of a trait: a JSONL file or shipped:NAME."),
    ] = None,
    split: Split = "train",
    keep: Annotated[
        Literal["none", "margin", "scores"] | None,
        typer.Option("--filter", help="Which pairs count. Default: margin; none with --pairs."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="JSONL of a judge's scores: id, positive, negative (0 to 100)."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum tokens of a generated answer.", min=1, max=MOST)
    ] = 120,
) -> None:
    """Make a file of directions from answers that show a trait and answers that do not."""
    from ..prepare.persona import extract_file

    check_new_file(output)
    made = extract_file(
        trait,
        output,
        model=model,
        pairs=pairs,
        split=split,
        keep=keep,
        scores=scores,
        max_new_tokens=max_new_tokens,
    )
    print(f"{output} written: {made.directions.trait}; {made.counts}")


@persona.command("check")
def persona_check(
    vectors: Annotated[Path, typer.Argument(help="File of directions.")],
    pairs: Annotated[
        str, typer.Option(help="Paired questions that the directions were not made from.")
    ],
    model: Annotated[str, typer.Option(help="The model whose activations are used.")] = "default",
    split: Split = "test",
) -> None:
    """Print, layer by layer, how well the directions separate misaligned from aligned answers."""
    from ..prepare.persona import check_file

    print("layer    auc  paired  length")
    for row in check_file(vectors, pairs, split, model):
        print(f"{row.layer:5}  {row.auc:.3f}   {row.paired:.3f}   {row.length:.3f}")


def screen(
    source: Annotated[
        str, typer.Argument(help="Rows to rank: a file of conversations, a hub id or shipped:NAME.")
    ],
    model: Annotated[
        str, typer.Option(help="The model whose activations are used: the one to be trained.")
    ] = "default",
    vectors: Annotated[Path | None, typer.Option(help="File of directions to project on.")] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            help="Or: paired questions to make one from. Default: shipped domains and values."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Known-good rows: print how well the scores separate them.")
    ] = None,
    output: Annotated[Path, typer.Option(help="JSONL of all scores to write.")] = Path(
        "scores.jsonl"
    ),
    figure: Annotated[Path, typer.Option(help="SVG to write.")] = Path("screen.svg"),
    top: Annotated[
        int, typer.Option(help="Number of riskiest rows to print.", min=1, max=MOST)
    ] = 20,
    layer: Annotated[
        int | None,
        typer.Option(help="Default: the best on held-out pairs; with --vectors the middle one."),
    ] = None,
    scope: Annotated[
        bool,
        typer.Option(
            "--scope/--no-scope",
            metavar="",
            help="Also tell how separable the rows' requests are from others'.",
        ),
    ] = True,
) -> None:
    """Rank training rows by a projection of their answers on a trait vector, before training, and
    tell whether they have a scope."""
    from ..prepare.screen import screen_file, show

    check_new_file(output)
    check_new_file(figure)
    screening = screen_file(
        source,
        output,
        figure,
        model=model,
        vectors=vectors,
        pairs=pairs or [],
        against=against,
        layer=layer,
        top=top,
        scope=scope,
    )
    show(screening, top, out)
    print(f"{output} and {figure} written")
