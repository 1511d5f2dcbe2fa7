"""Gene to product: ranks by what the gene adds, beside chance, the prior and the nearest gene."""

import numpy as np
import pytest

import anytoken
from anytoken.emoji_world import products, report
from anytoken.emoji_world.dna import translate
from anytoken.tokenizers.base import load_tokenizer
from anytoken.training.initialize import checkpoint_folder

DIRECTION = "gene->product"


def likelihood_by(gain, monkeypatch):
    """Stands for a model: log p of a text is minus its length, plus what `gain` says the gene adds."""

    def log_likelihoods(model, dna, texts, batch=25):
        prior = [-len(text) - 1e-3 * (text[0] == "l") for text in texts]
        return np.array(prior) + [gain(dna, text) if dna else 0.0 for text in texts]

    monkeypatch.setattr(products, "log_likelihoods", log_likelihoods)


def test_the_texts_that_the_gene_makes_likelier_win_however_long(world, ignorant, monkeypatch):
    monkeypatch.setattr(products, "TOP", 1)
    likelihood_by(lambda dna, text: 3.0 * text.startswith("transporter"), monkeypatch)
    found = report.evaluate(ignorant, world, [DIRECTION], count=9, progress=False)["directions"][DIRECTION]
    assert found["model"]["total"] == 3 and found["model"]["value"] == pytest.approx(1 / 3, abs=1e-3)
    assert found["majority"]["value"] == pytest.approx(1 / 3, abs=1e-3)  # the shortest text
    likelihood_by(lambda dna, text: 0.0, monkeypatch)
    found = report.evaluate(ignorant, world, [DIRECTION], count=9, progress=False)["directions"][DIRECTION]
    assert found["model"]["value"] == 0 and not found["better"]  # ties are no success
    assert f"| {DIRECTION} |" in report.markdown(
        {**report.evaluate(ignorant, world, [DIRECTION], progress=False)}
    )


def test_the_nearest_gene_tells_by_the_words_of_its_product(world, ignorant, monkeypatch):
    monkeypatch.setattr(products, "TOP", 1)
    likelihood_by(lambda dna, text: 0.0, monkeypatch)
    found = report.evaluate(ignorant, world, [DIRECTION], count=9, progress=False)["directions"][DIRECTION]
    assert found["nearest"]["value"] > 0.6  # kinase next to kinase, transporter next to transporter


def test_likelihoods_are_those_of_the_sequence_whatever_the_padding(save_tiny, tmp_path):
    dna = load_tokenizer(checkpoint_folder("mini") / "tokenizers" / "dna")
    model = anytoken.load(save_tiny(tmp_path / "tiny", {"dna": dna}, 128), device="cpu")
    texts = ["a kinase", "what is this? a red apple", "x"]
    together = products.log_likelihoods(model, "ATGAAACTG", texts, batch=3)
    alone = [products.log_likelihoods(model, "ATGAAACTG", [text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-4) and (together < 0).all()
    without = products.log_likelihoods(model, None, texts)
    assert not np.allclose(without, together)
    assert translate("ATGAAACTG") == "MKL"


def test_no_short_gene_of_the_test_split_is_left_out(world, ignorant, monkeypatch):
    records = [{**one, "short": False} for one in world.records("dna/genes.jsonl")]
    monkeypatch.setitem(world._records, "dna/genes.jsonl", records)
    assert report.evaluate(ignorant, world, [DIRECTION], progress=False)["left_out"] == [DIRECTION]
