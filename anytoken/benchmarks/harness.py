"""Benchmark method: both sides alternate in one run; quote the ratio.

Absolute speeds depend on the machine; the ratio of medians of alternating turns depends on the code, since drift of the
machine affects both sides equally.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from anytoken.utils.atomic import write_file
from anytoken.utils.git import commit

Figures = dict[str, Any]


def interleaved_timing(
    sides: Mapping[str, Callable[[], object]], repeats: int, warmups: int = 1
) -> dict[str, float]:
    """Median seconds of every side; in each of `repeats` rounds every side runs once, after `warmups` rounds."""
    return {name: statistics.median(times) for name, times in time_turns(sides, repeats, warmups).items()}


def ratio_of_turns(over: Callable[[], object], under: Callable[[], object], repeats: int) -> float:
    """The time of one side relative to another: the median over rounds of the ratio in each.

    A slowdown that lasts longer than a round affects both sides and cancels out.
    """
    taken = time_turns({"over": over, "under": under}, repeats, 1)
    return statistics.median(a / b for a, b in zip(taken["over"], taken["under"], strict=True))


def time_turns(
    sides: Mapping[str, Callable[[], object]], repeats: int, warmups: int
) -> dict[str, list[float]]:
    """Seconds of every side in each of `repeats` rounds; every side runs once a round."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(-warmups, repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if round_ >= 0:
                taken[name].append(time.perf_counter() - start)
    return taken


def environment() -> Figures:
    """The environment of the measurement."""
    import torch

    return {
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def report(figures: Figures, out: Path) -> None:
    """Write the figures with their environment to `out` and print `figures["rows"]`."""
    save(figures, out)
    show(figures["rows"])
    print(out)


def save(figures: Figures, out: Path) -> None:
    """Write the figures with their environment to `out`."""
    write_file(out, json.dumps(environment() | figures, indent=1) + "\n")


def show(rows: list[Figures]) -> None:
    """Print rows, one mapping per line; in a narrow terminal, one figure per line."""
    console = Console()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = _table(columns, [[row.get(column, "") for column in columns] for row in rows])
    if console.measure(table, options=console.options.update_width(10_000)).maximum > console.width:
        for row in rows:
            console.print(_table(None, [list(pair) for pair in row.items()]))
    else:
        console.print(table)


def _table(columns: list[str] | None, rows: list[list[object]]) -> Table:
    table = Table(*columns or (), box=SIMPLE_HEAD, pad_edge=False, show_header=columns is not None)
    for row in rows:
        table.add_row(*map(_cell, row))
    return table


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
