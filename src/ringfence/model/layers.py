"""Where the parts of a transformers model are: the decoder, its layers, its cache."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def causal_lm(model: Any) -> Any:
    """The plain transformers model inside DDP and peft wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers, first to last."""
    inner = causal_lm(model)
    number = inner.config.get_text_config().num_hidden_layers
    lists = (m for m in inner.get_decoder().modules() if isinstance(m, nn.ModuleList))
    return next(each for each in lists if len(each) == number)


def cache_in(named: Mapping[str, Any]) -> Any | None:
    """The cache of keys and values among a forward's keyword arguments, or in its output: `cache`
    in newer models of transformers, `past_key_values` in older ones. A caller may use either
    name."""
    names = ("cache", "past_key_values")
    return next((named[name] for name in names if named.get(name) is not None), None)


def cache_name(model: nn.Module) -> str:
    """The keyword by which a model's forward takes a cache."""
    taken = inspect.signature(causal_lm(model).forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


def is_cache_plain(inner: Any) -> bool:
    """Whether a model's cache holds only keys and values. Recurrent states belong to whole rows."""
    layers = DynamicCache(config=inner.config.get_text_config(decoder=True)).layers
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return known and not inner._is_stateful


def gate_of(model: Any) -> Any | None:
    """The gate of a scoped model (see `scope.Gate`), or None."""
    return getattr(causal_lm(model), "ringfence_gate", None)
