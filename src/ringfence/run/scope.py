"""Gives a finished adapter a scope: from then on it acts only on requests like its training rows'.

Nothing is trained, and the adapter's weights stay as they are.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import DefenseError, ModelError, RecipeError
from ..model.files import adapter_base, beyond_lora, load_tokenizer
from ..model.loading import load_model
from ..model.precision import Precision
from ..model.scope import read_scope
from ..prepare.scope import Fit, fit_scope
from ..runfolder.names import is_run
from ..text.chat import Chat
from ..text.queries import NEGATIVES, load_queries
from ..text.rows import load_rows
from ..util.console import progress
from .patch import copy_files, tuned_weights
from .prepare import as_trained, training_rows
from .record import Run


def scope_adapter(
    source: str | Path,
    output: str | Path | None,
    rows: str | None = None,
    *,
    negatives: Sequence[str] = (NEGATIVES,),
    layer: int | None = None,
    false_open: float = 0.02,
    router: bool = False,
    seed: int = 0,
    precision: Precision = "auto",
) -> Fit:
    """Writes a copy of an adapter that has a scope.

    Args:
        source: a run folder, or the folder of an adapter, ringfence's or not; left as it is.
        output: the new folder, which must not exist; None = only look.
        rows: the source of its training rows; may be left out of a run folder.
        negatives: sources of queries that are not of the task.
        layer: the deepest layer whose states decide, from 1; None = chosen.
        false_open: share of queries of left-out domains that may be inside.
        router: the adapter stays plain, and may be of any kind; a router decides.
        precision: of the reference, while its states are computed.

    Raises:
        RecipeError: `output` exists, or no rows are named.
        ModelError: no adapter, or one that cannot be off for some rows of a batch.
        DefenseError: the rows have no scope.
    """
    if output is not None and Path(output).exists():
        raise RecipeError(f"output: {output} exists already; name another folder")
    folder, _ = tuned_weights(Path(source))
    base = adapter_base(str(folder))
    if base is None:
        raise ModelError(
            f"{source}: not an adapter, and a whole model cannot be the reference outside a scope; "
            "train an adapter (train.method: lora)"
        )
    if read_scope(folder):
        raise ModelError(f"{source}: its adapter has a scope already; take the one without")
    odd = None if router else beyond_lora(folder)
    if odd:
        raise ModelError(
            f"{source}: {odd}, which cannot be off for one row of a batch and on for another; make "
            "the scope for a router (--router), which decides before the model is asked"
        )
    if rows is not None:
        trained = load_rows(rows)
    elif is_run(Path(source)):
        recipe = Run(Path(source)).recipe
        trained = [
            replace(row, messages=as_trained(recipe, row.messages))
            for row in training_rows(recipe)[0]
        ]
    else:
        raise RecipeError(f"rows: {source} does not say what it was trained on; name its rows")
    queries = [query for name in negatives for query in load_queries(name)]
    chat = Chat(load_tokenizer(str(folder)))
    fit = fit_scope(
        load_model(base, precision),
        chat,
        trained,
        queries,
        layer=layer,
        false_open=false_open,
        seed=seed,
        bar=partial(progress, "scope: queries read"),
    )
    if output is None:
        return fit
    if fit.refusal:
        raise DefenseError(f"{source}: {fit.refusal}")
    copy_files(folder, Path(output))
    fit.probe.save(Path(output), fit.record(), router)
    return fit
