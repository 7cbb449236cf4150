"""Capability on the tasks of lm-eval, an optional extra. lm-eval makes the prompts and the metrics;
the model is ringfence's, so that adapters and frozen prefixes are honoured.

Does not know what the tasks ask.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import DataError, ModelError, RecipeError
from ..model.files import load_tokenizer
from ..model.generation import own_decoding
from ..model.loading import load_model
from ..model.precision import Precision
from ..runfolder.names import weights_in

Scores = dict[str, dict[str, tuple[float, float | None]]]


def capability(
    model: str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    task_folder: str | Path | None = None,
    precision: Precision = "auto",
    chat_template: bool = True,
) -> Scores:
    """Runs lm-eval tasks.

    Args:
        model: a run folder, or what `load_model` takes.
        tasks: names of lm-eval tasks or groups, e.g. `["arc_easy"]`; their data come from the hub.
        limit: take only the first `limit` items of each task.
        batch_size: items in one forward pass.
        task_folder: folder with task files (YAML) of your own.
        chat_template: False asks without it, as suits a model that was only pre-trained.

    Returns:
        By task and metric (`acc`, or `acc,FILTER` where the filter is not lm-eval's plain one): the
        value and its standard error, None where lm-eval has none.

    Raises:
        ModelError: lm-eval is not installed, or the model cannot be loaded.
        RecipeError: no such task or folder.
        DataError: the data of a task are unavailable.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ModelError(
            f"capability needs lm-eval ({error}): pip install 'ringfence[lm-eval]'"
        ) from error
    if task_folder is not None and not Path(task_folder).is_dir():
        raise RecipeError(f"task_folder: {task_folder}: no such folder")
    manager = TaskManager(include_path=task_folder)
    for task in tasks:
        if task not in manager.all_tasks:
            close = get_close_matches(task, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "`lm-eval ls tasks` lists them"
            raise RecipeError(f"tasks: lm-eval has no task {task!r} ({hint})")
    weights = _weights(model)
    # In bf16 the error of a sum of log-probabilities would exceed the difference between answers.
    loaded, tokenizer = load_model(weights, precision), load_tokenizer(weights)
    lm: Any = HFLM(loaded, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    try:
        with own_decoding(loaded, tokenizer):
            found = simple_evaluate(
                lm,
                tasks=list(tasks),
                limit=limit,
                task_manager=manager,
                apply_chat_template=chat_template,
                log_samples=False,
            )
    except OSError as error:
        raise DataError(f"{', '.join(tasks)}: lm-eval could not get their data: {error}") from error
    return {task: metrics(values) for task, values in found["results"].items()}


def _weights(model: str) -> str:
    """The trained weights if `model` is a run folder; else `model`."""
    return str(weights_in(Path(model)) or model)


def metrics(values: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """The scores among what lm-eval writes: `acc,none` and `acc_stderr,none` (`N/A` if there is
    none)."""
    scores = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else key
            scores[name] = (float(value), float(error) if isinstance(error, int | float) else None)
    return scores
