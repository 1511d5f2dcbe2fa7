"""An index holds every file as a vector, finds by cosine, resumes, updates only what changed, and refuses the rest."""

import json
import os

import numpy as np
import pytest
import torch

from anytoken.inference import index_files
from anytoken.inference.index import Index, how_to_open
from anytoken.inference.index_files import Item
from anytoken.model.embedding_head import EmbeddingHead
from anytoken.segments import Image
from anytoken.utils.errors import DataError, RequestError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "media"
    (root / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(4):
        name = f"deep/{n}.png" if n % 2 else f"{n}.png"
        Image(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name)
    (root / "notes.txt").write_text("red apple\nand more\n\n\ngreen pear\n")
    (root / "tune.xyz").write_text("no medium")
    (root / ".hidden.txt").write_text("pear")
    return root


@pytest.fixture
def read(searcher, monkeypatch):
    """How many items were embedded since the last look."""
    counts = [0]
    original = index_files.read_files

    def read_files(reader, files):
        found = original(reader, files)
        counts[0] += len(found.items)
        return found

    monkeypatch.setattr(index_files, "read_files", read_files)

    def look():
        found, counts[0] = counts[0], 0
        return found

    return look


def test_every_file_is_found_by_itself(folder, searcher, tmp_path):
    index = Index.build(folder, searcher, tmp_path / "my.index")
    assert [(item.path, item.kind, item.part) for item in index.items] == [
        ("0.png", "image", 0), ("2.png", "image", 0), ("notes.txt", "text", 0), ("notes.txt", "text", 1),
        ("deep/1.png", "image", 0), ("deep/3.png", "image", 0),
    ]  # fmt: skip
    assert index.items[2].text == "red apple and more" and "4 image" in repr(index)
    for item in index.items:
        [hit] = index.search((folder / item.path) if item.kind == "image" else item.text, k=1)
        assert hit.item == item and hit.score == pytest.approx(1, abs=1e-5)
        assert hit.open() == (Image.open(hit.file) if item.kind == "image" else hit.open())
    whole = index.search("red apple and more", k=99)
    assert len(whole) == 6 and [hit.score for hit in whole] == sorted((h.score for h in whole), reverse=True)
    expected = np.argsort(-index.vectors @ searcher.embed("red apple and more")[0])
    assert [index.items.index(hit.item) for hit in whole] == expected.tolist()
    assert {hit.item.kind for hit in index.search("pear", k=3, kinds=["image"])} == {"image"}
    assert index.search(searcher.embed([[Image.open(folder / "0.png"), "green"]])[0])[0].score <= 1
    opened = Index.open(tmp_path / "my.index", searcher)
    assert isinstance(opened.vectors, np.memmap)
    assert [hit.item for hit in opened.search("pear", k=6)] == [hit.item for hit in index.search("pear", k=6)]


def test_an_update_embeds_only_what_changed(folder, searcher, read, tmp_path):
    out = tmp_path / "my.index"
    Index.build(folder, searcher, out)
    assert read() == 6 + 0
    Index.build(folder, searcher, out)
    assert read() == 0
    Image(np.zeros((16, 16, 3), np.uint8)).save(folder / "0.png")
    os.utime(folder / "0.png", ns=(1, 1))
    (folder / "2.png").unlink()
    (folder / "new.txt").write_text("pear")
    index = Index.build(folder, searcher, out)
    assert read() == 2
    assert {item.path for item in index.items} == {
        "0.png",
        "deep/1.png",
        "deep/3.png",
        "notes.txt",
        "new.txt",
    }
    assert np.allclose(index.vectors[0], searcher.embed([Image.open(folder / "0.png")])[0], atol=1e-5)
    read()
    with pytest.raises(RequestError, match=r"another width \(12, now 8\).*--overwrite"):
        Index.build(folder, searcher, out, width=8)
    with pytest.raises(RequestError, match="another folder"):
        Index.build(folder / "deep", searcher, out)
    assert Index.build(folder, searcher, out, width=8, overwrite=True).vectors.shape[1] == 8
    assert read() == 6
    torch.manual_seed(3)
    searcher.embedding_heads[None] = EmbeddingHead(32, ["text", "image"], 12, widths=[8])
    with pytest.raises(RequestError, match="another model"):
        Index.build(folder, searcher, out, width=8)


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_other_processes_embed_the_same(folder, searcher, tmp_path, monkeypatch, engine):
    if engine == "ray":
        pytest.importorskip("ray")
    monkeypatch.setattr(index_files, "PART", 2)
    (folder / "broken.png").write_bytes(b"no image")
    here = Index.build(folder, searcher)
    spread = Index.build(folder, searcher, tmp_path / "my.index", engine=engine, workers=2)
    assert spread.items == here.items and np.allclose(spread.vectors, here.vectors, atol=1e-5)
    with pytest.raises(DataError, match="unknown engine 'spark'"):
        Index.build(folder, searcher, engine="spark")


def test_a_killed_build_goes_on_and_leaves_the_old_index(folder, searcher, read, tmp_path, monkeypatch):
    out = tmp_path / "my.index"
    monkeypatch.setattr(index_files, "PART", 2)
    original = index_files.FolderEmbedder._embed

    def killed(self, files):
        if any(file.name == "1.png" for file, _ in files):
            raise KeyboardInterrupt
        original(self, files)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(index_files.FolderEmbedder, "_embed", killed)
        Index.build(folder, searcher, out)
    assert not out.exists() and read() == 2
    assert len(Index.build(folder, searcher, out)) == 6
    assert read() == 4 and sorted(path.name for path in tmp_path.iterdir()) == ["media", "my.index"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (folder / "deep" / "1.png").write_bytes((folder / "deep" / "3.png").read_bytes())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(index_files.FolderEmbedder, "_embed", killed)
        Index.build(folder, searcher, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def clustered(count, width=16, seed=0):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(40, width))[rng.integers(40, size=count)] + 0.3 * rng.normal(
        size=(count, width)
    )
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("kind", "least"), [("flat", 1.0), ("hnsw", 0.95), ("ivfpq", 0.95)])
def test_kinds_of_index_find_what_is_near(searcher, kind, least, tmp_path):
    vectors, queries = clustered(2000), clustered(50, seed=1)
    items = [Item(f"{n}.png", "image") for n in range(len(vectors))]
    index = Index.of_vectors(searcher, items, vectors, kind)
    exact = np.argsort(-queries @ vectors.T, axis=1)[:, :10]
    _, rows = index.search_many(queries, 10)
    found = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, rows, strict=True)])
    assert found >= least
    if kind == "ivfpq":  # by their codes alone a third is lost
        coarse = index.search_many(queries, 10, rerank=1)[1]
        assert found > 0.1 + np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, coarse, strict=True)])
        cosines = index.search_many(queries, 10)[0]
        assert np.allclose(cosines, np.einsum("qw,qkw->qk", queries, vectors[rows]), atol=1e-5)
        assert (np.diff(cosines, axis=1) <= 0).all()
    index.meta |= {"probe": searcher.embedding_probe().tolist()}
    index._write(tmp_path / "my.index")
    again = Index.open(tmp_path / "my.index", searcher)
    assert np.array_equal(again.search_many(queries, 10)[1], rows)
    assert len(again.search(queries[0], k=7)) == 7


def test_an_older_index_serves_a_compatible_head(folder, searcher, tmp_path):
    old = Index.build(folder, searcher, tmp_path / "my.index")
    torch.manual_seed(1)
    head = EmbeddingHead(32, ["text", "image"], 12, old_width=12)
    head.old_probe.copy_(torch.from_numpy(searcher.embedding_probe()))
    searcher.embedding_heads[None] = head
    index = Index.open(tmp_path / "my.index", searcher)
    query = head.to_old(torch.from_numpy(searcher.embed("pear")))[0].detach().numpy()
    assert index.search("pear", k=1)[0].item == old.search(query, k=1)[0].item


def test_errors_are_one_clear_sentence(folder, searcher, tmp_path, toys):
    out = tmp_path / "my.index"
    with pytest.raises(RequestError, match="There is no folder"):
        Index.build(tmp_path / "nowhere", searcher)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"holds no file that can be embedded.*\.png"):
        Index.build(tmp_path / "empty", searcher)
    (tmp_path / "empty" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(RequestError, match=r"None of the 1 files.*broken\.png"):
        Index.build(tmp_path / "empty", searcher, out)
    assert not out.exists()
    with pytest.raises(RequestError, match="flat, hnsw, ivfpq"):
        Index.build(folder, searcher, kind="lsh")
    with pytest.raises(RequestError, match="ivfpq needs 1000 vectors"):
        Index.build(folder, searcher, out, kind="ivfpq")
    with pytest.raises(RequestError, match="holds something else"):
        Index.build(folder, searcher, folder)
    with pytest.raises(RequestError, match="is not an index"):
        Index.open(folder, searcher)
    index = Index.build(folder, searcher, out)
    for k in (0, True, 1.5):
        with pytest.raises(RequestError, match="whole number from 1"):
            index.search("pear", k=k)
    with pytest.raises(RequestError, match="holds image, text; received 'dna'"):
        index.search("pear", kinds=["dna"])
    for kinds in ([], "image"):
        with pytest.raises(RequestError, match="kinds is a list"):
            index.search("pear", kinds=kinds)
    with pytest.raises(RequestError, match="12 dimensions; received 8"):
        index.search(np.zeros(8, np.float32))
    for value in (0, np.nan):
        with pytest.raises(RequestError, match="finite values that are not all 0"):
            index.search(np.full(12, value, np.float32))
    with pytest.raises(RequestError, match=r"\[Q, 12\]; received \[2, 8\]"):
        index.search_many(np.zeros((2, 8), np.float32))
    assert index.search_many(np.zeros((0, 12), np.float32), 3)[1].shape == (0, 3)
    for width in (0, -4, 9, "8", True):
        with pytest.raises(RequestError, match="width is one of 8, 12"):
            Index.build(folder, searcher, width=width)
    hit = index.search(folder / "2.png", k=1)[0]
    hit.file.unlink()
    assert not hit.exists and not hit.to_dict()["exists"]
    with pytest.raises(RequestError, match=r"2\.png has gone"):
        hit.open()
    torch.manual_seed(5)
    searcher.embedding_heads[None] = EmbeddingHead(32, ["text", "image"], 12)
    with pytest.raises(RequestError, match="made by another model"):
        Index.open(out, searcher)


def test_a_damaged_or_empty_index_is_refused(folder, searcher, tmp_path):
    out = tmp_path / "my.index"
    Index.build(folder, searcher, out)
    data = (out / "vectors.npy").read_bytes()
    (out / "vectors.npy").write_bytes(data[: len(data) // 2])
    with pytest.raises(RequestError, match="is damaged"):
        Index.open(out, searcher)
    assert len(Index.build(folder, searcher, out)) == 6  # it is made anew
    (out / "items.jsonl").write_text("")
    with pytest.raises(RequestError, match="is empty"):
        Index.open(out, searcher)
    (out / "index.json").write_text("{")
    with pytest.raises(RequestError, match="is damaged"):
        Index.open(out, searcher)


def test_what_cannot_be_read_is_left_out_and_told(folder, searcher, tmp_path, caplog):
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "long.txt").write_text("a" * 2000)  # cut at the context
    index = Index.build(folder, searcher, tmp_path / "my.index")
    assert "1 files left out" in caplog.text and "broken.png" in caplog.text
    assert {item.path for item in index.items} >= {"long.txt"} and len(index) == 7
    assert json.loads((tmp_path / "my.index" / "index.json").read_text())["items"] == 7


def test_a_kind_that_the_head_does_not_know_is_left_out(folder, searcher, tmp_path, caplog):
    searcher.embedding_heads[None] = EmbeddingHead(32, ["image"], 12)
    index = Index.build(folder, searcher, tmp_path / "my.index")
    assert len(index) == 4 and {item.kind for item in index.items} == {"image"}
    assert "notes.txt (the embedding head knows image, and this is text)" in caplog.text
    (tmp_path / "notes").mkdir()
    (folder / "notes.txt").rename(tmp_path / "notes" / "notes.txt")
    with pytest.raises(RequestError, match=r"None of the 1 files.*this is text"):
        Index.build(tmp_path / "notes", searcher)


def test_a_vector_is_searched_by_its_direction(folder, searcher):
    index = Index.build(folder, searcher)
    long = index.search(5 * searcher.embed("pear")[0].astype(np.float64), k=2)
    assert [hit.score for hit in long] == pytest.approx(
        [hit.score for hit in index.search("pear", k=2)], abs=1e-5
    )


def test_an_index_remembers_how_to_open_its_model(folder, searcher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    Index.build(folder, searcher, "my.index").remember_model("my.index", how_to_open("runs", None))
    meta, _ = index_files.read_index("my.index")
    assert meta["model"] == str(tmp_path / "runs")  # valid in any working folder
    Index.build(folder, searcher, "my.index")
    assert index_files.read_index("my.index")[0]["model"] == meta["model"]


def test_a_model_without_a_head_builds_if_told_to(folder, model, tmp_path):
    with pytest.raises(ValueError, match=r"stages/embed\.yaml"):
        Index.build(folder, model, tmp_path / "my.index")
    Index.build(folder, model, tmp_path / "my.index", untrained=True)
    assert (
        Index.open(tmp_path / "my.index", model)
        .search("red apple and more", k=1)[0]
        .item.text.startswith("red")
    )
