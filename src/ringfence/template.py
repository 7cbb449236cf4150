"""Chat templates are programs from strangers: they are rendered here, in transformers' sandbox, within bounds.

Knows nothing of roles, tokens or rows. What it renders is what `tokenizer.apply_chat_template` renders, but for two
things: today's date is the one that it is given, and a loop or a product that would fill the memory is an error.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from functools import lru_cache, partial, reduce, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from .errors import ChatError, first_line, nearest

LARGEST = 10_000_000  # characters, items or digits that an operator may make
PASSES = 300_000  # through all loops of a rendering; a macro, which takes longer, counts as ten
OPERATORS = frozenset({"*", "**", "%", "+"})
PADDING = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})  # methods of texts that make any width
# Filters that do, or that add to every line; and the largest number or text that each may be given.
WIDEST = {"batch": 10_000, "center": 10_000, "indent": 80, "slice": 10_000, "tojson": 80, "wordwrap": 10_000}


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
        template: Any = _compiled(text)
        template.environment.passes = 0
        # The environment's own `strftime_now` says the date of this very moment.
        return template.render({**variables, "strftime_now": today.strftime})
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ChatError(first_line(error)) from error
    except (MemoryError, RecursionError) as error:
        raise ChatError(f"it needs too much memory ({type(error).__name__})") from error


@lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    # A fresh environment of transformers, with its filters, its loop controls and its `generation` blocks.
    environment = chat_template_utils._compile_jinja_template.__wrapped__("").environment
    environment.intercepted_binops = OPERATORS
    environment.filters |= {name: _narrow(environment.filters[name], most) for name, most in WIDEST.items()}
    environment.filters["replace"] = lambda text, old, new, *count: _replaced(str(text), str(old), str(new), *count)
    environment.globals.pop("lipsum", None)  # makes text of any length
    is_safe = environment.is_safe_attribute
    environment.is_safe_attribute = lambda owner, name, value: name not in PADDING and is_safe(owner, name, value)
    environment.call_binop = lambda _, operator, left, right: _bounded(environment, operator, left, right)
    call = environment.call
    environment.call = lambda context, method, *args, **named: call(context, _bounded_method(method), *args, **named)
    environment.counted = lambda items: _counted(environment, items)
    environment.count_macro = lambda: _count(environment, 10)
    try:
        return environment.from_string(_Counted().visit(environment.parse(text)))
    except SyntaxError as error:  # of the Python code that jinja2 makes: `break` outside a loop
        raise jinja2.TemplateSyntaxError(error.msg, error.lineno or 1) from error


class _Counted(NodeTransformer):
    """Counts each pass through a loop and a macro, and makes `~` a `+` of texts, which is bounded."""

    def visit_For(self, node: Any) -> Any:
        if node.recursive:
            return self.visit_Macro(node)
        self.generic_visit(node)
        node.iter = _in_place_of(node, nodes.Call(nodes.EnvironmentAttribute("counted"), [node.iter], [], None, None))
        return node

    def visit_Macro(self, node: Any) -> Any:
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("count_macro"), [], [], None, None)
        node.body.insert(0, _in_place_of(node, nodes.ExprStmt(call)))
        return node

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        texts: list[nodes.Expr] = [nodes.Filter(part, "string", [], [], None, None) for part in node.nodes]
        return _in_place_of(node, reduce(nodes.Add, texts))


def _in_place_of(node: Any, new: nodes.Node) -> nodes.Node:
    return new.set_environment(node.environment).set_lineno(node.lineno)


def _counted(environment: Any, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _count(environment, 1)
        yield item


def _count(environment: Any, passes: int) -> None:
    environment.passes += passes
    if environment.passes > PASSES:
        raise OverflowError(f"its loops would go round more than {PASSES:,} times")


def _narrow(call: Callable[..., Any], most: int) -> Callable[..., Any]:
    subject = 2 if hasattr(call, "jinja_pass_arg") else 1  # the environment comes before the value, in some filters

    @wraps(call)
    def bounded(*given: Any, **named: Any) -> Any:
        for each in (*given[subject:], *named.values()):
            if (len(each) if isinstance(each, str) else each if isinstance(each, int) else 0) > most:
                raise OverflowError(f"{call.__name__}: found a width of more than {most:,}")
        return call(*given, **named)

    return bounded


def _bounded_method(method: Any) -> Any:
    owner = getattr(method, "__self__", None)
    return partial(_replaced, owner) if isinstance(owner, str) and method.__name__ == "replace" else method


def _replaced(text: str, old: str, new: str, count: int | None = None) -> str:
    if text.count(old) * len(new) > LARGEST:
        raise OverflowError(f"replace would make more than {LARGEST:,} characters")
    return text.replace(old, new, -1 if count is None else count)


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
    if operator == "+":
        return sum(len(part) for part in (left, right) if isinstance(part, str | list | tuple))
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple) and isinstance(times, int):
            return len(many) * times
    return 0
