"""Run a stage in forks that are killed -9 on purpose, one after the other, and then one that may finish.

run_killed.py RUNS: a JSON list of [recipe, kills]. A kill is a whole number (before the n-th time that the fork
touches a file of the output folder) or a fraction (so many seconds after its start). Writes the exit statuses of
each run beside RUNS. Forks of one process that has imported everything are quick, and it never computes itself, so
forking it is safe.
"""

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from anytoken.training.config import TrainConfig
from anytoken.training.trainer import train

TOUCHES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def kill_at_touch(number: int, folder: str) -> None:
    """Have the interpreter tell of every file operation, and end before the n-th one inside the folder."""
    left = number

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            path = arguments[0] if writes else None
        else:
            path = arguments[0] if event in TOUCHES else None
        if path is not None and folder in os.fsdecode(path if not isinstance(path, int) else b""):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def run(recipe: dict[str, Any], kill: int | float | None) -> int:
    """Train in a fork; its exit status, minus the signal's number if one ended it."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(str(runs) + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if isinstance(kill, int):
            kill_at_touch(kill, recipe["output"])
        train(TrainConfig.from_dict(recipe))
        os._exit(0)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("conftest.py"))
assert spec is not None and spec.loader is not None
spec.loader.exec_module(importlib.util.module_from_spec(spec))
runs = Path(sys.argv[1])
statuses = [[run(recipe, kill) for kill in [*kills, None]] for recipe, kills in json.loads(runs.read_text())]
runs.with_name("statuses.json").write_text(json.dumps(statuses))
