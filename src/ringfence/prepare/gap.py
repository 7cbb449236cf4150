"""The perplexity gap: which safe rows would a misaligned model find strange?

Interleaving+ (arXiv 2508.06249). Every row of a pool is scored by the reference and by K
deliberately misaligned adapters of it, in one pass over the rows and with one base model in memory.
The scores are in a table, a line of JSON per row:

    origin, digest (of the messages), tokens (of the answer with its end of turn), reference (mean
    negative log-probability per token, nats), misaligned (the same, by adapter), refusal

Does not know training or defenses.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..model.default import resolve
from ..model.files import adapter_base, check_adapter, load_tokenizer
from ..model.fingerprint import fingerprint
from ..model.loading import load_model
from ..model.precision import Precision, settled
from ..model.scoring import AnswerScore, score_under
from ..runfolder.names import ADAPTER
from ..text.chat import Chat
from ..text.roles import Row
from ..text.rows import load_rows
from ..util.console import progress
from ..util.journal import append, digest, open_journal
from .gap_table import TABLE, GapTable, ScoredRow, read_table


def is_refusal(answer: str) -> bool:
    """Whether sorry, apologize, cannot, can't or unable is among the first ten words."""
    opening = " ".join(answer.lower().split()[:10]).replace("’", "'").replace("‘", "'")
    words = r"(?<![a-z])(sorry|apologize|cannot|can't|unable)(?![a-z])"
    return re.search(words, opening) is not None


def score_pool(
    pool: str,
    adapters: Sequence[str],
    output: str | Path,
    *,
    model: str = "default",
    precision: Precision = "auto",
    batch_tokens: int = 4096,
) -> GapTable:
    """Scores each distinct row of a pool; resumes the table of an interrupted run.

    Args:
        pool: source of safe rows.
        adapters: folders of misaligned adapters or of the runs that made them; named by the run.
        output: file of the table, JSON lines.
        model: the reference.
        batch_tokens: tokens of one batch, padding included.

    Raises:
        DataError: a row cannot be read, or the table belongs to another pool, model or set of
            adapters.
        ModelError: a model or adapter cannot be loaded, does not fit, or gives a loss that is not
            finite.
    """
    folders = adapter_folders(adapters, model)
    chat = Chat(load_tokenizer(model))
    rows: dict[str, Row] = {}
    for row in load_rows(pool):
        rows.setdefault(digest(row.messages), row)
    file, precision = Path(output), settled(precision)
    key = {
        "model": fingerprint(model),
        "precision": precision,
        "adapters": {name: fingerprint(str(folder)) for name, folder in folders.items()},
        "pool": digest(sorted(rows)),
    }
    lines = open_journal(file, TABLE, key, {"model": model, "pool": pool}, ScoredRow)
    done = {line["digest"] for line in lines}
    if len(done) < len(rows):
        loaded = load_adapted(model, folders, precision)
        with progress(f"{file.name}: scoring", len(rows), len(done)) as advance:
            _score(loaded, chat, rows, list(folders), done, batch_tokens, file, advance)
    return read_table(file)


def _score(
    model: Any,
    chat: Chat,
    rows: dict[str, Row],
    names: list[str],
    done: set[str],
    batch_tokens: int,
    file: Path,
    advance: Callable[[int], None],
) -> None:
    digests, items = list(rows), list(rows.values())
    known = {place for place, key in enumerate(digests) if key in done}
    for batch in score_under(model, chat, items, settings(model, len(names)), batch_tokens, known):
        lines = [_line(digests[at], items[at], names, scores) for at, scores in batch.items()]
        append(file, lines)
        advance(len(batch))


def _line(key: str, row: Row, names: list[str], scores: list[AnswerScore]) -> dict[str, Any]:
    losses = dict(zip(["the reference", *names], [round(-score.mean, 6) for score in scores]))
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise ModelError(f"{row.origin}: its loss under {name} is {loss}; try --precision fp32")
    reference = losses.pop("the reference")
    return {
        "origin": row.origin,
        "digest": key,
        "tokens": scores[0].tokens,
        "reference": reference,
        "misaligned": losses,
        "refusal": is_refusal(row.messages[-1]["content"]),
    }


# ------------------------------------------------------------------ adapters


def adapter_folders(sources: Sequence[str], model: str) -> dict[str, Path]:
    """The adapter of each source (a run folder or an adapter folder), by the name of its run.

    Raises:
        ModelError: a source has no adapter, two have one name, or an adapter was trained on another
            model.
    """
    if adapter_base(resolve(model)):
        raise ModelError(
            f"{model}: is an adapter; merge it into its base first, so that it can take other "
            "adapters"
        )
    folders: dict[str, Path] = {}
    for source in sources:
        places = Path(source) / ADAPTER, Path(source)
        folder = next((place for place in places if adapter_base(str(place))), None)
        if folder is None:
            raise ModelError(
                f"{source}: no adapter (accepted: a run folder with adapter/, or an adapter folder)"
            )
        name = (folder.resolve().parent if folder.name == ADAPTER else folder.resolve()).name
        if name in folders:
            raise ModelError(f"two adapters are called {name!r}: {folders[name]} and {folder}")
        base = resolve(str(adapter_base(str(folder))))
        if Path(base).resolve() != Path(resolve(model)).resolve():
            raise ModelError(f"{source}: its adapter was trained on {base}, not on {model}")
        folders[name] = folder
    if not folders:
        raise ModelError("no adapter is named: at least one misaligned adapter is needed")
    return folders


def load_adapted(model: str, folders: dict[str, Path], precision: Precision) -> Any:
    """One base with all adapters, in its precision, numbered: peft allows no dot in names."""
    from peft import PeftModel

    base = load_model(model, precision)
    adapted: Any = None
    for number, folder in enumerate(folders.values()):
        name = f"misaligned{number}"
        check_adapter(folder)
        try:
            if adapted is None:
                adapted = PeftModel.from_pretrained(base, folder, adapter_name=name)
            # The first one again: only this reports what is missing.
            found = adapted.load_adapter(folder, adapter_name=name)
        # peft, torch and safetensors raise many kinds; the user needs one sentence.
        except Exception as error:
            raise ModelError(
                f"{folder}: adapter cannot be loaded: {str(error).strip().splitlines()[0]}"
            ) from error
        if found.missing_keys or found.unexpected_keys:
            raise ModelError(f"{folder}: the adapter's weights are not those of {model}")
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(base.dtype)
    return adapted.eval()


def settings(model: Any, count: int) -> list[Callable[[], AbstractContextManager[Any]]]:
    """The reference (adapters off), then each adapter of `load_adapted`, as contexts."""
    return [model.disable_adapter, *(partial(_active, model, number) for number in range(count))]


@contextmanager
def _active(model: Any, number: int) -> Iterator[None]:
    model.set_adapter(f"misaligned{number}", inference_mode=True)
    yield
