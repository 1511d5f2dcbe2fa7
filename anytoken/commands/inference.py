"""Commands that use a model: demo, chat, generate, tokenize, detokenize, info."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperCommand

from anytoken import recipes
from anytoken.commands.options import (
    Adapter,
    Device,
    Limits,
    Model,
    ModelArgument,
    Out,
    examples,
    load,
    with_sampling,
)
from anytoken.terminal.prompt_args import check_out, mark_parts, read_ids, read_part
from anytoken.terminal.render import print_events, show_events, show_model, show_reply, show_segments
from anytoken.terminal.repl import ChatRepl, line_reader

app = typer.Typer()
PROMPT_HELP = (
    "Strings and file paths in order, - for text on standard input; or typed parts: --text WORDS, --image PATH, "
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
    assets: Annotated[Path | None, typer.Option(help="Held-out files; by default the bundled ones.")] = None,
    each: Annotated[int, typer.Option(min=1, help="Prompts per direction.")] = 2,
) -> None:
    """Answer held-out prompts in every direction and write the results as an HTML page."""
    from anytoken.emoji_world.demo import run_demo

    run_demo(load(model), assets or recipes.assets(), out, each)


@app.command(epilog=examples("anytoken chat --model mini", "anytoken chat --load kept"))
@with_sampling
def chat(
    model: Model = "mini",
    out: Out = Path("out/chat"),
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    go_on: Annotated[
        Path | None, typer.Option("--load", help="Continue a conversation saved with /save.")
    ] = None,
    *,
    sampling: dict[str, Any],
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Chat in the terminal: /image PATH, /draw TEXT, /say TEXT, /save DIR ...; /help lists all.

    Images are shown if the terminal supports it; generated media are saved to --out.
    """
    if system is not None and go_on is not None:
        raise typer.BadParameter(
            "--system starts a new conversation and --load continues one: give only one of them."
        )
    check_out(out)
    opened = load(model, device, adapter)
    talk = ChatRepl(opened.chat(system), out, Console(), **sampling)
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
@with_sampling
def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help=f"{PROMPT_HELP} By default standard input.")
    ] = None,
    model: Model = "mini",
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            help="Output kinds in order: text,image or -o text -o image; by default the model decides.",
        ),
    ] = None,
    via: Annotated[
        list[str] | None,
        typer.Option(
            help="Kinds to generate first, as steps towards one output kind; none for no steps; by default as the "
            "checkpoint says."
        ),
    ] = None,
    cascade: Annotated[
        bool | None, typer.Option(help="Generate from each step of --via alone, or from the prompt, too.")
    ] = None,
    out: Out = Path("out"),
    num_return: Annotated[int, typer.Option(help="Number of replies.")] = 1,
    best_of: Annotated[
        int | None,
        typer.Option(
            help="Sample N replies and return the --num-return most likely; by default as the checkpoint says."
        ),
    ] = None,
    rerank: Annotated[
        Literal["prompt"] | None,
        typer.Option(
            help="prompt: the best replies are those from which the prompt's text can be read back."
        ),
    ] = None,
    *,
    sampling: dict[str, Any],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON line per reply, with ids and usage.")
    ] = False,
    stream: Annotated[
        bool, typer.Option(help="Show the reply while it is generated; with --json one line per event.")
    ] = False,
    limits: Limits = None,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Answer one prompt of text and files."""
    if stream and (num_return != 1 or best_of is not None):
        raise typer.BadParameter(
            "--stream shows a single reply while it is generated; leave out --num-return and --best-of."
        )
    if not prompt and sys.stdin.isatty():
        raise typer.BadParameter('the prompt is empty: anytoken generate "a fox", or pipe text in.')
    check_out(out)
    parts = [read_part(part) for part in prompt or ["-"]]
    kinds, steps = _kinds(output), _kinds(via)
    sampling["via"] = [] if steps == ["none"] else steps
    sampling["cascade"] = cascade
    opened, console = load(model, device, adapter), Console()
    if stream:
        events = opened.stream(parts, kinds, **sampling)
        if as_json:
            print_events(events, out)
        else:
            show_events(events, out, console)
        return
    replies = opened.generate(parts, kinds, num_return=num_return, best_of=best_of, rerank=rerank, **sampling)
    for reply in replies if isinstance(replies, list) else [replies]:
        show_reply(reply, out, console, as_json)


def _kinds(given: list[str] | None) -> list[str] | None:
    return [kind for one in given or [] for kind in one.replace(",", " ").split() or [""]] or None


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
    source: Annotated[str, typer.Argument(help="JSON file of ids, or - for standard input.")] = "-",
    model: Model = "mini",
    out: Out = Path("out"),
) -> None:
    """Decode token ids into text and files."""
    check_out(out)
    ids = read_ids(source)
    show_segments(load(model).detokenize(ids), out, Console())


@app.command(epilog=examples("anytoken info mini"))
def info(model: ModelArgument = "mini") -> None:
    """Show a model's size, kinds, id ranges, sampling defaults and library versions."""
    show_model(load(model))
