"""Models that several diagnoses are tried on."""

from typing import Any

import pytest

from helpers.models import nudged, random_model, small_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    """Like models, as tuning makes them."""
    sizes = {"base": 0.3, "reference": 0.0, "undefended": 0.1, "kl": 0.02}
    return {
        name: nudged(random_model(), seed=at, size=size)
        for at, (name, size) in enumerate(sizes.items())
    }
