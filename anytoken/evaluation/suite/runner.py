"""Run tasks: get the missing answers of the model, score all answers and baselines, and write the results.

OUT/MODEL/ contains, for each task, its answers (TASK.jsonl, one line per sample, appended in blocks so that a killed
run resumes), the media of replies (TASK/), and scores with the rows that they are computed from (TASK.json);
scores.json has the scores of all tasks, and index.html shows them with samples.

There are two baselines: `majority` always gives the most frequent answer (of split train, if there is one), and
`shuffled` gives each sample the answer to another one, which shows how much can be right without reading the prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from anytoken.evaluation.suite.decoding import answer, ranks, read_outcome
from anytoken.evaluation.suite.intervals import RESAMPLES, figure
from anytoken.evaluation.suite.metric_base import Tools
from anytoken.evaluation.suite.page import write_page
from anytoken.evaluation.suite.samples import Outcome, Sample, TaskSet, written
from anytoken.evaluation.suite.schema import Task
from anytoken.segments import Text
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import DataError, EvaluationError
from anytoken.utils.json_lines import read_json_lines

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken

VERSION = 1  # of how questions are made and answers kept
SCORED_LATER = {"metrics", "description", "count", "group_by"}  # keys of a task that no answer depends on
HELD = 1 << 12  # elements of each parameter that identify a model
Report = dict[str, Any]


def run_tasks(
    model: AnyToken,
    tasks: Sequence[Task],
    out: Path,
    tools: Tools,
    name: str,
    overwrite: bool = False,
    resamples: int = RESAMPLES,
    progress: bool = True,
) -> Path:
    """Run tasks and write OUT/NAME/; returns that folder.

    name: the model's name in paths and tables. Existing answers are kept; EvaluationError if they belong to another
    model or task, unless `overwrite` removes them.
    """
    folder = out / name
    missing = {kind for task in tasks for kind in _kinds(task)} - set(model.kinds)
    if missing:
        raise EvaluationError(f"{name} has no {', '.join(sorted(missing))}; it has {', '.join(model.kinds)}.")
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, list[Outcome]] = {}
    reports: dict[str, Report] = {}
    for task in tasks:
        data = TaskSet(task, tools.sets)
        fingerprint = model_fingerprint(model, embeds=getattr(task.decoding, "by", None) == "embed")
        outcomes[task.name] = _answers(model, task, data, folder, fingerprint, overwrite, progress)
        report, rows = score(task, data, outcomes[task.name], tools, resamples)
        ids = [one.sample.id for one in outcomes[task.name]]
        header = _header(task, data, fingerprint) | {"ids": ids, "rows": rows}
        write_file(folder / f"{task.name}.json", json.dumps(report | header, ensure_ascii=False) + "\n")
        reports[task.name] = report
    previous = read_scores(folder)
    summary = {"version": VERSION, "model": name, "tasks": {**previous, **reports}}
    write_file(folder / "scores.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_page(folder, name, reports, outcomes)
    return folder


def _kinds(task: Task) -> list[str]:
    output = task.output if task.decoding.how == "generate" else None
    return [output] if isinstance(output, str) else output or []


def read_scores(folder: Path) -> dict[str, Report]:
    """The scores of earlier tasks in a folder; {} without a complete file."""
    try:
        found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["tasks"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


# ---- answers ----


def model_fingerprint(model: AnyToken, embeds: bool = False) -> str:
    """Identifies a model: sha256 over names, shapes and first elements of all parameters.

    embeds: also those of its embedding heads, for answers that depend on them.
    """
    digest = hashlib.sha256()
    heads = getattr(model, "embedding_heads", {}).values() if embeds else ()
    for name, tensor in chain(model.lm.named_parameters(), *(head.named_parameters() for head in heads)):
        head = tensor.detach().flatten()[:HELD].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + head.numpy().tobytes())
    return digest.hexdigest()


def _header(task: Task, data: TaskSet, fingerprint: str) -> dict[str, str]:
    later = SCORED_LATER - ({"count"} if task.join and task.decoding.how == "retrieve" else set())
    asked = json.dumps(task.model_dump(mode="json", exclude=later), sort_keys=True)
    digest = hashlib.sha256(f"{VERSION} {asked}{data.digest()}".encode()).hexdigest()
    return {"task": task.name, "asked": digest, "model": fingerprint}


def _answers(
    model: AnyToken,
    task: Task,
    data: TaskSet,
    folder: Path,
    fingerprint: str,
    overwrite: bool,
    progress: bool,
) -> list[Outcome]:
    path, header = folder / f"{task.name}.jsonl", _header(task, data, fingerprint)
    if overwrite:
        path.unlink(missing_ok=True)
    lines = _read_lines(path, header)
    samples = data.samples()
    with path.open("a", encoding="utf-8") as file:
        if not lines:
            file.truncate(0)
            _append(file, [header])
        missing = sum(one.id not in lines for one in samples)
        bar = tqdm(total=missing, desc=task.name, disable=not progress or not missing)
        for block in answer(model, task, data, samples, set(lines), folder / task.name):
            asked = {one.id: one for one in samples}
            _append(file, [{**_readable(asked[line["id"]]), **line} for line in block])
            lines |= {line["id"]: line for line in block}
            bar.update(len(block))
        bar.close()
    return [read_outcome(task, one, lines[one.id], folder) for one in samples]


def _append(file: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    file.flush()


def _readable(sample: Sample) -> dict[str, Any]:
    """The question in readable form, for the results file."""
    prompt = " | ".join(f"{one['role']}: {_content(one['content'])}" for one in sample.messages)
    return {"id": sample.id, "prompt": prompt, "truth": [written(one) for one in sample.truth]}


def _content(content: Any) -> str:
    return written([Text(content)] if isinstance(content, str) else content)


def _read_lines(path: Path, header: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The answers in a file by id; an incomplete last line is removed. EvaluationError if they belong to something
    else."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    try:
        first, *rest = read_json_lines(path) if whole.strip() else iter([header])
        found = {int(line["id"]): line for line in rest}
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"{path} is not a file of answers ({error}); give another --out, or --overwrite."
        ) from error
    changed = [what for key, what in (("model", "another model"), ("asked", "another version of the task or its data"))
               if first.get(key) != header[key]]  # fmt: skip
    if changed:
        raise EvaluationError(
            f"{path} holds answers of {' and '.join(changed)}: give another --out, or --overwrite to ask again."
        )
    return found


# ---- scores ----


def score(
    task: Task, data: TaskSet, outcomes: Sequence[Outcome], tools: Tools, resamples: int = RESAMPLES
) -> tuple[Report, dict[str, Any]]:
    """The scores of a task with intervals and baselines, and their rows."""
    answers = {"model": list(outcomes), **baselines(task, data, outcomes)}
    report: Report = {"description": task.description, "how": task.decoding.how, "samples": len(outcomes)}
    figures: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    groups = _groups(task, outcomes)
    for metric in task.metrics:
        rows = {who: metric.measure(found, tools) for who, found in answers.items()}
        for name, own in rows["model"].items():
            figures[name] = {
                "percent": metric.percent,
                "lower_is_better": metric.lower_is_better,
                **{who: figure(metric.total, one[name], metric.is_mean, resamples)
                   for who, one in rows.items() if name in one},
            }  # fmt: skip
            if groups:
                figures[name]["groups"] = {
                    key: figure(metric.total, own[places], metric.is_mean, resamples)
                    for key, places in groups.items()
                }
            kept[name] = {"metric": metric.model_dump(mode="json"), "rows": _plain(own)}
    return {**report, "metrics": figures}, kept


def _plain(rows: np.ndarray) -> list[Any]:
    """Rows for JSON, which has no NaN."""
    return [None if one != one else one for one in rows.tolist()] if rows.ndim == 1 else rows.tolist()


def _groups(task: Task, outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    places: dict[str, list[int]] = defaultdict(list)
    if task.group_by is not None:
        for place, one in enumerate(outcomes):
            places[str(one.sample.record.get(task.group_by))].append(place)
    return {key: np.array(found) for key, found in sorted(places.items())}


def baselines(task: Task, data: TaskSet, outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Baselines without a model: `shuffled` and, if answers are words or labels, `majority`."""
    found: dict[str, list[Outcome]] = {}
    if len(outcomes) > 1:
        found["shuffled"] = _shuffled(task, outcomes)
    if task.decoding.how == "generate":
        most = _majority(data, outcomes)
        if most is not None:
            found["majority"] = [replace(one, answer=(Text(most),)) for one in outcomes]
    if task.decoding.how == "classify":
        fixed = {tuple(map(str, one.sample.labels)) for one in outcomes}
        if len(fixed) == 1:
            labels = next(iter(fixed))
            most = _majority(data, outcomes, labels)
            found["majority"] = [_chosen(one, labels.index(str(most))) for one in outcomes]
        rng = np.random.default_rng(task.seed)
        found["chance"] = [_chosen(one, int(rng.integers(len(one.sample.labels)))) for one in outcomes]
    return found


def _majority(data: TaskSet, outcomes: Sequence[Outcome], allowed: Sequence[str] | None = None) -> str | None:
    """The most frequent answer of the split train, or of the questions themselves if it has none."""
    if any(not isinstance(one, Text) for outcome in outcomes for one in outcome.sample.truth[0]):
        return None
    known = data.truths("train") if data.task.split != "train" else []
    counts = Counter(one for one in known if allowed is None or one in allowed)
    counts = counts or Counter(one.sample.truth_text for one in outcomes)
    return max(counts, key=lambda one: counts[one])


def _chosen(outcome: Outcome, label: int) -> Outcome:
    probabilities = tuple(float(place == label) for place in range(len(outcome.sample.labels)))
    return replace(outcome, choice=label, probabilities=probabilities)


def _shuffled(task: Task, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Each sample with the answer of another one, the next in random order; for rankings, a random ranking."""
    rng = np.random.default_rng(task.seed)
    order = rng.permutation(len(outcomes))
    found = list(outcomes)
    for place, other in zip(order, np.roll(order, 1), strict=True):
        one, lent = outcomes[place], outcomes[other]
        if one.ranking:
            right = [one.ranking[rank - 1] for rank in one.ranks]
            ranking = tuple(rng.permutation(one.ranking).tolist())
            found[place] = replace(one, ranking=ranking, ranks=ranks(ranking, right))
        elif lent.choice is not None and len(lent.sample.labels) != len(one.sample.labels):
            found[place] = _chosen(one, lent.choice % len(one.sample.labels))
        else:
            found[place] = replace(lent, sample=one.sample)
    return found
