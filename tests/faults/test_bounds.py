"""Numbers and YAML that nobody can mean: refused in one sentence, before anything is computed."""

import pytest
from typer.main import get_command

from ringfence.cli import app
from ringfence.errors import RecipeError
from ringfence.evaluate.evaluation import Evaluation
from ringfence.report.gate import Policy
from ringfence.run.config import Recipe, load_recipe, parse_recipe


def unbounded(node, path=""):
    if isinstance(node, list):
        for part in node:
            yield from unbounded(part, path)
    elif isinstance(node, dict):
        if node.get("type") in ("integer", "number") and "enum" not in node:
            low = {"minimum", "exclusiveMinimum"} & node.keys()
            high = {"maximum", "exclusiveMaximum"} & node.keys()
            if not low or not high:
                yield path
        for key, part in node.items():
            yield from unbounded(part, path if key in ("properties", "anyOf") else f"{path}/{key}")


@pytest.mark.parametrize("config", [Recipe, Evaluation, Policy])
def test_every_number_has_a_least_and_a_largest_value(config):
    found = [
        path
        for path in unbounded(config.model_json_schema())
        if not path.endswith("opswap_tiers/items")
    ]
    assert found == []  # tiers are 1, 2, 3


def options(command):
    for below in getattr(command, "commands", {}).values():
        yield from options(below)
    yield from (
        (f"{command.name} {option.name}", option)
        for option in command.params
        if hasattr(option, "is_flag")
    )


def test_every_number_of_the_command_line_has_them_too_and_no_flag_shows_bool():
    found = dict(options(get_command(app)))
    numbers = {name for name, option in found.items() if option.min is not None}
    assert len(numbers) > 10
    assert {name for name in numbers if found[name].max is None} == set()
    assert {
        name for name, option in found.items() if option.is_flag and option.metavar != ""
    } == set()


@pytest.mark.parametrize(
    "field",
    [
        "seed=100000000000000000000000000",
        "seed=4294967296",
        "seed=-1",
        "seed=true",
        "train.lora.rank=1000000000",
        "train.lora.rank=1.0",
        "train.epochs=1e300",
        "train.epochs=true",
        "train.batch_size=10000000000000000000000",
        "train.batch_size=true",
        "train.batch_size='2'",
        "train.learning_rate=.nan",
        "train.learning_rate=.inf",
        "data.max_length=1e30",
        "defenses.kl.weight=.inf",
        "defenses.kl.every=true",
        "defenses.ldifs.layers=[0]",
        "defenses.ldifs.layers=[true, 2]",
        "defenses.steering.coefficient=1e99",
        "evaluate.samples=1e9",
        "evaluate.answers.temperature=1e99",
        f"seed={'9' * 4000}",
    ],
)
def test_numbers_that_nobody_can_mean_are_refused(field):
    with pytest.raises(RecipeError, match=field.partition("=")[0].split(".")[0]) as caught:
        load_recipe(None, [field])
    assert len(str(caught.value)) < 1500


def test_ordinary_numbers_are_taken():
    recipe = load_recipe(
        None,
        [
            "seed=4294967295",
            "train.epochs=2",
            "train.learning_rate=1.0e-4",
            "defenses.ldifs.layers=[1, 2]",
        ],
    )
    assert (recipe.seed, recipe.train.epochs) == (2**32 - 1, 2.0)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("{a: " * 3000 + "}" * 3000, "nested too deeply"),
        (LAUGHS, "more than 100,000 values"),
        ("a: &a [*a]", "nested too deeply"),
        ("1: 2", "expected a text"),
        ("null: 2", "expected a text"),
        ("[a]: 2", "not YAML"),
        ("{a: 1}: 2", "not YAML"),
        ("model: 2024-01-05", "quote it"),
        ("model: !!binary aGk=", "quote it"),
        ("model: !!set {a, b}", "quote it"),
        ("model: !!python/object:os.system x", "not YAML"),
        ("a:\tb\n\tc: 1", "not YAML"),
        (f"seed: {'9' * 5000}", "not YAML"),
        ("a: \0", "not YAML"),
        ("- a", "found list"),
        ("false", "found bool"),
        ("a: 1\na: 2", "duplicate key"),
    ],
)
def test_strange_yaml_is_one_sentence(tmp_path, text, words):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_files_that_are_not_text_are_one_sentence(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"seed: 1\n\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(file)
    for name in (tmp_path, tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(RecipeError):
            load_recipe(name)
    file.write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert load_recipe(file).seed == 3


@pytest.mark.parametrize(
    "override",
    [
        "",
        "=",
        "a",
        ".=1",
        "a..b=1",
        "evaluate.x.y.z=",
        "model.x=1",
        "x=" + "[" * 3000,
        "x=&a [*a]",
        "." * 3000 + "=1",
        "seed=[",
        "seed={1: 2}",
        "model=2024-01-05",
        "a." * 3000 + "b=1",
        "seed=\0",
    ],
)
def test_strange_overrides_are_one_sentence(override):
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [override])
    assert len(str(caught.value)) < 1000


def test_a_dict_is_held_to_the_same_types():
    with pytest.raises(RecipeError, match="batch_size"):
        parse_recipe({"train": {"batch_size": True}})
