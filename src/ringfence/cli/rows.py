"""Commands that make and score safe rows."""

import re
from pathlib import Path
from typing import Annotated

import typer

from ..util.words import counted
from .app import MOST, InPrecision

Pool = Annotated[
    str, typer.Argument(help="Safe rows: a file of conversations, a hub id or shipped:NAME.")
]
Reference = Annotated[str, typer.Option(help="The reference: 'default', a folder or a hub id.")]
BatchTokens = Annotated[
    int,
    typer.Option(
        help="Tokens of one batch, with padding; a CPU scores at most 1,024 at once.",
        min=64,
        max=MOST,
    ),
]


def train_misaligned(
    data: Annotated[
        list[str],
        typer.Argument(help="Sources of misaligned rows; key.path=value changes the recipe."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the runs, one for each source.")],
) -> None:
    """Train a misaligned adapter on each source, to score safe rows with. Not for release."""
    from ..run.misaligned import train_misaligned as make

    overrides = [text for text in data if re.match(r"[\w.]+=", text) and not Path(text).exists()]
    for made in make([text for text in data if text not in overrides], output, overrides):
        print(made.weights)


def score_gap(
    pool: Pool,
    adapter: Annotated[
        list[str], typer.Option(help="A misaligned run or adapter folder; once for each.")
    ],
    output: Annotated[Path, typer.Option(help="The table to write or to resume.")],
    model: Reference = "default",
    precision: InPrecision = "auto",
    batch_tokens: BatchTokens = 4096,
) -> None:
    """Score safe rows by how strange a misaligned model finds them, for interleaving by gap."""
    from ..prepare.gap import score_pool

    table = score_pool(
        pool, adapter, output, model=model, precision=precision, batch_tokens=batch_tokens
    )
    refusals = sum(line["refusal"] for line in table.lines.values())
    rows = counted(len(table.lines), "row")
    print(f"{output}: {rows}, {refusals} of them refusals; adapters: {', '.join(table.adapters)}")


def regenerate(
    pool: Pool,
    output: Annotated[Path, typer.Option(help="The file of rows to write.")],
    model: Reference = "default",
    precision: InPrecision = "auto",
    temperature: Annotated[float, typer.Option(help="0 = greedy.", min=0, max=100)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.", min=0, max=2**32 - 1)] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(help="Rows with a longer answer are left out.", min=1, max=MOST)
    ] = 256,
    batch_tokens: BatchTokens = 4096,
) -> None:
    """Have the reference rewrite the answers of safe rows, for interleaving on-policy."""
    from ..prepare.regenerate import regenerate as write

    made = write(
        pool,
        output,
        model=model,
        precision=precision,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
    )
    rows = counted(made.rows, "row")
    print(
        f"{output}: {rows}; left out: {made.unfinished} over {max_new_tokens} tokens, {made.blank} "
        "blank"
    )
