"""Evaluate a model in every direction against baselines and write the figures as JSON.

`evaluate` returns one JSON-ready report, which is the only source of figures in README, cards and the demo page:
`fill` writes its table between `<!-- scores -->` and `<!-- /scores -->` of a Markdown file.
"""

import json
import platform
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from anytoken.emoji_world.dialogues import FIRST, SECOND
from anytoken.emoji_world.directions import DIRECTIONS, Direction, EvalExample
from anytoken.emoji_world.products import score_products
from anytoken.emoji_world.tasks import EvalDatasets, Parts, features
from anytoken.evaluation.metrics import majority, nearest, share
from anytoken.segments import Segment, Text
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import EvaluationError
from anytoken.utils.git import commit
from anytoken.utils.hints import choices

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken
    from anytoken.inference.outputs import GenerationOutput

BASELINES = ("chance", "majority", "nearest")


def evaluate(
    model: "AnyToken",
    world: EvalDatasets,
    directions: Sequence[str] | None = None,
    count: int = 200,
    seed: int = 0,
    batch: int = 20,
    progress: bool = True,
) -> dict[str, Any]:
    """Judge `count` held-out prompts per direction; EvaluationError for an unknown direction or sets without examples.

    Directions whose sets are missing, or whose kinds the model lacks, are listed under "left_out".
    """
    began, code = time.perf_counter(), commit()  # of the code that is loaded, not of what comes meanwhile
    unknown = sorted(set(directions or ()) - set(DIRECTIONS))
    if unknown:
        raise EvaluationError(f"Unknown direction {unknown[0]!r}{choices(unknown[0], DIRECTIONS)}.")
    asked = [DIRECTIONS[name] for name in directions or DIRECTIONS]
    able = [one for one in asked if world.has(one) and {*one.sources, one.target} <= set(model.kinds)]
    if not able:
        raise EvaluationError(f"{world.sets} holds no records for {', '.join(one.name for one in asked)}.")
    scores = {}
    for direction in tqdm(able, desc="directions", disable=not progress):
        if direction.how == "ranked":
            if figures := score_products(model, world, count, seed):
                scores[direction.name] = figures
        elif cases := world.cases(direction, "test", count, seed):
            replies = answer(model, cases, direction, seed, batch)
            scores[direction.name] = score(world, direction, cases, replies, model, seed)
            if tried := model.best_of.get((",".join(direction.sources), direction.target)):
                single = [_answer(direction, one) for one in answer(model, cases, direction, seed, batch, 1)]
                shares = _shares(_judge_all(world, direction, cases, single))
                scores[direction.name]["best_of"] = {"replies": tried.replies, "single": shares}
    if (first := scores.get(FIRST)) and (second := scores.get(SECOND)):
        second["share_of_first_turn"] = _quotient(second["model"], first["model"])
    return {
        "version": 1,
        "seed": seed,
        "commit": code,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "model": {"name": Path(model.lm.config._name_or_path).name, "parameters": model.lm.num_parameters()},
        "directions": scores,
        "left_out": [one.name for one in asked if one.name not in scores],
        "seconds": round(time.perf_counter() - began, 1),
    }


def answer(
    model: "AnyToken",
    cases: Sequence[EvalExample],
    direction: Direction,
    seed: int,
    batch: int = 20,
    best_of: int | None = None,
) -> list["GenerationOutput"]:
    """The model's replies to the cases, in batches; the checkpoint's own sampling, and its own best of several."""
    replies: list[GenerationOutput] = []
    for start in range(0, len(cases), batch):
        prompts = [list(case.asked) for case in cases[start : start + batch]]
        kind = None if direction.free else direction.target
        replies += model.generate(prompts, kind, batch=True, seed=seed + start, best_of=best_of)
    return replies


def score(
    world: EvalDatasets,
    direction: Direction,
    cases: Sequence[EvalExample],
    replies: Sequence["GenerationOutput"],
    model: "AnyToken",
    seed: int = 0,
) -> dict[str, Any]:
    """One direction's figures: the model's parts, its valid share, the judge's ceiling, and the baselines."""
    main = main_part(direction)
    answers = [_answer(direction, reply) for reply in replies]
    judged = {"model": _judge_all(world, direction, cases, answers)}
    judged["ceiling"] = _judge_all(world, direction, cases, [case.answer for case in cases])
    for name, guesses in baseline_answers(world, direction, cases, seed).items():
        judged[name] = _judge_all(world, direction, cases, guesses)
    valid = share([float(is_valid(model, direction, reply)) for reply in replies])
    figures = {
        name: share([parts.get(main, 0.0) for parts in rows]).to_dict() for name, rows in judged.items()
    }
    ours, real = _shares(judged["model"]), _shares(judged["ceiling"])
    parts = {name: _parts(rows, main) for name, rows in judged.items()}
    groups: dict[str, list[Parts]] = defaultdict(list)
    for case, row in zip(cases, judged["model"], strict=True):
        groups[str(case.record.get("holdout") or "all")].append(row)
    by_holdout = {name: _shares(rows) for name, rows in sorted(groups.items())}
    tokens = sum(reply.usage.new_tokens for reply in replies)
    return {
        "held_out": direction.held_out,
        "measure": main,
        "valid": valid.to_dict(),
        **figures,
        "parts": parts.pop("model"),
        "parts_of_others": parts,
        "part_shares": ours,
        "by_holdout": {name: shares[main] for name, shares in by_holdout.items()},
        "parts_by_holdout": by_holdout,
        "controls": {
            name: share(found).to_dict() for name, found in controls(world, direction, cases).items()
        },
        "share_of_ceiling": {name: _quotient(ours[name], real[name]) for name in ours if name in real},
        "better": all(
            figures["model"]["value"] > figures[name]["value"] for name in BASELINES if name in figures
        ),
        "tokens_per_reply": round(tokens / max(1, len(replies)), 1),
    }


def _parts(rows: Sequence[Parts], main: str) -> dict[str, float]:
    """The share of each part except the main one, such as the concept alone."""
    names = sorted({name for row in rows for name in row} - {main})
    return {name: round(share([row.get(name, 0.0) for row in rows]).value, 4) for name in names}


def _answer(direction: Direction, reply: "GenerationOutput") -> Segment | None:
    """The judged part of a reply: its first segment, or the kinds of all segments as words."""
    if direction.free:
        return Text(" ".join(segment.kind for segment in reply.segments))
    return reply.segments[0] if reply.segments else None


def _quotient(one: dict[str, float], whole: dict[str, float]) -> float:
    return round(one["value"] / whole["value"], 4) if whole["value"] else 0.0


def _shares(rows: Sequence[Parts]) -> dict[str, dict[str, float | int]]:
    """The share of every part, with its interval."""
    names = sorted({name for row in rows for name in row})
    return {name: share([row.get(name, 0.0) for row in rows]).to_dict() for name in names}


def controls(
    world: EvalDatasets, direction: Direction, cases: Sequence[EvalExample]
) -> dict[str, list[float]]:
    """Controls that a judge must reject: answers to other prompts, and noise (for speech and video also silence,
    gray)."""
    if direction.free:
        return {}  # most requests are for the same few kinds
    main = main_part(direction)
    others: dict[str, list[Segment]] = {"shuffled": [case.answer for case in [*cases[1:], *cases[:1]]]}
    for name, nothing in world.nothings(direction.target).items():
        others[name] = [nothing] * len(cases)
    return {
        name: [parts.get(main, 0.0) for parts in _judge_all(world, direction, cases, answers)]
        for name, answers in others.items()
    }


def main_part(direction: Direction) -> str:
    """The main metric of a direction: residues at the correct position for DNA, else fully correct answers."""
    return "identity" if "dna" in (*direction.sources, direction.target) else "right"


def is_valid(model: "AnyToken", direction: Direction, reply: "GenerationOutput") -> bool:
    """Whether a reply is exactly one complete segment of the requested kind, and its ids decode."""
    kinds = [segment.kind for segment in reply.segments]
    if reply.finish_reason != "stop" or (not kinds if direction.free else kinds != [direction.target]):
        return False
    ids = [token for token in reply.ids if token != model.token_space.end]
    return [segment.kind for segment in model.detokenize(ids)] == [one.kind for one in reply.steps] + kinds


def baseline_answers(
    world: EvalDatasets, direction: Direction, cases: Sequence[EvalExample], seed: int, pool: int = 2000
) -> dict[str, list[Segment]]:
    """Baseline answers: random, the most frequent text, that of the nearest training prompt."""
    known = world.cases(direction, "train", pool, seed)
    if not known:
        return {}
    rng = np.random.default_rng(seed)
    found: dict[str, list[Segment]] = {"chance": [known[int(rng.integers(len(known)))].answer for _ in cases]}
    texts = [case.answer.text for case in known if isinstance(case.answer, Text)]
    if texts:
        found["majority"] = [Text(majority(texts))] * len(cases)
    vectors = features([case.prompt for case in [*cases, *known]])
    found["nearest"] = [
        known[index].answer for index in nearest(vectors[: len(cases)], vectors[len(cases) :])
    ]
    return found


def _judge_all(
    world: EvalDatasets, direction: Direction, cases: Sequence[EvalExample], answers: Iterable[Segment | None]
) -> list[Parts]:
    return [world.judge(direction, case, answer) for case, answer in zip(cases, answers, strict=True)]


def save(report: dict[str, Any], path: str | Path) -> Path:
    """Write a report as JSON, completely or not at all."""
    return write_file(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def read(path: str | Path) -> dict[str, Any]:
    """Read what `save` wrote; EvaluationError for anything else."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(report["directions"], dict):
            raise EvaluationError(f"{path} is not an evaluation report.")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{path} is not an evaluation report ({type(error).__name__}: {error})."
        ) from error
    return report


def rows(report: dict[str, Any]) -> list[list[str]]:
    """The report as rows of text, the first being the head: direction, model, baselines, ceiling, valid."""
    table = [["direction", "score", "95 %", *BASELINES, "ceiling", "valid", "better than all"]]
    for name, one in report["directions"].items():
        baselines = [percent(one[key]["value"]) if key in one else "" for key in BASELINES]
        interval = f"{100 * one['model']['low']:.0f}–{100 * one['model']['high']:.0f}"
        measured = percent(one["model"]["value"]) + (" of residues" if one["measure"] == "identity" else "")
        ends = [
            percent(one["ceiling"]["value"]),
            percent(one["valid"]["value"]),
            "yes" if one["better"] else "no",
        ]
        table.append([name, measured, interval, *baselines, *ends])
    return table


def part_rows(report: dict[str, Any]) -> list[list[str]]:
    """Accuracy by part as rows of text; one row per direction with parts."""
    directions = report["directions"].items()
    names = list(dict.fromkeys(name for _, one in directions for name in one.get("parts", {})))
    table = [["direction", *names]]
    for direction, one in directions:
        if one.get("part_shares") and one["parts"]:
            table.append([direction, *(_with_interval(one["part_shares"].get(name)) for name in names)])
    return table


def holdout_rows(report: dict[str, Any]) -> list[list[str]]:
    """Score and concept by hold-out, as rows of text, for directions with several hold-outs."""
    table = [["direction", "held out", "prompts", "score", "concept"]]
    for direction, one in report["directions"].items():
        groups = one.get("parts_by_holdout", {})
        if len(groups) > 1 and "concept" in one["parts"]:
            for name, parts in groups.items():
                main = parts[one["measure"]]
                cells = [_with_interval(main), _with_interval(parts.get("concept"))]
                table.append([direction, name, str(main["total"]), *cells])
    return table


def _with_interval(found: dict[str, float] | None) -> str:
    return f"{percent(found['value'])} ({100 * found['low']:.0f}–{100 * found['high']:.0f})" if found else ""


def percent(value: float) -> str:
    """A share as text."""
    return f"{100 * value:.1f} %"


def markdown(report: dict[str, Any]) -> str:
    """The table and its provenance, as Markdown."""
    counts = defaultdict(list)
    for name, one in report["directions"].items():
        counts[one["valid"]["total"]].append(name)
    cases = ", ".join(f"{total}" for total in sorted(counts, reverse=True))
    worse = [name for name, one in report["directions"].items() if not one["better"]]
    lines = _as_table(rows(report))
    if len(by_part := part_rows(report)) > 1:
        lines += ["", *_as_table(by_part)]
    if len(by_holdout := holdout_rows(report)) > 1:
        lines += ["", *_as_table(by_holdout)]
    lines += [
        "",
        f"{cases} held-out prompts per direction, seed {report['seed']}, commit {report['commit']}, "
        f"{report['machine']}.",
    ]
    lines += [
        f"Not better than every baseline: {', '.join(worse)}."
        if worse
        else "Better than every baseline in all directions."
    ]
    return "\n".join([*lines, *_caveats(report)])


def _as_table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body]


def _caveats(report: dict[str, Any]) -> list[str]:
    """Caveats to a "yes": overlapping intervals, and the score of the concept alone.

    Often a combination (this drawing on that background) is held out, which no training answer can match as a whole:
    baselines are then zero by construction, and only the parts can be compared.
    """
    thin, alone = [], []
    for name, one in report["directions"].items():
        highest = max((one[key]["high"] for key in BASELINES if key in one), default=0.0)
        if one["better"] and one["model"]["low"] <= highest:
            thin.append(name)
        subject = next((part for part in ("concept", "words") if part in one["parts"]), None)
        near = one.get("parts_of_others", {}).get("nearest", {}) if subject else {}
        if subject in near:
            alone.append(f"{name} {percent(one['parts'][subject])} ({percent(near[subject])})")
    lines = [f"Better, but with 95 % intervals that overlap: {', '.join(thin)}."] if thin else []
    second = report["directions"].get(SECOND, {})
    if "share_of_first_turn" in second:
        lines.append(
            "Accuracy of naming an image in a second turn: "
            f"{percent(second['share_of_first_turn'])} of the first turn's."
        )
    if several := {name: one["best_of"] for name, one in report["directions"].items() if "best_of" in one}:
        each = "; ".join(
            f"{name} {one['replies']} replies, {_with_interval(one['single']['right'])} for a single one"
            + "".join(
                f", {part} {percent(one['single'][part]['value'])}"
                for part in ("concept", "words")
                if part in one["single"]
            )
            for name, one in several.items()
        )
        lines.append(f"The best of several replies, as the model ranks them itself: {each}.")
    checked = {name: one["controls"] for name, one in report["directions"].items() if one.get("controls")}
    if checked:
        passed = {name: max(share["value"] for share in found.values()) for name, found in checked.items()}
        worst = max(passed, key=lambda name: passed[name])
        lines.append(
            f"Controls (answers to other prompts, noise, silence) pass at most {percent(passed[worst])} ({worst})."
        )
    if alone:
        lines.append(
            "No training answer can match a held-out combination as a whole. Score of the concept alone (words for "
            f"speech), with the nearest training prompt's in brackets: {', '.join(alone)}."
        )
    return lines


def fill(page: str | Path, report: dict[str, Any]) -> None:
    """Put the report's table between the markers of a Markdown file; EvaluationError if it has none."""
    fill_between(page, "scores", markdown(report))


def fill_between(page: str | Path, name: str, table: str) -> None:
    """Put a table between `<!-- name -->` and `<!-- /name -->` of a Markdown file; EvaluationError if it has none."""
    path, opening, closing = Path(page), f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}).") from error
    before, opened, rest = text.partition(opening)
    _, closed, after = rest.partition(closing)
    if not (opened and closed):
        raise EvaluationError(
            f"{path} has no place for the table: write {opening} and {closing} on lines of their own."
        )
    write_file(path, f"{before}{opening}\n{table}\n{closing}{after}")
