"""`anytoken tokenizer`: train and measure one modality's tokenizer."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from anytoken import recipes
from anytoken.commands.options import Out, Overrides, examples

Count = Annotated[
    int | None, typer.Option("--count", "--limit", min=1, help="Held-out items at most; all without it.")
]
Genomes = Annotated[
    list[Path] | None,
    typer.Option(
        "--genome", help="FASTA files that DNA tokenizers stream, in the place of the set's own package's."
    ),
]
PictureTokenizer = Annotated[
    Path | None,
    typer.Option("--image", help="The picture tokenizer that clips are compared with; else `image` beside."),
]
Files = Annotated[
    str | None,
    typer.Option(
        help="A folder or glob of your own files under --data, in the place of the sets' held-out items."
    ),
]
Learnability = Annotated[
    bool,
    typer.Option(
        help="Also train two small language models on the codes of the captioned set, which takes ten minutes or so: "
        "bits per code and item, fidelity of what they generate, codes that stay when only the global changes."
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
    data: Annotated[Path, typer.Option(help="The folder of the built sets.")],
    out: Out,
    overrides: Overrides = None,
) -> None:
    """Train a tokenizer by its recipe; run again after an interruption it goes on where it was.

    Writes the tokenizer, training.json, metrics.jsonl, and tensorboard/ where that package is installed. `data` of a
    recipe may be a folder or glob of your own files under --data, as in data=photos/train.
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
    data: Annotated[Path, typer.Option(help="The folder of the built sets.")],
    card: Annotated[
        Path | None, typer.Option(help="A folder for figures.json, README.md and before/after samples.")
    ] = None,
    genome: Genomes = None,
    image: PictureTokenizer = None,
    files: Files = None,
    count: Count = None,
    learnability: Learnability = False,
    seed: Annotated[int, typer.Option(help="Which items, where there are more.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Measure a tokenizer on held-out data beside baselines: reconstruction, codebook usage, tokens, speed."""
    import json

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
    data: Annotated[Path, typer.Option(help="The folder of the built sets.")],
    out: Annotated[Path | None, typer.Option(help="A JSON file for all figures.")] = None,
    genome: Genomes = None,
    image: PictureTokenizer = None,
    files: Files = None,
    count: Count = None,
    learnability: Learnability = False,
    seed: Annotated[int, typer.Option(help="Which items, where there are more.")] = 0,
) -> None:
    """Measure several tokenizers on the same held-out items: rate, what comes back, codebook usage, speed."""
    import json

    from anytoken.evaluation.tokenizers.compare import compare, comparison

    found = compare(tokenizers, data, count, seed, genome or [], image, files, learnability)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(comparison(found))


@app.command(
    "import",
    epilog=examples("anytoken tokenizer import kyutai/mimi --out runs/tokenizers/speech num_codebooks=8"),
)
def tokenizer_import(
    source: Annotated[
        str, typer.Argument(help="A codec of transformers: a folder or a hub id, as kyutai/mimi.")
    ],
    out: Out,
    kind: Annotated[
        str | None, typer.Option(help="speech, image or video, where a codec does several.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As num_codebooks=8 or side_px=256.")
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
        typer.Option("--model", "-m", help="Say which tokenizers are part of this model: mini, or a folder."),
    ] = None,
    fill: Annotated[
        list[Path] | None, typer.Option(help="Markdown whose table of tokenizers is written anew.")
    ] = None,
) -> None:
    """One line for each tokenizer that has a card: rate, what it keeps beside a baseline, codebook usage."""
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
