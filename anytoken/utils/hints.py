"""Hints for error messages: the nearest known name to an unknown one, and pydantic's errors in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

LONGEST = 80  # characters of a received value that are shown
# Which branch of a union pydantic tried, as it writes it into an error's place: no key of the user's.
BRANCH = re.compile(r"(str|int|float|bool|none|constrained-\w+|.*\[.*)")


def nearest(given: object, allowed: Sequence[str] | Mapping[str, object]) -> str:
    """ " (did you mean 'image'?)", or nothing where no allowed name is near."""
    near = get_close_matches(str(given), list(allowed), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def no_such_model(name: str | Path, bundled: Sequence[str] = ()) -> str:
    """What to say of a name that neither this machine nor the hub has a model of: a folder that may be meant."""
    parent = Path(name).parent
    siblings = [str(one) for one in parent.iterdir() if one.is_dir()] if parent.is_dir() else []
    return (
        f"there is no folder {str(name)!r}{nearest(name, [*bundled, *siblings])}, and the hub has no model of that "
        "name; give a folder that exists, or a hub id such as Qwen/Qwen3-0.6B"
    )


def choices(given: object, allowed: Sequence[str] | Mapping[str, object]) -> str:
    """The nearest allowed name, if one is near, and all of them."""
    return f"{nearest(given, allowed)}; allowed: {', '.join(allowed)}"


def unknown_key(key: str, model: type[BaseModel], parents: Sequence[str | int] = ()) -> str:
    """That a key, below its parents, is none of a model's, and which was meant: `lr` may be `optimizer.lr`."""
    place = _part_of(model, parents)
    known = list(place.model_fields) if place else []
    everywhere: dict[str, list[str]] = {}
    for one in _dotted(model):
        everywhere.setdefault(one.split(".")[-1], []).append(one)
    meant = everywhere.get(key) or get_close_matches(key, known, n=1)
    meant = meant or everywhere.get(next(iter(get_close_matches(key, everywhere, n=1, cutoff=0.8)), ""), [])
    hint = f" (did you mean {' or '.join(map(repr, meant))}?)" if meant else f"; allowed: {', '.join(known)}"
    return f"unknown key {'.'.join(map(str, [*parents, key]))!r}{hint}"


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong with settings, in words: each key, what is allowed, what was received, what was meant."""
    said: dict[str, list[str]] = {}
    received: dict[str, str] = {}
    for item in error.errors():
        parts = [part for part in item["loc"] if isinstance(part, int) or not BRANCH.fullmatch(part)]
        place, message = ".".join(map(str, parts)), item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            said[place] = [unknown_key(str(parts[-1]), model, parts[:-1])]
            continue
        if item["type"] == "missing":
            said[place] = [f"{place} is missing"]
            continue
        if place and item["type"] != "value_error":
            message = re.sub(r"^Input should be", "must be", message).split(", unable to parse")[0]
            shown = repr(item["input"])
            received[place] = shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."
            if item["type"] == "literal_error":
                received[place] += nearest(item["input"], re.findall(r"'([^']*)'", item["msg"]))
        said.setdefault(place, []).append(message)
    return "; ".join(_sentence(place, messages, received.get(place)) for place, messages in said.items())


def _sentence(place: str, messages: list[str], received: str | None) -> str:
    """One key's messages, one for each branch of a union, as one."""
    if received is None:
        own = not place or messages[0].startswith((place, "unknown key"))
        return messages[0] if own else f"{place}: {messages[0]}"
    words = " or ".join(dict.fromkeys(one.removeprefix("must be ") for one in messages))
    must = "must be " if messages[0].startswith("must be ") else ""
    return f"{place}{' ' if must else ': '}{must}{words}, got {received}"


def _part_of(model: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel] | None:
    """The model of the settings at a path, or None if there is none."""
    found: type[BaseModel] | None = model
    for name in path:
        if isinstance(name, str) and found is not None:
            field = found.model_fields.get(name)
            found = next(_models(field.annotation), None) if field else None
    return found


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models an annotation speaks of."""
    if hasattr(annotation, "model_fields"):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _dotted(model: type[BaseModel], before: str = "") -> Iterator[str]:
    """Every key of a model and, of those that are models themselves (no lists of them), every key within."""
    for name, field in model.model_fields.items():
        yield before + name
        if "list" not in str(field.annotation):
            for part in _models(field.annotation):
                yield from _dotted(part, f"{before}{name}.")
