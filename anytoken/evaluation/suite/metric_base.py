"""The base of the metrics in `metrics.py`: their common class, their inputs, and the errors of task files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from anytoken.segments import Segment, Speech, Text
from anytoken.utils.errors import EvaluationError
from anytoken.utils.hints import choices

if TYPE_CHECKING:
    from anytoken.evaluation.suite.samples import Outcome

Array = np.ndarray


class Part(BaseModel):
    """A part of a task file: an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                raise mistake(f"unknown key {key!r}{choices(key, cls.model_fields)}", str(key))
        return given


def mistake(words: str, *keys: str | int) -> PydanticCustomError:
    """An error in a task file at a key below the checked part."""
    return PydanticCustomError("mistake", "{words}", {"words": words, "keys": list(keys)})


Judge = Callable[[Sequence["Outcome"]], list[dict[str, float] | None]]


@dataclass
class Tools:
    """What some metrics need besides answers.

    sets: the folder of the built sets. asr: a Whisper model that transcribes spoken answers. judge: scores the parts of
    answers, for `world_judge`.
    """

    sets: Path = Path("data/sets")
    asr: str | None = None
    judge: Judge | None = None
    _texts: dict[int, str] = field(default_factory=dict)

    @cached_property
    def transcriber(self) -> Any:
        """Transcribes spoken answers; EvaluationError without --asr."""
        from anytoken.evaluation.transcriber import Transcriber

        if self.asr is None:
            raise EvaluationError(
                "A text metric of spoken answers needs a Whisper to write them down: give --asr base."
            )
        return Transcriber(self.asr)

    def text_of(self, segments: Sequence[Segment]) -> str:
        """Segments as text: text unchanged, speech transcribed, DNA as its bases, other media as <image>."""
        words = []
        for one in segments:
            if isinstance(one, Speech):
                if id(one) not in self._texts:
                    self._texts[id(one)] = self.transcriber.transcribe(one)
                words.append(self._texts[id(one)])
            else:
                words.append(one.text if isinstance(one, Text) else getattr(one, "bases", f"<{one.kind}>"))
        return "".join(words)


class Metric(Part):
    """Base of all: the mean over samples of one score each, unless a metric says otherwise."""

    of: ClassVar[tuple[str, ...]] = ("generate",)  # the ways of decoding that it scores
    needs: ClassVar[tuple[str, ...]] = ()  # kinds of which the answer has to hold one; none: any
    keys: ClassVar[tuple[str, ...]] = ()  # its options that name a key of the records
    percent: ClassVar[bool] = False
    lower_is_better: ClassVar[bool] = False
    is_mean: ClassVar[bool] = True
    name: str

    def measure(self, outcomes: Sequence[Outcome], tools: Tools) -> dict[str, Array]:
        """Rows per figure [N] or [N, D]."""
        return {self.name: np.array([self.score(one, tools) for one in outcomes], np.float64)}

    def score(self, outcome: Outcome, tools: Tools) -> float:
        """The score of one sample."""
        raise NotImplementedError

    def total(self, rows: Array) -> float:
        """The figure of some rows; NaN if undefined."""
        kept = rows[~np.isnan(rows)]
        return float(kept.mean()) if len(kept) else float("nan")


def best_score(outcome: Outcome, tools: Tools, score: Callable[[str, str], float]) -> float:
    """The best score against any of the references."""
    answer = tools.text_of(outcome.answer)
    return max(score(answer, tools.text_of(truth)) for truth in outcome.sample.truth)


def optional_package(module: str, metric: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise EvaluationError(
            f"The metric {metric} needs {package}: pip install 'anytoken[eval]'."
        ) from error
