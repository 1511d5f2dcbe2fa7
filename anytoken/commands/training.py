"""Commands that make a model better, say what that costs and how good it became: train, plan, eval."""

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


@app.command()
def plan(
    stage: Annotated[str, typer.Argument(help="A stage recipe.")],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help="A config .json, checkpoint folder or hub id; by default the recipe's init_from."),
    ] = None,
    new_ids: Annotated[int, typer.Option(min=0, help="Rows to add to that model's vocabulary.")] = 0,
    gpus: Annotated[int, typer.Option(min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, l40s or rtx4090.")] = "h100",
    sharding: Annotated[str, typer.Option(help="ddp, zero1, zero2, zero3 or fsdp.")] = "zero3",
    share_of_peak: Annotated[float, typer.Option(help="Assumed share of the GPUs' peak FLOP/s.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a stage costs on many GPUs, without allocating a weight: parameters, memory, FLOPs, hours."""
    import dataclasses
    import json

    from rich.table import Table

    from anytoken.training import plan as planning
    from anytoken.training.stage import Stage

    recipe = Stage.load(recipes.find(stage), overrides or [])
    config = planning.read_config(model or recipe.init_from, new_ids)
    found = planning.plan(recipe, config, gpus, gpu, sharding, share_of_peak)
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    table = Table(show_header=False)
    for row in planning.as_rows(found, gpus, gpu):
        table.add_row(*row)
    Console().print(table)


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
