"""The `anytoken` command: each command is a thin call into one room.

A mistake of the user (ValueError, a file that cannot be read, a wrong option) is one red line on stderr and exit
code 2; `--debug`, anywhere on the line, shows the traceback instead. Rooms are imported inside the commands, so
that `anytoken --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import Abort, TyperException

from anytoken import recipes
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

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken

PROMPT_HELP = (
    "Strings and file paths, in order; or typed parts: --text WORDS, --image PATH, --speech PATH, --video PATH, "
    "--dna PATH-OR-BASES."
)


class OneLineErrors(TyperGroup):
    """The top command group: turns a user's mistake into one line and exit code 2."""

    def main(self, args: Sequence[str] | None = None, *unused: Any, **extra: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words
        if debug:
            words.remove("--debug")
        try:
            code = super().main(words, **{**extra, "standalone_mode": False})
        except (ValueError, OSError, TyperException) as error:
            if debug:
                raise
            complain(error)
            code = 2
        except (Abort, KeyboardInterrupt):
            code = 130
        sys.exit(code)


def complain(error: Exception) -> None:
    """One red line on stderr; nothing for a bare `anytoken`, which has already printed its help."""
    message = (
        error.format_message() if isinstance(error, TyperException) else str(error) or type(error).__name__
    )
    if message:
        line = " ".join(message.split())
        Console(stderr=True, soft_wrap=True).print(
            f"anytoken: {line}", style="red", markup=False, highlight=False
        )


class PromptCommand(TyperCommand):
    """A command whose prompt parts keep the order they were written in."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, mark_parts(args))


app = typer.Typer(
    cls=OneLineErrors, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train and measure one modality's tokenizer.")
data_app = typer.Typer(no_args_is_help=True, help="Build the data sets and tokenize records into shards.")
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes and programs that come with the library.")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")

Model = Annotated[
    str, typer.Option("--model", "-m", help="A bundled name, a checkpoint folder, or a hub id.")
]
ModelArgument = Annotated[str, typer.Argument(help="A bundled name, a checkpoint folder, or a hub id.")]
Adapter = Annotated[Path | None, typer.Option(help="A PEFT adapter folder to load with the model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Out = Annotated[Path, typer.Option(help="The folder to write to.")]
Seed = Annotated[int | None, typer.Option(help="The same seed and prompt give the same reply.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Change recipe values.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy; by default the checkpoint's, per kind.")
]
TopK = Annotated[int | None, typer.Option()]
TopP = Annotated[float | None, typer.Option()]
CfgScale = Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")]
MaxNewTokens = Annotated[int | None, typer.Option()]


@app.callback()
def top(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Text, images, speech, video and DNA as tokens of one stream, read and written by one language model."""


def load(model: str, device: str = "auto", adapter: Path | None = None) -> AnyToken:
    """Open a model without progress bars over the answer."""
    from transformers.utils import logging

    import anytoken

    logging.disable_progress_bar()
    return anytoken.load(model, device=device, adapter=adapter)


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
def train(stage: Annotated[str, typer.Argument(help="A stage recipe.")], overrides: Overrides = None) -> None:
    """Run a training stage; it resumes where it was stopped: `anytoken train stages/lora.yaml steps=500`."""
    from anytoken.training.stage import Stage
    from anytoken.training.trainer import train as run

    print(run(Stage.load(recipes.find(stage), overrides or [])))


@app.command("eval")
def evaluate(
    model: ModelArgument = "mini",
    data: Annotated[Path, typer.Option(help="The folder of the built sets.")] = Path("data/sets"),
    out: Annotated[Path, typer.Option(help="The JSON file of figures.")] = Path("out/scores.json"),
    directions: Annotated[str | None, typer.Option(help="Some only: text->image,image->text.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out prompts a direction.")] = 200,
    seed: Annotated[int, typer.Option()] = 0,
    judge_steps: Annotated[int, typer.Option(min=1, help="Training steps of the picture judges.")] = 1500,
    fill: Annotated[
        list[Path] | None, typer.Option(help="Markdown whose score table is written anew.")
    ] = None,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Score a model on held-out prompts in every direction, beside chance and simple baselines."""
    from anytoken.evaluation import gallery, report
    from anytoken.evaluation.tasks import World

    chosen = directions.split(",") if directions else None
    found = report.evaluate(load(model, device, adapter), World(data, judge_steps, seed), chosen, count, seed)
    report.save(found, out)
    for page in fill or []:
        report.fill(page, found)
    Console().print(gallery.score_table(found))
    print(out)


@app.command()
def info(model: ModelArgument = "mini") -> None:
    """Show a model's size, kinds, id ranges and sampling defaults, and the versions underneath."""
    show_model(load(model))


@tokenizer_app.command("train")
def tokenizer_train(
    recipe: Annotated[str, typer.Argument(help="tokenizers/KIND/recipe.yaml, or your own.")],
    data: Annotated[Path, typer.Option(help="The folder of the built sets.")],
    out: Out,
    overrides: Overrides = None,
) -> None:
    """Train a tokenizer by its recipe."""
    from anytoken.tokenizers.trainer import train_tokenizer

    print(train_tokenizer(recipes.find(recipe), data, out, overrides or []))


@tokenizer_app.command("eval")
def tokenizer_eval(
    tokenizer: Annotated[Path, typer.Argument(help="A tokenizer folder.")],
    data: Annotated[Path, typer.Option(help="The folder of the built sets.")],
    card: Annotated[
        Path | None, typer.Option(help="A folder for figures.json, README.md and before/after samples.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out items at most.")] = 400,
    seed: Annotated[int, typer.Option(help="Which items, where there are more.")] = 0,
) -> None:
    """Measure a tokenizer on held-out data beside baselines: reconstruction, codebook usage, tokens, speed."""
    import json

    from anytoken.tokenizers.cards import make_card
    from anytoken.tokenizers.measures import measure

    if card is None:
        print(json.dumps(measure(tokenizer, data, count, seed).figures, indent=2, ensure_ascii=False))
    else:
        print(make_card(tokenizer, data, card, count, seed))


@tokenizer_app.command("overview")
def tokenizer_overview(
    cards: Annotated[Path, typer.Argument(help="A folder of card folders.")] = Path("tokenizers"),
    fill: Annotated[
        list[Path] | None, typer.Option(help="Markdown whose table of tokenizers is written anew.")
    ] = None,
) -> None:
    """One line for each tokenizer that has a card: rate, what it keeps beside a baseline, codebook usage."""
    from anytoken.evaluation.report import fill_between
    from anytoken.tokenizers.cards import overview

    table = overview(cards)
    for page in fill or []:
        fill_between(page, "tokenizers", table)
    print(table)


Cache = Annotated[Path | None, typer.Option(help="Where fetched packages are kept.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Build only so many items: a quick look.")]


@data_app.command()
def emoji(
    out: Out,
    cache: Cache = None,
    concepts: Annotated[
        int, typer.Option(min=1, help="Core concepts that are composed into pictures.")
    ] = 160,
    workers: Workers = 2,
    limit: Limit = None,
) -> None:
    """Build the emoji world: pictures in five styles and videos, with captions."""
    from anytoken.data.emoji import build_emoji

    print(build_emoji(out, cache=cache, concepts=concepts, workers=workers, limit=limit))


@data_app.command()
def speech(
    out: Out,
    emoji: Annotated[Path | None, typer.Option(help="The built emoji set; by default OUT/emoji.")] = None,
    workers: Workers = 2,
    limit: Limit = None,
) -> None:
    """Build the spoken names, said by real speech engines."""
    from anytoken.data.speech import build_speech

    print(build_speech(out, emoji or out / "emoji", workers=workers, limit=limit))


@data_app.command()
def dna(out: Out, cache: Cache = None, limit: Limit = None) -> None:
    """Build the genes, proteins and intergenic stretches of real bacterial genomes."""
    from anytoken.data.dna import build_dna

    print(build_dna(out, cache=cache, limit=limit))


@data_app.command()
def instruct(
    sets: Annotated[Path, typer.Option(help="The folder of the built sets.")],
    out: Out,
    count: Annotated[int, typer.Option(min=1)] = 12_000,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write conversations with requests in words, made from the built sets."""
    from anytoken.data.instruct import build_instruct

    print(build_instruct(sets, out, count, seed))


@data_app.command("tokenize")
def data_tokenize(
    records: Annotated[Path, typer.Argument(help="A JSONL file of records or conversations.")],
    tokenizers: Annotated[Path, typer.Option(help="A folder of tokenizers, such as a checkpoint's.")],
    out: Out,
    workers: Workers = 2,
) -> None:
    """Tokenize the media of records once, into shards; it resumes where it was stopped."""
    from anytoken.data.shards import load_tokenizers, tokenize_records

    print(tokenize_records(records, load_tokenizers(tokenizers), out, workers))


@recipes_app.command("list")
def recipes_list() -> None:
    """Show the names of all recipes and programs."""
    for name in recipes.names():
        print(f"{name:36} {recipes.summary(name)}".rstrip())


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A name from `anytoken recipes list`, or its folder.")],
    to: Annotated[Path | None, typer.Argument(help="A new file or folder, or a folder to put it in.")] = None,
) -> None:
    """Copy a recipe to change it."""
    print(recipes.copy(name, to))


def main() -> None:
    """Run the command line."""
    app()
