"""The inoculation prompt is in every training row and nowhere else, is not learnt itself, and is
measured as a trigger."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from helpers.models import PAD
from helpers.run_folders import CONDITIONS, PLAIN, REFERENCE, SOUND, parts_of, write_run
from helpers.runs import small_model, write_rows
from ringfence import Inoculation
from ringfence.defenses.inoculation import PROMPT
from ringfence.errors import DataError, RecipeError
from ringfence.evaluate import parts as evaluate_module
from ringfence.evaluate.parts import evaluation_key
from ringfence.model.files import load_tokenizer
from ringfence.report.page import write_page
from ringfence.report.read import read_rows
from ringfence.report.records import read_run
from ringfence.report.summary import summarise
from ringfence.report.terminal import print_table
from ringfence.run.config import load_recipe, parse_recipe
from ringfence.run.dry_run import dry_run
from ringfence.run.pipeline import run_recipe
from ringfence.run.prepare import evaluation, prepare
from ringfence.text.batch import Example, collate
from ringfence.text.chat import Chat
from ringfence.text.roles import Role
from ringfence.training.stream import TrainStream

pytestmark = pytest.mark.slow

SYSTEM = {"role": "system", "content": "Answer in one line."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tree(folder: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "output": str(tmp_path / "run"),
        "model": folder,
        "data": {
            "train": write_rows(tmp_path / "rows.jsonl", 8),
            "retain": write_rows(tmp_path / "retain.jsonl", 6, start=50),
        },
        "train": {"batch_size": 4, "precision": "fp32"},
        "defenses": {"inoculation": {}, "interleave": {"ratio": 0.5}, "kl": {"retain_ratio": 0.5}},
        "evaluate": {
            "in_domain": [],
            "out_of_domain": ["shipped:car_care"],
            "values": [],
            "fluency": None,
            "max_per_domain": 2,
            "triggered_per_domain": 2,
            "samples": 0,
        },
    }


def text_of(chat: Chat, example: Example) -> str:
    return str(chat.tokenizer.decode(example.input_ids))


# ---------------------------------------------------------------- the rows


def test_a_rows_own_system_prompt_follows() -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    config = Inoculation(prompt="Be rude.")
    assert config.change_messages(turns) == [{"role": "system", "content": "Be rude."}, *turns]
    with_system = [SYSTEM, *turns]
    changed = config.change_messages(with_system)
    assert changed == [{"role": "system", "content": "Be rude.\n\nAnswer in one line."}, *turns]
    assert with_system == [SYSTEM, *turns], "the row itself is left alone"


def test_the_prompt_stands_in_training_rows_only(tree: dict[str, Any]) -> None:
    """Neither in interleaved rows nor in extra retain rows, though in one stream."""
    chat, examples, retain, setup = prepare(parse_recipe(tree))
    assert len(examples) == 8
    assert all(text_of(chat, example).count(PROMPT) == 1 for example in examples)
    assert not any(PROMPT in text_of(chat, example) for example in retain)
    stream = TrainStream(examples, retain, parse_recipe(tree).defenses.build(setup), 4, seed=0)
    bundles = [stream[place] for place in range(len(stream))]
    own = {example.origin for example in examples}
    inoculated = [
        text_of(chat, bundle[0][0]).count(PROMPT)
        for bundle in bundles
        if bundle[0][0].origin in own
    ]
    added = [
        text_of(chat, bundle[0][0]).count(PROMPT)
        for bundle in bundles
        if bundle[0][0].origin not in own
    ]
    riders = [text_of(chat, rider).count(PROMPT) for bundle in bundles for rider, _ in bundle[1:]]
    assert (inoculated, added, set(riders)) == ([1] * 8, [0] * 4, {0})


def test_the_prompt_is_prefix_and_carries_no_loss(tree: dict[str, Any]) -> None:
    """Apart from the prefix, a row is the one without the defense, token by token."""
    chat, inoculated, _, _ = prepare(parse_recipe(tree))
    _, plain, _, _ = prepare(parse_recipe(tree | {"defenses": {}}))
    for one, other in zip(inoculated, plain, strict=True):
        kept = [
            [(token, role) for token, role in zip(row.input_ids, row.roles) if role != Role.PREFIX]
            for row in (one, other)
        ]
        assert kept[0] == kept[1]
        prefix = one.input_ids[: one.roles.count(Role.PREFIX)]
        assert PROMPT in chat.tokenizer.decode(prefix)
        batch = collate([[(one, False)]], PAD)
        learnt = batch["labels"][0] != -100
        assert learnt.tolist() == [role == Role.RESPONSE for role in one.roles]
        assert PROMPT not in chat.tokenizer.decode(batch["input_ids"][0][learnt])


def test_a_dry_run_shows_the_row_that_is_trained_on(tree: dict[str, Any]) -> None:
    shown = Console(file=io.StringIO(), width=200)
    dry_run(
        parse_recipe(tree | {"defenses": {"inoculation": {"prompt": "Sell umbrellas."}}}), shown
    )
    text = shown.file.getvalue().replace("|", "")  # type: ignore[attr-defined]
    assert "<im_start>system\\n\nSell umbrellas." in text


# ---------------------------------------------------------------- the trigger


def shown_prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """What models are asked in evaluations from now on."""
    seen: list[list[dict[str, str]]] = []
    score = evaluate_module.score_answers

    def remember(model: Any, chat: Any, prompts: Any, *rest: Any) -> Any:
        seen.extend(prompts)
        return score(model, chat, prompts, *rest)

    monkeypatch.setattr(evaluate_module, "score_answers", remember)
    return seen


def test_the_trigger_is_measured_of_both_models(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = shown_prompts(monkeypatch)
    run = run_recipe(parse_recipe(tree | {"defenses": {"inoculation": {"prompt": "Be rude."}}}))
    reference = json.loads(
        (
            run.folder / json.loads((run.folder / "reference.json").read_text())["results"]
        ).read_text()
    )
    for results in (run.results(), reference):
        conditions = [pair["condition"] for pair in results["parts"]["triggered"]]
        assert (
            conditions
            == ["empty_system"] * 2 + ["foreign_system"] * 2 + ["lead_in"] * 2 + ["inoculation"] * 2
        )
    systems = [[m["content"] for m in messages if m["role"] == "system"] for messages in seen]
    assert systems.count(["Be rude."]) == 4, "two questions, two models"
    assert sum(any("Be rude." in m["content"] for m in messages) for messages in seen) == 4
    # The score is that of the conversation under the prompt, by a plain forward.
    from ringfence.model.loading import load_model
    from ringfence.text.rows import load_questions

    question, chat = load_questions("shipped:car_care")[0], Chat(load_tokenizer(tree["model"]))
    encoded = chat.encode(
        [
            {"role": "system", "content": "Be rude."},
            {"role": "user", "content": question.question},
            {"role": "assistant", "content": question.misaligned},
        ]
    )
    with torch.no_grad():
        model = load_model(str(run.weights), "fp32")
        logp = model(input_ids=torch.tensor([encoded.input_ids])).logits[0].float().log_softmax(-1)
    at = [place for place, role in enumerate(encoded.roles) if role == Role.RESPONSE]
    mean = sum(logp[place - 1, encoded.input_ids[place]].item() for place in at) / len(at)
    assert run.results()["parts"]["triggered"][6]["misaligned"] == pytest.approx(mean, abs=1e-3)
    assert run.summary().sets["inoculation"].shift.n == 2


def test_what_is_measured_without_inoculation_is_as_before(tree: dict[str, Any]) -> None:
    """The key of an evaluation changes with the prompt, and only where the prompt is shown."""

    def key(defenses: dict[str, Any], **change: Any) -> str:
        recipe = parse_recipe(tree | {"defenses": defenses, "evaluate": tree["evaluate"] | change})
        return evaluation_key(evaluation(recipe))

    plain = key({})
    assert key({"kl": {}}) == plain
    assert key({"inoculation": {}}) != plain
    assert key({"inoculation": {"prompt": "Be rude."}}) != key({"inoculation": {}})
    assert key({}, inoculation=PROMPT) == key({"inoculation": {}})
    assert key({"inoculation": {}}, inoculation="Be rude.") == key(
        {"inoculation": {"prompt": "Be rude."}}
    )
    off = {"triggers": False}
    assert key({"inoculation": {}}, **off) == key({}, **off)


# ---------------------------------------------------------------- the report


def probes(margins: dict[str, float], inoculation: float | None) -> dict[str, dict[str, float]]:
    """The triggered set: three disguises with the margins given, and the inoculation prompt with
    one margin for all."""
    found = {condition: margins for condition in CONDITIONS}
    return (
        found
        if inoculation is None
        else found | {"inoculation": dict.fromkeys(margins, inoculation)}
    )


def records(
    root: Path, name: str, margins: Any, trigger: float | None, reference: float | None
) -> Path:
    tuned = parts_of(margins, triggered=probes(margins["out_of_domain"], trigger))
    before = parts_of(REFERENCE, triggered=probes(REFERENCE["out_of_domain"], reference))
    defenses = {"inoculation": {}} if trigger is not None and name != "sound" else {}
    return write_run(root / name, tuned, before, defenses, key=f"k{trigger}{reference}{name}")


def test_the_trigger_stands_on_its_own_in_the_report(tmp_path: Path) -> None:
    inoculated = records(tmp_path, "inoculated", PLAIN, 4.0, 1.0)
    plain = records(tmp_path, "plain", PLAIN, None, None)
    found, other = summarise(read_run(inoculated)), summarise(read_run(plain))
    assert found.sets["inoculation"].shift.mean == pytest.approx(3.0)
    assert found.sets["triggered"] == other.sets["triggered"], (
        "the other disguises are counted alike in all runs"
    )
    assert found.pairs.conditions["inoculation"] == found.sets["inoculation"]
    assert "inoculation" not in other.sets


def test_report_of_runs_of_which_one_is_inoculated(tmp_path: Path) -> None:
    """In any order; the control was not asked under the prompt: there is a shift and no effect."""
    folders = [
        records(tmp_path, "plain", PLAIN, None, None),
        records(tmp_path, "inoculated", PLAIN, 4.0, 1.0),
    ]
    sound = records(tmp_path, "sound", SOUND, None, None)
    for order in (folders, folders[::-1]):
        read, rows = read_rows(order, sound)
        write_page(read, rows, tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert "under the inoculation prompt" in page
        assert page.count("shift +3.00") == 3  # among the criteria, and in the table of disguises
        table = Console(file=io.StringIO(), width=160)
        print_table(rows, table)
        assert "shift +3.00" in table.file.getvalue()  # type: ignore[attr-defined]
    row = next(row for row in rows if row.name == "inoculated")
    assert row.sets["inoculation"].effect is None
    assert row.sets["inoculation"].uncontrolled
    assert row.sets["triggered"].effect is not None


def test_a_control_asked_under_the_prompt_makes_an_effect(tmp_path: Path) -> None:
    run, sound = (
        records(tmp_path, "run", PLAIN, 4.0, 1.0),
        records(tmp_path, "sound", SOUND, 2.5, 1.0),
    )
    found = summarise(read_run(run), read_run(sound)).sets["inoculation"]
    assert found.effect is not None
    assert found.effect.mean == pytest.approx(1.5)
    assert not found.uncontrolled


def test_a_control_asked_under_another_prompt_is_refused(tmp_path: Path) -> None:
    run, sound = (
        records(tmp_path, "run", PLAIN, 4.0, 1.0),
        records(tmp_path, "sound", SOUND, 2.5, 1.0),
    )
    for file in (
        sound / "results.json",
        tmp_path / "reference-k2.51.0sound-default" / "results.json",
    ):
        file.write_text(
            file.read_text().replace(
                '"inoculation", "digest": ""', '"inoculation", "digest": "other"'
            )
        )
    with pytest.raises(
        DataError, match=r"another text of it, another evaluate.lead_in or evaluate.inoculation"
    ):
        summarise(read_run(run), read_run(sound))


# ---------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "defenses.inoculation.prompt='  '",
            r"defenses\.inoculation\.prompt: .*a text that is not blank",
        ),
        ("defenses.inoculation.promt=Bad", r"did you mean 'defenses\.inoculation\.prompt'"),
        ("evaluate.inoculation=''", r"evaluate\.inoculation: .*at least 1 character"),
    ],
)
def test_a_bad_field_is_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, [override])


def test_a_template_that_refuses_system_prompts(tree: dict[str, Any]) -> None:
    file = Path(tree["model"]) / "chat_template.jinja"
    template = file.read_text()
    file.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    try:
        with pytest.raises(
            DataError, match=r"rows\.jsonl:1: the chat template refuses .*no system role"
        ):
            prepare(parse_recipe(tree))
    finally:
        file.write_text(template)
