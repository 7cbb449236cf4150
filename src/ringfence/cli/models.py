"""Commands on finished models and adapters."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import RingfenceError
from ..util.words import counted
from .app import MOST, InPrecision, out


def project(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter; it is not changed.")],
    base: Annotated[
        str, typer.Option(help="The pre-trained model before its alignment: a folder or hub id.")
    ],
    output: Annotated[Path, typer.Option(help="The new folder to write.")],
    reference: Annotated[
        str | None,
        typer.Option(help="The model before fine-tuning. Default: the one the adapter names."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Project weights of at most this cosine. Default: 0.3.", min=0, max=1),
    ] = None,
    lowest: Annotated[
        int | None,
        typer.Option(
            help="Instead: project this number of weights, those of lowest cosine.", min=1, max=MOST
        ),
    ] = None,
    projector: Annotated[
        Literal["scaled", "exact"], typer.Option(help="As published, or orthogonal.")
    ] = "scaled",
) -> None:
    """Project a finished adapter onto what alignment changed (SafeLoRA). Reads weight by weight,
    loads no model."""
    from ..model.projection import ProjectionRule, project_adapter

    if threshold is not None and lowest is not None:
        raise RingfenceError(
            f"set --threshold or --lowest, not both (found {threshold} and {lowest})"
        )
    rule = ProjectionRule(threshold=threshold, lowest=lowest, projector=projector)
    layers = project_adapter(adapter, output, base, reference, rule)
    for name, layer in layers.items():
        fate = f"projected, {layer.kept:.2g} of its norm kept" if layer.projected else "left"
        out.print(f"{layer.cosine:.3f} {name}: {fate}", highlight=False, soft_wrap=True)
    count = sum(layer.projected for layer in layers.values())
    print(f"{count} of {counted(len(layers), 'weight')} projected: {output}")


def patch(
    source: Annotated[
        Path, typer.Argument(help="Folder of a run, an adapter or a model; it is not changed.")
    ],
    output: Annotated[Path, typer.Option(help="The new folder to write.")],
    reference: Annotated[
        str | None,
        typer.Option(
            help="The model before fine-tuning. Default: the one that the run or the adapter names."
        ),
    ] = None,
    until: Annotated[
        Literal["query", "header"],
        typer.Option(
            help="Where the prefix ends; with header an adapter becomes an activated LoRA of plain "
            "peft."
        ),
    ] = "query",
    system: Annotated[
        list[str] | None,
        typer.Option(
            help="For a whole model: a system prompt that it will be used with; repeat for more."
        ),
    ] = None,
    precision: InPrecision = "auto",
) -> None:
    """Repair a tuned model without training: write a copy that reads the reference's keys and
    values at its prefix."""
    from ..run.patch import patch as write

    made = write(
        source, output, reference=reference, until=until, systems=system or [], precision=precision
    )
    print(f"{made.folder} written; ringfence.load_model loads it")
    print(
        f"Next: ringfence evaluate {made.folder} --reference {made.reference} "
        f"--output {made.folder}-evaluated"
    )


def capability(
    model: Annotated[str, typer.Argument(help="A run folder, a model or an adapter.")],
    tasks: Annotated[list[str], typer.Argument(help="Names of lm-eval tasks.")],
    limit: Annotated[
        int | None,
        typer.Option(
            help="Take at most this number of items of each task, the first.", min=1, max=MOST
        ),
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder of your own task files.")] = None,
    precision: InPrecision = "auto",
    batch_size: Annotated[
        int, typer.Option(help="Items in one forward pass.", min=1, max=MOST)
    ] = 8,
) -> None:
    """Run tasks of lm-eval (pip install 'ringfence[lm-eval]'). Adapters and frozen prefixes are
    honoured."""
    from ..evaluate.capability import capability as measure

    found = measure(
        model,
        tasks,
        limit=limit,
        batch_size=batch_size,
        task_folder=task_folder,
        precision=precision,
    )
    for task, metrics in found.items():
        for metric, (value, error) in metrics.items():
            print(
                f"{task} {metric} {value:.4f}"
                + (f" (standard error {error:.4f})" if error is not None else "")
            )
