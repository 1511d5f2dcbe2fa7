"""Shards: the codes of every file, once, whatever the number of workers; tied to their tokenizers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anytoken.data.records import RecordError
from anytoken.data.shards import ShardError, Shards, load_tokenizers, tokenize_records
from anytoken.segments import Image
from anytoken.tokenizers.image import ImageTokenizer


def tiny_tokenizer(seed: int = 0) -> ImageTokenizer:
    torch.manual_seed(seed)
    return ImageTokenizer(
        width=16, encoder_depth=1, decoder_depth=1, refine_width=8, refine_depth=1, side_px=16
    ).eval()


@pytest.fixture
def records(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines: list[dict[str, object]] = []
    for index in range(7):
        Image(rng.integers(0, 255, (16, 16 if index % 2 else 32, 3), dtype=np.uint8)).save(
            tmp_path / f"{index}.png"
        )
        lines.append({"text": f"picture {index}", "image": f"{index}.png", "style": "3d"})
    lines.append({"text": "no picture"})
    parts = [
        {"type": "image", "image": "3.png"},
        {"type": "text", "text": "and"},
        {"type": "image", "image": "4.png"},
    ]
    lines.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "two"}]})
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "set.jsonl"


def tokenize(records: Path, out: Path, tokenizer: ImageTokenizer, **options: int) -> Path:
    return tokenize_records(
        records, {"image": tokenizer}, out, part_size=4, batch_size=2, progress=False, **options
    )


def test_codes_are_those_of_the_tokenizer(records: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    shards = Shards(tokenize(records, tmp_path / "out", tokenizer), {"image": tokenizer})
    assert len(shards) == 9 and shards.records[2]["style"] == "3d"
    for index in range(7):
        assert shards.codes(index, "image") == tokenizer.encode(Image.open(records.parent / f"{index}.png"))
    assert not shards.has(7, "image")
    parts = shards.records[8]["messages"][0]["content"]
    assert shards.codes(8, "image", parts[0]["row"]) == shards.codes(3, "image")
    assert shards.codes(8, "image", parts[2]["row"]) == shards.codes(4, "image")


def test_workers_and_interruptions_change_nothing(records: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    alone = tokenize(records, tmp_path / "alone", tokenizer)
    together = tokenize(records, tmp_path / "together", tokenizer, workers=2)
    killed = tokenize(records, tmp_path / "killed", tokenizer)
    (killed / "part-00001.safetensors").unlink()
    first = (killed / "part-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(ShardError, match="unfinished"):
        Shards(killed, {"image": tokenizer})
    tokenize(records, killed, tokenizer)
    assert (killed / "part-00000.safetensors").stat().st_mtime_ns == first
    for folder in (together, killed):
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in alone.iterdir())
        assert all((folder / path.name).read_bytes() == path.read_bytes() for path in alone.iterdir())


def test_another_tokenizer_is_refused_and_starts_anew(records: Path, tmp_path: Path) -> None:
    old, new = tiny_tokenizer(0), tiny_tokenizer(1)
    out = tokenize(records, tmp_path / "out", old)
    with pytest.raises(ShardError, match="another image tokenizer"):
        Shards(out, {"image": new})
    tokenize(records, out, new)
    assert len(Shards(out, {"image": new})) == 9


def test_what_cannot_be_tokenized_is_named(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"text": "a", "image": "missing.png"}\n')
    with pytest.raises(RecordError, match=r"missing\.png"):
        tokenize(tmp_path / "set.jsonl", tmp_path / "out", tiny_tokenizer())
    assert not list((tmp_path / "out").glob("*.safetensors"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RecordError, match="no record"):
        tokenize(tmp_path / "empty.jsonl", tmp_path / "out", tiny_tokenizer())
    with pytest.raises(ShardError, match="no shard folder"):
        Shards(tmp_path / "nowhere", {})


def test_load_tokenizers_takes_all_but_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "image")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text("{}")
    found = load_tokenizers(tmp_path)
    assert list(found) == ["image"] and found["image"].fingerprint() == tokenizer.fingerprint()
    with pytest.raises(ShardError, match="no tokenizer"):
        load_tokenizers(tmp_path / "none")
