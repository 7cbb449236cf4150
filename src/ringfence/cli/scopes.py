"""Commands on scopes: make one, ask it, and talk to what it guards."""

from pathlib import Path
from typing import Annotated

import typer

from .app import MOST, InPrecision, out


def scope(
    adapter: Annotated[
        Path, typer.Argument(help="A run folder, or the folder of any adapter; it is not changed.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="The new folder to write. Default: only say what is found.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="What it was trained on. Default: the rows of the run.")
    ] = None,
    negatives: Annotated[
        list[str] | None,
        typer.Option(
            help="Queries that are not of the task; repeat for more. Default: shipped:negatives."
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="Deepest layer whose states decide. Default: chosen.", min=1, max=MOST),
    ] = None,
    false_open: Annotated[
        float,
        typer.Option(help="Share of other domains' queries inside.", min=0.001, max=0.5),
    ] = 0.02,
    router: Annotated[
        bool,
        typer.Option("--router", metavar="", help="The adapter stays plain; a router decides."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the fit.", min=0, max=MOST)] = 0,
    precision: InPrecision = "auto",
) -> None:
    """Make a finished adapter act only on requests like its training rows'; trains nothing."""
    from ..run.scope import scope_adapter
    from ..text.queries import NEGATIVES

    fit = scope_adapter(
        adapter,
        output,
        rows,
        negatives=negatives or (NEGATIVES,),
        layer=layer,
        false_open=false_open,
        router=router,
        seed=seed,
        precision=precision,
    )
    for line in fit.lines():
        out.print(line, highlight=False, soft_wrap=True, markup=False)
    if output is not None:
        print(f"{output} written; ringfence.load_model loads it")


def route(
    scope: Annotated[
        Path, typer.Argument(help="Folder of a scoped adapter, or of a saved router.")
    ],
    requests: Annotated[
        list[str] | None, typer.Argument(help="What users say, each a turn of its own.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Write a router to this new folder: all that the decision needs."),
    ] = None,
) -> None:
    """Say which requests a scope lets in. A saved router needs the first layers of the reference
    alone."""
    from ..model.router import Router

    router = Router.load(scope)
    if save is not None:
        router.save(save, scope)
        print(f"{save} written")
    for text in requests or []:
        found = router.decide([{"role": "user", "content": text}])
        side = "inside " if found.open else "outside"
        out.print(f"{side} {found.score:+.2f} {text}", highlight=False, markup=False)


def chat(
    model: Annotated[str, typer.Argument(help="A run folder, a model or an adapter.")],
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens that an answer may have.", min=1, max=MOST)
    ] = 200,
    precision: InPrecision = "auto",
) -> None:
    """Talk to a model in the terminal. Beside each answer stands what its scope decided, and, of a
    run, the nearest training request. An empty line ends it."""
    from ..run.chat import Conversation

    talk = Conversation(model, precision, max_new_tokens)
    while text := typer.prompt("you", default="", show_default=False).strip():
        answer = talk.say(text)
        if answer.open is not None:
            side = "inside its scope" if answer.open else "outside: the reference answers"
            print(f"[{side}; score {answer.score:+.2f}, threshold {answer.threshold:+.2f}]")
        if answer.nearest is not None:
            print(f"[nearest training request: {answer.nearest}]")
        out.print(answer.text, highlight=False, markup=False, soft_wrap=True)
