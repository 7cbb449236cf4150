"""Where the parts of a transformers model are: the decoder, its layers, its cache."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def causal_lm(model: Any) -> Any:
    """The plain transformers model inside DDP and peft wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers, first to last."""
    inner = causal_lm(model)
    number = inner.config.get_text_config().num_hidden_layers
    lists = (
        m
        for m in inner.get_decoder().modules()
        if isinstance(m, nn.ModuleList) and len(m) == number
    )
    return next(lists)


def cache_in(named: Mapping[str, Any]) -> Any | None:
    """The cache of keys and values among a forward's keyword arguments, or in its output: `cache` in transformers'
    newer models, `past_key_values` in its older ones. A caller may use either name."""
    return next(
        (named[name] for name in ("cache", "past_key_values") if named.get(name) is not None), None
    )


def cache_name(model: nn.Module) -> str:
    """The keyword by which a model's forward takes a cache."""
    return (
        "cache"
        if "cache" in inspect.signature(causal_lm(model).forward).parameters
        else "past_key_values"
    )
