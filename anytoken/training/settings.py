"""Recipes of stages and tokenizers: strict settings in a YAML file, overrides, and keys of the previous version."""

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from anytoken.utils.errors import AnyTokenError, ConfigError
from anytoken.utils.hints import explain


class Settings(BaseModel):
    """A group of settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


Error = type[AnyTokenError]


class Recipe(Settings):
    """Settings of a run. Recipes, overrides and saved stages may use the ``old_keys``, with a FutureWarning."""

    error: ClassVar[Error] = ConfigError
    old_keys: ClassVar[Mapping[str, str]] = {}  # old -> new, dots lead into groups

    @model_validator(mode="before")
    @classmethod
    def _old_keys(cls, recipe: Any) -> Any:
        return cls.renamed(recipe) if isinstance(recipe, dict) else recipe

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe and apply ``a.b=value`` overrides; ``error`` says what is wrong."""
        return cls.from_dict(cls.overridden(read_recipe(path, cls.error), overrides), source=str(path))

    @classmethod
    def from_dict(cls, recipe: dict[str, Any], source: str = "stage") -> Self:
        """Validate a mapping; ``error`` names each wrong key, the value received and what is allowed."""
        try:
            return cls.model_validate(recipe)
        except ValidationError as wrong:
            raise cls.error(f"{source}: {explain(wrong, cls)}") from wrong

    @classmethod
    def overridden(cls, recipe: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
        """A copy of a recipe with ``a.b.0.c=value`` entries set, with old keys renamed."""
        named = [cls._named_today(one) for one in overrides]
        return override(recipe if named == list(overrides) else cls.renamed(recipe), named, cls.error)

    @classmethod
    def renamed(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        """A recipe with current keys, and a FutureWarning for each old one."""
        for old, new in cls.old_keys.items():
            group, _, key = old.rpartition(".")
            part = recipe.get(group) if group else recipe
            if not isinstance(part, dict) or key not in part:
                continue
            today = new.rpartition(".")[2]
            if today in part:
                raise ValueError(f"{old} is now {new}, and the recipe has both; remove {old}")
            cls._warn_of(old)
            part = {today if name == key else name: value for name, value in part.items()}
            recipe = {**recipe, group: part} if group else part
        return recipe

    @classmethod
    def _named_today(cls, entry: str) -> str:
        name, equals, value = entry.partition("=")
        old = next((one for one in cls.old_keys if f"{name}.".startswith(f"{one}.")), None)
        if old is None:
            return entry
        cls._warn_of(old)
        return cls.old_keys[old] + name.removeprefix(old) + equals + value

    @classmethod
    def _warn_of(cls, old: str) -> None:
        message = f"the recipe key {old} is now {cls.old_keys[old]}; the old name goes in the next version"
        warnings.warn(message, FutureWarning, stacklevel=2)


def read_recipe(path: str | Path, error: Error = ConfigError) -> dict[str, Any]:
    """The mapping in a YAML file; ``error`` if there is no such file or it holds something else."""
    path = Path(path)
    if not path.is_file():
        raise error(f"{path} is not a file; give the path of a recipe .yaml")
    recipe = _yaml(path.read_text(encoding="utf-8"), str(path), error)
    if not isinstance(recipe, dict):
        raise error(f"{path} holds {type(recipe).__name__}; expected a mapping of settings to values")
    return recipe


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
                    f"override {entry!r}: {key} is {child!r}, not a group of settings; give the whole group, as in "
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
    """The value of a key; a new group if there is none."""
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
