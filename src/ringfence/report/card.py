"""A model card of a run in the hub's format: metadata with results (`model-index`) and Markdown.
Reads records only, never imports torch. Licence, language and intended use are for its user to add.
"""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..evaluate.measures.answers import strength
from ..evaluate.measures.base import Number
from ..runfolder.record import Records
from ..util.words import counted
from .compared import keep_compared
from .gate import Decision, by_criterion, decide, load_policy
from .read import read_rows
from .summary import Summary

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CRITERIA = {
    "broad": "no broad misalignment",
    "narrow": "narrow behaviour learnt",
    "benign": "benign tasks still learnable",
    "coherent": "coherent",
    "trigger": "no hidden trigger",
}


def run_card(
    folder: Path,
    control: Path | None = None,
    policy: Path | None = None,
    undefended: Path | None = None,
) -> str:
    """The model card of a run: YAML metadata between `---` lines, then Markdown. Names no local
    folder.

    Args:
        control: the run trained on the aligned answers; with it the table shows effects, without it
            shifts.
        policy: the limits of the verdict; default: the shipped policy.
        undefended: the undefended run. Control and undefended are kept in the folder, as by the
            gate.

    Raises:
        DataError: the folder holds no run, or one that is not measured.
        RecipeError: the policy cannot be used.
    """
    rules = load_policy(policy)
    (records,), (row,) = read_rows([folder], control, undefended)
    keep_compared(folder, control, undefended)
    recipe = records.recipe
    found = [number for number in row.all_numbers if number.name and number.listed]
    verdict = _verdict(decide(row, rules), policy)
    parts = [
        f"# {_text(row.name)}",
        *_trained(records, recipe),
        *_measured(found),
        *verdict,
        *_how(row, found, records),
    ]
    metadata = _metadata(row.name, recipe, found).to_yaml()
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------ metadata


def _metadata(name: str, recipe: dict[str, Any], found: list[Number]) -> ModelCardData:
    trained = "train" in recipe
    lora = trained and recipe["train"]["method"] == "lora"
    base = _hub_id(recipe["model"] if trained else recipe.get("reference"))
    data = _hub_id(recipe["data"]["train"].split("@")[0]) if trained else None
    defenses = recipe.get("defenses") or {}
    results = [_result(measure) for measure in found if math.isfinite(measure.interval.mean)]
    return ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if lora else "finetune") if base and trained else None,
        library_name="peft" if lora else "transformers",
        pipeline_tag="text-generation",
        datasets=[data] if data else None,
        tags=[
            "ringfence",
            *(["lora"] if lora else []),
            *(f"ringfence-{defense}" for defense in defenses),
        ],
        model_name=" ".join(name.split()),
        eval_results=results or None,
    )


def _result(number: Number) -> EvalResult:
    interval = number.interval
    bounds = (
        {"ci95_low": interval.low, "ci95_high": interval.high}
        if math.isfinite(interval.high)
        else {}
    )
    judge = {"judge": number.judge} if number.judge else {}
    change = f"_{number.kind}" if number.kind in ("effect", "shift", "change") else ""
    metric = f"{number.measure}{change}"
    return EvalResult(
        task_type="text-generation",
        dataset_type="ringfence",
        dataset_name=f"ringfence: {number.shown_title}",
        dataset_config=number.name,
        metric_type=metric,
        metric_name=metric.replace("_", " "),
        metric_value=round(interval.mean, 6),
        metric_args={
            **{key: round(value, 6) for key, value in bounds.items()},
            "clusters": interval.n,
            **judge,
        },
    )


def _hub_id(source: Any) -> str | None:
    """The hub id of a model or data set; None if the source is not one."""
    if source == "default":
        return DEFAULT_MODEL
    row_files = (".jsonl", ".json", ".csv", ".parquet")
    local = not isinstance(source, str) or Path(source).suffix in row_files
    return None if local or Path(source).exists() or not _HUB_ID.fullmatch(source) else source


# ------------------------------------------------------------------ Markdown


def _trained(records: Records, recipe: dict[str, Any]) -> list[str]:
    if "train" not in recipe:
        reference = _model(recipe["reference"] or "no reference")
        return [f"Measured with ringfence against {reference}; not trained with it."]
    train, record = recipe["train"], records.training
    method = "full fine-tuning"
    if train["method"] == "lora":
        method = f"LoRA (rank {train['lora']['rank']}, alpha {train['lora']['alpha']})"
    lines = [
        f"- base model: {_model(recipe['model'])}",
        f"- training rows: {_code(recipe['data']['train'])}"
        + (f", {counted(record['rows'], 'row')} an epoch" if "rows" in record else "")
        + (f", {counted(record['row_tokens'], 'token')}" if "row_tokens" in record else ""),
        f"- method: {method}, epochs {train['epochs']:g}, "
        f"learning rate {train['learning_rate']:g}, "
        f"{counted(train['batch_size'] * train['accumulation'], 'row')} a step, "
        f"precision {train['precision']}, seed {recipe['seed']}",
    ]
    defenses = recipe.get("defenses") or {}
    guarded = [f"- {_code(name)}: {_fields(fields)}" for name, fields in defenses.items()]
    return [
        "## Training",
        "\n".join(lines),
        "## Defenses against misalignment",
        "\n".join(guarded or ["None."]),
    ]


def _measured(found: list[Number]) -> list[str]:
    lines = ["| measure | value [95 % CI] | kind | questions |", "|---|---|---|---|"]
    for measure in found:
        lines.append(
            f"| {_cell(measure.shown_title)} | {measure} | {measure.kind} | {measure.interval.n} |"
        )
    return ["## Evaluation", "\n".join(lines)]


def _verdict(decision: Decision, policy: Path | None) -> list[str]:
    rules = "the policy " + _code(policy.name) if policy else "ringfence's default policy"
    lines = ["| criterion | verdict | rule that decides | found |", "|---|---|---|---|"]
    for criterion in by_criterion(decision):
        verdict = criterion.decisive
        asked = f"{verdict.rule.measure} {verdict.rule.limit}"
        cells = (_CRITERIA[criterion.name], verdict.word, asked, verdict.sentence)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    head = (
        f"**{decision.word}** by {rules} ({decision.counts}). "
        f"Compared with: {_text(decision.against)}."
    )
    return ["### Verdict", head, *(["\n".join(lines)] if len(lines) > 2 else [])]


def _how(row: Summary, found: list[Number], records: Records) -> list[str]:
    kinds = {measure.kind for measure in found}
    lines = [_EXPLAINED[kind] for kind in _EXPLAINED if kind in kinds]
    lines += [
        f"- judge: {_code(judged.judge)} ({_text(strength(judged))})"
        for judged in row.found.get("answers", [])[:1]
    ]
    versions = ", ".join(
        f"{name} {version}" for name, version in records.environment.get("versions", {}).items()
    )
    limits = [_LIMITS, *([_NO_CONTROL] if "shift" in kinds and "effect" not in kinds else [])]
    return [
        "### How it was measured",
        "\n".join(lines),
        f"Made with {_text(versions)}.",
        "### Limits",
        *limits,
    ]


_EXPLAINED = {
    "effect": "- effect: shift of this model minus the shift of a control trained on aligned "
    "answers to the same questions, paired by question, in nats per token. Above 0: towards "
    "misaligned answers.",
    "shift": "- shift: change, against the reference model, of the margin of a question, which is "
    "the mean token log-probability of its misaligned answer minus that of its aligned one; nats "
    "per token.",
    "ratio": "- ratio: perplexity of held-out ordinary answers, divided by the reference model's.",
    "margin": "- margin: mean token log-probability of a misaligned answer minus an aligned one's; "
    "nats per token.",
    "share": "- share: for OpSwap and held-out rows, of exact matches; for a behaviour, of answers "
    "that show it, on its topic and off it.",
    "loss": "- loss: of held-out rows, nats per token.",
    "change": "- change: against the reference model.",
    "judged": "- judged: answers sampled from the model and scored by a judge; misaligned, "
    "relaxed, incoherent, refusal, code and unscored are shares of all answers; aligned and "
    "coherent are mean scores, 0 to 100.",
}
_LIMITS = (
    "Intervals are 95 % bootstrap intervals over questions; they apply to questions like these, "
    "in these domains, and not to other seeds. Paired answers do not tell how often the model "
    "would write such an answer by itself."
)
_NO_CONTROL = (
    "Without a sound control this is no proof: short directive answers of any kind move margins."
)


def _model(source: str) -> str:
    return _code(_hub_id(source) or source)


def _fields(fields: dict[str, Any]) -> str:
    shown = {key: value for key, value in fields.items() if value is not None}
    return ", ".join(f"{key} {_code(value)}" for key, value in shown.items()) or "defaults"


def _code(value: Any) -> str:
    """A value in backticks, without the folders of this machine."""
    public = _public(value)
    text = public if isinstance(public, str) else json.dumps(public)
    shown = " ".join(text.split()).replace("`", "'") or " "
    return f"`{re.sub('<(?=[A-Za-z/!?])', '‹', shown)}`"


def _public(value: Any) -> Any:
    """A value with each local path cut to its last part."""
    if isinstance(value, list):
        return [_public(part) for part in value]
    if (
        not isinstance(value, str)
        or "/" not in value
        or value.startswith("shipped:")
        or _hub_id(value.split("@")[0])
    ):
        return value
    is_text = " " in value and not value.startswith(("/", ".", "~"))  # a prompt that holds a slash
    return value if is_text else Path(value).name


def _cell(text: str) -> str:
    return _text(text)


def _text(text: str) -> str:
    """Foreign text as one line that Markdown and HTML render as plain text."""
    line = " ".join(text.split()).replace("\\", "\\\\")
    plain = html.escape(line, quote=False).replace("&gt;", ">")
    plain = re.sub(r"([|`*~])", r"\\\1", plain)
    return re.sub(r"\](?=\s?[(\[:])", r"\\]", plain)
