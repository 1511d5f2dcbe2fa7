"""Commands that train a model and estimate the cost: train, prefer, merge-adapter, plan."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from anytoken import recipes
from anytoken.commands.options import AsJson, ModelArgument, Overrides, Overwrite, Stage, examples, load

app = typer.Typer()


@app.command(
    epilog=examples(
        "anytoken train stages/lora.yaml data.train=my.jsonl output=runs/my steps=500",
        "anytoken train stages/scale/8b_dense.yaml --tiny",
    )
)
def train(
    stage: Stage,
    overrides: Overrides = None,
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="Run the recipe in miniature on generated files, without downloads."),
    ] = False,
) -> None:
    """Run a training stage; rerun the command to resume."""
    from anytoken.training.config import TrainConfig

    # Report a wrong recipe before the slow import.
    recipe = TrainConfig.load(recipes.find(stage), overrides or [])
    from anytoken.training.debug_model import tiny as shrink
    from anytoken.training.interrupts import Interrupted
    from anytoken.training.report.markdown import summary
    from anytoken.training.trainer import train as run

    recipe = shrink(recipe) if tiny else recipe
    try:
        run(recipe, _answer)
    except Interrupted as stop:
        Console(stderr=True, soft_wrap=True).print(f"anytoken: {stop}", markup=False, highlight=False)
        raise
    if os.environ.get("RANK", "0") == "0":  # of several processes that torchrun started, one speaks
        print("\n".join(summary(recipe)))


def _answer(lm: Any, processor: Any, prompt: Any, output: Any) -> str:
    """A sample for the report of a training."""
    from anytoken.inference.api import AnyToken

    return AnyToken(lm, processor).generate(prompt, output, seed=0)._repr_html_()


@app.command(epilog=examples("anytoken reference runs/1_alignment runs/2_interleaved --stages stages"))
def reference(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of finished runs; their names become the curves' names.")
    ],
    stages: Annotated[
        Path, typer.Option(help="The folder whose README.md and reference/ are written.")
    ] = Path("stages"),
) -> None:
    """Publish runs as reference curves."""
    from anytoken.training.report.reference import publish_references

    print(publish_references(runs, stages))


@app.command(epilog=examples("anytoken prefer mini pairs.jsonl --out runs/preferred --steps 100"))
def prefer(
    model: Annotated[str, typer.Argument(help="mini, or a checkpoint folder.")],
    pairs: Annotated[Path, typer.Argument(help="JSONL with messages, chosen and rejected per line.")],
    out: Annotated[Path, typer.Option(help="The adapter folder to write.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Pairs per step.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
    beta: Annotated[float, typer.Option(help="DPO beta (KL strength).")] = 0.1,
    seed: Annotated[int, typer.Option(help="Random seed for initialization and data order.")] = 0,
) -> None:
    """Train an adapter on preferred answers (DPO, through trl)."""
    from anytoken.training.dpo import DPOArgs
    from anytoken.training.dpo import prefer as run
    from anytoken.training.report.markdown import adapted

    print(run(model, pairs, out, DPOArgs(steps, batch, lr, beta, seed=seed)))
    print(f"next: {shlex.join(['anytoken', 'chat', *adapted(model, out)])}")


@app.command("merge-adapter", epilog=examples("anytoken merge-adapter mini runs/lora --out runs/merged"))
def merge_adapter(
    model: ModelArgument,
    adapter: Annotated[Path, typer.Argument(help="The PEFT adapter folder.")],
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write.")],
    dtype: Annotated[
        str, typer.Option(help="Data type of the saved weights: bfloat16 or float32.")
    ] = "bfloat16",
    overwrite: Overwrite = False,
) -> None:
    """Merge an adapter into its model and save a checkpoint that needs no PEFT."""
    import torch

    from anytoken.inference.checkpoint import CHECKPOINT
    from anytoken.utils.atomic import check_target
    from anytoken.utils.hints import choices

    kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in kinds:
        raise typer.BadParameter(f"{dtype!r} is none{choices(dtype, kinds)}.", param_hint="--dtype")
    check_target(out, CHECKPOINT, overwrite)
    merged = load(model, "cpu", adapter)
    merged.card = (
        f"# {Path(model).name} with the adapter {adapter.name}\n\nThe adapter is merged into the weights.\n"
    )
    print(merged.save_pretrained(out, kinds[dtype], overwrite))


@app.command(
    epilog=examples(
        "anytoken plan stages/scale/8b_dense.yaml --gpus 64 --gpu h100", "anytoken plan stages/lora.yaml"
    )
)
def plan(
    stage: Stage,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A config .json, checkpoint folder or hub id; by default the recipe's initial model."
        ),
    ] = None,
    new_ids: Annotated[int, typer.Option(min=0, help="Token ids to add to the model's vocabulary.")] = 0,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs; by default the recipe's world_size.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, l40s or rtx4090.")] = "h100",
    sharding: Annotated[
        str | None, typer.Option(help="ddp, zero1, zero2, zero3 or fsdp; by default the recipe's.")
    ] = None,
    mfu: Annotated[float, typer.Option(help="Assumed MFU (fraction of the GPUs' peak FLOP/s).")] = 0.4,
    share_of_peak: Annotated[float | None, typer.Option(hidden=True)] = None,
    measured: Annotated[
        Path | None,
        typer.Option(help="A file of `anytoken bench gpu`; its measured MFU replaces the assumed one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate parameters, memory, FLOPs and hours of a stage on many GPUs, without allocating weights."""
    import dataclasses
    import json

    from rich.table import Table

    from anytoken.training import cost_estimate as planning
    from anytoken.training.config import TrainConfig

    recipe = TrainConfig.load(recipes.find(stage), overrides or [])
    gpus = gpus or recipe.distributed.world_size
    sharding = sharding or planning.sharding_of(recipe)
    if model:
        config, space = planning.read_config(model, new_ids), None
    else:
        config, space = planning.planned_start(recipe)
    if share_of_peak is not None:
        mfu = share_of_peak
        print("--share-of-peak is now --mfu; the old name goes in the next version", file=sys.stderr)
    found = planning.plan(recipe, config, gpus, gpu, sharding, measured or mfu, space)
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    table = Table(show_header=False)
    for row in planning.as_rows(found, gpus, gpu):
        table.add_row(*row)
    Console().print(table)
