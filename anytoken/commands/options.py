"""What the commands share: options that mean the same everywhere, and opening a model quietly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace another checkpoint in --out; other files there are kept.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed and prompt give the same reply.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Change recipe values.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy; by default the checkpoint's, per kind.")
]
TopK = Annotated[
    int | None, typer.Option(help="Sample from this many of the most probable ids; 1 is greedy.")
]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the most probable ids that sum to this probability; 1 is off."),
]
MinP = Annotated[
    float | None, typer.Option(help="Keep ids at least this many times as probable as the likeliest.")
]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Of ids the reply already holds; 1 is off.")]
CfgScale = Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")]
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--limits",
        metavar="NAME=NUMBER",
        callback=allow_limits,
        help="Take larger media: max_pixels, max_frames, max_seconds, max_letters, max_bytes, max_video_pixels, "
        "max_decoded_bytes.",
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest reply, in token ids; by default what fits.")]


def examples(*lines: str) -> str:
    """A command's epilog: lines to type, as they are."""
    return "\n\n".join(["Example:" if len(lines) == 1 else "Examples:", *lines])


def load(model: str, device: str = "auto", adapter: Path | None = None) -> AnyToken:
    """Open a model without progress bars over the answer."""
    from transformers.utils import logging

    import anytoken

    logging.disable_progress_bar()
    return anytoken.load(model, device=device, adapter=adapter)
