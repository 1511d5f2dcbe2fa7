"""`anytoken embed`, `index` and `search`: results as a table, JSON or a page; one line for a mistake."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from anytoken.benchmarks.embed import bench_embed
from anytoken.cli import app
from anytoken.inference.api import AnyToken
from anytoken.model.embedding_head import EmbeddingHead
from anytoken.segments import Image


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture(scope="module")
def checkpoint(save_tiny, tmp_path_factory):
    from anytoken.tokenizers.image import ImageTokenizer

    torch.manual_seed(0)
    image = ImageTokenizer(
        width=8, encoder_depth=1, decoder_depth=1, refine_width=4, refine_depth=1, levels=[4, 3], side_px=16
    )
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", {"image": image}, 128)


@pytest.fixture(scope="module")
def head(checkpoint, tmp_path_factory):
    """A folder with a head alone, as a stage on a frozen model writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("head")
    EmbeddingHead(16, ["text", "image"], 8, widths=[4]).save(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(3):
        Image(np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"{n}.png"
        )
    (folder / "note.txt").write_text("a red apple")
    return folder


def test_a_folder_is_indexed_and_searched(checkpoint, head, photos, tmp_path):
    out = tmp_path / "my.index"
    made = run("index", photos, "--out", out, "-m", checkpoint, "--adapter", head)
    assert made.exit_code == 0, made.stderr
    assert "3 image" in made.stdout and "1 text" in made.stdout
    found = run("search", out, photos / "1.png", "-k", 2, "--json", "--html", tmp_path / "page.html")
    assert found.exit_code == 0, found.stderr
    *lines, page = found.stdout.splitlines()
    best = json.loads(lines[0])
    assert best["path"].endswith("1.png") and best["score"] == pytest.approx(1, abs=1e-4) and len(lines) == 2
    assert page == str(tmp_path / "page.html")
    assert (
        "data:image/webp" in (tmp_path / "page.html").read_text()
        and "1.png" in (tmp_path / "page.html").read_text()
    )
    words = run("search", out, "a red apple", "-k", 1)
    assert "note.txt" in words.stdout and "1.0000" in words.stdout
    only = run("search", out, "a red apple", "--kind", "image", "-k", 9, "--json")
    assert {json.loads(line)["kind"] for line in only.stdout.splitlines()} == {"image"}
    (photos / "1.png").unlink()
    gone = run("search", out, "a red apple", "-k", 4, "--json", "--html", tmp_path / "page.html")
    assert gone.exit_code == 0 and "run `anytoken index` again" in gone.stderr.replace("\n", " ")
    assert "has gone since it was indexed" in (tmp_path / "page.html").read_text()
    again = run("index", photos, "--out", out, "-m", checkpoint, "--adapter", head)
    assert again.exit_code == 0 and "2 image" in again.stdout


def test_embed_prints_a_vector(checkpoint, head, photos):
    found = run("embed", photos / "0.png", "a red apple", "-m", checkpoint, "--adapter", head, "--width", 4)
    vector = np.array(json.loads(found.stdout))
    model = AnyToken.from_pretrained(checkpoint, adapter=head)
    expected = model.embed([[Image.open(photos / "0.png"), "a red apple"]], width=4)[0]
    assert np.allclose(vector, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embed", "a"], "stages/embed.yaml"),
        (["index", "nowhere", "--out", "my.index", "--untrained"], "There is no folder nowhere"),
        (["index", ".", "--out", "my.index", "--untrained"], "holds no file that can be embedded"),
        (["search", "nowhere", "a"], "nowhere is not an index"),
    ],
)
def test_a_mistake_is_one_line(checkpoint, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(*words, "-m", checkpoint)
    assert found.exit_code == 2 and found.stderr.count("\n") == 1 and said in found.stderr
    assert not list(tmp_path.iterdir())


def test_the_benchmark_measures_what_it_says(checkpoint, head):
    model = AnyToken.from_pretrained(checkpoint, adapter=head)
    saved = []
    found = bench_embed(
        model,
        ["a red apple", "what is this?"] * 4,
        [1000, 100],
        16,
        1,
        save=lambda f: saved.append(len(f["rows"])),
    )
    assert saved == [1, 2, 3, 4] and [row["vectors"] for row in found["rows"]] == [100, 100, 1000, 1000]
    found["rows"] = found["rows"][2:]
    assert found["rows"][0]["memory_mb"] == 0 and found["rows"][1]["memory_mb"] > 1000 * 16 * 4 / 1e6
    assert found["embedding"]["embed_over_forward"] > 0 and found["embedding"]["prompts"] == 8
    assert [row["kind"] for row in found["rows"]] == ["flat", "hnsw"]
    assert found["rows"][0]["recall@10"] == 1.0 and found["rows"][1]["recall@10"] > 0.8
