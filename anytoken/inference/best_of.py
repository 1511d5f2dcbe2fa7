"""Defaults of a checkpoint for the best of several replies, the one from which the prompt can best be read back.

`best_of.json` says how many replies `generate` makes for a direction, and how varied they are:
``{"text->image": {"replies": 8, "temperature": 0.5}}``. They are ranked as by ``rerank="prompt"``, see
`likeliest_prompt.py`. Replies that are streamed or served are single ones, at the temperatures of `sampling.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from anytoken.inference.chains import prompt_kind, read_ways
from anytoken.inference.request import GenerationRequest
from anytoken.token_space import TokenSpace
from anytoken.utils.errors import RequestError

FILE = "best_of.json"


@dataclass(frozen=True)
class BestOf:
    """How many replies (1 or more) are generated, and the temperature (above 0) of their media; else RequestError."""

    replies: int
    temperature: float

    def __post_init__(self) -> None:
        count, heat = self.replies, self.temperature
        if type(count) is not int or count < 1 or type(heat) not in (int, float) or not heat > 0:
            raise RequestError(
                f"replies must be an integer of at least 1 and temperature a number above 0; received {asdict(self)}."
            )


BestOfDefaults = dict[tuple[str, str], BestOf]  # by kind of the prompt and kind of the reply


def load_best_of(folder: Path) -> BestOfDefaults:
    """The defaults of a checkpoint; {} if it has none. RequestError for a damaged file."""
    example = '{"text->image": {"replies": 8, "temperature": 0.5}}'
    return read_ways(folder / FILE, lambda settings: BestOf(**settings), example)


def save_best_of(defaults: Mapping[tuple[str, str], BestOf], folder: Path) -> None:
    """Write the defaults of a checkpoint, if there are any."""
    if defaults:
        data = {"->".join(way): asdict(one) for way, one in defaults.items()}
        (folder / FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def several(
    request: GenerationRequest, defaults: BestOfDefaults, space: TokenSpace, keep_sampling: bool
) -> list[GenerationRequest]:
    """The requests, by default one, among whose replies the best is chosen.

    There are more only if the reply is one medium that can be compared with a text: the last step of a chain, or a
    prompt of a single turn that holds nothing else. keep_sampling: whether the request's own temperatures apply.
    """
    kinds, turns = request.output_kinds, list(request.prompt).count(space.user)
    if not defaults or kinds is None or len(kinds) != request.num_steps + 1 or turns != 1:
        return [request]
    source = prompt_kind(request.prompt, space)
    chained = request.num_steps > 0 and not request.cascade
    found = defaults.get((str(source), kinds[-1]))
    if found is None or (kinds[-2] if chained else source) != "text":
        return [request]
    if not keep_sampling:
        sampling = {
            kind: one if kind == "text" else replace(one, temperature=found.temperature)
            for kind, one in request.sampling.items()
        }
        request = replace(request, sampling=sampling)
    if all(request.sampling[kind].greedy for kind in kinds):
        return [request]
    return [replace(request, draw=draw) for draw in range(found.replies)]
