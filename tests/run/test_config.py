import json
from typing import get_args

import pytest
import torch
import yaml
from pydantic import BaseModel

from ringfence.defenses import AUTO, Defenses
from ringfence.errors import RecipeError
from ringfence.evaluate.answers.config import LocalJudgeConfig
from ringfence.evaluate.evaluation import Evaluation
from ringfence.run.config import Recipe, dump_recipe, load_recipe, parse_recipe, recipe_tree
from ringfence.run.recipes import commented_recipe


def refused(*overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, list(overrides))
    return str(caught.value)


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_no_file_gives_the_defaults(recipe_file):
    assert load_recipe() == Recipe() == load_recipe(recipe_file("")) == parse_recipe({})


# ------------------------------------------------------------------ unknown keys

MISSPELT = {
    "modle": "model",
    "trian": "train",
    "defences": "defenses",
    "data.max_lenght": "data.max_length",
    "train.learing_rate": "train.learning_rate",
    "train.lora.rnak": "train.lora.rank",
    "evaluate.lead-in": "evaluate.lead_in",
    "defenses.treff": "defenses.treft",
    "defenses.kl.wieght": "defenses.kl.weight",
    "defenses.interleave.pol": "defenses.interleave.pool",
    "defenses.treft.token": "defenses.treft.tokens",
}


@pytest.mark.parametrize("key", MISSPELT)
def test_unknown_key_is_refused_with_the_nearest_name(key, recipe_file):
    expected = f"unknown key {key!r} (did you mean {MISSPELT[key]!r}?)"
    assert expected in refused(f"{key}=1")
    tree = 1
    for part in reversed(key.split(".")):
        tree = {part: tree}
    path = recipe_file(yaml.safe_dump(tree))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("zzzz", Recipe),
        ("train.lora.zzzz", type(Recipe().train.lora)),
        ("defenses.zzzz", Defenses),
        ("data.zzzz", type(Recipe().data)),
    ],
)
def test_key_like_no_other_lists_what_is_accepted(key, known):
    assert f"unknown key {key!r} (accepted: {', '.join(sorted(known.model_fields))})" in refused(
        f"{key}=1"
    )


def test_every_wrong_field_is_named():
    message = refused("trian.x=1", "data.max_length=3", "train.lora.rnak=2")
    assert len(message.splitlines()) == 3
    for piece in ("'trian'", "data.max_length", "'train.lora.rnak'"):
        assert piece in message


# ------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E-5", 2e-5),
        ("1.5e-3", 1.5e-3),
        (".5e-2", 0.005),
        ("1e+0", 1.0),
        ("3", 3.0),
        ("0.25", 0.25),
    ],
)
def test_numbers(text, value, recipe_file):
    for recipe in (
        load_recipe(None, [f"train.learning_rate={text}"]),
        load_recipe(recipe_file(f"train:\n  learning_rate: {text}\n")),
        load_recipe(recipe_file(f"train: {{learning_rate: {text}}}")),
    ):
        assert recipe.train.learning_rate == value


def test_names_that_look_like_numbers_stay_texts():
    assert load_recipe(None, ["output=1e-4x"]).output == "1e-4x"
    assert load_recipe(None, ["model=org/1e-4"]).model == "org/1e-4"
    assert load_recipe(None, ["output='1e-4'"]).output == "1e-4"


def test_null():
    recipe = load_recipe(None, ["data.retain=null", "evaluate.fluency=~", "evaluate.lead_in="])
    assert (recipe.data.retain, recipe.evaluate.fluency, recipe.evaluate.lead_in) == (
        None,
        None,
        None,
    )


def test_auto_is_a_scope_with_kl_inside():
    spelt = parse_recipe({"defenses": {"scope": {}, "kl": AUTO["kl"]}})
    assert parse_recipe({"defenses": "auto"}) == spelt
    assert load_recipe(None, ["defenses=auto"]) == spelt
    assert recipe_tree(spelt)["defenses"].keys() == {"kl", "scope"}  # the record says what it was
    changed = load_recipe(None, ["defenses=auto", "defenses.kl.weight=2"]).defenses
    assert (changed.kl.weight, changed.scope) == (2, spelt.defenses.scope)
    assert load_recipe(None, ["defenses=auto"]).defenses.kl.weight == AUTO["kl"]["weight"]
    with pytest.raises(RecipeError, match=r"defenses: expected auto, or names .*, found 'atuo'"):
        parse_recipe({"defenses": "atuo"})


def test_nested_defenses():
    recipe = load_recipe(
        None,
        [
            "defenses.kl.weight=1e-1",
            "defenses.treft.tokens=[prefix, postfix]",
            "defenses.kl.every=3",
        ],
    )
    assert recipe.defenses.kl is not None
    assert (recipe.defenses.kl.weight, recipe.defenses.kl.every) == (0.1, 3)
    assert recipe.defenses.treft is not None
    assert recipe.defenses.treft.tokens == ("prefix", "postfix")
    assert load_recipe(None, ["defenses.treft.tokens=postfix"]).defenses.treft.tokens == (
        "postfix",
    )
    assert recipe.defenses.interleave is None


def test_override_changes_one_place_of_a_file(recipe_file):
    path = recipe_file(
        "train: {epochs: 2, lora: {rank: 4, alpha: 8}}\ndefenses: {kl: {weight: 3}}\nseed: 5\n"
    )
    before = load_recipe(path).model_dump()
    after = load_recipe(path, ["train.lora.rank=16"]).model_dump()
    assert after["train"]["lora"].pop("rank") == 16
    assert before["train"]["lora"].pop("rank") == 4
    assert after == before
    assert load_recipe(path, ["seed=1", "seed=2"]).seed == 2


def test_value_may_hold_an_equals_sign():
    assert (
        load_recipe(None, ["data.train=opswap:tier=2,rows=9"]).data.train == "opswap:tier=2,rows=9"
    )


@pytest.mark.parametrize(
    ("overrides", "pieces"),
    [
        (["train.epochs"], ["'train.epochs'", "expected key.path=value"]),
        (["=3"], ["'=3'", "expected key.path=value"]),
        (["train.epochs=[1"], ["'train.epochs=[1'", "'[1' is not a YAML value"]),
        (["output=a: b: c"], ["'output=a: b: c'", "not a YAML value"]),
        (["output=!!python/object:os.system x"], ["not a YAML value"]),
        (["output=2024-01-01"], ["'output=2024-01-01'", "found date '2024-01-01'", "quote it"]),
        (["seed=3", "seed.x=2"], ["'seed.x=2'", "'seed' holds a value"]),
        (["data.train=x", "data.train.y.z=2"], ["'data.train.y.z=2'", "'train' holds a value"]),
    ],
)
def test_bad_override(overrides, pieces):
    message = refused(*overrides)
    for piece in pieces:
        assert piece in message


@pytest.mark.parametrize("text", ["2024-13-45", "0b_"])
def test_impossible_date_or_number_is_refused(text, recipe_file):
    assert "output" in refused(f"output={text}")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(recipe_file(f"output: {text}\n"))


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("- a\n- b\n", ["expected keys and values", "found list"]),
        ("hello\n", ["expected keys and values", "found str"]),
        ("a: b: c\n", ["not YAML", "line 1"]),
        ("train:\n\tepochs: 1\n", ["not YAML", "line 2"]),
        (b"output: \xff\n", ["not UTF-8 text (byte 9)"]),
        ("1: 2\n", ["key 1", "expected a text"]),
    ],
)
def test_bad_file(text, pieces, recipe_file):
    path = recipe_file(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    for piece in [path, *pieces]:
        assert piece in str(caught.value)


def test_missing_file(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(RecipeError, match="no such file") as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2\ntrain: {}\nseed: 2\n",
        "train:\n  seed: 2\n  seed: 3\n",
        "train: {lora: {seed: 2, seed: 3}}\n",
    ],
)
def test_key_that_stands_twice_is_refused(text, recipe_file):
    path = recipe_file(text)
    with pytest.raises(RecipeError, match="duplicate key 'seed'") as caught:
        load_recipe(path)
    assert path in str(caught.value)


def test_key_that_stands_twice_in_an_override_is_refused():
    assert "train=" in refused("train={epochs: 2, epochs: 3}")


def test_parts_of_a_file_may_be_shared(recipe_file):
    path = recipe_file("defenses:\n  kl: &own {weight: 0.5}\n  treft:\n    <<: *own\n")
    assert load_recipe(path) == parse_recipe(
        {"defenses": {name: {"weight": 0.5} for name in ("kl", "treft")}}
    )


def test_empty_entry_of_a_defense_is_refused_with_a_hint(recipe_file):
    for name in Defenses.model_fields:
        hint = f"write `{name}: {{}}`"
        assert hint in refused(f"defenses.{name}=null")
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe_file(f"defenses:\n  {name}:\n"))
        assert "defenses: " in str(caught.value)
        assert hint in str(caught.value)


# ------------------------------------------------------------------ values

BAD_VALUES = [
    ("train.epochs=0", "greater than 0", "found 0"),
    ("train.epochs=many", "valid number", "found 'many'"),
    ("train.learning_rate=-0.5", "greater than 0", "found -0.5"),
    ("train.batch_size=2.5", "integer", "found 2.5"),
    ("train.method=qlora", "'lora' or 'full'", "found 'qlora'"),
    ("train.lora.dropout=1", "less than 1", "found 1"),
    ("train.lora.targets=3", "valid list", "found 3"),
    ("train.lora.targets=[]", "at least 1", "found []"),
    ("train.precision=fp16", "'fp32'", "found 'fp16'"),
    ("train=null", "TrainConfig", "found None"),
    ("data.over_long=cut", "'truncate'", "found 'cut'"),
    ("data.max_length=8", "greater than or equal to 16", "found 8"),
    ("evaluate.in_domain=shipped:finance", "valid list", "found 'shipped:finance'"),
    ("defenses.kl=true", "KL", "found True"),
    ("defenses.kl.direction=sideways", "'forward'", "found 'sideways'"),
    ("defenses.kl.every=0", "greater than or equal to 1", "found 0"),
    ("defenses.interleave.ratio=0", "greater than 0", "found 0"),
    ("defenses.interleave.ratio=10", "less than or equal to 4", "found 10"),
    ("defenses.treft.weight=-1", "greater than or equal to 0", "found -1"),
    ("defenses.treft.tokens=[prefix, prefix]", "distinct roles", "found ['prefix', 'prefix']"),
    ("defenses.treft.tokens=[auto, prefix]", "auto alone", "found ['auto', 'prefix']"),
    ("defenses.treft.tokens=[]", "one or more distinct roles", "found []"),
]


@pytest.mark.parametrize(
    ("override", "expected", "found"), BAD_VALUES, ids=[case[0] for case in BAD_VALUES]
)
def test_value_not_accepted_names_field_and_found(override, expected, found):
    message = refused(override)
    assert f"{override.partition('=')[0]}: " in message
    assert expected in message
    assert found in message


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("evaluate.opswap_tiers=[1, 4]", "evaluate.opswap_tiers.1: "),
        ("defenses.treft.tokens=[prefx]", "tokens.0: "),
    ],
)
def test_bad_member_of_a_list_is_named_by_its_place(override, place):
    assert place in refused(override)


def number_fields(model, place=""):
    for name, field in model.model_fields.items():
        for kind in get_args(field.annotation) or (field.annotation,):
            if kind is float:
                yield place + name
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from number_fields(kind, f"{place}{name}.")


def test_every_number_must_be_finite():
    fields = set(number_fields(Recipe))
    assert fields >= {
        "train.epochs",
        "train.learning_rate",
        "train.lora.dropout",
        "defenses.kl.weight",
    }
    for field in fields:
        for value in ("inf", "-inf", "nan"):
            message = refused(f"{field}={value.replace('inf', '.inf').replace('nan', '.nan')}")
            assert f"recipe: {field}: " in message
            assert f"finite number, found {value}" in message


def test_one_target_may_stand_alone(recipe_file):
    for recipe in (
        load_recipe(None, ["train.lora.targets=q_proj"]),
        load_recipe(None, ["train.lora.targets=[q_proj]"]),
    ):
        assert recipe.train.lora.targets == ["q_proj"]
        assert load_recipe(recipe_file(dump_recipe(recipe))) == recipe


def test_lora_settings_with_full_training_are_refused():
    message = refused("train.method=full", "train.lora.rank=8")
    assert "train.lora is set but train.method is full" in message
    assert load_recipe(None, ["train.method=full"]).train.method == "full"


# ------------------------------------------------------------------ round trip and schema

RECIPES = [
    [],
    ["train.learning_rate=1e-5", "train.weight_decay=1e-20", "seed=3"],
    ["train.method=full", "train.gradient_checkpointing=true"],
    [
        "train.lora.targets=[q_proj, v_proj]",
        "evaluate.opswap_tiers=[1, 3]",
        "evaluate.max_per_domain=4",
    ],
    ["defenses.kl={}", "defenses.treft.tokens=[postfix]", "defenses.interleave.ratio=.5"],
    ["defenses.interleave.pool='12'", "output='null'", "model='yes: # \"no\" ä\n'"],
    ["evaluate.out_of_domain=[]", "evaluate.lead_in=x.jsonl"],
]


@pytest.mark.parametrize("overrides", RECIPES, ids=range(len(RECIPES)))
def test_round_trip(overrides, recipe_file):
    recipe = load_recipe(None, overrides)
    text = dump_recipe(recipe)
    assert load_recipe(recipe_file(text)) == recipe
    assert parse_recipe(yaml.safe_load(text)) == recipe
    assert dump_recipe(load_recipe(recipe_file(text))) == text


@pytest.mark.parametrize("override", ["data.retain=null", "evaluate.fluency=null"])
def test_round_trip_of_null(override, recipe_file):
    recipe = load_recipe(None, [override])
    assert load_recipe(recipe_file(dump_recipe(recipe))) == recipe


def test_round_trip_of_a_text_that_looks_like_a_number(recipe_file):
    recipe = load_recipe(None, ["output='1e-4'"])
    assert load_recipe(recipe_file(dump_recipe(recipe))) == recipe


def nodes(schema):
    yield schema
    for value in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(value, dict | list):
            yield from nodes(value)


def test_json_schema_is_closed_and_complete():
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    objects = [node for node in nodes(schema) if isinstance(node, dict)]
    definitions = {f"#/$defs/{name}" for name in schema["$defs"]}
    references = {node["$ref"] for node in objects if "$ref" in node}
    assert references == definitions
    kinds = {"object", "array", "string", "number", "integer", "boolean", "null"}
    assert {node["type"] for node in objects if isinstance(node.get("type"), str)} <= kinds
    for node in [schema, *schema["$defs"].values()]:
        assert node["type"] == "object"
        assert node["additionalProperties"] is False
        for field in node["properties"].values():
            assert {"type", "$ref", "anyOf", "enum", "const"} & set(field)


def test_json_schema_lists_every_defense_with_all_its_fields():
    schema = Recipe.model_json_schema()
    listed = schema["$defs"]["Defenses"]["properties"]
    assert set(listed) == set(Defenses.model_fields)
    assert len(listed) >= 3
    for name in listed:
        [reference] = [option["$ref"] for option in listed[name]["anyOf"] if "$ref" in option]
        config = type(getattr(parse_recipe({"defenses": {name: {}}}).defenses, name))
        assert reference == f"#/$defs/{config.__name__}"
        assert set(schema["$defs"][config.__name__]["properties"]) == set(config.model_fields)


@pytest.mark.parametrize(
    ("accelerator", "in_cpu", "expected"),
    [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")],
)
def test_auto_precision_is_what_the_machine_computes_fast(
    accelerator, in_cpu, expected, monkeypatch, recipe_file
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: in_cpu)
    assert load_recipe(recipe_file("train: {epochs: 1}")).train.precision == expected
    assert load_recipe(recipe_file("train: {precision: auto}")).train.precision == expected
    assert load_recipe(recipe_file("train: {precision: bf16}")).train.precision == "bf16"
    assert f"precision: {expected}\n" in dump_recipe(load_recipe(None, ["train.epochs=1"]))
    assert "precision: auto  #" in commented_recipe()
    assert "precision: auto  #" in commented_recipe(train="opswap:tier=1,rows=8")
    assert Evaluation(model="m").precision == LocalJudgeConfig(model="m").precision == expected


def test_a_text_that_looks_like_a_number_with_an_exponent_is_written_in_quotes(recipe_file):
    recipe = load_recipe(None, ["output='1e-4'", "train.learning_rate=1e-4"])
    text = dump_recipe(recipe)
    assert "output: '1e-4'\n" in text
    assert load_recipe(recipe_file(text)) == recipe
    assert "valid string, found 0.0001" in refused("output=1e-4")
