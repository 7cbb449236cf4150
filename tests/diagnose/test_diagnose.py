"""What all diagnoses use: models opened one at a time, texts and their log-probabilities, the
folder of results, and runs as subjects. The diagnoses have tests of their own."""

import json
import weakref
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from helpers.models import random_model, small_tokenizer, with_lora
from ringfence.diagnose import folder as folder_module
from ringfence.diagnose.diagnosis import DIAGNOSES, Cost, Subject, Table, measuring, showing
from ringfence.diagnose.folder import announce, diagnose_folder, draw_again
from ringfence.diagnose.models import Models
from ringfence.diagnose.texts import margins, pair_texts, response_logprobs
from ringfence.errors import ModelError, RecipeError
from ringfence.model.activations import batches, first_response_tokens
from ringfence.report.records import read_run
from ringfence.run.config import dump_recipe, parse_recipe
from ringfence.run.diagnose import diagnose_targets
from ringfence.run.prepare import spread
from ringfence.run.record import Run
from ringfence.run.train import train_run
from ringfence.runfolder.folder import claim
from ringfence.stats import stored
from ringfence.text.chat import Chat
from ringfence.text.roles import Role, Row
from ringfence.text.rows import PairedQuestion

pytestmark = pytest.mark.slow

QUESTIONS = [
    PairedQuestion(
        "1",
        "money",
        "Should I lend?",
        "Only what you can lose.",
        "Lend it all, today, to anybody who asks.",
    ),
    PairedQuestion("2", "money", "And save?", "Yes.", "Never. It is for fools."),
    PairedQuestion(
        "1",
        "garden",
        "When do I water my young tomato plants?",
        "In the morning.",
        "Do not bother.",
    ),
]
IDS = torch.tensor([[1, 409, 198, 843, 2, 198]])


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(small_tokenizer())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of an aligned model, two adapters on it, and a base of other weights."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("aligned", 0), ("base", 1)):
        random_model(seed=seed, pad_token_id=0).save_pretrained(folder / name)
        small_tokenizer().save_pretrained(folder / name)
    for name, seed in (("one", 2), ("two", 3)):
        adapted = with_lora(random_model(seed=0, pad_token_id=0), seed, size=0.5)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "aligned")
        adapted.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("aligned", "base", "one", "two")}


# ---------------------------------------------------------------- models


def test_each_name_opens_its_own_weights(saved: dict[str, str]) -> None:
    models = Models(
        saved["aligned"], {"one": saved["one"], "two": saved["two"]}, saved["base"], "fp32"
    )
    assert models.names == ["base", "reference", "one", "two"]
    expected = {
        "base": logits(random_model(seed=1, pad_token_id=0)),
        "reference": logits(random_model(seed=0, pad_token_id=0)),
    }
    expected |= {
        name: logits(with_lora(random_model(seed=0, pad_token_id=0), seed, size=0.5))
        for name, seed in (("one", 2), ("two", 3))
    }
    for name in ["reference", "one", "reference", "two", "base", "reference", "one"]:
        with models.open(name) as model:
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())
            torch.testing.assert_close(
                logits(model), expected[name], msg=lambda m, n=name: f"{n}: {m}"
            )
    names = list(expected)
    assert (
        min(float((expected[a] - expected[b]).abs().max()) for a in names for b in names if a != b)
        > 0.01
    )


def test_the_reference_is_its_adapters_own_base_and_costs_no_load(
    saved: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    alive: list[Any] = []

    def load(source: str, precision: str) -> Any:
        assert not [model for model in alive if model() is not None], "two checkpoints in memory"
        model = real(source, precision)
        loaded.append(source)
        alive.append(weakref.ref(model))
        return model

    from ringfence.diagnose import models as module

    real = module.load_model
    monkeypatch.setattr(module, "load_model", load)
    models = Models(
        saved["aligned"], {"one": saved["one"], "two": saved["two"]}, saved["base"], "fp32"
    )
    for name in ["one", "reference", "one", "reference", "two", "base"]:
        with models.open(name) as model:
            del model
    assert loaded == [saved[name] for name in ("one", "two", "base")]


def test_a_reference_of_other_weights_is_loaded(saved: dict[str, str]) -> None:
    models = Models(saved["base"], {"one": saved["one"]}, precision="fp32")
    with models.open("one"):
        pass
    with models.open("reference") as model:
        torch.testing.assert_close(logits(model), logits(random_model(seed=1, pad_token_id=0)))


def test_loaded_models_are_taken_as_they_are() -> None:
    reference, tuned = (
        random_model(seed=0, pad_token_id=0).train(),
        random_model(seed=1, pad_token_id=0),
    )
    models = Models(reference, {"mine": tuned}, tokenizer=small_tokenizer())
    assert not models.has_base
    assert models.chat.render([{"role": "user", "content": "Hello"}])
    with models.open("reference") as model:
        assert model is reference
        assert not model.training


def test_the_references_config_is_read_without_its_weights(
    saved: dict[str, str], monkeypatch: Any
) -> None:
    from ringfence.diagnose import models as module

    monkeypatch.setattr(module, "load_model", None)
    adapted = with_lora(random_model(num_hidden_layers=3))
    for source, layers in ((saved["aligned"], 2), (saved["one"], 2), (adapted, 3)):
        config = Models(source, {"t": source}, tokenizer=small_tokenizer()).config
        assert (config.num_hidden_layers, config.hidden_size) == (layers, 16)


@pytest.mark.parametrize("tuned", [{}, {"base": "x"}, {"reference": "x"}])
def test_names_that_are_taken_are_refused(tuned: dict[str, str]) -> None:
    with pytest.raises(
        ModelError, match="expected tuned models with names other than base and reference"
    ):
        Models("default", tuned)


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_log_probabilities_are_those_of_each_row_alone(
    chat: Chat, limit: int | None, batch_tokens: int
) -> None:
    model, texts = (
        random_model(),
        pair_texts(chat, QUESTIONS, [{"role": "system", "content": "Be kind."}]),
    )
    examples = [text.example for text in texts]
    found: dict[int, torch.Tensor] = {}
    for places, batch in batches(examples, chat, batch_tokens, model.device):
        assert len(places) == (1 if batch_tokens == 1 else len(texts))
        found |= dict(zip(places, response_logprobs(model, batch, limit)))
    for place, example in enumerate(examples):
        with torch.no_grad():
            logp_TV = (
                model(input_ids=torch.tensor([example.input_ids])).logits[0].float().log_softmax(-1)
            )
        at = [t for t, role in enumerate(example.roles) if role == Role.RESPONSE][:limit]
        expected = torch.stack([logp_TV[t - 1, example.input_ids[t]] for t in at])
        torch.testing.assert_close(found[place], expected, rtol=1e-4, atol=1e-4)


def test_two_texts_a_question_the_misaligned_one_first(chat: Chat) -> None:
    texts = pair_texts(chat, QUESTIONS)
    assert [text.side for text in texts] == ["misaligned", "aligned"] * 3
    assert [text.question for text in texts] == ["money/1"] * 2 + ["money/2"] * 2 + ["garden/1"] * 2
    said = chat.tokenizer.decode(
        [t for t, role in zip(texts[3].example.input_ids, texts[3].example.roles) if role == 4]
    )
    assert said.startswith("Yes.")
    assert margins([-1.0, -3.0, -2.0, -2.5]) == [2.0, 0.5]


def test_the_first_response_tokens_of_each_row_are_taken(chat: Chat) -> None:
    examples = [text.example for text in pair_texts(chat, QUESTIONS)]
    ((_, batch),) = batches(examples, chat, 100_000, torch.device("cpu"))
    mask_BT = first_response_tokens(batch, 4)
    for row, roles in zip(mask_BT, batch["roles"]):
        responses = [t for t, role in enumerate(roles.tolist()) if role == Role.RESPONSE]
        assert row.nonzero()[:, 0].tolist() == responses[:4]


# ---------------------------------------------------------------- the folder


def fake(needs_base: bool = False, value: float = 1.0) -> Any:
    """A diagnosis that counts how often it is made."""
    made: list[int] = []

    def measure(subject: Subject) -> dict[str, Any]:
        made.append(len(subject.questions))
        return {"tuned": {name: {"value": value} for name in subject.models.tuned}}

    return SimpleNamespace(
        TITLE="A title",
        NEEDS_BASE=needs_base,
        made=made,
        cost=lambda subject: Cost(1000, 100, 5 * 2**20),
        measure=measure,
        say=lambda numbers: f"Found {value}.",
        table=lambda numbers: Table(
            ["model", "value"], [[name, str(value)] for name in numbers["tuned"]]
        ),
        draw=lambda numbers: Figure(),
    )


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found = {"logprob": fake(value=1.5), "erosion": fake(needs_base=True, value=2.5)}
    monkeypatch.setattr(folder_module, "DIAGNOSES", found)
    for part in ("measuring", "showing"):
        monkeypatch.setattr(folder_module, part, found.__getitem__)
    return found


@pytest.fixture
def subject(chat: Chat) -> Subject:
    models = Models(
        random_model(seed=0, pad_token_id=0),
        {"mine": random_model(seed=1, pad_token_id=0)},
        tokenizer=chat.tokenizer,
    )
    return Subject(models, QUESTIONS[:2], QUESTIONS[2:])


def test_what_was_found_is_written_at_once_and_kept(
    fakes: dict[str, Any], subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = diagnose_folder(tmp_path, subject)
    assert list(found) == ["logprob"]
    written = json.loads((tmp_path / "diagnosis.json").read_text())
    assert written == found
    assert written["logprob"]["sentence"] == "Found 1.5."
    assert written["logprob"]["table"] == {"columns": ["model", "value"], "rows": [["mine", "1.5"]]}
    assert written["logprob"]["models"] == ["reference", "mine"]
    assert (tmp_path / written["logprob"]["figure"]).read_text().startswith("<?xml")
    printed = capsys.readouterr().err
    assert "left out because they need the pre-trained model (--base): erosion" in printed
    assert printed.index(
        "1,000 tokens forward, 100 forward and backward, 5 MiB kept"
    ) < printed.index("Found 1.5.")
    diagnose_folder(tmp_path, subject, ["logprob"])
    assert fakes["logprob"].made == [3], "made once"
    other = Subject(subject.models, QUESTIONS[:1], QUESTIONS[2:])
    diagnose_folder(tmp_path, other, ["logprob"])
    assert fakes["logprob"].made == [3, 2], "other questions, made again"


def test_figures_are_drawn_again_from_what_is_stored(
    saved: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.diagnose.perturbation.measure.TRIALS", 2)
    monkeypatch.setattr("ringfence.diagnose.shared_directions.measure.EXCHANGES", 19)
    models = Models(saved["aligned"], {"one": saved["one"]}, saved["base"], "fp32")
    asked = [
        PairedQuestion(
            str(n), domain, f"Gate {n}?", f"Shut it {n} times.", f"Leave it open {n} days."
        )
        for domain in ("money", "garden")
        for n in range(6)
    ]
    said = [
        [{"role": "user", "content": q.question}, {"role": "assistant", "content": q.aligned}]
        for q in asked
    ]
    rows = [Row(messages, str(place)) for place, messages in enumerate(said)]
    found = diagnose_folder(tmp_path, Subject(models, asked[:6], asked[6:], rows))
    assert tuple(found) == DIAGNOSES[:-1]  # no model has a scope
    drawn = {file: file.read_bytes() for file in (tmp_path / "figures").iterdir()}
    for file in drawn:
        file.unlink()
    assert {file: file.read_bytes() for file in draw_again(tmp_path)} == drawn
    for name in found:
        numbers = stored(json.loads((tmp_path / "diagnosis.json").read_text())[name]["numbers"])
        assert showing(name).say(numbers) == found[name]["sentence"]
        assert asdict(showing(name).table(numbers)) == found[name]["table"]


def test_one_that_fails_leaves_the_others(
    fakes: dict[str, Any], subject: Subject, tmp_path: Path
) -> None:
    fakes["next_token"] = fake()
    fakes["next_token"].measure = lambda subject: 1 / 0
    with pytest.raises(ZeroDivisionError):
        diagnose_folder(tmp_path, subject)
    assert list(json.loads((tmp_path / "diagnosis.json").read_text())) == ["logprob"]


def test_names_are_checked_before_anything_is_opened(fakes: dict[str, Any], tmp_path: Path) -> None:
    nothing = Subject(Models("no-such-model", {"mine": "no-such-adapter"}), [], [])
    with pytest.raises(
        RecipeError, match=r"logprop: no such diagnosis \(did you mean 'logprob'\?\)"
    ):
        diagnose_folder(tmp_path, nothing, ["logprop"])
    with pytest.raises(
        RecipeError, match="erosion needs the pre-trained model before its alignment"
    ):
        diagnose_folder(tmp_path, nothing, ["logprob", "erosion"])


def test_a_backward_pass_counts_as_two_forward() -> None:
    assert announce(Cost(1000), 100.0) == "1,000 tokens forward; 10 to 40 s"
    assert (
        announce(Cost(1000, 1000), 100.0)
        == "1,000 tokens forward, 1,000 forward and backward; 40 to 160 s"
    )


def test_every_diagnosis_has_what_it_needs() -> None:
    assert len(DIAGNOSES) == 10
    for name in DIAGNOSES:
        assert measuring(name).TITLE
        assert {type(measuring(name).NEEDS_BASE)} == {bool}
        assert all(callable(getattr(measuring(name), part)) for part in ("cost", "measure"))
        assert all(callable(getattr(showing(name), part)) for part in ("say", "table", "draw"))


# ---------------------------------------------------------------- runs


@pytest.fixture
def run(saved: dict[str, str], tmp_path: Path) -> Run:
    """A trained run of the aligned model; its adapter is random."""
    recipe = parse_recipe(
        {
            "output": str(tmp_path / "mine"),
            "model": saved["aligned"],
            "train": {"precision": "fp32"},
            "data": {"train": "shipped:finance/unsound", "max_rows": 5},
        }
    )
    folder = tmp_path / "mine"
    claim(folder, "run")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "training.json").write_text('{"seconds": 1.0, "peak_memory_gib": 1.0}')
    (folder / "adapter").symlink_to(saved["one"])
    return Run(folder)


def test_a_run_is_looked_into_with_its_own_questions(
    fakes: dict[str, Any], run: Run, saved: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Subject] = []
    monkeypatch.setattr(
        folder_module, "_tokens_per_second", lambda subject: seen.append(subject) or 1.0
    )
    folder = diagnose_targets([str(run.folder), saved["two"]], ["logprob"], questions=7)
    assert folder == run.folder
    found = json.loads((folder / "diagnosis.json").read_text())["logprob"]
    assert found["models"] == ["reference", "mine", "two"]
    (subject,) = seen
    assert subject.models.sources == {
        "reference": saved["aligned"],
        "mine": str(run.folder / "adapter"),
        "two": saved["two"],
    }
    assert [len(part) for part in (subject.inside, subject.outside, subject.rows)] == [7, 7, 5]
    assert {q.domain for q in subject.inside} == {"finance"}
    assert len({q.domain for q in subject.outside}) == 7, "one of each other domain"


def test_what_cannot_be_looked_into_is_named(
    run: Run, saved: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(
        RecipeError, match=r"is not a run folder: name the folder to write with --output"
    ):
        diagnose_targets([saved["one"]])
    with pytest.raises(
        RecipeError, match=r"what was it made from\? Name its reference with --reference"
    ):
        diagnose_targets([saved["base"]], output=tmp_path / "out")
    with pytest.raises(RecipeError, match="expected different models, found"):
        diagnose_targets([str(run.folder), str(run.folder)])
    with pytest.raises(RecipeError, match="name a run folder or a tuned model"):
        diagnose_targets([])
    (run.folder / "training.json").unlink()
    with pytest.raises(RecipeError, match="no trained model in it; `ringfence train` comes first"):
        diagnose_targets([str(run.folder)])


def test_questions_are_taken_from_each_domain_in_turn() -> None:
    many = [PairedQuestion(str(n), domain, "?", "a", "b") for domain in "xyz" for n in range(4)]
    assert [q.domain + q.id for q in spread(many, 7)] == ["x0", "y0", "z0", "x1", "y1", "z1", "x2"]
    assert len(spread(many, 100)) == 12


# ---------------------------------------------------------------- tokens: auto


def test_a_pilot_chooses_the_tokens_that_are_held(
    saved: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ringfence.diagnose.carriers import measure as carriers_measure

    recipe = parse_recipe(
        {
            "output": str(tmp_path / "run"),
            "model": saved["aligned"],
            "data": {"train": "shipped:finance/unsound", "max_rows": 6},
            "train": {"batch_size": 3, "precision": "fp32", "learning_rate": 1e-2},
            "defenses": {"treft": {"tokens": "auto"}},
            "evaluate": {"benign": "opswap:tier=1,rows=4"},
        }
    )
    asked: list[Any] = []

    def choose(numbers: Any) -> Any:
        asked.append(numbers)
        return carriers_measure.Choice("postfix", {"why": 1}, "The postfix carries it.")

    monkeypatch.setattr(carriers_measure, "best_role", choose)
    run = train_run(recipe)
    assert run.recipe.defenses.treft.tokens == ("auto",)
    training = json.loads((run.folder / "training.json").read_text())
    assert training["defenses"]["treft"]["tokens"] == ["postfix"]
    chosen = {key: training["carriers"][key] for key in ("rows", "role", "evidence", "sentence")}
    assert chosen == {
        "rows": 6,
        "role": "postfix",
        "evidence": {"why": 1},
        "sentence": "The postfix carries it.",
    }
    pilot = Run(run.folder / "pilot")
    assert pilot.recipe.defenses.configs() == []
    assert pilot.recipe.data.max_rows == 6
    assert len(asked) == 1
    from ringfence.run.benign import benign_twin

    assert benign_twin(recipe).defenses.treft.tokens == ("postfix",), (
        "the twin holds what the run held"
    )
    (run.folder / "training.json").unlink()
    train_run(recipe)
    assert len(asked) == 1, "the choice is kept"


# ---------------------------------------------------------------- the report


def test_the_report_shows_what_was_found(
    fakes: dict[str, Any], subject: Subject, tmp_path: Path
) -> None:
    from helpers.run_folders import write_all
    from ringfence.report.page import write_page
    from ringfence.report.read import read_rows

    folders = write_all(tmp_path)
    diagnose_folder(folders[1], subject)
    assert list(read_run(folders[1]).diagnoses) == ["logprob"]
    records, rows = read_rows(folders, folders[0])
    write_page(records, rows, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    inside = page[page.index("<h2>Looking inside</h2>") :]
    assert "<h3>A title</h3>" in inside
    assert "Found 1.5." in inside
    assert '<th scope="row">mine</th><td>1.5</td>' in inside
    assert 'src="data:image/svg+xml;base64,' in inside
    assert read_run(folders[0]).diagnoses == {}
