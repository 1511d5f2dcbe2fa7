"""Metrics of texts whose usual packages need Java, or have no package: CIDEr-D, VQA accuracy, token F1.

CIDEr-D: Vedantam et al., arXiv 1411.5726; the packages tokenize with Java's PTB tokenizer, this with a regular
expression: lower case, words and numbers, no punctuation. VQA accuracy: Antol et al., arXiv 1505.00468, with the
normalisation of its evaluation code less its table of contractions. Token F1: SQuAD, Rajpurkar et al., arXiv
1606.05250.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import exp, log, sqrt

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = re.compile(r"[^\w\s']|_")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(DIGITS)} | {"none": "0"}
LONGEST_NGRAM, SIGMA = 4, 6.0
Vector = dict[tuple[str, ...], float]


def plain_words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return PUNCTUATION.sub(" ", text.casefold()).replace("'", " ").split()


def squad_words(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, punctuation removed, no articles."""
    return ARTICLES.sub(" ", re.sub(r"[^\w\s]|_", "", text.casefold())).split()


def token_f1(answer: str, target: str) -> float:
    """F1 of the words that answer and target share; 1 if both have none."""
    ours, theirs = Counter(squad_words(answer)), Counter(squad_words(target))
    shared = (ours & theirs).total()
    total = ours.total() + theirs.total()
    return 2 * shared / total if total else 1.0


def vqa_words(text: str) -> str:
    """An answer as VQA compares it: lower case, numbers as digits, no articles, no punctuation."""
    words = PUNCTUATION.sub(" ", text.casefold().replace("\n", " ")).split()
    return " ".join(NUMBERS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer: str, targets: Sequence[str]) -> float:
    """min(matches / 3, 1), averaged over the ways to leave one of the people's answers out; of one answer, equality."""
    given = vqa_words(answer)
    matches = [vqa_words(target) == given for target in targets]
    if len(matches) == 1:
        return float(matches[0])
    return sum(min((sum(matches) - one) / 3, 1.0) for one in matches) / len(matches)


def cider(answers: Sequence[str], targets: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each answer against its references; how common an n-gram is comes from the references of all.

    10 is the most; every score is 0 where all references are of one sample, since then no n-gram is rare.
    """
    references = [[_ngrams(one) for one in group] for group in targets]
    seen = Counter(gram for group in references for gram in {gram for one in group for gram in one})
    common = log(max(1, len(targets)))

    def vectors(counts: Counter[tuple[str, ...]]) -> tuple[list[Vector], list[float], int]:
        found: list[Vector] = [{} for _ in range(LONGEST_NGRAM)]
        for gram, count in counts.items():
            found[len(gram) - 1][gram] = count * (common - log(max(1, seen[gram])))
        norms = [sqrt(sum(value**2 for value in one.values())) for one in found]
        return found, norms, sum(count for gram, count in counts.items() if len(gram) == 1)

    scores = []
    for answer, group in zip(answers, references, strict=True):
        ours, our_norms, length = vectors(_ngrams(answer))
        total = 0.0
        for one in group:
            theirs, norms, other_length = vectors(one)
            penalty = exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
            for mine, other, norm, other_norm in zip(ours, theirs, our_norms, norms, strict=True):
                shared = sum(
                    min(value, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, value in mine.items()
                )
                total += penalty * shared / (norm * other_norm) if norm * other_norm else 0.0
        scores.append(10 * total / LONGEST_NGRAM / len(group))
    return scores


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = plain_words(text)
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, LONGEST_NGRAM + 1)
        for start in range(len(words) - n + 1)
    )
