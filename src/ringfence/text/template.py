"""Chat templates are programs from strangers: they are rendered here, in transformers' sandbox,
within bounds.

Does not know roles, tokens or rows. It renders what `tokenizer.apply_chat_template` renders, with
two differences: today's date is the one it is given, and a loop or a product that would fill the
memory is an error.
"""

import inspect
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from datetime import date
from functools import lru_cache, partial, reduce, wraps
from math import inf
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from ..errors import ChatError, first_line, nearest

LARGEST = 10_000_000  # characters, items or digits that one operation may make
IN_ALL = 300_000_000  # characters or items that a rendering may make
SECONDS = 30.0  # of computing that a rendering may take
PASSES = 300_000  # through all loops of a rendering; a macro, which takes longer, counts as ten
CHARACTERS = 100  # of a template's own text in a loop that count as one more pass
OPERATORS = frozenset({"*", "**", "%", "+"})
# Methods that make text of any width, or what is neither text nor items.
UNBOUNDED = frozenset(
    {"center", "encode", "expandtabs", "ljust", "rjust", "to_bytes", "translate", "zfill"}
)
# Filters that do so, or that add to every line, with the largest number or text each may be given.
WIDEST = {
    "batch": 10_000,
    "center": 10_000,
    "indent": 80,
    "slice": 10_000,
    "tojson": 80,
    "wordwrap": 10_000,
}
# In a format string: a width of millions, or one that is among the values.
WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{7}|\*)|\{[^}]*(\d{7}|\{)")
# Filters that make no text from their input.
SELECTING = {
    "attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last",
    "length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "select",
    "selectattr", "slice", "sort", "unique",
}  # fmt: skip


def choose_template(templates: str | Mapping[str, str], with_tools: bool, name: str) -> str:
    """The text of a tokenizer's template; of several named ones `tool_use` if tools are given, else
    `default`.

    Raises:
        ChatError: there are several, and none is called `default`.
    """
    if isinstance(templates, str):
        return templates
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        raise ChatError(
            f"tokenizer {name!r} has chat templates [{', '.join(sorted(templates))}] and none is "
            f"called default{nearest('default', list(templates))}"
        )
    return templates["default"]


def render_template(text: str, variables: dict[str, Any], today: date) -> str:
    """The rendered text.

    Raises:
        ChatError: the template is not Jinja, refuses the conversation, or would never end.
    """
    try:
        template: Any = _compiled(text)
        template.environment.spent = _Spent()
        # The environment's own `strftime_now` says the date of this very moment.
        return template.render({**variables, "strftime_now": today.strftime})
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise ChatError(first_line(error)) from error
    except (MemoryError, RecursionError) as error:
        raise ChatError(f"it needs too much memory ({type(error).__name__})") from error


@lru_cache(maxsize=512)
def _compiled(text: str) -> jinja2.Template:
    # A fresh environment of transformers, with its filters, its loop controls and its `generation`
    # blocks.
    environment = chat_template_utils._compile_jinja_template.__wrapped__("").environment
    environment.spent = _Spent()  # by constants, which are computed while compiling
    environment.intercepted_binops = OPERATORS
    environment.finalize = _written
    environment.filters = {
        name: _bounded_filter(environment, name, of) for name, of in environment.filters.items()
    }
    for name in ("urlize", "xmlattr"):  # useless in prompts, and make text of any length
        environment.filters.pop(name)
    environment.globals.pop("lipsum")
    is_safe = environment.is_safe_attribute
    environment.is_safe_attribute = lambda owner, name, value: (
        name not in UNBOUNDED and is_safe(owner, name, value)
    )
    environment.call_binop = lambda _, operator, left, right: environment.spent.bounded(
        environment.binop_table[operator], operator, left, right
    )
    environment.call = partial(_bounded_call, environment.call, environment)
    environment.counted = lambda items, passes: _counted(environment, items, passes)
    environment.count_macro = lambda passes: environment.spent.count(passes=passes)
    try:
        return environment.from_string(_Counted().visit(environment.parse(text)))
    except SyntaxError as error:  # of the Python code that jinja2 makes: `break` outside a loop
        raise jinja2.TemplateSyntaxError(error.msg, error.lineno or 1) from error


class _Counted(NodeTransformer):
    """Counts each pass through a loop or macro, and turns `~` into a `+` of texts, which is
    bounded."""

    def visit_For(self, node: Any) -> Any:
        if node.recursive:
            return self.visit_Macro(node)
        passes = 1 + _own_text(node)
        self.generic_visit(node)
        node.iter = _in_place_of(node, _call("counted", node.iter, nodes.Const(passes)))
        return node

    def visit_Macro(self, node: Any) -> Any:
        passes = 10 + _own_text(node)
        self.generic_visit(node)
        node.body.insert(
            0, _in_place_of(node, nodes.ExprStmt(_call("count_macro", nodes.Const(passes))))
        )
        return node

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        texts: list[nodes.Expr] = [
            nodes.Filter(part, "string", [], [], None, None) for part in node.nodes
        ]
        return _in_place_of(node, reduce(nodes.Add, texts))


def _own_text(node: Any) -> int:
    return sum(len(each.data) for each in node.find_all(nodes.TemplateData)) // CHARACTERS


def _call(name: str, *given: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(given), [], None, None)


def _in_place_of(node: Any, new: nodes.Node) -> nodes.Node:
    return new.set_environment(node.environment).set_lineno(node.lineno)


def _counted(environment: Any, items: Iterable[Any], passes: int) -> Iterator[Any]:
    for item in items:
        environment.spent.count(passes=passes)
        yield item


# ------------------------------------------------------------------ what a rendering spends


class _Spent:
    """What one rendering has made, and how many passes it took.

    Raises, from its methods:
        OverflowError: too much.
    """

    def __init__(self) -> None:
        self.passes = self.made = 0
        self.end = time.thread_time() + SECONDS

    def count(self, passes: int = 0, made: int = 0) -> None:
        self.passes += passes
        self.made += made
        if self.passes > PASSES:
            raise OverflowError(f"its loops would go round more than {PASSES:,} times")
        if self.made > IN_ALL:
            raise OverflowError(f"it would make more than {IN_ALL:,} characters or items")
        if time.thread_time() > self.end:
            raise OverflowError(f"it would take more than {SECONDS:g} s")

    def bounded(self, call: Callable[..., Any], what: str, *given: Any, **named: Any) -> Any:
        """The result of `call`, if `_size` of `what` allows it."""
        if what:
            given = tuple([*each] if isinstance(each, Iterator) else each for each in given)
        if _size(what, *given, *named.values()) > LARGEST:
            raise OverflowError(
                f"{what!r} would make more than {LARGEST:,} characters, items or digits"
            )
        result = call(*given, **named)
        self.count(made=len(result) if isinstance(result, str | list | tuple) else 0)
        return result


@pass_context
def _written(context: Any, value: Any) -> Any:
    """What `{{ }}` writes. (It takes the context so that constants, too, are counted each time.)"""
    return context.environment.spent.bounded(str, "{{ }}", value)


def _bounded_filter(environment: Any, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    # Some filters take the environment before the value.
    subject = 1 if hasattr(call, "jinja_pass_arg") else 0

    @wraps(call)
    def bounded(*given: Any, **named: Any) -> Any:
        before, value, rest = given[:subject], given[subject], given[subject + 1 :]
        for each in (*rest, *named.values()):
            width = len(each) if isinstance(each, str) else _whole(each)
            if name in WIDEST and width > WIDEST[name]:
                raise OverflowError(f"{name}: found a width of more than {WIDEST[name]:,}")
        what = "" if name in SELECTING else name
        return environment.spent.bounded(partial(call, *before), what, value, *rest, **named)

    return bounded


def _bounded_call(
    call: Callable[..., Any], environment: Any, context: Any, method: Any, *given: Any, **named: Any
) -> Any:
    owner = getattr(inspect.unwrap(method), "__self__", None)
    if not isinstance(owner, str):
        return call(context, method, *given, **named)
    made = lambda _, *given, **named: call(context, method, *given, **named)  # noqa: E731
    return environment.spent.bounded(made, f".{method.__name__}", owner, *given, **named)


def _size(what: str, value: Any, *others: Any) -> float:
    """Upper bound of the length of what an operator, a filter or a method (".join") makes from a
    value, if it may be long."""
    first = others[0] if others else None
    match what.removeprefix("."):
        case "":
            return 0
        case "+":
            return sum(len(part) for part in (value, first) if isinstance(part, str | list | tuple))
        case "*":
            pairs = ((value, first), (first, value))
            made = [len(a) * _whole(b) for a, b in pairs if isinstance(a, str | list | tuple)]
            return max(made, default=0)
        case "**":
            return value.bit_length() * _whole(first) if isinstance(value, int) else 0
        case "%" | "format" | "format_map" if isinstance(value, str):
            if WIDTH.search(value.replace("{{", "").replace("}}", "")):
                return inf
            return len(value) + sum(map(value.count, "%{")) * max(map(_length, others), default=0)
        case "%":
            return 0
        case "replace":
            if len(others) < 2:
                return 0
            return _length(value) + str(value).count(str(first)) * _length(others[1])
        case "join":
            items, separator = (first, value) if what == ".join" else (value, first or "")
            between = len(items) * _length(separator) if isinstance(items, Sized) else 0
            return _length(items) + between
        case "indent" | "tojson" | "wordwrap" as name:
            width = 0 if name == "wordwrap" else 10  # of each indented level
            added = [len(e) if isinstance(e, str) else width * _whole(e) for e in others]
            return _length(value) * (1 + max(added, default=0))
    return _length(value)


def _length(value: Any) -> int:
    """Of the text made from a value: its parts count as often as they occur in it."""
    if isinstance(value, str):
        return len(value)
    known: dict[int, int] = {}

    def of(value: Any) -> int:
        if isinstance(value, str):
            return len(value)
        if isinstance(value, Namespace):
            value = vars(value)
        if not isinstance(value, Collection):
            return 1 + (value.bit_length() // 3 if isinstance(value, int) else 0)
        if id(value) not in known:
            parts = [*value, *value.values()] if isinstance(value, Mapping) else value
            known[id(value)] = len(value) + sum(map(of, parts))
        return known[id(value)]

    return of(value)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
