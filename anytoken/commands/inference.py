"""Commands that use a model: demo, chat, generate, tokenize, detokenize, info."""

from __future__ import annotations

import shlex
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
    Limits,
    MaxNewTokens,
    MinP,
    Model,
    ModelArgument,
    Out,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    examples,
    load,
)
from anytoken.terminal.prompt_args import check_out, mark_parts, read_ids, read_part
from anytoken.terminal.render import print_events, show_events, show_model, show_reply, show_segments
from anytoken.terminal.repl import ChatRepl, line_reader

app = typer.Typer()
PROMPT_HELP = (
    "Strings and file paths, in order, and - for words on standard input; or typed parts: --text WORDS, --image PATH, "
    "--speech PATH (- for standard input), --video PATH, --dna PATH-OR-BASES."
)


class PromptCommand(TyperCommand):
    """A command whose prompt parts keep the order they were written in."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, mark_parts(args))


@app.command(epilog=examples("anytoken demo --out out/demo"))
def demo(
    model: Model = "mini",
    out: Out = Path("out/demo"),
    assets: Annotated[
        Path | None, typer.Option(help="Held-out files; by default those that come along.")
    ] = None,
    each: Annotated[int, typer.Option(min=1, help="Prompts per direction.")] = 2,
) -> None:
    """Answer held-out files in every direction and write a page of the results."""
    from anytoken.emoji_world.demo import run_demo

    run_demo(load(model), assets or recipes.assets(), out, each)


@app.command(epilog=examples("anytoken chat --model mini", "anytoken chat --load kept"))
def chat(
    model: Model = "mini",
    out: Out = Path("out/chat"),
    system: Annotated[str | None, typer.Option(help="A system text.")] = None,
    go_on: Annotated[
        Path | None, typer.Option("--load", help="Go on with a conversation that /save kept.")
    ] = None,
    seed: Seed = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    cfg_scale: CfgScale = None,
    max_new_tokens: MaxNewTokens = None,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Talk in the terminal: /image PATH, /draw TEXT, /say TEXT, /save DIR ...; /help lists all.

    Pictures are shown where the terminal can; everything that comes back is a file in --out.
    """
    if system is not None and go_on is not None:
        raise typer.BadParameter(
            "--system begins a conversation and --load goes on with one: give one of them."
        )
    check_out(out)
    opened = load(model, device, adapter)
    talk = ChatRepl(
        opened.chat(system),
        out,
        Console(),
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        cfg_scale=cfg_scale,
        max_new_tokens=max_new_tokens,
    )
    if go_on is not None:
        talk.handle_command(f"/load {shlex.quote(str(go_on))}")
    interactive = sys.stdin.isatty()
    talk.run(line_reader() if interactive else input, interactive)


@app.command(
    cls=PromptCommand,
    epilog=examples(
        'anytoken generate cat.png "What is this?" -o text',
        'anytoken generate "a red apple, 3d" -o image --seed 0',
    ),
)
def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help=f"{PROMPT_HELP} Without any, what is piped in.")
    ] = None,
    model: Model = "mini",
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output", "-o", help="Kinds in order: text,image or -o text -o image; else the model's choice."
        ),
    ] = None,
    out: Out = Path("out"),
    num_return: Annotated[int, typer.Option(help="How many replies.")] = 1,
    best_of: Annotated[
        int | None, typer.Option(help="Make so many and give the likeliest, as many as --num-return.")
    ] = None,
    seed: Seed = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    cfg_scale: CfgScale = None,
    max_new_tokens: MaxNewTokens = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON line a reply, with ids and usage.")
    ] = False,
    stream: Annotated[
        bool, typer.Option(help="Show the reply while it is made; with --json one line an event.")
    ] = False,
    limits: Limits = None,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Answer one prompt, of words and files."""
    if stream and (num_return != 1 or best_of is not None):
        raise typer.BadParameter(
            "--stream shows one reply while it is made; leave out --num-return and --best-of."
        )
    if not prompt and sys.stdin.isatty():
        raise typer.BadParameter('say something: anytoken generate "a fox", or pipe words in.')
    check_out(out)
    parts = [read_part(part) for part in prompt or ["-"]]
    kinds = [kind for one in output or [] for kind in one.replace(",", " ").split() or [""]] or None
    options: dict[str, Any] = {
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "cfg_scale": cfg_scale,
        "max_new_tokens": max_new_tokens,
    }
    opened, console = load(model, device, adapter), Console()
    if stream:
        events = opened.stream(parts, kinds, **options)
        if as_json:
            print_events(events, out)
        else:
            show_events(events, out, console)
        return
    replies = opened.generate(parts, kinds, num_return=num_return, best_of=best_of, **options)
    for reply in replies if isinstance(replies, list) else [replies]:
        show_reply(reply, out, console, as_json)


@app.command(cls=PromptCommand, epilog=examples('anytoken tokenize "a fox" cat.png > ids.json'))
def tokenize(
    prompt: Annotated[list[str], typer.Argument(metavar="FILE...", help=PROMPT_HELP)],
    model: Model = "mini",
    limits: Limits = None,
) -> None:
    """Print segments as a JSON list of token ids."""
    parts = [read_part(part) for part in prompt]
    opened = load(model)
    print([token for part in parts for token in opened.tokenize(part)])


@app.command(epilog=examples("anytoken detokenize ids.json --out out"))
def detokenize(
    source: Annotated[str, typer.Argument(help="A file of ids as JSON, or - for standard input.")] = "-",
    model: Model = "mini",
    out: Out = Path("out"),
) -> None:
    """Turn token ids back into text and files."""
    check_out(out)
    ids = read_ids(source)
    show_segments(load(model).detokenize(ids), out, Console())


@app.command(epilog=examples("anytoken info mini"))
def info(model: ModelArgument = "mini") -> None:
    """Show a model's size, kinds, id ranges and sampling defaults, and the versions underneath."""
    show_model(load(model))
