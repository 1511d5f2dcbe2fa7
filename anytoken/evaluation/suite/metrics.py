"""Metrics by name. Each measures every sample separately, so that scores can be bootstrapped.

`measure` gives an array per figure, a row per sample: a score, or the statistics of a corpus score, such as the errors
and words of WER, or truth and choice of MCC. `total` reduces rows to one number. So one bootstrap serves all metrics,
and two models are compared on the samples that both have answered. NaN marks a sample without a score. N: samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field, field_validator

from anytoken import moved
from anytoken.evaluation.metrics import same_text, same_words, sequence_identity
from anytoken.evaluation.suite.metric_base import Array, Metric, Tools, best_score, optional_package
from anytoken.evaluation.suite.text_metrics import cider, plain_words, token_f1, vqa_accuracy
from anytoken.segments import DNA, Image, Segment, Speech, Text, Video
from anytoken.utils.errors import EvaluationError

if TYPE_CHECKING:
    from anytoken.evaluation.suite.samples import Outcome

MOST_DB = 100.0  # PSNR of equal pixels, which is infinite
SIDE = 32  # images are compared by class at this size


# ---- texts ----


class ExactMatch(Metric):
    """Equal up to letter case and white space, and without punctuation if `punctuation: false`."""

    percent = True
    name: Literal["exact_match"]
    punctuation: bool = True

    def score(self, outcome: Outcome, tools: Tools) -> float:
        return float(best_score(outcome, tools, same_text if self.punctuation else same_words))


class TokenF1(Metric):
    """F1 of the words shared with the best reference (SQuAD)."""

    percent = True
    name: Literal["token_f1"]

    def score(self, outcome: Outcome, tools: Tools) -> float:
        return best_score(outcome, tools, token_f1)


class VQAAccuracy(Metric):
    """Agreement with the annotators; all of `answer`'s references count."""

    percent = True
    name: Literal["vqa_accuracy"]

    def score(self, outcome: Outcome, tools: Tools) -> float:
        return vqa_accuracy(
            tools.text_of(outcome.answer), [tools.text_of(one) for one in outcome.sample.truth]
        )


class Cider(Metric):
    """CIDEr-D of captions."""

    name: Literal["cider"]

    def measure(self, outcomes: Sequence[Outcome], tools: Tools) -> dict[str, Array]:
        answers = [tools.text_of(one.answer) for one in outcomes]
        targets = [[tools.text_of(truth) for truth in one.sample.truth] for one in outcomes]
        return {self.name: np.array(cider(answers, targets))}


class ChrF(Metric):
    """chrF of the whole set (Popović 2015), by sacrebleu; chrF++ with `word_order: 2`."""

    is_mean = False
    name: Literal["chrf"]
    word_order: int = Field(default=0, ge=0, le=2)

    def measure(self, outcomes: Sequence[Outcome], tools: Tools) -> dict[str, Array]:
        answers = [tools.text_of(one.answer) for one in outcomes]
        targets = [[tools.text_of(truth) for truth in one.sample.truth] for one in outcomes]
        most = max(map(len, targets), default=0)
        streams = [
            [group[place] if place < len(group) else None for group in targets] for place in range(most)
        ]
        stats = _chrf(self.word_order)._extract_corpus_statistics(answers, streams)
        return {self.name: np.array(stats, np.float64)}

    def total(self, rows: Array) -> float:
        return float(_chrf(self.word_order)._compute_f_score(rows.sum(0).tolist()))


@cache
def _chrf(word_order: int) -> Any:
    return optional_package("sacrebleu.metrics", "chrf", "sacrebleu").CHRF(word_order=word_order)


class _ErrorRate(Metric):
    """Errors over the length of the references; with several references, the one with the lowest rate."""

    percent = True
    lower_is_better = True
    is_mean = False
    verbatim: bool = False  # letter case and punctuation count

    def measure(self, outcomes: Sequence[Outcome], tools: Tools) -> dict[str, Array]:
        rows = []
        for one in outcomes:
            counts = [
                self._count(tools.text_of(one.answer), tools.text_of(truth)) for truth in one.sample.truth
            ]
            rows.append(min(counts, key=lambda count: count[0] / max(1, count[1])))
        return {self.name: np.array(rows, np.float64).reshape(len(rows), 2)}

    def _count(self, answer: str, target: str) -> tuple[int, int]:
        jiwer = optional_package("jiwer", self.name, "jiwer")
        if not self.verbatim:
            answer, target = (" ".join(plain_words(text)) for text in (answer, target))
        if not target.strip():
            raise EvaluationError(f"{self.name} needs references with words; received {target!r}.")
        process = jiwer.process_words if self.name == "wer" else jiwer.process_characters
        found = process(target, answer)
        errors = found.substitutions + found.deletions + found.insertions
        return errors, found.hits + found.substitutions + found.deletions

    def total(self, rows: Array) -> float:
        errors, length = rows.sum(0)
        return float(errors / length) if length else float("nan")


class WER(_ErrorRate):
    """Word error rate, by jiwer; spoken answers are transcribed by --asr."""

    name: Literal["wer"]


class CER(_ErrorRate):
    """Character error rate, by jiwer."""

    name: Literal["cer"]


class Kinds(Metric):
    """Whether the reply's segments are of the answer's kinds, in order."""

    percent = True
    name: Literal["kinds"]

    def score(self, outcome: Outcome, tools: Tools) -> float:
        given = [one.kind for one in outcome.answer]
        return float(any(given == [one.kind for one in truth] for truth in outcome.sample.truth))


class SequenceIdentity(Metric):
    """The share of positions that agree: bases of DNA, or the words (residues) of a text."""

    percent = True
    name: Literal["identity"]

    def score(self, outcome: Outcome, tools: Tools) -> float:
        return max(
            sequence_identity(_elements(outcome.answer), _elements(truth)) for truth in outcome.sample.truth
        )


def _elements(segments: Sequence[Segment]) -> list[str]:
    found: list[str] = []
    for one in segments:
        found += (
            list(one.bases.upper())
            if isinstance(one, DNA)
            else one.text.split()
            if isinstance(one, Text)
            else []
        )
    return found


# ---- media ----


class PSNR(Metric):
    """Peak signal-to-noise ratio of an image or video in dB, 100 for equal pixels; resized to the truth's size."""

    needs = ("image", "video")
    name: Literal["psnr"]

    def score(self, outcome: Outcome, tools: Tools) -> float:
        truth = _images(outcome.sample.truth[0])
        answer = _images(outcome.answer, truth.shape[1:3]) if outcome.answer else None
        if answer is None or not len(answer):
            return 0.0
        frames = min(len(answer), len(truth))
        error = float(((answer[:frames] - truth[:frames]) ** 2).mean())
        return min(MOST_DB, 10 * float(np.log10(255**2 / error))) if error else MOST_DB


def _images(segments: Sequence[Segment], size: tuple[int, ...] | None = None) -> Array:
    """The first image or video of some segments as frames float64 [T, H, W, 3]; none of another kind."""
    first = next((one for one in segments if isinstance(one, Image | Video)), None)
    if first is None:
        return np.zeros((0, 1, 1, 3))
    images = [first] if isinstance(first, Image) else [Image(frame) for frame in first.frames]
    return np.stack([(one.resize(*size) if size else one).pixels for one in images]).astype(np.float64)


class STOI(Metric):
    """Short-time objective intelligibility of speech (Taal et al. 2011), by pystoi; cut or padded to the truth."""

    needs = ("speech",)
    name: Literal["stoi"]

    def score(self, outcome: Outcome, tools: Tools) -> float:
        pystoi = optional_package("pystoi", "stoi", "pystoi")
        truth = next((one for one in outcome.sample.truth[0] if isinstance(one, Speech)), None)
        if truth is None:
            raise EvaluationError("stoi compares speech; a true answer of this task holds none.")
        answer = next((one for one in outcome.answer if isinstance(one, Speech)), None)
        if answer is None:
            return 0.0
        samples = answer.resample(truth.sample_rate_hz).samples[: len(truth.samples)]
        samples = np.pad(samples, (0, len(truth.samples) - len(samples)))
        return float(pystoi.stoi(truth.samples, samples, truth.sample_rate_hz))


class NearestLabel(Metric):
    """Whether the true image nearest to the answer (pixels at 32x32) has the record's value of a key."""

    percent = True
    needs = ("image", "video")
    keys = ("label",)
    name: Literal["nearest_label"]
    label: str

    def measure(self, outcomes: Sequence[Outcome], tools: Tools) -> dict[str, Array]:
        known = np.stack([_images(one.sample.truth[0], (SIDE, SIDE))[0].ravel() for one in outcomes])
        labels = [str(one.sample.record.get(self.label)) for one in outcomes]
        scores = []
        for one, label in zip(outcomes, labels, strict=True):
            made = _images(one.answer, (SIDE, SIDE))
            near = int(((known - made[0].ravel()) ** 2).sum(1).argmin()) if len(made) else None
            scores.append(float(near is not None and labels[near] == label))
        return {self.name: np.array(scores)}


class WorldJudge(Metric):
    """The judge of `Tools`: correct as a whole, and by part. Answers that it cannot judge are skipped."""

    percent = True
    name: Literal["world_judge"]

    def measure(self, outcomes: Sequence[Outcome], tools: Tools) -> dict[str, Array]:
        if tools.judge is None:
            raise EvaluationError(
                "world_judge needs a judge: Tools(judge=...), as `anytoken eval --task` passes."
            )
        rows = tools.judge(outcomes)
        names = sorted({"right", *(name for row in rows if row for name in row)})
        return {
            name: np.array([np.nan if row is None else row.get(name, 0.0) for row in rows]) for name in names
        }


# ---- labels ----


class Accuracy(Metric):
    """The share of correct labels; for `score`, a score above 0 predicts the label `positive`."""

    of = ("classify", "score")
    percent = True
    name: Literal["accuracy"]
    positive: str = "1"

    def score(self, outcome: Outcome, tools: Tools) -> float:
        if outcome.score is not None:
            return float((outcome.score > 0) == (outcome.sample.truth_text == self.positive))
        return float(outcome.choice == outcome.sample.truth_label)


class _Labels(Metric):
    """Base of metrics over truth and choice in the whole set, as label indices."""

    of = ("classify",)
    is_mean = False

    def measure(self, outcomes: Sequence[Outcome], tools: Tools) -> dict[str, Array]:
        return {self.name: np.array([[one.sample.truth_label, one.choice] for one in outcomes], np.int64)}


class MacroF1(_Labels):
    """The mean over labels of their F1."""

    percent = True
    name: Literal["macro_f1"]

    def total(self, rows: Array) -> float:
        right, truths, choices = _confusion(rows)
        return float((2 * right / (truths + choices)).mean())


class MCC(_Labels):
    """Matthews correlation coefficient (multi-class: Gorodkin 2004): 1 is perfect, 0 no better than chance."""

    name: Literal["mcc"]

    def total(self, rows: Array) -> float:
        right, truths, choices = _confusion(rows)
        total = float(len(rows))
        spread = (total**2 - (choices**2).sum()) * (total**2 - (truths**2).sum())
        return float((right.sum() * total - (choices * truths).sum()) / np.sqrt(spread)) if spread else 0.0


def _confusion(rows: Array) -> tuple[Array, Array, Array]:
    """Per label that occurs: counts of correct choices, truths and choices; float64 [C].

    In numpy, since a bootstrap calls it a thousand times and scikit-learn spends milliseconds on input checks.
    """
    labels, flat = np.unique(rows, return_inverse=True)
    truth, choice = flat.reshape(rows.shape).T
    counted = (truth[truth == choice], truth, choice)
    right, truths, choices = (np.bincount(one, minlength=len(labels)).astype(np.float64) for one in counted)
    return right, truths, choices


class AUROC(Metric):
    """Area under the ROC curve: the share of pairs in the correct order; for several labels the mean of one-vs-rest.

    For `score`, records whose answer is `positive` should have higher scores.
    """

    of = ("classify", "score")
    is_mean = False
    name: Literal["auroc"]
    positive: str = "1"

    def measure(self, outcomes: Sequence[Outcome], tools: Tools) -> dict[str, Array]:
        if outcomes and outcomes[0].score is not None:
            rows = [[one.sample.truth_text == self.positive, 0.0, one.score] for one in outcomes]
        else:
            rows = [[one.sample.truth_label, *one.probabilities] for one in outcomes]
        return {self.name: np.array(rows, np.float64)}

    def total(self, rows: Array) -> float:
        truth, scores = rows[:, 0].astype(int), rows[:, 1:]
        found = []
        for label in range(1 if scores.shape[1] == 2 else 0, scores.shape[1]):
            positive = truth == label
            count = int(positive.sum())
            if 0 < count < len(truth):
                _, places, counts = np.unique(scores[:, label], return_inverse=True, return_counts=True)
                ranks = (counts.cumsum() - (counts - 1) / 2)[places]  # equal scores share their mean rank
                above = ranks[positive].sum() - count * (count + 1) / 2
                found.append(float(above) / (count * (len(truth) - count)))
        return float(np.mean(found)) if found else float("nan")


# ---- rankings ----


class Recall(Metric):
    """The share of prompts with a right item among the first k."""

    of = ("retrieve",)
    percent = True
    name: Literal["recall"]
    k: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 5, 10], min_length=1)

    @field_validator("k", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    def measure(self, outcomes: Sequence[Outcome], tools: Tools) -> dict[str, Array]:
        first = np.array([one.ranks[0] for one in outcomes])
        return {f"recall@{k}": (first <= k).astype(np.float64) for k in self.k}


class MRR(Metric):
    """Mean reciprocal rank of the first right item."""

    of = ("retrieve",)
    name: Literal["mrr"]

    def score(self, outcome: Outcome, tools: Tools) -> float:
        return 1 / outcome.ranks[0]


class MeanAveragePrecision(Metric):
    """Mean average precision over the ranks of all right items."""

    of = ("retrieve",)
    name: Literal["map"]

    def score(self, outcome: Outcome, tools: Tools) -> float:
        return float(np.mean([place / rank for place, rank in enumerate(outcome.ranks, start=1)]))


class RankVariance(Metric):
    """Variance of an item's rank over languages, averaged over items (MRV, Nie et al., arXiv 2406.18254).

    item: the key that identifies the item of a prompt; language: the key of its language. Items in one language are
    skipped.
    """

    of = ("retrieve",)
    lower_is_better = True
    keys = ("item", "language")
    name: Literal["rank_variance"]
    item: str
    language: str = "language"

    def measure(self, outcomes: Sequence[Outcome], tools: Tools) -> dict[str, Array]:
        groups: dict[Any, dict[Any, tuple[int, int]]] = defaultdict(dict)
        for place, one in enumerate(outcomes):
            record = one.sample.record
            groups[record.get(self.item)].setdefault(record.get(self.language), (place, one.ranks[0]))
        rows = np.full(len(outcomes), np.nan)
        for group in groups.values():
            if len(group) > 1:
                places, ranks = zip(*group.values(), strict=True)
                rows[min(places)] = np.var(ranks)
        return {self.name: rows}


CLASSES: tuple[type[Metric], ...] = (
    ExactMatch, TokenF1, VQAAccuracy, Cider, ChrF, WER, CER, Kinds, SequenceIdentity, PSNR, STOI, NearestLabel,
    WorldJudge, Accuracy, MacroF1, MCC, AUROC, Recall, MRR, MeanAveragePrecision, RankVariance,
)  # fmt: skip
METRICS: dict[str, type[Metric]] = {get_args(one.model_fields["name"].annotation)[0]: one for one in CLASSES}
AnyMetric = Annotated[
    ExactMatch | TokenF1 | VQAAccuracy | Cider | ChrF | WER | CER | Kinds | SequenceIdentity | PSNR | STOI
    | NearestLabel | WorldJudge | Accuracy | MacroF1 | MCC | AUROC | Recall | MRR | MeanAveragePrecision | RankVariance,
    Field(discriminator="name"),
]  # fmt: skip


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
