"""Compare two models on the same samples: differences of all common scores, with paired bootstrap intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from anytoken.evaluation.suite.intervals import RESAMPLES, difference
from anytoken.evaluation.suite.metric_base import Metric
from anytoken.evaluation.suite.metrics import AnyMetric
from anytoken.utils.errors import EvaluationError

NOT_RESULTS = ("scores.json",)


def compare(ours: str | Path, theirs: str | Path, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Differences per task and figure, ours less theirs: value, low, high, p, total, and both figures.

    ours, theirs: the result file (TASK.json) of one task, or folders of them. Only samples that both have count.
    EvaluationError for files that are no results, of different tasks, or without a common sample.
    """
    first, second = _results(Path(ours)), _results(Path(theirs))
    shared = [name for name in first if name in second]
    if not shared:
        raise EvaluationError(
            f"{ours} and {theirs} have no task in common: {', '.join(first)}; {', '.join(second)}."
        )
    return {name: _task(name, first[name], second[name], resamples) for name in shared}


def _results(path: Path) -> dict[str, Any]:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = {}
    for file in files:
        if path.is_dir() and file.name in NOT_RESULTS:
            continue
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            found[str(result["task"])] = {
                "ids": result["ids"],
                "rows": result["rows"],
                "asked": result["asked"],
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{file} holds no results ({type(error).__name__}: {error}); give TASK.json as `anytoken eval --task` "
                "writes it, or the folder of a model."
            ) from error
    if not found:
        raise EvaluationError(f"{path} holds no results.")
    return found


def _task(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], resamples: int) -> dict[str, Any]:
    if ours["asked"] != theirs["asked"]:
        raise EvaluationError(
            f"The results of {name} are of different versions of the task or its data: run it again."
        )
    known = {number: place for place, number in enumerate(theirs["ids"])}
    pairs = [(place, known[number]) for place, number in enumerate(ours["ids"]) if number in known]
    if not pairs:
        raise EvaluationError(f"The two results of {name} have no sample in common.")
    mine, other = (list(places) for places in zip(*pairs, strict=True))
    found = {}
    for figure in ours["rows"]:
        if figure not in theirs["rows"]:
            continue
        metric = _metric(name, ours["rows"][figure]["metric"])
        rows = [
            np.array(one["rows"][figure]["rows"], np.float64)[places]
            for one, places in ((ours, mine), (theirs, other))
        ]
        found[figure] = {
            **difference(metric.total, rows[0], rows[1], metric.is_mean, resamples),
            "ours": metric.total(rows[0]),
            "theirs": metric.total(rows[1]),
            "percent": metric.percent,
            "lower_is_better": metric.lower_is_better,
        }
    return found


def _metric(name: str, given: Any) -> Metric:
    try:
        return TypeAdapter(AnyMetric).validate_python(given)
    except ValidationError as error:
        raise EvaluationError(
            f"The results of {name} have a metric that is not known: {given!r:.80}."
        ) from error


def rows_of(found: Mapping[str, Any], ours: str, theirs: str) -> list[list[str]]:
    """Differences as rows of text, the first being the head."""
    table = [["task", "metric", ours, theirs, "difference", "95 %", "p", "better"]]
    for task, figures in found.items():
        for name, one in figures.items():
            scale, digits = (100, 1) if one["percent"] else (1, 3)
            numbers = [
                "" if value is None or np.isnan(value) else f"{scale * value:.{digits}f}"
                for value in (one["ours"], one["theirs"], one["value"], one["low"], one["high"])
            ]
            clear = one["low"] is not None and (one["low"] > 0 or one["high"] < 0)
            better = ""
            if clear:
                better = ours if (one["low"] > 0) != one["lower_is_better"] else theirs
            table.append(
                [
                    task,
                    name,
                    *numbers[:3],
                    f"{numbers[3]} to {numbers[4]}",
                    f"{one['p']:.3f}",
                    better or "neither",
                ]
            )
    return table
