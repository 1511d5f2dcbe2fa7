"""The modalities that are folders of their own: each passes the battery, trains by its recipe and gets a card."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from batteries import TokenizerBattery

from anytoken.evaluation.tokenizers.card import make_card
from anytoken.segments import SegmentError
from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.registry import load_modality
from anytoken.training.tokenizer.recipe import TokenizerRecipe
from anytoken.training.tokenizer.trainer import train_tokenizer

ROOT = Path(__file__).parents[2] / "tokenizers"
Protein, Motion, Palette = (
    load_modality(ROOT / kind).segment_type for kind in ("protein", "motion", "palette")
)
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


class TestProtein(TokenizerBattery):
    tokenizer_class = load_modality(ROOT / "protein")
    settings = {"width": 16, "code_dim": 8, "codebook_size": 64}

    def segment(self, seed):
        return Protein("".join(np.random.default_rng(seed).choice(list(AMINO_ACIDS), 41)))

    def odd(self):
        return {"one": Protein("M"), "unknown": Protein("XBZ"), "long": Protein("MK" * 512)}

    def batch(self):
        return torch.randint(0, 20, (2, 128, 2), generator=torch.Generator().manual_seed(0))

    def check_same_shape(self, segment, back):
        assert len(back.residues) <= len(segment.residues) + 1

    def check_close(self, one, other):
        assert one == other

    def test_letters_of_any_case_and_more_than_a_segment_takes(self, tokenizer):
        assert Protein("mkbujoxz").residues == "MKDCLKAE"
        with pytest.raises(SegmentError, match="received 'M1'"):
            Protein("M1")
        with pytest.raises(TokenizerError, match="at most 1024 residues; received 1025"):
            tokenizer.encode(Protein("A" * 1025))


class TestMotion(TokenizerBattery):
    tokenizer_class = load_modality(ROOT / "motion")
    settings = {"width": 16, "depth": 1, "codebook_size": 24, "residual": 2}

    def segment(self, seed):
        return Motion(np.random.default_rng(seed).normal(size=(40, 6)).cumsum(0))

    def odd(self):
        return {
            "one sample": Motion(np.ones((1, 6))),
            "odd length": Motion(np.random.default_rng(5).normal(size=(7, 6))),
            "rest": Motion(np.zeros((20, 6))),
            "shocks": Motion(np.full((11, 6), 1e6)),
        }

    def batch(self):
        samples = np.stack([self.segment(seed).samples for seed in range(4)])
        return torch.from_numpy(np.sign(samples) * np.log1p(np.abs(samples)))

    def check_same_shape(self, segment, back):
        assert back.samples.shape == segment.samples.shape

    def check_close(self, one, other):
        np.testing.assert_allclose(one.samples, other.samples, rtol=1e-4, atol=1e-4)

    def test_one_series_loses_nothing_against_itself(self, tokenizer):
        assert set(tokenizer.distortion(self.segment(1), self.segment(1)).values()) == {0.0}
        assert min(tokenizer.distortion(self.segment(1), self.segment(2)).values()) > 0.1


class TestPalette(TokenizerBattery):
    tokenizer_class = load_modality(ROOT / "palette")
    settings = {"width": 16, "codebook_size": 32}

    def segment(self, seed):
        rng = np.random.default_rng(seed)
        return Palette(rng.integers(0, 256, (5, 3)), np.array([0.4, 0.3, 0.15, 0.1, 0.05]))

    def odd(self):
        return {
            "one": Palette(np.zeros((1, 3)), np.ones(1)),
            "seven alike": Palette(np.full((7, 3), 255), np.ones(7)),
            "nearly one": Palette(np.array([[9, 9, 9], [0, 0, 0]]), np.array([1e-6, 1])),
        }

    def batch(self):
        return torch.rand(1, 200, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def check_same_shape(self, segment, back):
        assert back.colours.shape == segment.colours.shape and back.shares.sum() == pytest.approx(1, abs=1e-5)

    def check_close(self, one, other):
        assert np.abs(one.colours.astype(int) - other.colours).max() <= 1
        assert np.array_equal(one.shares, other.shares)

    def test_the_largest_share_comes_first_and_shares_are_kept_to_sixteenths(self, tokenizer):
        back = tokenizer.decode(tokenizer.encode(Palette(np.eye(3) * 255, np.array([0.125, 0.25, 0.625]))))
        assert back.shares.tolist() == pytest.approx([0.625, 0.25, 0.125])


@pytest.mark.parametrize("segment", [Protein("MKV"), TestMotion().segment(0), TestPalette().segment(0)])
def test_a_segment_is_read_back_from_its_file(segment, tmp_path):
    path = segment.save(tmp_path / f"one.{'json' if segment.kind == 'palette' else 'csv'}")
    back = type(segment).open(path)
    if segment.kind == "motion":
        np.testing.assert_allclose(back.samples, segment.samples, rtol=1e-5)
    else:
        assert back == segment


@pytest.fixture(scope="module")
def plugin_sets(sets, tmp_path_factory):
    """The sets, proteins added to the genes, and a few series in the format of BasicMotions."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "emoji").symlink_to(sets / "emoji")
    rng = np.random.default_rng(0)
    genes = [
        {"product": f"product {n}", "protein": "M" + "".join(rng.choice(list(AMINO_ACIDS), 300)),
         "split": "test" if n % 3 == 0 else "train"}
        for n in range(6)
    ]  # fmt: skip
    (folder / "dna").mkdir()
    (folder / "dna" / "genes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in genes))
    (folder / "motion").mkdir()
    for split in ("TRAIN", "TEST"):
        rows = []
        for label in ("Standing", "Running"):
            channels = (",".join(f"{value:.3f}" for value in rng.normal(size=100)) for _ in range(6))
            rows.append("'" + "\\n".join(channels) + f"',{label}\n")
        text = "@relation 'BasicMotions'\n@data\n" + "".join(rows)
        (folder / "motion" / f"BasicMotions_{split}.arff").write_text(text)
    return folder


TINY = {
    "protein": ["config.width=16", "config.codebook_size=32"],
    "motion": ["config.width=16", "config.depth=1", "config.codebook_size=12"],
    "palette": ["config.width=16", "config.codebook_size=16"],
}


@pytest.mark.parametrize("kind", TINY)
def test_a_folder_trains_by_its_recipe_and_gets_a_card(kind, plugin_sets, tmp_path):
    overrides = [*TINY[kind], "steps=3", "batch_size=4", "log_every=1"]
    out = train_tokenizer(ROOT / kind / "recipe.yaml", plugin_sets, tmp_path / "out", overrides)
    assert (out / f"{kind}.py").read_bytes() == (ROOT / kind / f"{kind}.py").read_bytes()
    page = make_card(out, plugin_sets, tmp_path / "card", count=4).read_text()
    figures = json.loads((tmp_path / "card" / "figures.json").read_text())
    assert set(figures["distortion"]) == set(figures["random_codes_distortion"])
    assert all(name in page for name in figures["distortion"]) and "random codes" in page
    assert figures["code_perplexity"] >= 1 and figures["encode_units_per_second"] > 0
    assert ("samples.png" in page) == (kind != "protein") and "curve.png" in page


@pytest.mark.parametrize("kind", TINY)
def test_a_missing_set_is_an_error_that_says_where_it_comes_from(kind, tmp_path):
    with pytest.raises(TokenizerError, match="is missing"):
        train_tokenizer(ROOT / kind / "recipe.yaml", tmp_path, tmp_path / "out", TINY[kind])


@pytest.mark.parametrize("kind", TINY)
def test_a_class_is_short_and_its_recipe_names_it(kind):
    import ast

    tree = ast.parse((ROOT / kind / f"{kind}.py").read_text())
    (cls,) = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Tokenizer")
    ]
    assert cls.end_lineno - cls.lineno + 1 < 80
    assert TokenizerRecipe.load(ROOT / kind / "recipe.yaml").code == f"{kind}.py"
