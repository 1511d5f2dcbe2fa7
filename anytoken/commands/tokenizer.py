"""`anytoken tokenizer`: train and measure one modality's tokenizer."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from anytoken import recipes
from anytoken.commands.options import Out, Overrides, Sets, examples

Count = Annotated[
    int | None,
    typer.Option("--count", "--limit", min=1, help="Maximum number of held-out items; all by default."),
]
Genomes = Annotated[
    list[Path] | None,
    typer.Option(
        "--genome",
        help="FASTA file for the streaming test of DNA tokenizers, instead of the set's own; repeatable.",
    ),
]
ImageTokenizer = Annotated[
    Path | None,
    typer.Option(
        "--image",
        help="Image tokenizer to compare video with; by default the folder `image` next to this one.",
    ),
]
Files = Annotated[
    str | None,
    typer.Option(help="Folder or glob of your own files below --data, instead of the sets' held-out items."),
]
Learnability = Annotated[
    bool,
    typer.Option(
        help="Also train two small language models on the codes of the captioned set (about ten minutes): bits per "
        "code and item, fidelity of generated items, and stability of codes when only the global codes change."
    ),
]
app = typer.Typer(no_args_is_help=True, help="Train and measure one modality's tokenizer.")


@app.command(
    "train",
    epilog=examples(
        "anytoken tokenizer train tokenizers/image/recipe.yaml --data data/sets --out runs/tokenizers/image steps=2000"
    ),
)
def tokenizer_train(
    recipe: Annotated[str, typer.Argument(help="tokenizers/KIND/recipe.yaml, or your own.")],
    data: Sets,
    out: Out,
    overrides: Overrides = None,
) -> None:
    """Train a tokenizer from its recipe; rerun the command to resume.

    Writes the tokenizer, training.json, metrics.jsonl, and tensorboard/ if that package is installed. `data` in a
    recipe may be a folder or glob of your own files below --data, such as data=photos/train.
    """
    from anytoken.training.tokenizer.trainer import train_tokenizer

    print(train_tokenizer(recipes.find(recipe), data, out, overrides or []))
    print(f"next: {shlex.join(['anytoken', 'tokenizer', 'eval', str(out), '--data', str(data)])}")


@app.command(
    "eval",
    epilog=examples(
        "anytoken tokenizer eval runs/tokenizers/image --data data/sets",
        "anytoken tokenizer eval runs/tokenizers/image --data data/sets --card out/cards/image",
    ),
)
def tokenizer_eval(
    tokenizer: Annotated[Path, typer.Argument(help="A tokenizer folder.")],
    data: Sets,
    card: Annotated[
        Path | None, typer.Option(help="Folder for a card: figures.json, README.md and samples.")
    ] = None,
    genome: Genomes = None,
    image: ImageTokenizer = None,
    files: Files = None,
    count: Count = None,
    learnability: Learnability = False,
    seed: Annotated[int, typer.Option(help="Random seed for choosing items.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Measure a tokenizer on held-out data against baselines: reconstruction, codebook usage, rate, speed."""
    import json

    import anytoken.emoji_world.test_sets  # noqa: F401 (registers the built sets)
    from anytoken.evaluation.tokenizers.card import make_card
    from anytoken.evaluation.tokenizers.compare import summary
    from anytoken.evaluation.tokenizers.evaluate import measure

    measured = (count, seed, genome or [], image, files, learnability)
    if card is not None:
        page = make_card(tokenizer, data, card, *measured)
        figures = json.loads((card / "figures.json").read_text(encoding="utf-8"))
    else:
        figures = measure(tokenizer, data, *measured).figures
    if as_json:
        print(json.dumps(figures, indent=2, ensure_ascii=False))
        return
    head, *rows = summary(figures)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if card is not None:
        print(page)


@app.command(
    "compare",
    epilog=examples(
        "anytoken tokenizer compare runs/tokenizers/dna runs/tokenizers/dna_bpe --data data/sets"
    ),
)
def tokenizer_compare(
    tokenizers: Annotated[list[Path], typer.Argument(help="Tokenizer folders of one modality.")],
    data: Sets,
    out: Annotated[Path | None, typer.Option(help="JSON file for all figures.")] = None,
    genome: Genomes = None,
    image: ImageTokenizer = None,
    files: Files = None,
    count: Count = None,
    learnability: Learnability = False,
    seed: Annotated[int, typer.Option(help="Random seed for choosing items.")] = 0,
) -> None:
    """Measure several tokenizers on the same held-out items: rate, reconstruction, codebook usage, speed."""
    import json

    import anytoken.emoji_world.test_sets  # noqa: F401 (registers the built sets)
    from anytoken.evaluation.tokenizers.compare import compare, comparison
    from anytoken.utils.atomic import write_file

    found = compare(tokenizers, data, count, seed, genome or [], image, files, learnability)
    if out is not None:
        write_file(out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(comparison(found))


@app.command(
    "import",
    epilog=examples("anytoken tokenizer import kyutai/mimi --out runs/tokenizers/speech num_codebooks=8"),
)
def tokenizer_import(
    source: Annotated[
        str, typer.Argument(help="A transformers codec: a folder or a hub id such as kyutai/mimi.")
    ],
    out: Out,
    kind: Annotated[
        str | None, typer.Option(help="speech, image or video, if the codec supports several.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings such as num_codebooks=8 or side_px=256."),
    ] = None,
) -> None:
    """Save a pretrained codec (Mimi, DAC, EnCodec, X-Codec, Emu3, Janus, Chameleon) as a tokenizer folder."""
    import yaml

    from anytoken.tokenizers import TokenizerError
    from anytoken.tokenizers.pretrained import pretrained_tokenizer

    if wrong := [one for one in settings or [] if "=" not in one]:
        raise TokenizerError(f"Settings are key=value; received {wrong[0]!r}.")
    pairs = (one.split("=", 1) for one in settings or [])
    chosen = {"kind": kind} | {key: yaml.safe_load(value) for key, value in pairs}
    print(pretrained_tokenizer(source, **chosen).save_pretrained(out))


@app.command("overview", epilog=examples("anytoken tokenizer overview tokenizers --model mini"))
def tokenizer_overview(
    cards: Annotated[Path, typer.Argument(help="A folder of card folders.")] = Path("tokenizers"),
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="Mark the tokenizers of this model: mini or a folder; repeatable."
        ),
    ] = None,
    fill: Annotated[
        list[Path] | None, typer.Option(help="Markdown file whose tokenizer table to update; repeatable.")
    ] = None,
) -> None:
    """List all tokenizers with a card: rate, reconstruction, baseline, codebook usage."""
    import json

    from anytoken.emoji_world.report import fill_between
    from anytoken.evaluation.tokenizers.card import overview
    from anytoken.inference.checkpoint import find_checkpoint
    from anytoken.processor import FINGERPRINTS

    models = {
        name: json.loads((find_checkpoint(name) / FINGERPRINTS).read_text(encoding="utf-8")).values()
        for name in model or []
    }
    for page in fill or []:
        fill_between(page, "tokenizers", overview(cards, models, page))
    print(overview(cards, models))
