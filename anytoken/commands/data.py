"""`anytoken data`: build the data sets, check records, and tokenize them into shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anytoken.commands.options import Engine, Limits, Out, Sets, Workers, examples

app = typer.Typer(
    no_args_is_help=True, help="Build the data sets, check records, and tokenize them into shards."
)
Cache = Annotated[Path | None, typer.Option(help="Cache folder for downloaded packages.")]
Source = Annotated[
    str,
    typer.Argument(
        help="A .jsonl, .json, .csv or .tsv file, a folder of media with captions or in class folders, webdataset "
        "tars, Parquet or Arrow files, a saved `datasets` folder, or hf:owner/name; a pattern such as 'set-*.tar' for "
        "several files."
    ),
]
Rename = Annotated[
    list[str] | None, typer.Option(metavar="OLD=NEW", help="Rename a key of the records; repeatable.")
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Another folder that media may be in; by default the source's own folder.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Build at most N items, for a quick look.")]


@app.command(
    epilog=examples(
        "anytoken data emoji --out data/sets/emoji", "anytoken data emoji --out data/sets/emoji --limit 20"
    )
)
def emoji(
    out: Out,
    cache: Cache = None,
    concepts: Annotated[
        int, typer.Option(min=1, help="Number of core concepts to compose into images.")
    ] = 160,
    still: Annotated[
        bool, typer.Option(help="Allow core concepts without a video; needed for more than 183.")
    ] = False,
    layouts: Annotated[
        bool,
        typer.Option(
            help="Also compose images with small and large objects at the left, right, top and bottom."
        ),
    ] = False,
    moving: Annotated[
        bool, typer.Option(help="Also compose stills and clips in all styles, to learn how drawings move.")
    ] = False,
    workers: Workers = 2,
    limit: Limit = None,
) -> None:
    """Build the emoji world: captioned images in five styles and videos."""
    from anytoken.emoji_world.emoji import build_emoji

    print(build_emoji(out, cache, concepts, workers, limit, still=still, layouts=layouts, moving=moving))


@app.command(epilog=examples("anytoken data speech --out data/sets --emoji data/sets/emoji"))
def speech(
    out: Out,
    emoji: Annotated[Path | None, typer.Option(help="The built emoji set; by default OUT/emoji.")] = None,
    workers: Workers = 2,
    limit: Limit = None,
) -> None:
    """Build the spoken names with text-to-speech engines."""
    from anytoken.emoji_world.speech import build_speech

    print(build_speech(out, emoji or out / "emoji", workers=workers, limit=limit))


@app.command(epilog=examples("anytoken data words --out data/sets --count 6000"))
def words(
    out: Out,
    emoji: Annotated[Path | None, typer.Option(help="The built emoji set; by default OUT/emoji.")] = None,
    cache: Cache = None,
    count: Annotated[int, typer.Option(min=1, help="Number of distinct words and short phrases.")] = 6_000,
    voices: Annotated[int, typer.Option(min=1, help="Voices per word.")] = 3,
    workers: Workers = 2,
    limit: Limit = None,
) -> None:
    """Build spoken words and short phrases with all speech engines, to train text-to-speech."""
    from anytoken.emoji_world.spoken_words import build_words

    print(build_words(out, emoji or out / "emoji", cache, count, voices, workers, limit))


@app.command(epilog=examples("anytoken data voices --out data/sets"))
def voices(
    out: Out,
    prompts: Annotated[
        Path | None, typer.Option(help="Folder of G.722 recordings; by default that of Debian's packages.")
    ] = None,
    workers: Workers = 2,
    limit: Limit = None,
) -> None:
    """Build a multi-speaker speech set, for a speech tokenizer that generalizes over voices."""
    from anytoken.emoji_world.voices import PROMPTS, build_voices

    print(build_voices(out, prompts or PROMPTS, workers=workers, limit=limit))


@app.command(epilog=examples("anytoken data dna --out data/sets"))
def dna(out: Out, cache: Cache = None, limit: Limit = None) -> None:
    """Build the genes, proteins and intergenic regions of real bacterial genomes."""
    from anytoken.emoji_world.dna import build_dna

    print(build_dna(out, cache=cache, limit=limit))


@app.command(
    "dna-tasks", epilog=examples("anytoken data dna-tasks --dna data/sets/dna --out data/sets/dna_tasks")
)
def dna_tasks(
    dna: Annotated[Path, typer.Option(help="The folder of the built DNA set, such as data/sets/dna.")],
    out: Out,
    limit: Limit = None,
) -> None:
    """Build small DNA task sets: promoters, gene starts, variants, motifs with images."""
    from anytoken.emoji_world.dna_tasks import build_dna_tasks

    print(build_dna_tasks(dna, out, limit))


@app.command(
    "label-fasta", epilog=examples("anytoken data label-fasta genes.fasta labels.csv --out genes.jsonl")
)
def label_fasta(
    fasta: Annotated[Path, typer.Argument(help="FASTA file, may be gzipped.")],
    labels: Annotated[
        Path, typer.Argument(help="A .csv, .tsv or .jsonl file with the columns name and label.")
    ],
    out: Annotated[Path, typer.Option(help="The .jsonl to write.")],
) -> None:
    """Convert FASTA and a table of labels to records, for tasks and training."""
    from anytoken.data.fasta import label_fasta

    print(label_fasta(fasta, labels, out))


@app.command(epilog=examples("anytoken data instruct --sets data/sets --out data/sets/instruct"))
def instruct(
    sets: Sets,
    out: Out,
    count: Annotated[int, typer.Option(min=1, help="Number of conversations.")] = 12_000,
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same set.")] = 0,
) -> None:
    """Build instruction conversations from the built sets."""
    from anytoken.emoji_world.instruct import build_instruct

    print(build_instruct(sets, out, count, seed))


@app.command(
    "check",
    epilog=examples(
        "anytoken data check my.jsonl --open", "anytoken data check table.csv --rename picture=image"
    ),
)
def data_check(
    source: Source,
    decode: Annotated[bool, typer.Option("--open", help="Also decode every media file.")] = False,
    tokenizers: Annotated[
        Path | None,
        typer.Option(help="A folder of tokenizers; also list what they reject, such as long clips."),
    ] = None,
    rename: Rename = None,
    data_root: DataRoot = None,
    limits: Limits = None,
) -> None:
    """List every bad record with its location and reason; exit code 2 if there is one. Shards: verify checksums."""
    from anytoken.data.shards import is_shards, load_tokenizers, verify_shards
    from anytoken.data.validate import Census, check_source
    from anytoken.utils.errors import RecordError

    if is_shards(source):
        manifest = verify_shards(source)
        print(f"{source}: {manifest['records']:,} records in {manifest['parts']:,} parts, checksums match")
        return
    census = Census()
    made = load_tokenizers(tokenizers) if tokenizers else None
    for place, error in check_source(source, census, decode, pairs(rename), data_root, made):
        print(f"{Path(source).name} {place}: {error}")
    media = ", ".join(f"{count:,} {kind}" for kind, count in census.media.items() if count) or "no media"
    print(f"{source}: {census.records:,} records, {census.conversations:,} of them conversations; {media}")
    if census.files:
        print(f"note: {len(census.files):,} files belong to no record; the first: {census.files[0]}")
    for hint in census.hints():
        print(f"note: {hint}")
    if census.bad:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in census.bad.most_common())
        raise RecordError(
            f"{source}: {census.bad.total():,} of {census.records:,} records are bad: {reasons}"
        )
    if not census.records:
        raise RecordError(f"{source} holds no record")
    for note in census.unused():
        print(f"note: {note}")


@app.command(
    "tokenize",
    epilog=examples(
        "anytoken data tokenize my.jsonl --tokenizers runs/4_instruct/tokenizers --out data/shards/my"
    ),
)
def data_tokenize(
    source: Source,
    tokenizers: Annotated[Path, typer.Option(help="A folder of tokenizers, such as a checkpoint's.")],
    out: Out,
    workers: Workers = 2,
    engine: Engine = "local",
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="Fraction of records that may be bad.")] = 0.01,
    rename: Rename = None,
    data_root: DataRoot = None,
    limits: Limits = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing shards of other records.")
    ] = False,
    first_frames: Annotated[
        bool | None,
        typer.Option(
            help="Also encode the first frame of every video as an image; by default if the checkpoint reads it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Tokenize the media of records into shards; rerun the command to resume."""
    from anytoken.data.shards import load_tokenizers, tokenize_records
    from anytoken.processor import PROMPTS, saved_first_frames

    if first_frames is None:
        first_frames = saved_first_frames(tokenizers.absolute().parent / PROMPTS)
    options = {"max_bad": max_bad, "engine": engine, "rename": pairs(rename)}
    options |= {"data_root": data_root, "overwrite": overwrite, "first_frames": first_frames}
    print(tokenize_records(source, load_tokenizers(tokenizers), out, workers, **options))  # type: ignore[arg-type]


def pairs(words: list[str] | None) -> dict[str, str]:
    """OLD=NEW words as a mapping; ValueError for any other word."""
    split = {word: word.partition("=") for word in words or []}
    if wrong := [word for word, parts in split.items() if not all(parts)]:
        raise ValueError(f"--rename takes OLD=NEW, such as audio=speech; received {wrong[0]!r}")
    return {old: new for old, _, new in split.values()}
