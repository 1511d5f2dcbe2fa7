"""Commands that use a model: demo, chat, generate, tokenize, detokenize, info."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from anytoken import recipes
from anytoken.commands.options import (
    Adapter,
    CfgScale,
    Device,
    MaxNewTokens,
    Model,
    ModelArgument,
    Out,
    Seed,
    Temperature,
    TopK,
    TopP,
    load,
)
from anytoken.terminal import (
    chat_loop,
    mark_parts,
    read_ids,
    read_part,
    show_model,
    show_parts,
    show_reply,
    write_segments,
)

app = typer.Typer()
PROMPT_HELP = (
    "Strings and file paths, in order; or typed parts: --text WORDS, --image PATH, --speech PATH, --video PATH, "
    "--dna PATH-OR-BASES."
)


class PromptCommand(TyperCommand):
    """A command whose prompt parts keep the order they were written in."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, mark_parts(args))


@app.command()
def demo(
    model: Model = "mini",
    out: Out = Path("out/demo"),
    assets: Annotated[
        Path | None, typer.Option(help="Held-out files; by default those that come along.")
    ] = None,
) -> None:
    """Answer held-out files in every direction and write a page of the results."""
    from anytoken.evaluation.gallery import run_demo

    run_demo(load(model), assets or recipes.assets(), out)


@app.command()
def chat(
    model: Model = "mini",
    out: Out = Path("out/chat"),
    system: Annotated[str | None, typer.Option(help="A system text.")] = None,
    seed: Seed = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    cfg_scale: CfgScale = None,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Talk in the terminal; /image PATH, /draw TEXT, /say TEXT ... and files for what comes back."""
    opened = load(model, device, adapter)
    console = Console()
    read = (lambda: console.input("[bold]> [/]")) if sys.stdin.isatty() else input
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "cfg_scale": cfg_scale,
        "seed": seed,
    }
    chat_loop(opened.chat(system), out, console, read, **options)


@app.command(cls=PromptCommand)
def generate(
    prompt: Annotated[list[str], typer.Argument(help=PROMPT_HELP)],
    model: Model = "mini",
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output", "-o", help="Kinds in order: text,image or -o text -o image; else the model's choice."
        ),
    ] = None,
    out: Out = Path("out"),
    num_return: Annotated[int, typer.Option(help="How many replies.")] = 1,
    seed: Seed = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    cfg_scale: CfgScale = None,
    max_new_tokens: MaxNewTokens = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON line a reply, with ids and usage.")
    ] = False,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Answer one prompt: `anytoken generate cat.png "What is this?" -o text`."""
    parts = [read_part(part) for part in prompt]
    kinds = [kind for one in output or [] for kind in one.replace(",", " ").split() or [""]] or None
    replies = load(model, device, adapter).generate(
        parts,
        kinds,
        num_return=num_return,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        cfg_scale=cfg_scale,
        max_new_tokens=max_new_tokens,
    )
    for reply in replies if isinstance(replies, list) else [replies]:
        show_reply(reply, out, as_json)


@app.command(cls=PromptCommand)
def tokenize(
    prompt: Annotated[list[str], typer.Argument(metavar="FILE...", help=PROMPT_HELP)], model: Model = "mini"
) -> None:
    """Print segments as a JSON list of token ids."""
    parts = [read_part(part) for part in prompt]
    opened = load(model)
    print([token for part in parts for token in opened.tokenize(part)])


@app.command()
def detokenize(
    source: Annotated[str, typer.Argument(help="A file of ids as JSON, or - for standard input.")] = "-",
    model: Model = "mini",
    out: Out = Path("out"),
) -> None:
    """Turn token ids back into text and files."""
    ids = read_ids(source)
    show_parts(write_segments(load(model).detokenize(ids), out))


@app.command()
def info(model: ModelArgument = "mini") -> None:
    """Show a model's size, kinds, id ranges and sampling defaults, and the versions underneath."""
    show_model(load(model))
