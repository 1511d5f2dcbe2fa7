"""The schema of task files. Errors name the file, line and key, the allowed values, and the closest match.

A file contains one task, or a list ``tasks:``; sibling keys of ``tasks`` apply to all. Options belong to one way of
decoding, so an option without effect is an unknown key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from anytoken.evaluation.suite.metric_base import Part, mistake
from anytoken.evaluation.suite.metrics import METRICS, AnyMetric
from anytoken.evaluation.suite.template import MESSAGES, fields, kinds, segment_types
from anytoken.inference.score import Normalize
from anytoken.utils.errors import EvaluationError
from anytoken.utils.hints import choices, nearest

TASKS = list(Path(__file__).parents[2].glob("*/task_files"))  # of each room, the task files that come along
Scalar = str | int | float | bool | None


class Generate(Part):
    """Score the model's generated reply."""

    how: Literal["generate"] = "generate"
    output: str | list[str] | None = Field(
        default=None,
        description="kind(s) of the reply; by default those of the answer; any: the model decides",
    )
    via: list[str] | None = Field(
        default=None, description="kinds generated first, as steps; by default the checkpoint's; []: none"
    )
    cascade: bool | None = Field(default=None, description="with via: generate from each step alone")
    best_of: int | None = Field(default=None, ge=2, description="replies per prompt, of which one is scored")
    rerank: Literal["prompt"] | None = Field(
        default=None, description="prompt: the reply from which the prompt's text can best be read back"
    )
    max_new_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    cfg_scale: float | None = Field(default=None, ge=0)
    extract: str | None = Field(
        default=None,
        description="a regular expression; its first group is the answer within the reply's text",
    )

    @field_validator("extract")
    @classmethod
    def _regular(cls, value: str | None) -> str | None:
        try:
            if value is not None and re.compile(value).groups < 1:
                raise ValueError("the expression has no group; put the answer in parentheses: 'answer: (.*)'")
        except re.error as error:
            raise ValueError(f"invalid regular expression: {error}") from None
        return value

    @property
    def options(self) -> dict[str, Any]:
        """The options for `AnyToken.generate`."""
        return self.model_dump(exclude={"how", "output", "extract"}, exclude_none=True)


class Classify(Part):
    """The answer is the most likely label; `labels`: a list, or a field with each record's own labels."""

    how: Literal["classify"]
    labels: list[str] | str | None = Field(
        default=None, description="by default the different answers of all records that could be asked about"
    )
    normalize: Normalize = "none"


class Score(Part):
    """Log-likelihood of `of`, minus that of `against` if given; higher means "positive"."""

    how: Literal["score"]
    of: str = Field(description="a template of what is scored")
    against: str | None = None
    normalize: Normalize = "none"


class Retrieve(Part):
    """Rank items by similarity to the prompt, or by likelihood as its answer."""

    how: Literal["retrieve"]
    item: str | None = Field(default=None, description="a template of the items; by default the answer")
    by: Literal["embed", "score"] = "embed"
    via: str | None = Field(
        default=None,
        description="a template: the prompt finds the nearest of these, which then finds the item (two hops)",
    )
    match: str | None = Field(
        default=None, description="a key: items of records with the same value are right, too"
    )
    candidates: int | None = Field(
        default=None, ge=2, description="rank the correct items among random others, this many in total"
    )
    normalize: Normalize | None = Field(default=None, description="of by: score; pmi by default")

    @model_validator(mode="after")
    def _used(self) -> Retrieve:
        if self.by == "embed" and self.normalize is not None:
            raise mistake("normalize applies only to by: score; vectors have unit length", "normalize")
        if self.by == "score" and self.via is not None:
            raise mistake("via applies only to by: embed", "via")
        return self


Decoding = Annotated[Generate | Classify | Score | Retrieve, Field(discriminator="how")]


class Turn(Part):
    """One message of a prompt: a role, and a template."""

    role: Literal["system", "user", "assistant"]
    content: str


class Shots(Part):
    """Examples before the prompt: `count` records of a split that are not the one asked about."""

    count: int = Field(ge=1)
    split: str | None = "train"
    seed: int = 0


class Join(Part):
    """Joins each record with one of another set that has the same value of a key, as ``{other...}``."""

    data: str
    key: str
    split: str | None = Field(default=None, description="only records of this split; by default of all")


class Task(Part):
    """A task: records, prompt, decoding and metrics."""

    name: str = Field(pattern=r"^[^/\\.][^/\\]*$", max_length=100, description="also of its result files")
    description: str = ""
    data: str = Field(
        description="a file or folder of records, or hf:owner/name; relative to the task file or --data"
    )
    split: str | None = Field(default=None, description="only records whose key split has this value")
    where: dict[str, Scalar | list[Scalar]] = Field(
        default={}, description="only records with these values; of a list any, null for a missing key"
    )
    first: int | None = Field(default=None, ge=1, description="read at most this many records")
    join: Join | None = None
    count: int | None = Field(
        default=None, ge=1, description="evaluate this many records, sampled at random; by default all"
    )
    seed: int = Field(default=0, ge=0)
    prompt: list[Turn] = Field(default=[], description="a template, or a list of turns")
    answer: str = ""
    shots: Shots | None = None
    decoding: Decoding = Generate()
    metrics: list[AnyMetric] = Field(min_length=1)
    group_by: str | None = Field(default=None, description="figures for each value of this key, too")
    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        """The folder of the task file."""
        return self._folder

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        found = dict(given)
        if isinstance(found.get("prompt"), str):
            found["prompt"] = [{"role": "user", "content": found["prompt"]}]
        if isinstance(found.get("decoding"), str):
            found["decoding"] = {"how": found["decoding"]}
        if isinstance(found.get("decoding"), dict):
            found["decoding"] = {"how": "generate", **found["decoding"]}
        if isinstance(found.get("shots"), int) and not isinstance(found["shots"], bool):
            found["shots"] = {"count": found["shots"]} if found["shots"] else None
        metrics = found.get("metrics")
        if isinstance(metrics, str | dict):
            metrics = [metrics]
        if isinstance(metrics, list):
            found["metrics"] = [{"name": one} if isinstance(one, str) else one for one in metrics]
        return found

    @model_validator(mode="after")
    def _fits(self) -> Task:
        how, decoding = self.decoding.how, self.decoding
        if self.name == "scores":
            raise mistake("scores.json is the table of all tasks; choose another name", "name")
        if not self.answer and how != "retrieve":
            raise mistake('answer is missing: a template such as "{text}"')
        if not self.prompt and how != "score":
            raise mistake('prompt is missing: a template such as "{image} What is this?"')
        if self.shots and not self.prompt:
            raise mistake("shots are examples of a prompt, and there is none", "shots")
        if isinstance(decoding, Retrieve) and not (decoding.item or self.answer):
            raise mistake("retrieve needs items: an answer, or decoding.item", "decoding")
        self._check_templates()
        self._check_output()
        allowed = [name for name, one in METRICS.items() if how in one.of]
        for place, metric in enumerate(self.metrics):
            if metric.name not in allowed:
                words = f"the metric {metric.name} does not score {how}; allowed: {', '.join(allowed)}"
                raise mistake(words, "metrics", place)
            if (
                metric.needs
                and self.answer != f"{{{MESSAGES}}}"
                and not {*metric.needs} & {*kinds(self.answer)}
            ):
                found = " and ".join(kinds(self.answer)) or "missing"
                words = f"{metric.name} compares {' or '.join(metric.needs)}; the answer is {found}"
                raise mistake(words, "metrics", place)
        return self

    def _check_templates(self) -> None:
        templates: list[tuple[tuple[str | int, ...], str]] = [(("answer",), self.answer)]
        templates += [(("prompt", place, "content"), turn.content) for place, turn in enumerate(self.prompt)]
        for name in ("of", "against", "item", "via", "labels"):
            value = getattr(self.decoding, name, None)
            templates += [(("decoding", name), value)] if isinstance(value, str) else []
        for keys, template in templates:
            try:
                used = fields(template)
            except EvaluationError as error:
                raise mistake(str(error), *keys) from None
            if any(field.name == "other" for field in used) and self.join is None:
                raise mistake("{other...} is a field of join, which is not given", *keys)

    def _check_output(self) -> None:
        output = getattr(self.decoding, "output", None)
        for kind in [output] if isinstance(output, str) else output or []:
            if kind not in (*segment_types(), "any"):
                words = _choice(kind, [*segment_types(), "any"])
                raise mistake(f"{words}, or a list of kinds", "decoding", "output")

    @property
    def output(self) -> str | list[str] | None:
        """The kind(s) of the reply; None lets the model decide."""
        given = getattr(self.decoding, "output", None)
        if given == "any":
            return None
        found = given or kinds(self.answer)
        if self.answer == f"{{{MESSAGES}}}" and given is None:
            return None
        return found[0] if isinstance(found, list) and len(found) == 1 else found


def find_task_files(name: str | Path) -> list[Path]:
    """The files of a name: a file, a folder of .yaml files, or a bundled task such as "dna/promoter"."""
    path = Path(name)
    for place in (path, *(one / end for one in TASKS for end in (path, f"{name}.yaml"))):
        if place.is_file():
            return [place]
        if place.is_dir():
            found = sorted(place.rglob("*.yaml"))
            if not found:
                raise EvaluationError(f"{place} holds no .yaml file.")
            return found
    known = sorted(
        one.relative_to(folder).with_suffix("").as_posix()
        for folder in TASKS
        for one in folder.rglob("*.yaml")
    )
    raise EvaluationError(
        f"{name} is neither a task file nor a folder of them{nearest(name, known)}; bundled: "
        f"{', '.join(known)}."
    )


def load_tasks(names: Sequence[str | Path]) -> list[Task]:
    """The tasks of files and folders, in order; EvaluationError for a mistake in one, or two tasks of one name."""
    tasks = [task for name in names for path in find_task_files(name) for task in read_tasks(path)]
    seen: dict[str, Task] = {}
    for task in tasks:
        if task.name in seen:
            raise EvaluationError(
                f"Two tasks are named {task.name!r}; results are kept by name, so give each its own."
            )
        seen[task.name] = task
    return tasks


def read_tasks(path: str | Path) -> list[Task]:
    """The tasks of one file."""
    path = Path(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}).") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise EvaluationError(f"{path} line {line}: not YAML: {error.problem}") from None
    if not isinstance(root, yaml.MappingNode):
        raise EvaluationError(
            f"{path}: a task file holds keys such as name, data, prompt; received {_kind(root)}."
        )
    _refuse_twins(path, root)
    given = yaml.SafeLoader("").construct_document(root)
    entries = given.pop("tasks", None)
    if entries is None:
        found = [_validate(path, root, given, ())]
    elif not isinstance(entries, list) or not entries:
        raise EvaluationError(f"{path}: tasks is a list of tasks; received {entries!r:.80}.")
    else:
        found = [
            _validate(path, root, {**given, **one} if isinstance(one, dict) else one, ("tasks", number))
            for number, one in enumerate(entries)
        ]
    for task in found:
        task._folder = path.parent
    return found


def _kind(node: yaml.Node | None) -> str:
    return {"scalar": "a single value", "sequence": "a list"}.get(getattr(node, "id", ""), "nothing")


def _refuse_twins(path: Path, node: yaml.Node) -> None:
    """EvaluationError for a key that appears twice: YAML would keep the last."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise EvaluationError(
                    f"{path} line {line}: the key {key.value!r} is already in line {seen[key.value]}."
                )
            seen[key.value] = line
            _refuse_twins(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_twins(path, value)


def _validate(path: Path, root: yaml.Node, given: Any, place: tuple[str | int, ...]) -> Task:
    try:
        return Task.model_validate(given)
    except ValidationError as error:
        problems = [_problem(path, root, place, one) for one in error.errors()]
        raise EvaluationError("; ".join(dict.fromkeys(problems))) from None


def _problem(path: Path, root: yaml.Node, place: tuple[str | int, ...], error: Any) -> str:
    """One error message: file, line, key, value received, values allowed."""
    context = error.get("ctx", {})
    loc = [*error["loc"], *context.get("keys", ())]
    if error["type"].startswith("union_tag"):
        loc.append(context["discriminator"].strip("'"))
    line, names = _locate(root, [*place, *loc])
    shared, shared_names = _locate(root, loc)  # a key next to `tasks`
    if len(shared_names) + len(place) > len(names):
        line, names = shared, shared_names
    where = f"{path} line {line}" + (f", {'.'.join(map(str, names[len(place) :] or names))}" if names else "")
    return f"{where}: {_words(error, context)}"


def _words(error: Any, context: Mapping[str, Any]) -> str:
    received = error["input"]
    if error["type"] == "literal_error":
        return _choice(received, re.findall(r"'([^']*)'", context["expected"]))
    if error["type"] == "union_tag_invalid":
        return _choice(context["tag"], re.findall(r"'([^']*)'", context["expected_tags"]))
    if error["type"] == "union_tag_not_found":
        return f"the key {context['discriminator']} is missing; received {received!r:.80}"
    if error["type"] == "missing":
        return f"the key {error['loc'][-1]!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    plain = isinstance(received, Scalar | list)
    return (
        f"{message}; received {received!r:.80}"
        if plain and error["type"] not in ("value_error", "mistake")
        else message
    )


def _choice(received: object, allowed: Sequence[str]) -> str:
    return f"received {received!r:.80}{choices(received, allowed)}"


def _locate(root: yaml.Node, loc: Sequence[str | int]) -> tuple[int, list[str | int]]:
    """Line of the deepest node on the path of a pydantic location, and the keys up to it; tags are skipped."""
    node, line, names = root, root.start_mark.line + 1, list[str | int]()
    for step in loc:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == step:
                    node, line = value, key.start_mark.line + 1
                    names.append(step)
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
            names.append(step)
    return line, names
