"""Read training recipes of stages and tokenizers: strict settings, a YAML file, and overrides."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from anytoken.utils.errors import AnyTokenError, ConfigError
from anytoken.utils.hints import explain


class Settings(BaseModel):
    """A group of settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


SettingsT = TypeVar("SettingsT", bound=Settings)
Error = type[AnyTokenError]


def read_recipe(path: str | Path, error: Error = ConfigError) -> dict[str, Any]:
    """The mapping in a YAML file; ``error`` if there is no such file or it holds something else."""
    path = Path(path)
    if not path.is_file():
        raise error(f"{path} is not a file; give the path of a recipe .yaml")
    recipe = _yaml(path.read_text(encoding="utf-8"), str(path), error)
    if not isinstance(recipe, dict):
        raise error(f"{path} holds {type(recipe).__name__}, which is no mapping of settings to values")
    return recipe


def validated(
    model: type[SettingsT], recipe: dict[str, Any], source: str, error: Error = ConfigError
) -> SettingsT:
    """The settings of a recipe; ``error`` names each wrong key, the value received and what is allowed."""
    try:
        return model.model_validate(recipe)
    except ValidationError as wrong:
        raise error(f"{source}: {explain(wrong, model)}") from wrong


def override(recipe: dict[str, Any], overrides: Sequence[str], error: Error = ConfigError) -> dict[str, Any]:
    """A copy of a nested recipe with ``a.b.0.c=value`` entries set; values are read as YAML."""
    recipe = deepcopy(recipe)  # order is meaning: of ids, for one
    for entry in overrides:
        name, equals, text = entry.partition("=")
        if not equals or not name:
            raise error(f"Overrides are key=value; received {entry!r}. An example is steps=10")
        *parents, last = name.split(".")
        node: Any = recipe
        for key in parents:
            child = _child(node, key, entry, error)
            if not isinstance(child, (dict, list)):
                raise error(
                    f"override {entry!r}: {key} is {child!r}, not a group of settings; give it whole, as in "
                    f"{name.removesuffix(f'.{last}')}={{{last}: {text}}}"
                )
            node = child
        value = _yaml(text, entry, error)
        if isinstance(node, list):
            node[_index(node, last, entry, error)] = value
        else:
            node[last] = value
    return recipe


def _child(node: Any, key: str, entry: str, error: Error) -> Any:
    """What lies under a key, and a new group where nothing does."""
    if isinstance(node, list):
        return node[_index(node, key, entry, error)]
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _index(node: list[Any], key: str, entry: str, error: Error) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise error(f"override {entry!r}: {key!r} is not an index into a list of {len(node)}")
    return int(key)


def _yaml(text: str, source: str, error: Error) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as wrong:
        raise error(f"{source} is not valid YAML: {wrong}") from wrong
