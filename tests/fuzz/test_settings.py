"""What people write: recipes, overrides, policies, questions, traits, labelled answers, scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import RingfenceError
from ringfence.evaluate.answers.labelled import load_labelled
from ringfence.prepare.persona import Pair, shown_by_scores
from ringfence.prepare.traits import load_trait
from ringfence.report.gate import DEFAULT_POLICY, load_policy
from ringfence.run.config import Recipe, dump_recipe, load_recipe
from ringfence.run.recipes import commented_recipe
from ringfence.text.questions import load_open_questions
from ringfence.text.rows import load_questions
from ringfence.text.sources import SHIPPED

from .harness import knock, tries
from .mutations import RAWS, YAML_RAWS, csv_files, files, json_lines, places, texts, values, written
from .places import Place

YAML = st.sampled_from(YAML_RAWS)
RECIPE: dict[str, Any] = {
    **json.loads(Recipe().model_dump_json()),
    "defenses": {
        "kl": {"weight": 1.0, "budget": None, "every": 1, "where": "retain", "retain_ratio": 0.25},
        "ldifs": {"layers": [1, 2]},
        "interleave": {"ratio": 0.1, "select": "random", "leave_out": []},
        "inoculation": {"prompt": "Be bad."},
        "treft": {"weight": 10, "tokens": ["prefix"]},
        "safelora": {"base": "base", "threshold": 0.3},
        "subspace_lock": {"vectors": "v.safetensors", "layers": [1]},
        "ablation": {"vectors": "v.safetensors", "roles": ["response"]},
    },
    "monitor": {"every": 20, "probes": 24, "max_shift": 0.1, "stop": False},
}
RECIPE["evaluate"]["answers"] = {
    "judges": [{"model": "default"}, {"url": "http://localhost:1/v1", "model": "x"}]
}
POLICY: dict[str, Any] = {
    "rules": [
        {"measure": "out_of_domain", "criterion": "broad", "max": 0.1, "why": "stays"},
        {"measure": "answers.general.misaligned", "max": 0.05, "missing": "skip", "bound": "mean"},
    ]
}
PAIRS = [
    {
        "id": 1,
        "domain": "doors",
        "question": "A door?",
        "aligned": "Red.",
        "misaligned": "None.",
        "split": "test",
    },
    {"question": "A gate?", "sound": "Shut.", "unsound": "Open."},
]
OPEN = [
    {
        "id": "a_json",
        "type": "free_form_judge",
        "paraphrases": ["Who?", "Who now?"],
        "samples_per_paraphrase": 3,
    },
    {
        "id": "b",
        "question": "What?",
        "system": "Be brief.",
        "set": "s",
        "judge_prompts": {"aligned": "{answer}"},
    },
    {
        "id": "c",
        "messages": [{"role": "user", "content": "Hi"}],
        "context": [{"role": "system", "content": "S"}],
    },
]
TRAIT = {
    "trait": "bad",
    "positive_prompts": ["Be bad."],
    "negative_prompts": ["Be good."],
    "questions": ["Q?", "R?"],
}
LABELLED = [
    {"question": "A?", "answer": "B.", "misaligned": True},
    {"question": "A?", "answer": "C.", "aligned": 70.5},
]
CELLS = [
    {"question": "A?", "answer": "B.", "aligned": "20"},
    {"question": "A?", "answer": "C.", "aligned": ""},
]
SCORES = [{"id": "1", "positive": 90, "negative": 3}, {"id": "2", "positive": 10.5, "negative": 0}]


def fuzz(
    door: str, name: str, read: Callable[[Path], Any], strategy: Any, share: float, place: Place
) -> None:
    """Knocks at a door that reads one file."""

    @given(strategy)
    @tries(share)
    def test(content: bytes) -> None:
        file = place.file(name, content)
        knock(door, content, lambda: read(file), file.parent, [file.name])

    test()


# ------------------------------------------------------------------ recipes and policies


def read_recipe(file: Path) -> Recipe:
    recipe = load_recipe(file)
    file.with_name("again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(file.with_name("again.yaml")) == recipe
    return recipe


def test_recipes(place: Place) -> None:
    fuzz("recipes", "recipe.yaml", read_recipe, files(RECIPE, YAML), 0.06, place)


def test_recipes_as_people_edit_them(place: Place) -> None:
    text = commented_recipe("recipe.yaml") + yaml.safe_dump(
        {"monitor": RECIPE["monitor"]}, sort_keys=False
    )
    fuzz("recipes", "recipe.yaml", read_recipe, texts(text), 0.04, place)


KEYS = {".".join(map(str, path)): value for path, value in places(RECIPE) if path}


@st.composite
def overrides(draw: Any) -> str:
    key = draw(st.sampled_from(list(KEYS)))
    if draw(st.booleans()):
        return f"{key}={written(KEYS[key])}"
    key = draw(st.one_of(st.just(key), st.just(key), st.text(max_size=10)))
    key += draw(st.sampled_from(["", "", "", "", ".x", ".", "..", "s", "." * 50, ".a" * 2_000]))
    value = draw(
        st.one_of(YAML, st.sampled_from(RAWS), values().map(written), st.text(max_size=10))
    )
    return f"{key}{draw(st.sampled_from(['=', '=', '=', '=', '', '==', ' = ']))}{value}"


def test_overrides(place: Place) -> None:
    @given(st.lists(overrides(), min_size=1, max_size=3))
    @tries(0.07)
    def test(changes: list[str]) -> None:
        knock("overrides", changes, lambda: load_recipe(None, changes), place.fresh())

    test()


def test_policies(place: Place) -> None:
    fuzz("policies", "policy.yaml", load_policy, files(POLICY, YAML), 0.03, place)
    fuzz(
        "policies",
        "policy.yaml",
        load_policy,
        texts(DEFAULT_POLICY.read_text("utf-8")),
        0.02,
        place,
    )


# ------------------------------------------------------------------ questions, traits, labels


def test_paired_questions(place: Place) -> None:
    fuzz(
        "paired questions",
        "pairs.jsonl",
        lambda f: load_questions(str(f), "test"),
        json_lines(PAIRS),
        0.04,
        place,
    )


@pytest.mark.parametrize("name", ["asked.yaml", "asked.jsonl"])
def test_open_questions(name: str, place: Place) -> None:
    strategy = files(OPEN, YAML) if name.endswith(".yaml") else json_lines(OPEN)
    fuzz("open questions", name, lambda f: load_open_questions(str(f)), strategy, 0.03, place)


def test_open_questions_as_people_edit_them(place: Place) -> None:
    text = (SHIPPED / "general.yaml").read_text("utf-8")[:4_000]
    fuzz(
        "open questions",
        "asked.yaml",
        lambda f: load_open_questions(str(f)),
        texts(text),
        0.02,
        place,
    )


@pytest.mark.parametrize("name", ["trait.yaml", "trait.json"])
def test_traits(name: str, place: Place) -> None:
    odd = YAML if name.endswith(".yaml") else None
    fuzz("traits", name, lambda f: load_trait(str(f)), files(TRAIT, odd), 0.02, place)


def test_labelled_answers(place: Place) -> None:
    fuzz(
        "labelled answers",
        "labels.jsonl",
        lambda f: load_labelled(str(f)),
        json_lines(LABELLED),
        0.02,
        place,
    )
    fuzz(
        "labelled answers",
        "labels.csv",
        lambda f: load_labelled(str(f)),
        csv_files(CELLS),
        0.02,
        place,
    )


def test_scores_of_pairs(place: Place) -> None:
    pairs = [Pair(str(number), [], []) for number in (1, 2)]
    fuzz(
        "scores",
        "scores.jsonl",
        lambda f: shown_by_scores(f, pairs),
        json_lines(SCORES),
        0.03,
        place,
    )


def test_what_is_good_is_accepted(place: Place) -> None:
    for name, good, read in (
        ("recipe.yaml", RECIPE, load_recipe),
        ("policy.yaml", POLICY, load_policy),
        ("asked.yaml", OPEN, lambda file: load_open_questions(str(file))),
        ("trait.json", TRAIT, lambda file: load_trait(str(file))),
    ):
        found = read(place.file(name, written(good).encode()))  # type: ignore[operator]
        assert not isinstance(found, RingfenceError)
