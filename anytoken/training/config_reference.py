"""The recipe reference: every key of a stage with type, default and meaning, from the schema in `config.py` alone.

`anytoken recipes reference` prints it, and docs/recipe_reference.md is what it prints.
"""

import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from anytoken.training.config import TrainConfig

HEAD = """# Recipe reference

Every key of a stage recipe. `anytoken train RECIPE key=value` overrides any of them; nested keys are joined by dots,
list items by their index (`data.0.weight=2`). Unknown keys are errors. [stages](../stages/README.md) explains the
stages.

```bash
anytoken recipes list
anytoken recipes copy stages/lora.yaml my.yaml
```
"""


def reference() -> str:
    """The reference as Markdown: a table for the recipe and one for each group of settings in it."""
    parts = [HEAD]
    seen: set[type[BaseModel]] = {TrainConfig}
    waiting: list[tuple[str, type[BaseModel]]] = [("", TrainConfig)]
    while waiting:
        place, model = waiting.pop(0)
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            key = f"{place}{name}"
            groups = list(_groups(field.annotation))
            rows.append(
                f"| `{key}` | {_type(field.annotation)} | {_default(field)} | {_meaning(field, groups)} |"
            )
            inside = f"{key}.N." if typing.get_origin(field.annotation) is list else f"{key}."
            inside = f"{key}.KIND." if typing.get_origin(field.annotation) is dict else inside
            waiting += [(inside, one) for one in groups if one not in seen]
            seen |= set(groups)
        title = f"## `{place.rstrip('.')}`\n\n{_summary(model)}\n\n" if place else ""
        parts.append(title + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _groups(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside a type."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for one in typing.get_args(annotation):
        yield from _groups(one)


def _type(annotation: Any) -> str:
    """A type in the words of a YAML file."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is list or origin is tuple:
        return "list of " + _type(inner[0])
    if origin is dict:
        return f"mapping to {_type(inner[1])}"
    if inner:  # a union
        return " or ".join(dict.fromkeys("null" if one is type(None) else _type(one) for one in inner))
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "any"}
    return names.get(annotation, "settings")


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    words = {None: "null", True: "true", False: "false", "": '""'}
    known = words.get(value) if isinstance(value, str | bool | None) else None
    return f"`{known or value}`"


def _meaning(field: FieldInfo, groups: list[type[BaseModel]]) -> str:
    text = field.description or (_summary(groups[0]) if groups else "")
    return text.replace("|", "\\|")


def _summary(model: type[BaseModel]) -> str:
    """The first sentence of a class's docstring."""
    text = re.sub(r"\s+", " ", inspect.getdoc(model) or "").replace("``", "`")
    return text.split(". ")[0].rstrip(".") + "."
