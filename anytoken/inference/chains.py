"""Chains of modality: a reply generated in steps, such as speech -> text -> image.

A model that first writes what it understood can reuse its knowledge of text and images, instead of learning a direct
mapping (SpeechGPT, arXiv 2305.11000). In a `Cascade` each step, and then the output, is generated from the step before
alone: the image of a text is animated as if it were the prompt. A checkpoint lists its default chains in
`chains.json`: ``{"speech->image": ["text"], "text->video": {"cascade": ["image"]}}``. The steps are part of the
reply's ids, but not of its segments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from anytoken.token_space import TokenSpace
from anytoken.utils.errors import RequestError

FILE = "chains.json"
T = TypeVar("T")


class Cascade(tuple[str, ...]):
    """The kinds of steps that are generated each from the one before alone."""


Chains = dict[tuple[str, str], tuple[str, ...]]  # (kind of the prompt, kind of the reply): steps


def load_chains(folder: Path) -> Chains:
    """The default chains of a checkpoint; {} if it has none. RequestError for a damaged file."""

    def steps_of(value: Any) -> tuple[str, ...]:
        kinds = value["cascade"] if isinstance(value, dict) else value
        if not kinds or not all(isinstance(one, str) for one in kinds):
            raise ValueError(f"{value!r}")
        return Cascade(kinds) if isinstance(value, dict) else tuple(kinds)

    return read_ways(folder / FILE, steps_of, '{"speech->image": ["text"]}')


def read_ways(path: Path, read: Callable[[Any], T], example: str) -> dict[tuple[str, str], T]:
    """A checkpoint's file of settings by kind of prompt and reply ("text->image"), each read by `read`.

    {} if there is none; RequestError with an example for a damaged one.
    """
    if not path.is_file():
        return {}
    try:
        found = {}
        for way, value in json.loads(path.read_text(encoding="utf-8")).items():
            source, _, target = way.partition("->")
            if not (source and target):
                raise ValueError(f"{way!r}")
            found[source, target] = read(value)
        return found
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise RequestError(
            f"{path} does not hold settings such as {example} ({error}); copy the checkpoint again."
        ) from error


def save_chains(chains: Mapping[tuple[str, str], Sequence[str]], folder: Path) -> None:
    """Write the chains of a checkpoint, if there are any."""
    if chains:
        data: dict[str, Any] = {}
        for (source, target), steps in chains.items():
            kinds = list(steps)
            data[f"{source}->{target}"] = {"cascade": kinds} if isinstance(steps, Cascade) else kinds
        (folder / FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def default_chains(chains: Chains, prompt: Sequence[int], space: TokenSpace) -> Chains:
    """The chains for the kind of a prompt's ids, without those of which a step is in the prompt already."""
    kind = prompt_kind(prompt, space)
    held = {name for name in space.modalities if space.open_token(name) in prompt}
    return {way: steps for way, steps in chains.items() if way[0] == kind and held.isdisjoint(steps)}


def prompt_kind(prompt: Sequence[int], space: TokenSpace) -> str | None:
    """The kind of the last user turn of a prompt's ids: its medium, or "text"; None for several media or no turn.

    An image right before a video counts as the video's first frame.
    """
    ids = list(prompt)
    if space.user not in ids:
        return None
    turn = ids[len(ids) - 1 - ids[::-1].index(space.user) :]
    media = {name for name in space.modalities if space.open_token(name) in turn}
    if media == {"image", "video"}:
        frame = space.close_token("image"), space.open_token("video")
        if turn.count(space.open_token("image")) == list(pairwise(turn)).count(frame):
            media.remove("image")
    if not media:
        return "text"
    return media.pop() if len(media) == 1 else None
