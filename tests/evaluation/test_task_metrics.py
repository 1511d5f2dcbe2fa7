"""Metrics of task files against numbers computed by hand, and against the packages they stand on."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from anytoken.evaluation.suite import intervals
from anytoken.evaluation.suite.metrics import METRICS, Tools
from anytoken.evaluation.suite.text_metrics import cider, token_f1, vqa_accuracy
from anytoken.segments import DNA, Image, Speech, Text, Video
from anytoken.utils.errors import EvaluationError

TOOLS = Tools()


def outcome(answer=(), truth=(), record=None, **more):
    sample = SimpleNamespace(
        truth=[[one] if not isinstance(one, list) else one for one in truth], record=record or {},
        truth_label=more.pop("truth_label", -1), truth_text=more.pop("truth_text", ""),
    )  # fmt: skip
    found = {"answer": list(answer), "choice": None, "score": None, "probabilities": (), "ranks": ()}
    return SimpleNamespace(sample=sample, **found | more)


def texts(*pairs):
    return [outcome([Text(answer)], [Text(one) for one in targets]) for answer, *targets in pairs]


def figure(name, outcomes, **options):
    metric = METRICS[name](name=name, **options)
    return {key: metric.total(rows) for key, rows in metric.measure(outcomes, TOOLS).items()}


def test_kinds_of_a_reply_are_those_of_the_answer_in_order():
    image = Image(np.zeros((2, 2, 3), np.uint8))
    truth = [[Text("a"), image]]
    given = [outcome([Text("b"), image], truth), outcome([image, Text("b")], truth), outcome([], truth)]
    assert figure("kinds", given) == {"kinds": pytest.approx(1 / 3)}


def test_text_figures_by_hand():
    pairs = texts(("A  cat", "a cat"), ("a dog.", "a dog", "the dog"), ("bird", "fish"))
    assert figure("exact_match", pairs) == {"exact_match": pytest.approx(1 / 3)}
    assert figure("exact_match", pairs, punctuation=False) == {"exact_match": pytest.approx(2 / 3)}
    assert token_f1("the red big apple", "a red apple") == pytest.approx(2 * 2 / (3 + 2))
    assert figure("identity", texts(("M K L", "M K W V"))) == {"identity": 0.5}
    assert figure("identity", [outcome([DNA("ACGT")], [DNA("acga")])]) == {"identity": 0.75}


def test_vqa_accuracy_leaves_each_of_the_people_out():
    people = ["red"] * 3 + ["blue"] * 7
    # without one "red": 2 of 3 in three of ten cases; without one "blue": 3 of 3 in the other seven
    assert vqa_accuracy("Red.", people) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("the two", ["2"]) == 1 and vqa_accuracy("three", ["2"]) == 0


def test_cider_by_hand():
    # Two samples, so an n-gram of one of them has idf log 2, and of both 0.
    # "red cat" against "red cat": cosine 1 for n = 1, 2; no 3- or 4-grams: 10 * (1 + 1) / 4 = 5.
    assert cider(["red cat", "blue dog"], [["red cat"], ["blue dog"]]) == pytest.approx([5, 5])
    # "a" stands in both references, so it weighs nothing: unigrams agree, of the bigrams neither "a cat" nor "the cat".
    [one, other] = cider(["the cat", "a dog"], [["a cat"], ["a dog"]])
    # ours: the (unseen, idf log 2), cat; theirs: a (0), cat: cosine 1 / sqrt(2)
    assert one == pytest.approx(10 * (1 / math.sqrt(2)) / 4)
    # "dog" alone counts: cosine 1 for unigrams, 1 for the bigram
    assert other == pytest.approx(5)
    # a longer answer: length penalty exp(-(4 - 2)^2 / 72), and repeats are clipped: cat x3 counts once
    [long, _] = cider(["red cat cat cat", "blue dog"], [["red cat"], ["blue dog"]])
    unigrams = (1 * 1 + 1 * 1) / (math.sqrt(1 + 9) * math.sqrt(2))
    bigrams = 1 / math.sqrt(1 + 4)  # "red cat" once, "cat cat" twice
    assert long == pytest.approx(10 * math.exp(-4 / 72) * (unigrams + bigrams) / 4)


def test_error_rates_by_hand_and_the_best_reference():
    pairs = texts(("the cat sat", "The cat sat down."), ("a", "b c", "a d"))
    assert figure("wer", pairs) == {"wer": pytest.approx((1 + 1) / (4 + 2))}
    assert figure("wer", pairs[:1], verbatim=True) == {"wer": pytest.approx(2 / 4)}
    assert figure("cer", texts(("abc", "abd"))) == {"cer": pytest.approx(1 / 3)}
    with pytest.raises(EvaluationError, match="needs references with words"):
        figure("wer", texts(("a", "...")))


def test_chrf_is_that_of_sacrebleu_over_the_whole_set():
    from sacrebleu import corpus_chrf

    pairs = texts(("the cat sat", "the cat sat down", "a cat sat"), ("dogs bark", "a dog barks"))
    wanted = corpus_chrf(
        ["the cat sat", "dogs bark"], [["the cat sat down", "a dog barks"], ["a cat sat", None]]
    )
    assert figure("chrf", pairs) == {"chrf": pytest.approx(wanted.score)}


def test_media_figures_by_hand():
    black, grey = (Image(np.full((4, 4, 3), level, np.uint8)) for level in (0, 51))
    assert figure("psnr", [outcome([grey], [black])]) == {"psnr": pytest.approx(10 * math.log10(25))}
    assert figure("psnr", [outcome([black], [black]), outcome([], [black])]) == {"psnr": 50}
    clips = [Video(np.zeros((frames, 4, 4, 3), np.uint8), 4.0) for frames in (3, 2)]
    assert figure("psnr", [outcome(clips[:1], clips[1:])]) == {"psnr": 100}
    rng = np.random.default_rng(0)
    clip = Speech(rng.normal(0, 0.1, 16_000).astype(np.float32), 16_000)
    hiss = Speech(rng.normal(0, 0.1, 12_000).astype(np.float32), 16_000)
    assert figure("stoi", [outcome([clip], [clip])])["stoi"] == pytest.approx(1)
    assert figure("stoi", [outcome([hiss], [clip])])["stoi"] < 0.3 and figure(
        "stoi", [outcome([], [clip])]
    ) == {"stoi": 0}
    cases = [
        outcome([grey], [black], {"c": "x"}),
        outcome([grey], [grey], {"c": "y"}),
        outcome([], [grey], {"c": "y"}),
    ]
    assert figure("nearest_label", cases, label="c") == {"nearest_label": pytest.approx(1 / 3)}


def test_label_figures_by_hand():
    pairs = [(0, 0), (0, 0), (0, 1), (1, 1), (1, 0), (1, 1)]  # 2 of 3 right in both classes
    found = [
        outcome(truth_label=truth, choice=choice, probabilities=(1.0 - choice, choice))
        for truth, choice in pairs
    ]
    assert figure("accuracy", found) == {"accuracy": pytest.approx(4 / 6)}
    assert figure("macro_f1", found) == {"macro_f1": pytest.approx(2 / 3)}
    assert figure("mcc", found) == {"mcc": pytest.approx((2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))}
    assert figure("auroc", found) == {"auroc": pytest.approx(0.5 * (2 / 3) + 0.5 * (2 / 3))}
    scored = [
        outcome(truth_text=text, score=score)
        for text, score in (("1", 2.0), ("0", 1.0), ("1", 0.5), ("0", -1.0))
    ]
    assert figure("auroc", scored) == {"auroc": 0.75}  # three of four pairs are in order
    assert figure("accuracy", scored) == {"accuracy": 0.75}
    three = [
        outcome(truth_label=n % 3, choice=0, probabilities=tuple(float(n % 3 == k) for k in range(3)))
        for n in range(6)
    ]
    assert figure("auroc", three) == {"auroc": 1}


def test_label_figures_are_those_of_scikit_learn():
    from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score

    rng = np.random.default_rng(0)
    for classes in (2, 4):
        truth, choice = rng.integers(classes, size=(2, 60))
        scores = rng.integers(5, size=(60, classes)).astype(float) + np.eye(classes)[truth]  # with ties
        scores /= scores.sum(1, keepdims=True)
        found = [
            outcome(truth_label=int(one), choice=int(other), probabilities=tuple(row))
            for one, other, row in zip(truth, choice, scores, strict=True)
        ]
        assert figure("macro_f1", found)["macro_f1"] == pytest.approx(
            f1_score(truth, choice, average="macro")
        )
        assert figure("mcc", found)["mcc"] == pytest.approx(matthews_corrcoef(truth, choice))
        each = [roc_auc_score(truth == label, scores[:, label]) for label in range(classes)]
        assert figure("auroc", found)["auroc"] == pytest.approx(each[1] if classes == 2 else np.mean(each))


def test_ranking_figures_by_hand():
    found = [outcome(ranks=ranks) for ranks in ((1, 4), (2,), (12,))]
    assert figure("recall", found, k=[1, 2, 10]) == {
        "recall@1": pytest.approx(1 / 3), "recall@2": pytest.approx(2 / 3), "recall@10": pytest.approx(2 / 3),
    }  # fmt: skip
    assert figure("mrr", found) == {"mrr": pytest.approx((1 + 1 / 2 + 1 / 12) / 3)}
    assert figure("map", found) == {"map": pytest.approx(((1 + 2 / 4) / 2 + 1 / 2 + 1 / 12) / 3)}


def test_rank_variance_is_over_languages_within_each_thing():
    ranks = {("cat", "en"): 1, ("cat", "de"): 3, ("dog", "en"): 2, ("dog", "de"): 2, ("ox", "en"): 9}
    found = [
        outcome(record={"thing": what, "language": how}, ranks=(rank,)) for (what, how), rank in ranks.items()
    ]
    assert figure("rank_variance", found, item="thing") == {"rank_variance": pytest.approx((1 + 0) / 2)}


def test_intervals_cover_the_truth_and_pairs_cancel_what_is_hard():
    rng = np.random.default_rng(0)
    mean = METRICS["token_f1"](name="token_f1").total
    covered = 0
    for _ in range(100):
        rows = (rng.random(60) < 0.3).astype(float)
        found = intervals.figure(mean, rows, True, 200)
        covered += found["low"] <= 0.3 <= found["high"]
        assert intervals.figure(mean, rows, False, 200) == found
    assert 85 <= covered <= 100
    hard = rng.random(200)
    ours, theirs = hard + 0.02 + rng.normal(0, 0.01, 200), hard
    paired = intervals.difference(mean, ours, theirs, True)
    assert 0.01 < paired["low"] < paired["high"] < 0.03 and paired["p"] == 0.002
    alone = intervals.figure(mean, ours, True)
    assert alone["high"] - alone["low"] > 5 * (paired["high"] - paired["low"])


def test_spoken_answers_need_a_whisper_for_text_figures():
    clip = Speech(np.zeros(1600, np.float32), 16_000)
    with pytest.raises(EvaluationError, match="--asr"):
        figure("wer", [outcome([clip], [Text("a word")])])
