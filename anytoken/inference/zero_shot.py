"""Classes by their names, and what belongs to none of them, from embeddings alone; and queries that are composed.

A class is the mean of its name's vectors in several sentences (prompt ensembles of CLIP, arXiv 2103.00020). How far an
input is from all classes is a score: the maximum similarity under a softmax (MCM, 2211.13445), the energy of all
similarities (2010.03759), or how much less it looks like far-off names, the negative labels (NegLabel, 2403.20078).

Shapes: N inputs, C classes, M negative labels, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from anytoken.inference.api import AnyToken
from anytoken.inference.score import Classification, classify
from anytoken.utils.errors import RequestError

TEMPLATES = ("{}", "a {}", "a picture of a {}", "this is a {}")
Score = Literal["max", "energy", "negative"]


class ZeroShot:
    """A classifier made of names. `prototypes`: a unit vector for each, float32 [C, W]."""

    def __init__(
        self,
        model: AnyToken,
        names: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        negatives: Sequence[str] = (),
        temperature: float = 0.05,
        untrained: bool = False,
    ) -> None:
        """templates: sentences with {} for the name. negatives: names that no input has, for score="negative".

        temperature: of similarities in probabilities and scores. RequestError for no names or a template without {}.
        """
        _check_names("names", names)
        if negatives:
            _check_names("negatives", negatives)
        if isinstance(templates, str) or not templates or any("{}" not in one for one in templates):
            raise RequestError(
                f"templates is a list of sentences with {{}} for the name; received {templates!r:.80}."
            )
        if not temperature > 0:
            raise RequestError(f"temperature is above 0; received {temperature}.")
        self.model, self.names, self.templates = model, list(names), list(templates)
        self.temperature, self.untrained = temperature, untrained
        self.prototypes = self._prototypes(self.names)
        self.negatives = self._prototypes(list(negatives)) if negatives else None

    def _prototypes(self, names: list[str]) -> np.ndarray:
        sentences = [template.replace("{}", name) for name in names for template in self.templates]
        vectors = self.model.embed(sentences, untrained=self.untrained)
        return unit(vectors.reshape(len(names), len(self.templates), -1).mean(1))

    def similarities(self, inputs: Any) -> np.ndarray:
        """Cosines of inputs (as for `embed`) and classes, float32 [N, C]."""
        return self.model.embed(inputs, untrained=self.untrained) @ self.prototypes.T

    def classify(self, inputs: Any) -> list[Classification]:
        """For each input its class, with the probabilities of all."""
        return [classify(self.names, row) for row in (self.similarities(inputs) / self.temperature).tolist()]

    def scores(self, inputs: Any, score: Score = "max") -> np.ndarray:
        """How much each input looks like any of the classes, float64 [N]: low for what belongs to none.

        RequestError for an unknown score, and for "negative" without negatives.
        """
        if score not in get_args(Score):
            raise RequestError(f"score is one of {', '.join(get_args(Score))}; received {score!r}.")
        vectors = self.model.embed(inputs, untrained=self.untrained)
        return open_set_scores(vectors, self.prototypes, score, self.negatives, self.temperature)


def open_set_scores(
    vectors: np.ndarray,
    prototypes: np.ndarray,
    score: Score = "max",
    negatives: np.ndarray | None = None,
    temperature: float = 0.05,
) -> np.ndarray:
    """`ZeroShot.scores` of vectors [N, W] against prototypes [C, W] and negative labels [M, W]."""
    logits = (vectors @ prototypes.T).astype(np.float64) / temperature
    total = log_sum(logits)
    if score == "max":
        return np.exp(logits.max(1) - total)
    if score == "energy":
        return temperature * total
    if negatives is None:
        raise RequestError('score="negative" needs negative labels: ZeroShot(..., negatives=[...]).')
    against = log_sum((vectors @ negatives.T).astype(np.float64) / temperature)
    return np.exp(total - np.logaddexp(total, against))


def _check_names(what: str, names: Any) -> None:
    if not isinstance(names, list | tuple) or not names or len(set(names)) != len(names):
        raise RequestError(
            f"{what} is a list of different class names, at least one; received {names!r:.80}."
        )
    if not all(isinstance(name, str) and name for name in names):
        raise RequestError(f"{what} are strings that are not empty; received {names!r:.80}.")


def log_sum(logits: np.ndarray) -> np.ndarray:
    """log of the sum of exponentials over the last axis."""
    return np.logaddexp.reduce(logits, axis=-1)


def compose(vectors: Sequence[np.ndarray] | np.ndarray, weights: Sequence[float] | None = None) -> np.ndarray:
    """One query of several, float32 [W]: the weighted sum of unit vectors, such as of an image and "make it green".

    A negative weight takes away. Vectors add up as words do in CLIP's space (Baldrati et al., "Effective Conditioned
    and Composed Image Retrieval", CVPR 2022, take the sum for the simplest baseline). RequestError for a sum of zero.
    """
    shapes = {np.shape(one) for one in vectors}
    if len(shapes) != 1 or len(shapes.pop()) != 1:
        raise RequestError(
            "vectors is a list of vectors of one width, as `embed` returns; received shapes "
            f"{[np.shape(one) for one in vectors]!r:.80}."
        )
    parts = np.asarray(vectors, np.float32)
    given = np.ones(len(parts), np.float32) if weights is None else np.asarray(weights, np.float32)
    if given.shape != (len(parts),):
        raise RequestError(f"weights are one per vector; received {len(given)} for {len(parts)}.")
    total = given @ parts
    if not np.linalg.norm(total) >= 1e-6 or not np.isfinite(total).all():
        raise RequestError(
            "The vectors cancel each other out, or a value is not finite: nothing is left to search with."
        )
    return unit(total)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., W] at length 1."""
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
