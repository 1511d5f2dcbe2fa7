"""Options shared by the commands, and loading a model without progress bars."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken


def allow_limits(context: typer.Context, given: list[str] | None) -> list[str] | None:
    """Set limits of media for as long as the command runs."""
    if given:
        from anytoken.utils.limits import media_limits, parse_limits

        context.with_resource(media_limits(**parse_limits(given)))
    return given


Model = Annotated[
    str, typer.Option("--model", "-m", help="A bundled name, a checkpoint folder, or a hub id.")
]
ModelArgument = Annotated[str, typer.Argument(help="A bundled name, a checkpoint folder, or a hub id.")]
Adapter = Annotated[Path | None, typer.Option(help="A PEFT adapter folder to load with the model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Out = Annotated[Path, typer.Option(help="The folder to write to.")]
Sets = Annotated[Path, typer.Option(help="The folder of the built sets.")]
Stage = Annotated[str, typer.Argument(help="A stage recipe.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Engine = Annotated[
    str, typer.Option(help="local, or ray (the cluster at RAY_ADDRESS, else one on this machine).")
]
Host = Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is this machine only.")]
ApiKeys = Annotated[
    Path | None,
    typer.Option(help="File with one API key per line; by default the variable ANYTOKEN_API_KEYS."),
]
AllowOpen = Annotated[
    bool, typer.Option("--allow-open", help="Listen on other addresses without an API key.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing checkpoint in --out; other files are kept.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override recipe values.")
]
Workers = Annotated[int, typer.Option(min=1, help="Number of processes.")]
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--limits",
        metavar="NAME=NUMBER",
        callback=allow_limits,
        help="Raise media limits: max_pixels, max_frames, max_seconds, max_letters, max_bytes, max_video_pixels, "
        "max_decoded_bytes.",
    ),
]
SAMPLING: dict[str, Any] = {  # options of how a reply is sampled, by their names in `AnyToken.generate`
    "seed": Annotated[
        int | None, typer.Option(help="Random seed; the same seed and prompt give the same reply.")
    ],
    "temperature": Annotated[
        float | None, typer.Option(help="0 is greedy; by default the checkpoint's setting per kind.")
    ],
    "top_k": Annotated[
        int | None, typer.Option(help="Sample from this many of the most probable ids; 1 is greedy.")
    ],
    "top_p": Annotated[
        float | None,
        typer.Option(help="Sample from the most probable ids that sum to this probability; 1 is off."),
    ],
    "min_p": Annotated[
        float | None, typer.Option(help="Drop ids below this fraction of the top probability.")
    ],
    "repetition_penalty": Annotated[
        float | None, typer.Option(help="Penalty on ids already in the reply; 1 is off.")
    ],
    "cfg_scale": Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is off.")],
    "max_new_tokens": Annotated[
        int | None, typer.Option(help="Maximum reply length in tokens; by default what fits the context.")
    ],
}


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of SAMPLING; its parameter `sampling` gets their values by name."""

    @wraps(command)
    def run(**given: Any) -> None:
        command(sampling={name: given.pop(name) for name in SAMPLING}, **given)

    signature = inspect.signature(command, eval_str=True)
    parameters = []
    for one in signature.parameters.values():
        if one.name == "sampling":
            parameters += [
                one.replace(name=name, annotation=SAMPLING[name], default=None) for name in SAMPLING
            ]
        else:
            parameters.append(one)
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def examples(*lines: str) -> str:
    """A command's epilog: lines to type, as they are."""
    return "\n\n".join(["Example:" if len(lines) == 1 else "Examples:", *lines])


def load(model: str, device: str = "auto", adapter: Path | None = None) -> AnyToken:
    """Open a model without progress bars over the answer."""
    from transformers.utils import logging

    import anytoken

    logging.disable_progress_bar()
    return anytoken.load(model, device=device, adapter=adapter)
