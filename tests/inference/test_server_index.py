"""A collection of a vector database finds the same as an index in a folder, resumes, and refuses other models."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from anytoken.cli import app
from anytoken.inference import index_files, vector_store
from anytoken.inference.index import Index
from anytoken.inference.server_index import ServerIndex
from anytoken.model.embedding_head import EmbeddingHead
from anytoken.segments import Image
from anytoken.utils.errors import RequestError


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """URL of a database of a PostgreSQL server with pgvector, started for the tests."""
    pytest.importorskip("psycopg")
    server = pytest.importorskip("pgserver").get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(params=["qdrant", "pgvector"])
def url(request, tmp_path):
    if request.param == "qdrant":
        pytest.importorskip("qdrant_client")
        return f"file://{tmp_path}/store#my-media"
    return f"{request.getfixturevalue('postgres')}#my-media-{tmp_path.name.lower()[:30].replace('[', '-')}"


@pytest.fixture(autouse=True)
def one_store(monkeypatch):
    """A folder of Qdrant is open once in a process."""
    opened, original = {}, vector_store.open_store

    def open_store(url):
        if url not in opened:
            opened[url] = original(url)
        return opened[url]

    for module in ("server_index", "vector_store"):
        monkeypatch.setattr(f"anytoken.inference.{module}.open_store", open_store)
    yield
    for store in opened.values():
        store.close()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    for n in range(3):
        Image(np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / f"{n}.png")
    (root / "notes.txt").write_text("red apple\n\ngreen pear\n\nold plum")
    return root


def embedded(monkeypatch):
    """A list that grows by the paths of what is embedded."""
    paths, original = [], index_files.read_files

    def read_files(reader, files):
        found = original(reader, files)
        paths.extend(item.path for item in found.items)
        return found

    monkeypatch.setattr(index_files, "read_files", read_files)
    return paths


def test_it_finds_the_same_as_a_folder(folder, searcher, url):
    index, there = Index.build(folder, searcher), ServerIndex.build(folder, searcher, url)
    assert len(there) == len(index) == 6 and "12 dimensions" in repr(there)
    for query in ("green pear", folder / "1.png", searcher.embed("plum")[0] * 3):
        for one, other in zip(there.search(query, k=9), index.search(query, k=9), strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-5)
            assert one.item == other.item and one.file == other.file
    assert {hit.item.kind for hit in there.search("pear", k=9, kinds=["image"])} == {"image"}
    assert ServerIndex.open(url, searcher).search("green pear", k=1)[0].open().text == "green pear"


def test_an_update_embeds_what_changed_and_removes_what_has_gone(folder, searcher, url, monkeypatch):
    paths = embedded(monkeypatch)
    ServerIndex.build(folder, searcher, url)
    assert len(paths) == 6
    ServerIndex.build(folder, searcher, url)
    assert len(paths) == 6
    (folder / "0.png").unlink()
    (folder / "notes.txt").write_text("red apple\n\nyellow pear")
    (folder / "new.txt").write_text("a fox")
    there = ServerIndex.build(folder, searcher, url)
    assert sorted(paths[6:]) == ["new.txt", "notes.txt", "notes.txt"]
    found = [(hit.item.path, hit.item.text) for hit in there.search("pear", k=99)]
    assert sorted(found) == [
        ("1.png", ""), ("2.png", ""), ("new.txt", "a fox"), ("notes.txt", "red apple"), ("notes.txt", "yellow pear"),
    ]  # fmt: skip
    other = folder.parent / "other"
    other.mkdir()
    (other / "new.txt").write_text("an owl")
    assert len(ServerIndex.build(other, searcher, url)) == 6  # folders share a collection


def test_a_killed_build_resumes_with_whole_files(folder, searcher, url, monkeypatch):
    paths = embedded(monkeypatch)
    monkeypatch.setattr(index_files, "PART", 1)
    store = vector_store.open_store(url)
    put = store.put

    def killed(root, items, vectors):
        put(root, items[:1], vectors[:1])
        if len(items) > 1:  # of notes.txt one of three paragraphs is stored
            raise KeyboardInterrupt
        put(root, items[1:], vectors[1:])

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "put", killed)
        ServerIndex.build(folder, searcher, url)
    paths.clear()
    there = ServerIndex.build(folder, searcher, url)
    assert paths == ["notes.txt"] * 3 and len(there) == 6


def test_another_model_or_width_is_refused(folder, searcher, url):
    with pytest.raises(RequestError, match="is not an index"):
        ServerIndex.open(url, searcher)
    ServerIndex.build(folder, searcher, url)
    with pytest.raises(RequestError, match=r"another width \(12, now 8\).*--overwrite"):
        ServerIndex.build(folder, searcher, url, width=8)
    torch.manual_seed(1)
    searcher.embedding_heads[None] = EmbeddingHead(32, ["text", "image"], 12, widths=[8])
    with pytest.raises(RequestError, match="another model"):
        ServerIndex.build(folder, searcher, url)
    with pytest.raises(RequestError, match="made by another model"):
        ServerIndex.open(url, searcher)
    there = ServerIndex.build(folder, searcher, url, width=8, overwrite=True)
    assert there.meta["width"] == 8 and there.search("red apple", k=1)[0].item.text == "red apple"
    with pytest.raises(RequestError, match="whole number from 1"):
        there.search("pear", k=0)
    with pytest.raises(RequestError, match="received 'dna'"):
        there.search("pear", kinds=["dna"])


def test_someone_elses_collection_is_left_alone(folder, searcher, url):
    store = vector_store.open_store(url)
    store.create({"width": 12})
    for made in (lambda: ServerIndex.build(folder, searcher, url), lambda: ServerIndex.open(url, searcher)):
        with pytest.raises(RequestError, match="holds something else"):
            made()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host#photos", "is no URL of an index; expected http"),
        ("http://localhost:6333", "name the collection after #"),
        ("http://localhost:6333#a b", "received 'a b'"),
        ("http://127.0.0.1:9#photos", "does not work"),
        ("postgresql://me:secret@127.0.0.1:9/db#photos", "pgvector is needed"),
    ],
)
def test_a_wrong_url_is_one_sentence_without_the_password(folder, searcher, url, said):
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg")
    with pytest.raises(RequestError, match=said) as error:
        ServerIndex.build(folder, searcher, url)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_the_commands_take_a_url(folder, searcher, url, tmp_path, monkeypatch):
    monkeypatch.setattr("anytoken.commands.search.load", lambda *_: searcher)
    made = CliRunner().invoke(app, ["index", str(folder), "--out", url])
    assert made.exit_code == 0 and "6 items" in made.stdout
    found = CliRunner().invoke(app, ["search", url, "green pear", "-k", "1"])
    assert found.exit_code == 0 and "notes.txt [2] green pear" in found.stdout
    wrong = CliRunner().invoke(app, ["index", str(folder), "--out", url, "--kind", "hnsw"])
    assert wrong.exit_code == 2 and "--kind" in wrong.stderr
