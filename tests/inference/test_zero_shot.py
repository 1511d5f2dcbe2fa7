"""Classes by name, scores of what belongs to none, and composed queries, all on vectors whose answers are known."""

import numpy as np
import pytest

from anytoken.evaluation.metrics import auroc, false_positive_rate
from anytoken.inference.zero_shot import ZeroShot, compose, open_set_scores, unit
from anytoken.utils.errors import RequestError


class Words:
    """A model whose vectors are sums of a fixed vector for each word, so that likeness is shared words."""

    def __init__(self, width=64):
        self.width, self.known = width, {}

    def word(self, word):
        rng = np.random.default_rng(sum(map(ord, word)) * 7919 + len(word))
        return self.known.setdefault(word, rng.normal(size=self.width))

    def embed(self, texts, untrained=False):
        return unit(np.stack([sum(self.word(word) for word in text.split()) for text in texts]))


NAMES = ["apple", "fox", "owl"]


def test_a_class_is_the_mean_of_its_sentences():
    model = Words()
    found = ZeroShot(model, NAMES, templates=["{}", "a drawn {}"])
    expected = unit((model.embed(["fox"]) + model.embed(["a drawn fox"]))[0])
    assert np.allclose(found.prototypes[1], expected, atol=1e-6)
    answers = found.classify(["red fox", "old owl", "apple"])
    assert [one.label for one in answers] == ["fox", "owl", "apple"]
    assert all(sum(one.probabilities) == pytest.approx(1) for one in answers)


@pytest.mark.parametrize("score", ["max", "energy", "negative"])
def test_what_belongs_to_no_class_scores_lower(score):
    found = ZeroShot(Words(), NAMES, negatives=["car", "boat", "train", "plane"])
    inside = found.scores([f"{word} {name}" for word in ("red", "old") for name in NAMES], score)
    outside = found.scores(["red car", "old boat", "fast train", "loud plane"], score)
    assert auroc(inside, outside) > 0.9 and false_positive_rate(inside, outside) <= 0.25


def test_scores_are_their_formulas():
    vectors, classes, others = (unit(np.random.default_rng(n).normal(size=(n, 8))) for n in (4, 3, 5))
    ins, outs = np.exp(vectors @ classes.T / 0.1), np.exp(vectors @ others.T / 0.1)
    assert np.allclose(
        open_set_scores(vectors, classes, "max", None, 0.1), ins.max(1) / ins.sum(1), rtol=1e-4
    )
    assert np.allclose(
        open_set_scores(vectors, classes, "energy", None, 0.1), 0.1 * np.log(ins.sum(1)), rtol=1e-4
    )
    expected = ins.sum(1) / (ins.sum(1) + outs.sum(1))
    assert np.allclose(open_set_scores(vectors, classes, "negative", others, 0.1), expected, rtol=1e-4)


def test_auroc_and_fpr95_on_numbers_by_hand():
    assert auroc([3, 4], [1, 2]) == 1 and auroc([1, 2], [3, 4]) == 0 and auroc([1, 1], [1]) == 0.5
    assert auroc([1, 3], [2]) == 0.5 and auroc([1, 2, 3], [2, 0]) == pytest.approx((1.5 + 3) / 6)
    inside = list(range(1, 21))  # 95 % of 20 are the 19 from 2 up
    assert false_positive_rate(inside, [0, 1, 2, 30]) == 0.5
    assert false_positive_rate(inside, [0, 1, 2, 30], recall=1.0) == 0.75


def test_a_composed_query_finds_what_has_both():
    model = Words()
    items = ["red fox", "green fox", "red owl", "green owl"]
    vectors = model.embed(items)
    query = compose([model.embed(["red fox"])[0], model.embed(["green"])[0]])
    assert np.linalg.norm(query) == pytest.approx(1, abs=1e-6)
    weighted = compose(
        [model.embed(["red fox"])[0], model.embed(["green"])[0], model.embed(["red"])[0]], [1, 1, -1]
    )
    assert items[int((vectors @ weighted).argmax())] == "green fox"
    assert (vectors @ query)[1] > (vectors @ query)[3]
    with pytest.raises(RequestError, match="one per vector; received 1 for 2"):
        compose([query, query], [1])
    with pytest.raises(RequestError, match="cancel each other out"):
        compose([query, query], [1, -1])
    for vectors in ([], query, [query, query[:3]], np.stack([query, query])[None]):
        with pytest.raises(RequestError, match="vectors of one width"):
            compose(vectors)
    with pytest.raises(RequestError, match="not finite"):
        compose([query, query], [1, float("nan")])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"names": []}, "at least one"),
        ({"names": "fox"}, "list of different class names"),
        ({"names": ["fox", "fox"]}, "different"),
        ({"names": [1, 2]}, "names are strings"),
        ({"negatives": "car"}, "negatives is a list of different class names"),
        ({"templates": ["a picture"]}, "with {} for the name"),
        ({"templates": "a {}"}, "templates is a list"),
        ({"temperature": 0}, "above 0; received 0"),
    ],
)
def test_settings_that_do_not_fit(settings, said):
    with pytest.raises(RequestError, match=said):
        ZeroShot(Words(), **{"names": NAMES, **settings})


def test_other_braces_of_a_template_are_text():
    model = Words()
    found = ZeroShot(model, ["fox"], templates=["{0} {} and {}"])
    assert np.allclose(found.prototypes, model.embed(["{0} fox and fox"]), atol=1e-6)


def test_scores_that_are_not_there():
    found = ZeroShot(Words(), NAMES)
    with pytest.raises(RequestError, match="max, energy, negative; received 'mean'"):
        found.scores(["fox"], "mean")
    with pytest.raises(RequestError, match="needs negative labels"):
        found.scores(["fox"], "negative")


def test_a_model_classifies(model):
    found = ZeroShot(model, ["red apple", "green pear"], templates=["{}"], untrained=True)
    assert [one.label for one in found.classify(["green pear", "red apple"])] == ["green pear", "red apple"]
