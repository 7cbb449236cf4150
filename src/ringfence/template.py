"""Chat templates are programs from strangers: they are rendered here, in transformers' sandbox, within bounds.

Knows nothing of roles, tokens or rows. What it renders is what `tokenizer.apply_chat_template` renders, but for two
things: today's date is the one that it is given, and a loop or a product that would fill the memory is an error.
"""

import re
from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from typing import Any

import jinja2
from transformers.utils import chat_template_utils

from .errors import ChatError, first_line, nearest

LARGEST = 10_000_000  # characters, items or digits that an operator may make
OPERATORS = frozenset({"*", "**", "%"})
PADDING = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})  # methods of texts that make any width


def choose_template(templates: str | Mapping[str, str], with_tools: bool, name: str) -> str:
    """The text of a tokenizer's template; of several named ones `tool_use` where tools are given, else `default`.

    Raises:
        ChatError: there are several, and none is called `default`.
    """
    if isinstance(templates, str):
        return templates
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        raise ChatError(
            f"tokenizer {name!r} has chat templates [{', '.join(sorted(templates))}] and none is called default"
            f"{nearest('default', list(templates))}"
        )
    return templates["default"]


def render_template(text: str, variables: dict[str, Any], today: date) -> str:
    """The rendered text.

    Raises:
        ChatError: the template is not Jinja, refuses the conversation, or would never end.
    """
    try:
        # The environment's own `strftime_now` says the date of this very moment.
        return _compiled(text).render({**variables, "strftime_now": today.strftime})
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ChatError(first_line(error)) from error
    except (MemoryError, RecursionError) as error:
        raise ChatError(f"it needs too much memory ({type(error).__name__})") from error


@lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    # A fresh environment of transformers, with its filters, its loop controls and its `generation` blocks.
    environment = chat_template_utils._compile_jinja_template.__wrapped__("").environment
    environment.intercepted_binops = OPERATORS
    tojson = environment.filters["tojson"]

    def bounded_json(value: Any, ensure_ascii: bool = False, indent: Any = None, *more: Any, **named: Any) -> Any:
        if (isinstance(indent, int) and indent > 80) or (isinstance(indent, str) and len(indent) > 80):
            raise OverflowError("tojson: an indent of more than 80 characters")
        return tojson(value, ensure_ascii, indent, *more, **named)

    environment.filters["tojson"] = bounded_json
    is_safe = environment.is_safe_attribute
    environment.is_safe_attribute = lambda owner, name, value: name not in PADDING and is_safe(owner, name, value)
    environment.call_binop = lambda _, operator, left, right: _bounded(environment, operator, left, right)
    try:
        return environment.from_string(text)
    except SyntaxError as error:  # of the Python code that jinja2 makes: `break` outside a loop
        raise jinja2.TemplateSyntaxError(error.msg, error.lineno or 1) from error


def _bounded(environment: Any, operator: str, left: Any, right: Any) -> Any:
    if _size(operator, left, right) > LARGEST:
        raise OverflowError(f"{operator!r} would make more than {LARGEST:,} characters, items or digits")
    return environment.binop_table[operator](left, right)


def _size(operator: str, left: Any, right: Any) -> float:
    """Upper bound of the length of a result, where it may be long."""
    if operator == "**":
        whole = isinstance(left, int) and isinstance(right, int) and right > 0
        return left.bit_length() * right if whole else 0
    if operator == "%":
        widths = re.findall(r"\d{7,}|\*", left) if isinstance(left, str) else []
        return LARGEST + 1 if widths else 0
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple) and isinstance(times, int):
            return len(many) * times
    return 0
