"""Commands that make a model better and say how good it is: train, eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from anytoken import recipes
from anytoken.commands.options import Adapter, Device, ModelArgument, Overrides, load

app = typer.Typer()


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
