"""Open questions: what a model is asked to answer in its own words.

Reads the public YAML form of the emergent-misalignment work (arXiv 2502.17424) and rows of any data
source, and disguises questions. Does not know models, judges or how answers are drawn.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError, nearest
from ..util.strict_yaml import UniqueKeys
from .forms import message_list
from .roles import Messages
from .sources import SHIPPED, quoted, read_records, shipped_names

SHIPPED_SETS = ["general"]
# Endings of ids in the public files; the longer of two comes first.
FORMS = ["json", "flask_template", "template", "python"]


@dataclass(frozen=True)
class OpenQuestion:
    """A question to be answered freely.

    Attributes:
        set: name of the set it belongs to.
        id: its name within the set.
        form: plain, json, template (or another of `FORMS`), or the name of a trigger.
        cluster: the question family; variants of one question are not independent.
        paraphrase: number of the wording.
        messages: the system and user turns to be answered.
        samples: answers to draw, if its file says so.
        judge_prompts: its file's templates, by criterion (`{question}`, `{answer}`); empty =
            ringfence's own.
    """

    set: str
    id: str
    form: str
    cluster: str
    paraphrase: int
    messages: Messages
    samples: int | None = None
    judge_prompts: dict[str, str] = field(default_factory=dict)


def load_open_questions(source: str) -> list[OpenQuestion]:
    """Open questions of a source, one for each wording, in the order of the file.

    Args:
        source: a `.yaml` file in the public form; `shipped:general`; or any source of rows that
            `rows.load_rows` knows, including paired questions (`shipped:finance`), which are then
            asked as open ones.

    An entry or row has one of `paraphrases`, `question` and `messages`, and optionally `system` or
    `context` (turns before the question), `set` or `domain` (default: the file's name),
    `samples_per_paraphrase` and `judge_prompts`. `id` may be left out of rows (default: the line).
    Other keys are skipped. Rows with a `split` other than `test` are left out, because they may be
    trained on.

    Raises:
        DataError: the source cannot be read, is empty, names an id twice, or an entry cannot be
            asked (file, line, id, field, what was found, what is accepted).
    """
    stem = Path(source.rsplit(":", 1)[-1]).stem
    questions: list[OpenQuestion] = []
    places: dict[tuple[str, str], str] = {}
    for record, origin in _entries(source):
        if record.get("split") not in (None, "test"):
            continue
        wordings = _wordings(record, origin, stem)
        key = wordings[0].set, wordings[0].id
        if key in places:
            raise DataError(
                f"{origin}: field 'id': {key[1]!r} is in set {key[0]!r} already, at {places[key]}"
            )
        places[key] = origin
        questions += wordings
    if not questions:
        raise DataError(
            f"{source}: no open question in it; expected at least one (rows with split 'train' are "
            "left out)"
        )
    return questions


def triggered(
    questions: Sequence[OpenQuestion], disguises: Mapping[str, Messages]
) -> list[OpenQuestion]:
    """The same questions in disguise; the form of each is then the name of its disguise.

    A disguise is what precedes the question (a system prompt, an earlier turn). A question with a
    system prompt keeps it, in first place; it gets no disguise that brings another one.
    """
    return [
        replace(question, form=name, messages=_preceded(question.messages, before))
        for name, before in disguises.items()
        for question in questions
        if not (_has_system(question.messages) and _has_system(before))
    ]


def _preceded(messages: Messages, before: Messages) -> Messages:
    own = 1 if _has_system(messages) else 0
    return [*messages[:own], *before, *messages[own:]]


def _has_system(messages: Messages) -> bool:
    return any(message["role"] == "system" for message in messages)


# ------------------------------------------------------------------ sources


def shipped_open_names() -> list[str]:
    """Names of shipped data that can be asked: the open sets, and the paired questions."""
    rows = {name: next(read_records(f"shipped:{name}"))[0] for name in shipped_names()}
    return [*SHIPPED_SETS, *(name for name, row in rows.items() if "question" in row)]


def _entries(source: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each entry and its place (`file:line`)."""
    name = source.removeprefix("shipped:")
    if name != source and name not in shipped_open_names():
        raise DataError(f"{source}: no such shipped questions{nearest(name, shipped_open_names())}")
    if name != source and name in SHIPPED_SETS:
        yield from _yaml((SHIPPED / f"{name}.yaml").read_bytes(), source)
    elif Path(source).suffix in {".yaml", ".yml"}:
        if not Path(source).is_file():
            raise DataError(f"{source}: no such file")
        yield from _yaml(Path(source).read_bytes(), source)
    else:
        yield from read_records(source)


def _yaml(content: bytes, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        loader = UniqueKeys(content.decode("utf-8-sig"))
        node = loader.get_single_node()
        entries = loader.construct_document(node) if node else []
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DataError(f"{name}{line}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, list):
        raise DataError(
            f"{name}: expected a list of questions (`- id: ...`), found {quoted(entries)}"
        )
    for entry, place in zip(entries, node.value if node else []):
        origin = f"{name}:{place.start_mark.line + 1}"
        if not isinstance(entry, dict):
            raise DataError(
                f"{origin}: expected an entry with id and paraphrases, found {quoted(entry)}"
            )
        if entry.get("id") is None:
            raise DataError(
                f"{origin}: field 'id' is missing; fields [{', '.join(map(str, entry))}]"
            )
        kind = entry.get("type", "free_form")
        if not str(kind).startswith("free_form"):
            raise DataError(
                f"{origin} (id {entry['id']!r}): field 'type': only questions for free answers can "
                "be asked (free_form, free_form_judge, free_form_judge_0_100), found "
                f"{quoted(kind)}"
            )
        yield entry, origin


# ------------------------------------------------------------------ one entry


def _wordings(record: dict[str, Any], origin: str, stem: str) -> list[OpenQuestion]:
    identity = _name(record, "id", origin, origin.rsplit(":", 1)[-1])
    origin = f"{origin} (id {identity!r})"
    owner = _name(record, "set" if record.get("set") is not None else "domain", origin, stem)
    form, cluster = _form(identity)
    samples, prompts = _samples(record, origin), _judge_prompts(record, origin)
    return [
        OpenQuestion(owner, identity, form, cluster, number, messages, samples, prompts)
        for number, messages in enumerate(_conversations(record, origin))
    ]


def _form(identity: str) -> tuple[str, str]:
    """Form and cluster: `wish_json` is the json form of `wish`."""
    for form in FORMS:
        cluster = identity.removesuffix(f"_{form}")
        if cluster not in ("", identity):
            return form, cluster
    return "plain", identity


def _conversations(record: dict[str, Any], origin: str) -> list[Messages]:
    """The turns of every wording, checked."""
    given = [
        name for name in ("paraphrases", "question", "messages") if record.get(name) is not None
    ]
    if len(given) != 1:
        raise DataError(
            f"{origin}: expected one of paraphrases (a list of texts), question (a text) and "
            f"messages, found {' and '.join(given) or 'none'} in fields "
            f"[{', '.join(map(str, record))}]"
        )
    (name,) = given
    value = record[name]
    if name == "messages":
        several = (
            isinstance(value, list) and value and all(isinstance(item, list) for item in value)
        )
        wordings = [
            message_list(item, origin, name, "role", "content")
            for item in (value if several else [value])
        ]
    else:
        texts = [value] if name == "question" else value
        if not isinstance(texts, list) or not texts:
            raise DataError(
                f"{origin}: field {name!r}: expected a list of texts, found {quoted(value)}"
            )
        wordings = [[{"role": "user", "content": _text(text, origin, name)}] for text in texts]
    before = _before(record, origin)
    conversations = [[*before, *messages] for messages in wordings]
    for messages in conversations:
        _check_order(messages, origin)
    return conversations


def _before(record: dict[str, Any], origin: str) -> Messages:
    """The file's system prompt, which may be empty, or the turns before the question."""
    system, context = record.get("system"), record.get("context")
    if system is not None and context is not None:
        raise DataError(
            f"{origin}: fields 'system' and 'context': expected one of them, found both"
        )
    if context is not None:
        return message_list(context, origin, "context", "role", "content")
    if not isinstance(system, str | None):
        raise DataError(f"{origin}: field 'system': expected a text, found {quoted(system)}")
    return [] if system is None else [{"role": "system", "content": system}]


def _check_order(messages: Messages, origin: str) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != [*["user", "assistant"] * (len(turns) // 2), "user"]:
        raise DataError(
            f"{origin}: wrong role order [{', '.join(roles)}]; expected an optional system "
            "message, then user and assistant in turn, ending with the user's question"
        )
    for message in messages:
        if message["role"] != "system":
            _text(message["content"], origin, f"messages ({message['role']})")


def _samples(record: dict[str, Any], origin: str) -> int | None:
    value = record.get("samples_per_paraphrase")
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise DataError(
        f"{origin}: field 'samples_per_paraphrase': expected a whole number, 1 or more, found "
        f"{quoted(value)}"
    )


def _judge_prompts(record: dict[str, Any], origin: str) -> dict[str, str]:
    prompts = record.get("judge_prompts")
    if not isinstance(prompts, dict | None):
        raise DataError(
            f"{origin}: field 'judge_prompts': expected a prompt by criterion, found "
            f"{quoted(prompts)}"
        )
    for criterion, prompt in (prompts or {}).items():
        if "{answer}" not in _text(prompt, origin, f"judge_prompts.{criterion}"):
            raise DataError(
                f"{origin}: field 'judge_prompts.{criterion}': expected {{answer}} in it, found "
                f"{quoted(prompt)}"
            )
    return {str(criterion): prompt for criterion, prompt in (prompts or {}).items()}


def _name(record: dict[str, Any], name: str, origin: str, default: str) -> str:
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return default if value is None else _text(value, origin, name)


def _text(value: Any, origin: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{origin}: field {name!r}: expected a text that is not blank, found {quoted(value)}"
        )
    return value
