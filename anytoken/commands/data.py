"""`anytoken data`: build the data sets and tokenize records into shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anytoken.commands.options import Out, Workers

app = typer.Typer(no_args_is_help=True, help="Build the data sets and tokenize records into shards.")
Cache = Annotated[Path | None, typer.Option(help="Where fetched packages are kept.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Build only so many items: a quick look.")]


@app.command()
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


@app.command()
def speech(
    out: Out,
    emoji: Annotated[Path | None, typer.Option(help="The built emoji set; by default OUT/emoji.")] = None,
    workers: Workers = 2,
    limit: Limit = None,
) -> None:
    """Build the spoken names, said by real speech engines."""
    from anytoken.data.speech import build_speech

    print(build_speech(out, emoji or out / "emoji", workers=workers, limit=limit))


@app.command()
def dna(out: Out, cache: Cache = None, limit: Limit = None) -> None:
    """Build the genes, proteins and intergenic stretches of real bacterial genomes."""
    from anytoken.data.dna import build_dna

    print(build_dna(out, cache=cache, limit=limit))


@app.command()
def instruct(
    sets: Annotated[Path, typer.Option(help="The folder of the built sets.")],
    out: Out,
    count: Annotated[int, typer.Option(min=1)] = 12_000,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write conversations with requests in words, made from the built sets."""
    from anytoken.data.instruct import build_instruct

    print(build_instruct(sets, out, count, seed))


@app.command("tokenize")
def data_tokenize(
    records: Annotated[Path, typer.Argument(help="A JSONL file of records or conversations.")],
    tokenizers: Annotated[Path, typer.Option(help="A folder of tokenizers, such as a checkpoint's.")],
    out: Out,
    workers: Workers = 2,
) -> None:
    """Tokenize the media of records once, into shards; it resumes where it was stopped."""
    from anytoken.data.shards import load_tokenizers, tokenize_records

    print(tokenize_records(records, load_tokenizers(tokenizers), out, workers))
