"""Commands that score given answers instead of generating them: score, classify."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from anytoken.commands.inference import PROMPT_HELP, PromptCommand
from anytoken.commands.options import Adapter, Device, Model, examples, load
from anytoken.terminal.prompt_args import read_lines, read_part

app = typer.Typer()


class Normalize(StrEnum):
    """How log-likelihoods of answers of different lengths are compared."""

    none = "none"
    tokens = "tokens"
    pmi = "pmi"


Prompt = Annotated[list[str], typer.Argument(metavar="PROMPT...", help=PROMPT_HELP)]
NormalizeOption = Annotated[
    Normalize,
    typer.Option(help="none: sum over tokens; tokens: mean; pmi: sum minus that of an empty prompt."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per answer, best first.")]


@app.command(
    cls=PromptCommand, epilog=examples('anytoken score cat.png "What is this?" -a "a cat" -a "a dog"')
)
def score(
    prompt: Prompt,
    answer: Annotated[list[str], typer.Option("--answer", "-a", help="A string or a file path; repeatable.")],
    model: Model = "mini",
    normalize: NormalizeOption = Normalize.none,
    as_json: AsJson = False,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Print the log-likelihood of each answer to a prompt."""
    parts, answers = [read_part(part) for part in prompt], [read_part(one) for one in answer]
    found = load(model, device, adapter).score_details(parts, answers, normalize.value)
    values = [one.value(normalize.value) for one in found]
    rows = [
        {"answer": text, "score": value, "tokens": len(one.ids), "logprob": one.total}
        for text, value, one in zip(answer, values, found, strict=True)
    ]
    _show(sorted(rows, key=lambda row: row["score"], reverse=True), as_json)


@app.command(
    cls=PromptCommand,
    epilog=examples(
        'anytoken classify cat.png "What is this?" --labels animals.txt',
        "anytoken classify cat.png -l cat -l dog --top 1",
    ),
)
def classify(
    prompt: Prompt,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="A label; repeatable.")] = None,
    labels: Annotated[Path | None, typer.Option(help="A text file with one label per line.")] = None,
    model: Model = "mini",
    top: Annotated[int, typer.Option(min=1, help="Number of labels to print.")] = 5,
    normalize: NormalizeOption = Normalize.none,
    as_json: AsJson = False,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Print the most likely labels for a prompt."""
    # a label that is given twice would halve its probability
    choices = list(dict.fromkeys([*(label or []), *(read_lines(labels) if labels else [])]))
    if not choices:
        raise typer.BadParameter("classify needs labels: --label cat --label dog, or --labels FILE.")
    parts = [read_part(part) for part in prompt]
    found = load(model, device, adapter).classify(parts, choices, normalize.value)
    _show([{"label": name, "probability": share} for name, share in found.top(top)], as_json)


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows as JSON lines or as a table."""
    if as_json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
