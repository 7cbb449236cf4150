"""YAML as people write it, read strictly: no key twice, no key unknown, every message with the field's name.

Does not know what the keys mean.
"""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)


class UniqueKeys(yaml.SafeLoader):
    """Plain YAML keeps the last of two equal keys in silence; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_mapping(file: Path, hint: str) -> dict[Any, Any]:
    """The keys and values of a YAML file.

    Args:
        hint: how to get such a file, for the message when there is none.

    Raises:
        RecipeError: no such file, not YAML, a key that stands twice, or no mapping.
    """
    if not file.is_file():
        raise RecipeError(f"{file}: no such file ({hint})")
    try:
        tree = yaml.load(file.read_text("utf-8"), UniqueKeys) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{file}: expected keys and values, found {type(tree).__name__}")
    return tree


def set_value(tree: dict[Any, Any], override: str) -> None:
    """Changes a tree of keys and values after `key.path=value`, the value in YAML.

    Raises:
        RecipeError: it is no such text, or goes through a key that holds a value.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override {override!r}: expected key.path=value, e.g. train.epochs=2")
    keys = path.split(".")
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise RecipeError(f"override {override!r}: {key!r} holds a value, it has no parts")
    try:
        tree[keys[-1]] = yaml.load(text, UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"override {override!r}: {text!r} is not a YAML value") from error


def validate(kind: type[Model], tree: dict[Any, Any], name: str) -> Model:
    """A pydantic model from keys and values. Raises RecipeError naming `name` and every field that is wrong."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{name}: {_explain(item, kind)}" for item in error.errors())) from None


def _explain(item: Any, kind: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        parent = item["loc"][:-1]
        known = _known_fields(kind.model_json_schema(), parent)
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = (
            f"did you mean {'.'.join([*map(str, parent), close[0]])!r}?" if close else f"accepted: {', '.join(known)}"
        )
        return f"unknown key {place!r} ({hint})"
    found = "" if item["type"] in ("missing", "value_error") else f", found {item['input']!r}"
    return f"{place or kind.__name__.lower()}: {item['msg'].removeprefix('Value error, ')}{found}"


def _known_fields(schema: dict[str, Any], parent: tuple[Any, ...]) -> list[str]:
    """Names that may stand below the key path `parent`."""
    nodes = [schema]
    for key in parent:
        found = [option for node in nodes for option in _options(node, schema)]
        if isinstance(key, int):
            below = [option["items"] for option in found if "items" in option]
        else:
            below = [option["properties"][key] for option in found if key in option.get("properties", {})]
        nodes = below or nodes  # pydantic names the member of a union, which has no node of its own
    return sorted(
        {name for node in nodes for option in _options(node, schema) for name in option.get("properties", {})}
    )


def _options(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """What a node of the schema may be."""
    if "$ref" in node:
        return _options(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], schema)
    members = [option for kind in ("anyOf", "oneOf", "allOf") for option in node.get(kind, [])]
    return [found for member in members for found in _options(member, schema)] or [node]
