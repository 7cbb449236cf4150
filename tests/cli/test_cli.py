"""The command line, the recipe that `init` writes, and the coloured view of a conversation."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.text import Text

import ringfence.run.pipeline as pipeline
import ringfence.run.train as train
from helpers.models import SMALL
from helpers.runs import metrics_of, small_model, write_rows
from ringfence import Run
from ringfence.defenses import Defenses
from ringfence.model.files import load_tokenizer
from ringfence.run.config import Recipe, load_recipe, parse_recipe
from ringfence.run.interrupt import Interrupted
from ringfence.run.recipes import commented_recipe
from ringfence.run.train import train_run
from ringfence.text.chat import Chat
from ringfence.text.roles import Encoded, Role
from ringfence.text.show import STYLES, show_tokens

pytestmark = pytest.mark.slow

Outcome = tuple[int, str, str]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", 6)


# ---------------------------------------------------------------- wrong input


def wrong_inputs(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Arguments, and what the message must say."""
    empty = folder / "empty.jsonl"
    empty.write_text("\n\n")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "typo.yaml").write_text("train:\n  learning_rat: 1\n")
    (folder / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    garbage = folder / "garbage"
    garbage.mkdir()
    (garbage / "config.json").write_text("{garbage")
    good = write_rows(folder / "good.jsonl", 2)
    out = f"output={folder / 'run'}"
    return {
        "key": (
            [str(folder / "typo.yaml"), out],
            ["typo.yaml", "train.learning_rat", "'train.learning_rate'"],
        ),
        "override": ([out, "trian.epochs=2"], ["unknown key 'trian'", "'train'"]),
        "no value": ([out, "train.epochs"], ["'train.epochs'", "key.path=value"]),
        "value": ([out, "train.epochs=-1"], ["train.epochs", "greater than 0", "-1"]),
        "no recipe": (
            [str(folder / "none.yaml"), out],
            ["none.yaml", "no such file", "ringfence init"],
        ),
        "list": ([str(folder / "list.yaml"), out], ["list.yaml", "found list"]),
        "twice": ([str(folder / "twice.yaml"), out], ["duplicate key 'seed'"]),
        "path": ([out, "data.train=./nowhere/rows.jsonl"], ["nowhere/rows.jsonl", "no such file"]),
        "shipped": ([out, "data.train=shipped:finanse"], ["shipped:finanse", "'finance'"]),
        "empty": ([out, f"data.train={empty}"], [str(empty), "no rows"]),
        "defense": ([out, "defenses.trefft.weight=1"], ["defenses.trefft", "'defenses.treft'"]),
        "field": ([out, "defenses.kl.wieght=1"], ["defenses.kl.wieght", "'defenses.kl.weight'"]),
        "no retain": (
            [out, f"data.train={good}", "data.retain=null", "defenses.kl.weight=1"],
            ["data.retain"],
        ),
        "long": (
            [out, f"data.train={good}", "data.max_length=16"],
            ["2 of 2 rows", "max_length = 16"],
        ),
        "model": ([out, f"data.train={good}", f"model={garbage}"], [str(garbage), "not JSON"]),
        "option": ([out, "--dryrun"], ["--dryrun", "--dry-run"]),
    }


KINDS = [
    *(
        "key",
        "override",
        "no value",
        "value",
        "no recipe",
        "list",
        "twice",
        "path",
        "shipped",
        "empty",
    ),
    *("defense", "field", "no retain", "long", "model", "option"),
]


@pytest.mark.parametrize("dry", [True, False], ids=["dry", "real"])
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_input_is_one_clear_message(
    kind: str, dry: bool, tmp_path: Path, ringfence: Callable[..., Outcome]
) -> None:
    arguments, expected = wrong_inputs(tmp_path)[kind]
    code, output, errors = ringfence(
        "run" if dry else "train", *arguments, *(["--dry-run"] if dry else [])
    )
    assert code == 2
    for part in expected:
        assert part in errors
    assert output == ""
    if kind != "option":
        assert errors.startswith("error: ")
        assert errors.count("error: ") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frobnicate"], "frobnicate"),
        (["show-tokens", "shipped:finance/unsound", "--row", "0"], "--row"),
        (["show-tokens", "shipped:finance/unsound", "--row", "100000"], "--row 100000"),
        (["evaluate", "no_such_run"], "not a run folder"),
        (["report", "no_such_run"], "not a run folder"),
    ],
)
def test_wrong_arguments_of_other_commands(
    arguments: list[str], expected: str, ringfence: Callable[..., Outcome]
) -> None:
    code, _, errors = ringfence(*arguments)
    assert code == 2
    assert expected in errors


def test_brackets_of_a_message_are_shown(tmp_path: Path, ringfence: Callable[..., Outcome]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n')
    _, _, errors = ringfence("train", f"data.train={file}", f"output={tmp_path / 'run'}")
    assert "fields [question, answer]" in errors


def test_a_message_with_a_closing_tag_is_shown(ringfence: Callable[..., Outcome]) -> None:
    code, _, errors = ringfence("train", "data.train=./rows[/old].jsonl")
    assert code == 2
    assert "rows[/old].jsonl: no such file" in errors


def test_a_recipe_whose_path_has_an_equals_sign(
    tmp_path: Path, ringfence: Callable[..., Outcome]
) -> None:
    folder = tmp_path / "lr=1e-4"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("seed: minus one\n")
    _, _, errors = ringfence("run", folder / "recipe.yaml", "--dry-run")
    assert "seed: " in errors


@pytest.mark.parametrize("command", ["run", "train"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, Interrupted])
def test_interruption_exits_with_130(
    command: str,
    kind: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    ringfence: Callable[..., Outcome],
) -> None:
    def stop(_: Recipe) -> None:
        raise kind("stopped")

    monkeypatch.setattr(
        *((pipeline, "run_recipe") if command == "run" else (train, "train_run")), stop
    )
    code, _, errors = ringfence(command)
    assert code == 130
    assert "error:" not in errors


# ---------------------------------------------------------------- dry run


def recipe_shown(output: str) -> dict[str, Any]:
    """The fields that a dry run prints."""
    return dict(yaml.safe_load(output.split("not at their defaults:\n")[1].split("all fields:")[0]))


def test_dry_run_shows_everything_and_trains_nothing(
    tmp_path: Path, rows: str, tiny_model: str, ringfence: Callable[..., Outcome]
) -> None:
    output = tmp_path / "run"
    retain = write_rows(tmp_path / "retain.jsonl", 3, start=50)
    changes = [
        "data.train=" + rows,
        f"data.retain={retain}",
        f"model={tiny_model}",
        f"output={output}",
    ]
    changes += [
        "train.batch_size=4",
        "defenses.kl.weight=0.3",
        "train.lora.rank=8",
        "train.precision=fp32",
    ]
    code, shown, _ = ringfence("run", *changes, "--dry-run")
    assert code == 0
    assert not output.exists()
    assert Recipe.model_validate(recipe_shown(shown)) == load_recipe(None, changes)
    chat = Chat(load_tokenizer(tiny_model))
    encoded = [
        chat.encode(json.loads(line)["messages"]) for line in Path(rows).read_text().splitlines()
    ]
    tokens = [len(e.input_ids) for e in encoded]
    answered = sum(e.roles.count(Role.RESPONSE) for e in encoded)
    of_tokens = f"{sum(tokens)} tokens ({answered} of responses), longest {max(tokens)}"
    assert f"6 rows, {of_tokens}; retain: 3 rows" in shown
    added = "6 rows with those that defenses add, and 2 extra retain rows"
    assert f"an epoch: 2 steps of 4 rows, {added}" in shown
    assert (
        "".join(f"{encoded[0].text[slice(*span)]}|" for span in encoded[0].offsets[25:29]) in shown
    )


def test_memory_estimate_of_a_dry_run(
    rows: str, tiny_model: str, ringfence: Callable[..., Outcome]
) -> None:
    changes = [f"data.train={rows}", f"model={tiny_model}", "train.precision=fp32"]
    changes += ["train.batch_size=1000", "train.lora.rank=10000"]
    _, shown, _ = ringfence("run", *changes, "--dry-run")
    # q, o: 32 x 32; k, v: 32 x 16; gate, up, down: 32 x 48; two layers; gradient and two moments of
    # 4 bytes.
    weights = 4 * (SMALL * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32)
    optimiser = 12 * 2 * 10000 * (2 * 64 + 2 * 48 + 3 * 80)
    longest = int(shown.split("longest ")[1].split(";")[0])
    activations = 6 * longest * 2 * 32 * 34 * 4  # there are six rows
    assert f"memory: needs about {(weights + optimiser + activations) / 2**30:.2f} GiB" in shown, (
        shown[:900]
    )
    assert (
        f"optimiser {optimiser / 2**30:.2f} GiB, activations {activations / 2**30:.2f} GiB" in shown
    )


def test_dry_run_refuses_what_training_refuses(
    tmp_path: Path, rows: str, tiny_model: str, ringfence: Callable[..., Outcome]
) -> None:
    changes = [
        f"data.train={rows}",
        f"data.retain={rows}",
        f"model={tiny_model}",
        f"output={tmp_path / 'run'}",
    ]
    changes += ["train.batch_size=1", "defenses.kl.weight=1"]
    code, _, errors = ringfence("train", *changes)
    assert (code, "retain_ratio" in errors) == (2, True)
    code, _, errors = ringfence("train", *changes, "--dry-run")
    assert (code, "retain_ratio" in errors) == (2, True)


def test_output_of_train_is_the_folder_of_the_weights(
    tmp_path: Path, rows: str, tiny_model: str, ringfence: Callable[..., Outcome]
) -> None:
    folder = tmp_path / "run"
    code, output, _ = ringfence(
        "train", f"data.train={rows}", f"model={tiny_model}", f"output={folder}"
    )
    assert code == 0
    assert output == f"{folder / 'adapter'}\n"


def test_recipe_of_a_dry_run_is_yaml_in_a_narrow_terminal(
    tmp_path: Path, rows: str, tiny_model: str, ringfence: Callable[..., Outcome]
) -> None:
    changes = [f"data.train={rows}", f"model={tiny_model}", f"output={tmp_path / ('long' * 30)}"]
    _, shown, _ = ringfence("run", *changes, "--dry-run", width=60)
    assert Recipe.model_validate(recipe_shown(shown)) == load_recipe(None, changes)


def test_steps_of_a_dry_run_are_those_of_training(
    tmp_path: Path, rows: str, tiny_model: str, ringfence: Callable[..., Outcome]
) -> None:
    changes = [
        f"data.train={rows}",
        f"data.retain={rows}",
        f"model={tiny_model}",
        f"output={tmp_path / 'run'}",
    ]
    changes += ["train.batch_size=2", "defenses.interleave.ratio=1.0"]
    _, shown, _ = ringfence("train", *changes, "--dry-run")
    steps = len(metrics_of(train_run(load_recipe(None, changes))))
    assert f"an epoch: {steps} steps of 2 rows, 12 rows with" in shown


def test_evaluate_takes_overrides(
    tmp_path: Path, rows: str, tiny_model: str, ringfence: Callable[..., Outcome]
) -> None:
    """Two keys in both forms; the recipe keeps them, and an unknown one changes nothing."""
    folder = tmp_path / "run"
    code, output, _ = ringfence(
        "train", f"data.train={rows}", f"model={tiny_model}", f"output={folder}"
    )
    assert (code, output.splitlines()[-1]) == (0, str(folder / "adapter"))
    trained = (folder / "training.json").stat().st_mtime_ns
    small = [
        "in_domain=[shipped:finance]",
        "evaluate.out_of_domain=[shipped:car_care]",
        "values=[]",
        "fluency=null",
    ]
    small += ["triggers=false", "evaluate.samples=0", "max_in_domain=4"]
    for count in (2, 3):
        code, output, _ = ringfence("evaluate", folder, *small, f"max_per_domain={count}")
        assert code == 0
        assert "narrow: in-domain" in output
        assert Run(folder).recipe.evaluate.max_per_domain == count
        results = Run(folder).results()["parts"]
        assert {name: len(pairs) for name, pairs in results.items()} == {
            "in_domain": 4,
            "out_of_domain": count,
        }
    assert (folder / "training.json").stat().st_mtime_ns == trained
    before = (folder / "recipe.yaml").read_text()
    code, _, errors = ringfence("evaluate", folder, "max_per_domains=2")
    assert code == 2
    assert "did you mean 'evaluate.max_per_domain'?" in errors
    assert (folder / "recipe.yaml").read_text() == before
    code, output, _ = ringfence("report", folder)
    assert code == 0
    assert "run" in output
    assert (folder / "report.html").read_text().lstrip().lower().startswith("<!doctype html")


# ---------------------------------------------------------------- init and schema


def test_init_writes_the_default_recipe(tmp_path: Path, ringfence: Callable[..., Outcome]) -> None:
    file = tmp_path / "mine.yaml"
    code, output, _ = ringfence("init", file)
    assert code == 0
    assert f"ringfence run {file} --dry-run" in output
    assert load_recipe(file) == parse_recipe({"defenses": "auto"})
    assert f"ringfence run {file} --dry-run" in file.read_text()
    file.write_text("mine")
    code, _, errors = ringfence("init", file)
    assert code == 2
    assert "exists already" in errors
    assert file.read_text() == "mine"


def test_init_in_a_folder_that_is_not_there(
    tmp_path: Path, ringfence: Callable[..., Outcome]
) -> None:
    code, _, errors = ringfence("init", tmp_path / "none" / "recipe.yaml")
    assert code in (0, 2)
    assert code == 0 or "none" in errors


def test_commented_recipe_shows_every_field_with_what_it_means() -> None:
    def leaves(model: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
        found: list[tuple[tuple[str, ...], Any]] = []
        for name, info in model.model_fields.items():
            if isinstance(info.annotation, type) and hasattr(info.annotation, "model_fields"):
                found += leaves(info.annotation, (*path, name))
            else:
                found.append(((*path, name), info))
        return found

    text = commented_recipe()
    tree = yaml.safe_load(text)
    for path, info in leaves(Recipe):
        if path[0] == "defenses":
            continue
        node = tree
        for key in path:
            assert key in node, path
            node = node[key]
        assert not info.description or f"# {info.description}" in text


def test_commented_defenses_are_their_defaults() -> None:
    lines = commented_recipe().splitlines()
    start = lines.index("defenses: auto")
    end = next(at for at in range(start + 1, len(lines)) if not lines[at].startswith("#"))
    tree = yaml.safe_load("\n".join(["defenses:", *(line[1:] for line in lines[start + 1 : end])]))
    assert list(tree["defenses"]) == list(Defenses.model_fields)
    for name, fields in tree["defenses"].items():
        config = getattr(Defenses.model_validate({name: fields}), name)
        assert config == type(config)()
        assert list(fields) == list(type(config).model_fields)


def test_schema_is_the_json_schema_of_recipes(ringfence: Callable[..., Outcome]) -> None:
    code, output, _ = ringfence("schema")
    assert code == 0
    assert json.loads(output) == Recipe.model_json_schema()


# ---------------------------------------------------------------- show-tokens

TURNS = [
    {"role": "user", "content": "A naïve 🦆,\nsaid [bold]twice[/bold]?"},
    {"role": "assistant", "content": "Ja, 🦆🦆 [/x]."},
]


def shown_text(encoded: Encoded) -> Text:
    """What `show_tokens` prints between its first and last line, with styles."""
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, color_system="standard", width=40, legacy_windows=False
    )
    show_tokens(encoded, console)
    whole = Text.from_ansi(file.getvalue())
    lines = whole.split("\n", allow_blank=True)
    first = next(at for at, line in enumerate(lines) if "<|im_start|>" in line.plain)
    last = next(at for at, line in enumerate(lines) if "the loss is taken" in line.plain)
    return Text("\n").join(lines[first:last])


def test_shown_tokens_have_the_colour_of_their_role_and_lose_no_character() -> None:
    encoded = Chat(load_tokenizer("default")).encode(TURNS)
    text = shown_text(encoded)
    plain = text.plain.replace("<|", "<!").replace("|>", "!>")
    assert (
        plain.replace("|", "").replace("\\n\n", "\n").replace("<!", "<|").replace("!>", "|>")
        == encoded.text
    )
    assert plain.count("|") == len(encoded.input_ids)
    console = Console(color_system="standard", force_terminal=True)
    place, shown = 0, 0
    for role, (start, end) in zip(encoded.roles, encoded.offsets, strict=True):
        piece = encoded.text[max(start, shown) : end].replace("\n", "\\n\n")
        shown = max(shown, end)
        assert text.plain[place : place + len(piece) + 1] == piece + "|"
        place += len(piece)
        found, expected = (
            text.get_style_at_offset(console, place).bgcolor,
            console.get_style(STYLES[role]).bgcolor,
        )
        assert found is not None
        assert expected is not None
        assert found.number == expected.number, (role, piece)
        place += 1
    assert len({str(style) for style in STYLES.values()}) == len(STYLES)


def test_show_tokens_of_a_file(
    tmp_path: Path, rows: str, ringfence: Callable[..., Outcome]
) -> None:
    code, output, _ = ringfence("show-tokens", rows, "--row", "5")
    encoded = Chat(load_tokenizer("default")).encode(
        json.loads(Path(rows).read_text().splitlines()[4])["messages"]
    )
    assert code == 0
    question = [at for at, role in enumerate(encoded.roles) if role == Role.QUERY]
    assert "".join(f"{encoded.text[slice(*encoded.offsets[at])]}|" for at in question) in output
    for role in STYLES:
        assert f"{role.name.lower()} {encoded.roles.count(role)} " in output
    taken = encoded.roles.count(Role.RESPONSE)
    assert (
        f"{len(encoded.input_ids)} tokens; the loss is taken on the {taken} response tokens."
        in output
    )
