"""Releases of the libraries: a cache under either name, declared dependencies, and the pins that
are kept in files."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from transformers import DynamicCache

from helpers.models import tiny, with_lora
from ringfence.model.layers import cache_in, cache_name, causal_lm
from ringfence.model.prefix import Prefix
from ringfence.model.taps import compute_prefix

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEVELOPED_WITH = [
    Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
]
ALL = [
    Requirement(text)
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
]
HEADER, PROMPT = [10, 11], [5, 6, 10, 11, 30, 31]
BOTH_NAMES = ("cache", "past_key_values")


def with_argument(model: Any, name: str) -> Any:
    """A model whose `forward` takes its cache as `name` alone, and ignores other keywords."""
    inner = causal_lm(model)
    forward, own = inner.forward, cache_name(inner)
    if name == "cache":

        def renamed(
            input_ids: Any, cache: Any = None, use_cache: Any = None, **ignored: Any
        ) -> Any:
            return forward(input_ids, use_cache=use_cache, **{own: cache})
    else:

        def renamed(
            input_ids: Any, past_key_values: Any = None, use_cache: Any = None, **ignored: Any
        ) -> Any:
            return forward(input_ids, use_cache=use_cache, **{own: past_key_values})

    inner.forward = renamed
    return model


@pytest.mark.parametrize("name", BOTH_NAMES)
def test_the_name_of_a_cache_is_the_models_own(name: str) -> None:
    assert cache_name(with_argument(tiny(), name)) == name
    assert cache_name(with_argument(with_lora(tiny()), name)) == name


@pytest.mark.parametrize("name", BOTH_NAMES)
def test_a_cache_is_found_under_either_name(name: str) -> None:
    empty = DynamicCache()
    assert cache_in({name: empty, "use_cache": True}) is empty
    assert cache_in({name: None}) is None
    assert cache_in({}) is None


def test_the_cache_in_an_output_is_found() -> None:
    model, ids = tiny(), torch.tensor([PROMPT])
    assert cache_in(model(ids, use_cache=True)).get_seq_length() == len(PROMPT)
    assert cache_in(model(ids, use_cache=False)) is None


@pytest.mark.parametrize("name", BOTH_NAMES)
def test_a_prefix_is_computed_into_a_cache_of_either_name(name: str) -> None:
    found = compute_prefix(with_argument(tiny(), name), torch.tensor(HEADER))
    assert found.cache.get_seq_length() == len(HEADER)


@pytest.mark.parametrize("name", BOTH_NAMES)
def test_tokens_behind_a_cache_of_either_name_are_not_searched_for_a_header(name: str) -> None:
    model = with_lora(tiny())
    Prefix(HEADER).attach(model)
    whole = model(input_ids=torch.tensor([[*PROMPT, 32]]), use_cache=False).logits[0, -1]
    with_argument(model, name)
    cache = DynamicCache()
    for tokens in (PROMPT, [32]):
        logits = causal_lm(model)(
            input_ids=torch.tensor([tokens]), use_cache=True, **{name: cache}
        ).logits[0, -1]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- dependencies


def pins(name: str) -> dict[str, SpecifierSet]:
    lines = (ROOT / name).read_text().splitlines()
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines[1:])}


def imported() -> set[str]:
    """Names of the packages that any file of ringfence imports, at its top or in a function."""
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).split(".")[0])
    return found - set(sys.stdlib_module_names) - {"ringfence"}


def test_every_import_is_a_declared_dependency() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in ALL}
    of = packages_distributions()
    undeclared = {
        name
        for name in imported()
        if not declared & {canonicalize_name(owner) for owner in of.get(name, [name])}
    }
    # Built against the torch that is there; docs/distributed.md says how.
    assert undeclared <= {"deepspeed"}


def test_the_oldest_releases_that_are_tried_are_the_lower_bounds() -> None:
    bounds = {
        canonicalize_name(requirement.name): bound.version
        for requirement in DEVELOPED_WITH
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    assert {
        name: str(pin).removeprefix("==") for name, pin in pins("constraints-oldest.txt").items()
    } == bounds


def test_a_dependency_has_one_lower_bound_in_all_extras() -> None:
    bounds: dict[str, set[str]] = {}
    for requirement in ALL:
        bounds.setdefault(canonicalize_name(requirement.name), set()).add(
            str(requirement.specifier)
        )
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def test_the_pinned_releases_are_allowed_and_name_no_build() -> None:
    pinned = {name: str(pin).removeprefix("==") for name, pin in pins("constraints.txt").items()}
    assert not [version for version in pinned.values() if "+" in version]
    for requirement in DEVELOPED_WITH:
        if requirement.name != "pip":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), (
                requirement
            )
