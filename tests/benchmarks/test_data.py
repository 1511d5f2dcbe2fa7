"""The data benchmark: its peers read the same tokens, its yardstick is right, and all of it runs on the tiny sets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anytoken.benchmarks import data
from anytoken.data.shards import Shards, tokenize_records
from anytoken.segments import Image
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.utils.errors import EvaluationError


def test_best_fit_decreasing_on_cases_that_are_known():
    assert data.best_fit_decreasing([5, 5, 5, 5], 10) == 1
    assert data.best_fit_decreasing([6, 5, 4, 3], 10) == pytest.approx(18 / 20)  # 6 + 4, 5 + 3
    assert data.best_fit_decreasing([7, 7, 7], 10) == pytest.approx(0.7)


@pytest.fixture
def images(tmp_path):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(
        width=16, encoder_depth=1, decoder_depth=1, refine_width=8, refine_depth=1, side_px=16
    )
    lines = []
    for index in range(5):
        picture = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image(picture).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"text": f"picture {index}", "image": f"{index}.png"}))
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    tokenizers = {"image": tokenizer}
    return Shards(
        tokenize_records(tmp_path / "set.jsonl", tokenizers, tmp_path / "images", progress=False), tokenizers
    )


def test_all_sides_read_the_same_tokens_or_there_is_no_figure(images, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    pytest.importorskip("datasets")
    rows = data._reading(images, tmp_path / "one", repeats=1)
    assert [row["of"] for row in rows] == ["webdataset", "datasets", "datasets"]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)

    def other(path):
        return ((record, codes + 1) for record, codes in data._samples(images, range(len(images))))

    monkeypatch.setattr(data, "_read_tar", other)
    with pytest.raises(EvaluationError, match="in order, webdataset: the two sides read different tokens"):
        data._reading(images, tmp_path / "two", repeats=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_benchmark_runs_on_the_tiny_sets(tmp_path):
    shards = data.shards_or_tiny(Path("nowhere"), tmp_path)
    figures = data.bench_data(shards, tmp_path, repeats=1, batches=3)
    assert [row["measure"].split(",")[0] for row in figures["rows"]] == [
        *["real ids"] * 4, "loading", *["tokens/s"] * 3,
    ]  # fmt: skip
    assert all(0.9 < row["ours"] <= 1 for row in figures["rows"][:4])
