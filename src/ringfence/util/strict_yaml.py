"""Reads YAML as people write it, but strictly: no duplicate key, no unknown key, every message with
the field's name.

Does not know what the keys mean.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, Field, Strict, ValidationError

from ..errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)


Whole = Annotated[int, Strict()]  # true is not 1, "2" is not 2
Real = Annotated[float, Strict()]
Layer = Annotated[int, Strict(), Field(ge=1, le=10**4)]
SEED = 2**32 - 1  # the largest that numpy takes
_DEEPEST, _MOST = 50, 100_000  # levels, and values once aliases are followed
_LONGEST = 4_000_000  # characters of a file


# PyYAML reads 1e-4, which has no point, as a text; YAML 1.2 reads it as a number.
_WITH_EXPONENT = re.compile(r"[-+]?(?:[0-9]+|[0-9]*\.[0-9]+|[0-9]+\.)[eE][-+]?[0-9]+\Z")


class UniqueKeys(yaml.SafeLoader):
    """Plain YAML silently keeps the last of two equal keys; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [
            self.construct_object(key, deep=True)
            for key, _ in node.value
            if not key.tag.endswith(":merge")
        ]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", node.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that looks like such a number."""


for kind in (UniqueKeys, _Dumper):
    kind.add_implicit_resolver("tag:yaml.org,2002:float", _WITH_EXPONENT, list("-+.0123456789"))


def _number(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    """4.0 is written `4`, as people write it."""
    if value.is_integer() and abs(value) < 1e15:
        return dumper.represent_int(int(value))
    return dumper.represent_float(value)


_Dumper.add_representer(float, _number)


def dump(value: Any, **style: Any) -> str:
    """YAML of plain values, with the keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, **style)


def read_mapping(file: Path, hint: str) -> dict[Any, Any]:
    """The keys and values of a YAML file.

    Args:
        hint: how to get such a file, for the message when there is none.

    Raises:
        RecipeError: no such file, not YAML, a duplicate key, or not a mapping.
    """
    return read_text_and_mapping(file, hint)[1]


def read_text_and_mapping(file: Path, hint: str) -> tuple[str, dict[Any, Any]]:
    """Like `read_mapping`, with the text."""
    try:
        if not file.is_file():
            raise RecipeError(f"{file}: no such file ({hint})")
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text (byte {error.start + 1})") from error
    except ValueError as error:
        raise RecipeError(f"{str(file)!r}: not a file name: {error}") from error
    except OSError as error:
        raise RecipeError(f"{str(file)[:200]}: cannot be read: {error.strerror}") from error
    tree = load(text, str(file), f"{file}: not YAML: ")
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise RecipeError(f"{file}: expected keys and values, found {type(tree).__name__}")
    return text, tree


def load(text: str, origin: str, not_yaml: str) -> Any:
    """A YAML value of plain parts: texts, numbers, truth values, lists, and mappings whose keys are
    texts."""
    if len(text) > _LONGEST:
        raise RecipeError(f"{origin}: {len(text):,} characters; accepted: {_LONGEST:,}")
    try:
        value = yaml.load(text, UniqueKeys)
    except RecursionError as error:
        raise RecipeError(f"{origin}: nested too deeply") from error
    # Also a 5,000-digit number, a list as a key.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise RecipeError(f"{not_yaml}{' '.join(str(error).split())[:300]}") from error
    _check(value, origin)
    return value


def _check(value: Any, origin: str) -> None:
    """A mapping may contain itself, or aliases that double it on every line; pydantic would copy
    that forever."""
    left, places = _MOST, [(value, 0, "")]
    while places:
        node, depth, place = places.pop()
        left -= 1
        if left < 0:
            raise RecipeError(f"{origin}: more than {_MOST:,} values once its aliases are followed")
        if depth > _DEEPEST:
            raise RecipeError(f"{origin}: nested too deeply")
        if isinstance(node, dict):
            for key in node:
                if not isinstance(key, str):
                    raise RecipeError(
                        f"{origin}: key {key!r} in {place or 'it'}: expected a text (quote it)"
                    )
            places += [
                (part, depth + 1, f"{place}.{key}".lstrip(".")) for key, part in node.items()
            ]
        elif isinstance(node, list):
            places += [(part, depth + 1, place) for part in node]
        elif not isinstance(node, str | int | float | None):
            raise RecipeError(
                f"{origin}: {place or 'value'}: expected text, a number, true or false, found "
                f"{type(node).__name__} {str(node)[:60]!r}; quote it if it is a text"
            )


def set_value(tree: dict[Any, Any], override: str) -> None:
    """Changes a tree of keys and values by `key.path=value`, with the value in YAML.

    Raises:
        RecipeError: it has another form, or goes through a key that holds a value.
    """
    path, equals, text = override.partition("=")
    keys = path.split(".")
    name = f"override {override[:200]!r}"
    if not equals or not all(keys) or len(keys) > _DEEPEST:
        raise RecipeError(f"{name}: expected key.path=value, e.g. train.epochs=2")
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise RecipeError(f"{name}: {key!r} holds a value, it has no parts")
    tree[keys[-1]] = load(text, name, f"{name}: {text[:200]!r} is not a YAML value: ")


def validate(kind: type[Model], tree: dict[Any, Any], name: str) -> Model:
    """A pydantic model from keys and values. Raises RecipeError naming `name` and every field that
    is wrong."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(
            "\n".join(f"{name}: {_explain(item, kind)}" for item in error.errors())
        ) from None


def _explain(item: Any, kind: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        parent = item["loc"][:-1]
        known = _known_fields(kind.model_json_schema(), parent)
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = (
            f"did you mean {'.'.join([*map(str, parent), close[0]])!r}?"
            if close
            else f"accepted: {', '.join(known)}"
        )
        return f"unknown key {place!r} ({hint})"
    shown = repr(item["input"])
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    found = "" if item["type"] in ("missing", "value_error") else f", found {shown}"
    return f"{place or kind.__name__.lower()}: {item['msg'].removeprefix('Value error, ')}{found}"


def _known_fields(schema: dict[str, Any], parent: tuple[Any, ...]) -> list[str]:
    """Names accepted below the key path `parent`."""
    nodes = [schema]
    for key in parent:
        found = [option for node in nodes for option in _options(node, schema)]
        if isinstance(key, int):
            below = [option["items"] for option in found if "items" in option]
        else:
            below = [
                option["properties"][key] for option in found if key in option.get("properties", {})
            ]
        nodes = below or nodes  # pydantic also names a union's member, which has no node of its own
    return sorted(
        {
            name
            for node in nodes
            for option in _options(node, schema)
            for name in option.get("properties", {})
        }
    )


def _options(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a schema's node."""
    if "$ref" in node:
        return _options(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], schema)
    members = [option for kind in ("anyOf", "oneOf", "allOf") for option in node.get(kind, [])]
    return [found for member in members for found in _options(member, schema)] or [node]
