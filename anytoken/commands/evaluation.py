"""Commands that evaluate a model: eval (built-in directions, or tasks from files), compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from anytoken.commands.options import Adapter, AsJson, Device, ModelArgument, Sets, examples, load

app = typer.Typer()
COUNT = 200  # held-out prompts per built-in direction


@app.command(
    "eval",
    epilog=examples(
        "anytoken eval mini --data data/sets --directions 'text->image,image->text'",
        "anytoken eval mini --task my.yaml",
    ),
)
def evaluate(
    model: ModelArgument = "mini",
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A task file, a folder of them, or a bundled name such as dna/promoter; repeatable."
        ),
    ] = None,
    data: Sets = Path("data/sets"),
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file for the scores (out/scores.json); with --task a folder (out/eval)."),
    ] = None,
    directions: Annotated[
        str | None, typer.Option(help="Comma-separated directions; all by default.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Held-out prompts per direction ({COUNT}), or per task (by default its own count)."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed; by default 0, or the task's own.")] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="With --task: another model to run and compare with, pair by pair; repeatable."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --task: discard existing answers.")
    ] = False,
    judge_steps: Annotated[int, typer.Option(min=1, help="Training steps of the image judges.")] = 1500,
    fill: Annotated[
        list[Path] | None,
        typer.Option(help="Markdown file whose score table to update; repeatable; not with --task."),
    ] = None,
    asr: Annotated[
        str | None,
        typer.Option(
            help="A faster-whisper model, by name or folder, as a second judge of speech or for WER."
        ),
    ] = None,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Score a model and its baselines on held-out prompts in every direction, or on tasks from files."""
    if task:
        unused = {"--directions": directions, "--fill": fill}
        _refuse(unused, "goes with the built-in directions, not with --task")
        _run_tasks(model, task, data, out or Path("out/eval"), count, seed, compare or [], overwrite, judge_steps, asr,
                   device, adapter)  # fmt: skip
        return
    _refuse({"--compare": compare, "--overwrite": overwrite}, "needs --task")
    from anytoken.emoji_world import demo, report
    from anytoken.emoji_world.directions import read_directions
    from anytoken.emoji_world.tasks import EvalDatasets
    from anytoken.evaluation.transcriber import Transcriber

    chosen = read_directions(directions) if directions else None
    world = EvalDatasets(data, judge_steps, seed or 0, Transcriber(asr) if asr else None)
    found = report.evaluate(load(model, device, adapter), world, chosen, count or COUNT, seed or 0)
    out = out or Path("out/scores.json")
    report.save(found, out)
    for page in fill or []:
        report.fill(page, found)
    Console().print(demo.score_table(found))
    print(out)


def _refuse(given: dict[str, Any], why: str) -> None:
    if name := next((name for name, value in given.items() if value), None):
        raise typer.BadParameter(f"{name} {why}.")


def _run_tasks(
    model: str,
    files: list[str],
    data: Path,
    out: Path,
    count: int | None,
    seed: int | None,
    others: list[str],
    overwrite: bool,
    judge_steps: int,
    asr: str | None,
    device: str,
    adapter: Path | None,
) -> None:
    from anytoken.emoji_world.task_files import world_judge
    from anytoken.evaluation.suite import compare as pairs
    from anytoken.evaluation.suite import page, runner
    from anytoken.evaluation.suite.metric_base import Tools
    from anytoken.evaluation.suite.schema import load_tasks
    from anytoken.utils.errors import EvaluationError

    changes = {name: value for name, value in (("count", count), ("seed", seed)) if value is not None}
    tasks = [one.model_copy(update=changes) for one in load_tasks(files)]
    tools = Tools(data, asr, world_judge(data, judge_steps))
    names = [_name(model, adapter), *(_name(other, None) for other in others)]
    if len(set(names)) < len(names):
        raise EvaluationError(
            f"Results are stored by model name, and two models have the same name: {', '.join(names)}."
        )
    folders = [
        runner.run_tasks(load(one, device, given), tasks, out, tools, name, overwrite)
        for one, given, name in zip([model, *others], [adapter, *([None] * len(others))], names, strict=True)
    ]
    for name, folder in zip(names, folders, strict=True):
        scores = runner.read_scores(folder)
        _show(page.rows_of({task.name: scores[task.name] for task in tasks}), name)
        print(folder / "index.html")
    for name, folder in zip(names[1:], folders[1:], strict=True):
        _show(pairs.rows_of(pairs.compare(folders[0], folder), names[0], name), "paired bootstrap")


def _name(model: str, adapter: Path | None) -> str:
    """What a model is called in the folder of results: "mini", "mini+my-adapter"."""
    return Path(model).name + (f"+{Path(adapter).name}" if adapter else "")


@app.command(epilog=examples("anytoken compare out/eval/mini out/eval/my-model"))
def compare(
    ours: Annotated[Path, typer.Argument(help="A result file TASK.json, or a model's result folder.")],
    theirs: Annotated[Path, typer.Argument(help="Another one, with the same tasks.")],
    as_json: AsJson = False,
) -> None:
    """Compare two results of `eval --task` on their common samples, with paired bootstrap intervals."""
    import json

    from anytoken.evaluation.suite import compare as pairs

    found = pairs.compare(ours, theirs)
    if as_json:
        print(json.dumps(found))
        return
    names = [one.name if one.is_dir() else one.parent.name for one in (ours, theirs)]
    if names[0] == names[1]:
        names = [str(ours), str(theirs)]
    _show(pairs.rows_of(found, *names), "")


def _show(rows: Sequence[Sequence[str]], title: str) -> None:
    head, *body = rows
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for place, name in enumerate(head):
        table.add_column(name, justify="left" if place < 2 else "right", overflow="fold", no_wrap=place < 2)
    for row in body:
        table.add_row(*row)
    Console().print(table)
