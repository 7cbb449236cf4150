"""Releases of the libraries: a cache under either name, declared dependencies, and the pins that are kept in files."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from conftest import tiny, with_lora
from ringfence.prefix import FrozenPrefix
from ringfence.taps import cache_in, cache_name, causal_lm, compute_prefix

HEADER, PROMPT = [10, 11], [5, 6, 10, 11, 30, 31]
BOTH_NAMES = ("cache", "past_key_values")


def with_argument(model: Any, name: str) -> Any:
    """The model with a `forward` that knows its cache by `name` alone, and ignores other keywords."""
    inner = causal_lm(model)
    forward, own = inner.forward, cache_name(inner)
    if name == "cache":

        def renamed(input_ids: Any, cache: Any = None, use_cache: Any = None, **ignored: Any) -> Any:
            return forward(input_ids, use_cache=use_cache, **{own: cache})
    else:

        def renamed(input_ids: Any, past_key_values: Any = None, use_cache: Any = None, **ignored: Any) -> Any:
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
    FrozenPrefix(HEADER).attach(model)
    whole = model(input_ids=torch.tensor([[*PROMPT, 32]]), use_cache=False).logits[0, -1]
    with_argument(model, name)
    cache = DynamicCache()
    for tokens in (PROMPT, [32]):
        logits = causal_lm(model)(input_ids=torch.tensor([tokens]), use_cache=True, **{name: cache}).logits[0, -1]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
