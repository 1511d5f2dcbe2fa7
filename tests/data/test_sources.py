"""Sources: the same records out of every usual form, and what is wrong with one said by name and place."""

import gzip
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anytoken.data.records import Blob, media_parts, open_media
from anytoken.data.sources import open_source, read_records
from anytoken.segments import Image
from anytoken.utils.errors import RecordError

CONVERSATION = {
    "messages": [
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}],
        },
        {"role": "assistant", "content": "an apple"},
    ]
}


def picture(shade: int) -> Image:
    return Image(np.full((8, 8, 3), shade, dtype=np.uint8))


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    picture(shade).to_pil().save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shades(source: Any, key: str = "image") -> list[tuple[str, int]]:
    """The text and the shade of the picture of every record: what each form must give alike."""
    opened = open_source(source)
    found = []
    for _, entry in opened.entries():
        record = opened.parse(entry)
        image = open_media(record[key], Image, opened.root)
        assert isinstance(image, Image)
        found.append((record.get("text", ""), int(image.pixels[0, 0, 0])))
    return found


# ---- JSON lines ----


def test_records_and_conversations_are_read_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a", "image": "a.png"}, CONVERSATION)
    assert list(read_records(path)) == [{"text": "a", "image": "a.png"}, CONVERSATION]
    assert open_source(path).length == 2


def test_gzip_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n\n{"text": "b"}\n'))
    assert [record["text"] for record in read_records(path)] == ["a", "b"]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(RecordError, match="cannot be read completely"):
        list(read_records(path))


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"messages": []}'])
def test_a_bad_line_is_named(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(RecordError, match="line 2"):
        list(read_records(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.jsonl", "does not exist"),
        ("none-*.tar", "does not exist"),
        ("a.xyz", "unknown format"),
        ("a.csv", "column names"),
    ],
)
def test_what_is_no_source(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("a,b")
    (tmp_path / "a.csv").write_text("a,\nb,c")
    with pytest.raises(RecordError, match=said):
        list(open_source(tmp_path / name).entries())
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="holds no record"):
        open_source(tmp_path / "empty")
    with pytest.raises(RecordError, match="got int"):
        open_source(3)


def test_renamed_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"caption": "a", "audio": "a.wav"})
    opened = open_source(path, {"caption": "text", "audio": "speech"})
    assert [opened.parse(entry) for _, entry in opened.entries()] == [{"text": "a", "speech": "a.wav"}]


# ---- folders ----


def test_files_of_one_stem_are_one_record(tmp_path: Path) -> None:
    for stem, shade in (("cat", 10), ("dog.v2", 20), ("test/cow", 30)):
        (tmp_path / stem).parent.mkdir(exist_ok=True)
        (tmp_path / f"{stem}.png").write_bytes(png(shade))
        (tmp_path / f"{stem}.txt").write_text(f"a {stem}\n")
    (tmp_path / "cat.json").write_text('{"style": "3d"}')
    (tmp_path / "cat.video.webp").write_bytes(b"a clip")
    (tmp_path / "README.md").write_text("no caption")
    cat, dog, cow = read_records(tmp_path)
    assert cat == {"text": "a cat", "image": "cat.png", "video": "cat.video.webp", "style": "3d"}
    assert dog == {"text": "a dog.v2", "image": "dog.v2.png"}
    assert cow == {"text": "a test/cow", "image": "test/cow.png", "split": "test"}
    assert shades(tmp_path) == [("a cat", 10), ("a dog.v2", 20), ("a test/cow", 30)]


def test_class_folders_name_what_has_no_caption(tmp_path: Path) -> None:
    for name, shade in (("train/cat/1", 10), ("train/dog/1", 20), ("validation/dog/2", 30)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(png(shade))
    assert shades(tmp_path) == [("cat", 10), ("dog", 20), ("dog", 30)]
    assert [record["split"] for record in read_records(tmp_path)] == ["train", "train", "validation"]
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "3.png").write_bytes(png(40))
    assert next(iter(read_records(tmp_path))) == {"image": "test/3.png", "split": "test"}


def test_metadata_names_media(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "1.png").write_bytes(png(10))
    write(
        tmp_path / "test" / "metadata.jsonl",
        {"file_name": "1.png", "speech_file_name": "1.wav", "text": "cat"},
    )
    (record,) = read_records(tmp_path)
    assert record == {"image": "test/1.png", "speech": "test/1.wav", "text": "cat", "split": "test"}
    assert shades(tmp_path) == [("cat", 10)]
    write(tmp_path / "test" / "metadata.jsonl", {"file_name": 3})
    with pytest.raises(RecordError, match=r"metadata\.jsonl line 1: file_name: expected a path"):
        list(read_records(tmp_path))


def test_a_folder_changes_its_digest_with_its_captions_and_files(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(png(10))
    (tmp_path / "cat.txt").write_text("a cat")
    seen = {open_source(tmp_path).digest()}
    (tmp_path / "cat.txt").write_text("a dog")
    seen.add(open_source(tmp_path).digest())
    (tmp_path / "dog.png").write_bytes(png(20))
    seen.add(open_source(tmp_path).digest())
    assert len(seen) == 3


# ---- tars ----


def tar_members() -> Iterator[tuple[str, bytes]]:
    for number in range(4):
        yield f"./a.b/{number:03d}.png", png(10 * number)
        yield f"./a.b/{number:03d}.TXT", f"picture {number}".encode()
        yield f"./a.b/{number:03d}.json", b'{"style": "3d"}'


def test_tars_are_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    members = list(tar_members())
    write_tar(tmp_path / "set-0.tar", members[:6])
    write_tar(tmp_path / "set-1.tar", members[6:])
    urls = [f"file:{tmp_path}/set-{number}.tar" for number in (0, 1)]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    ours = list(read_records(tmp_path / "set-*.tar"))
    assert len(ours) == len(theirs) == 4
    for own, their in zip(ours, theirs, strict=True):
        assert own["image"].data == their["png"] and own["text"] == their["txt"].decode()
        assert own["style"] == json.loads(their["json"])["style"]
    assert list(read_records(tmp_path)) == ours
    assert shades(tmp_path) == [(f"picture {number}", 10 * number) for number in range(4)]


def test_a_compressed_tar(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "set.tar", list(tar_members()))
    packed = write_tar(tmp_path / "set.tar.gz", list(tar_members()))
    assert shades(plain) == shades(packed)


def test_a_conversation_in_a_tar_names_members_of_its_sample(tmp_path: Path) -> None:
    parts = [{"type": "image", "image": name} for name in ("x.one.png", "two.png")]
    talk = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "two"}]}
    members = [("x.one.png", png(10)), ("x.two.png", png(20)), ("x.json", json.dumps(talk).encode())]
    (record,) = read_records(write_tar(tmp_path / "set.tar", members))
    media = [open_media(value, Image, tmp_path) for _, value, _ in media_parts(record, {"image": Image})]
    assert media == [picture(10), picture(20)]


def test_damaged_tars(tmp_path: Path) -> None:
    for name in ("set.tar", "set.tar.gz"):
        path = write_tar(tmp_path / name, list(tar_members()))
        data = path.read_bytes()
        for cut in (0, 100, 600, 1500, 2048, len(data) // 2) if name == "set.tar" else (100, len(data) // 2):
            path.write_bytes(data[:cut])
            with pytest.raises(RecordError, match=r"set\.tar.* cannot be read completely"):
                list(read_records(path))
    twice = write_tar(tmp_path / "twice.tar", [("a.png", png(1)), ("a.png", png(2))])
    with pytest.raises(RecordError, match=r"a in twice\.tar: two members with the same name"):
        list(read_records(twice))


# ---- datasets ----


@pytest.fixture
def dataset() -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows = [
        {"text": f"picture {number}", "image": {"bytes": png(10 * number), "path": None}}
        for number in range(4)
    ]
    return datasets.Dataset.from_list(rows, features=features)


EXPECTED = [(f"picture {number}", 10 * number) for number in range(4)]


def test_datasets_in_memory_streamed_and_by_split(dataset: Any) -> None:
    import datasets

    assert shades(dataset) == EXPECTED and open_source(dataset).length == 4
    assert shades(dataset.to_iterable_dataset()) == EXPECTED
    splits = datasets.DatasetDict({"train": dataset, "test": dataset.select([3])})
    assert [record["split"] for record in read_records(splits)] == ["train"] * 4 + ["test"]
    assert open_source(dataset).digest() != open_source(dataset.select([3])).digest()


def test_parquet_and_saved_folders(dataset: Any, tmp_path: Path) -> None:
    for number in (0, 1):
        dataset.select([2 * number, 2 * number + 1]).to_parquet(tmp_path / f"set-{number}.parquet")
    assert shades(tmp_path / "set-*.parquet") == shades(tmp_path) == EXPECTED
    assert {record["split"] for record in read_records(tmp_path)} == {"train"}
    dataset.save_to_disk(tmp_path / "saved")
    assert shades(tmp_path / "saved") == EXPECTED
    (tmp_path / "set-0.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(RecordError, match="parquet"):
        list(read_records(tmp_path / "set-*.parquet"))


def test_a_stream_without_features(dataset: Any) -> None:
    import datasets

    rows = [{"text": "a", "image": {"bytes": png(10), "path": None}}]
    assert shades(datasets.IterableDataset.from_generator(lambda: iter(rows))) == [("a", 10)]


def test_media_that_a_stream_only_points_at_are_fetched(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.png").write_bytes(png(10))
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe("/a.png", png(10))
    urls = ["memory://a.png", "memory://none.png", f"file://{tmp_path}/a.png", "zip://x::/etc/passwd"]
    rows = [{"text": "a", "image": {"bytes": None, "path": url}} for url in urls]
    opened = open_source(datasets.IterableDataset.from_generator(lambda: iter(rows)))
    (_, first), (_, second), *local = opened.entries()
    assert open_media(opened.parse(first)["image"], Image, tmp_path) == picture(10)
    with pytest.raises(RecordError, match=r"none\.png cannot be fetched"):
        opened.parse(second)
    for _, entry in local:
        with pytest.raises(RecordError, match="is on this machine"):
            opened.parse(entry)


def test_without_datasets_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecordError, match=r"anytoken\[data\]"):
        open_source(tmp_path / "set.parquet")


def test_columns_of_bytes_and_of_paths(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    (tmp_path / "b.png").write_bytes(png(20))
    pandas.DataFrame({"text": ["a"], "image": [png(10)]}).to_parquet(tmp_path / "bytes.parquet")
    pandas.DataFrame({"text": ["b"], "image": ["b.png"]}).to_parquet(tmp_path / "paths.parquet")
    assert shades(tmp_path / "bytes.parquet") == [("a", 10)]
    assert shades(tmp_path / "paths.parquet") == [("b", 20)]


def test_conversations_in_a_dataset_lose_what_arrow_fills_them_up_with() -> None:
    datasets = pytest.importorskip("datasets")
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    answer = [{"type": "text", "text": "a cat"}]
    row = {
        "images": [{"bytes": png(10), "path": "x.png"}],
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
    }
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                }
            ],
        }
    )
    (record,) = read_records(datasets.Dataset.from_list([row], features=features))
    user, assistant = record["messages"]
    assert user["content"] == [{"type": "image", "image": Blob("x.png", png(10))}, content[1]]
    assert assistant["content"] == answer
