"""Shards: the codes of every file, once, whatever the number of workers; tied to their tokenizers."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load_file

from anytoken.data import shard_worker, shards
from anytoken.data.shards import (
    Shards,
    load_tokenizers,
    tokenize_records,
)
from anytoken.segments import Image, Segment
from anytoken.tokenizers.base import Codes, TokenizerError
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.utils.errors import DataError, RecordError


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


def tokenize(records: Path, out: Path, tokenizer: ImageTokenizer, **options: Any) -> Path:
    return tokenize_records(
        records, {"image": tokenizer}, out, part_size=4, batch_size=2, progress=False, **options
    )


def test_codes_are_those_of_the_tokenizer(records: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    found = Shards(tokenize(records, tmp_path / "out", tokenizer), {"image": tokenizer})
    assert len(found) == 9 and found.records[2]["style"] == "3d"
    for index in range(7):
        assert found.codes(index, "image") == tokenizer.encode(Image.open(records.parent / f"{index}.png"))
    assert not found.has(7, "image")
    parts = found.records[8]["messages"][0]["content"]
    assert found.codes(8, "image", parts[0]["row"]) == found.codes(3, "image")
    assert found.codes(8, "image", parts[2]["row"]) == found.codes(4, "image")


def test_global_codes_are_kept(records: Path, tmp_path: Path) -> None:
    """Shards of a tokenizer without any have no array for them, as before."""
    plain = tiny_tokenizer()
    out = tokenize(records, tmp_path / "plain", plain)
    assert set(load_file(out / "part-00000.safetensors")) == {"image.values", "image.offsets", "image.sizes"}

    class Marked(ImageTokenizer):
        """The brightness of the first pixel is a global code."""

        def encode_batch(self, segments: Sequence[Segment]) -> list[Codes]:
            found = super().encode_batch(segments)
            headers = [[one.pixels[0, 0, 0], 7] for one in segments]  # type: ignore[attr-defined]
            return [replace(one, header=header) for one, header in zip(found, headers, strict=True)]

    marked = Marked(**plain.config).eval()
    found = Shards(tokenize(records, tmp_path / "out", marked), {"image": marked})
    for index in range(7):
        codes = marked.encode(Image.open(records.parent / f"{index}.png"))
        assert found.codes(index, "image") == codes and codes.header[1] == 7


def test_workers_and_interruptions_change_nothing(records: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    alone = tokenize(records, tmp_path / "alone", tokenizer)
    together = tokenize(records, tmp_path / "together", tokenizer, workers=2)
    killed = tokenize(records, tmp_path / "killed", tokenizer)
    (killed / "part-00001.safetensors").unlink()
    first = (killed / "part-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(DataError, match="unfinished"):
        Shards(killed, {"image": tokenizer})
    tokenize(records, killed, tokenizer)
    assert (killed / "part-00000.safetensors").stat().st_mtime_ns == first
    assert same_files(together, alone) and same_files(killed, alone)


def test_a_killed_run_loses_the_parts_in_progress_and_nothing_else(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    alone = tokenize(records, tmp_path / "alone", tokenizer)
    made: list[int] = []

    def dying(tokenizers: object, job: shard_worker.Job) -> object:
        if job.part == 2:
            raise KeyboardInterrupt
        made.append(job.part)
        return shard_worker.encode_part(tokenizers, job)  # type: ignore[arg-type]

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "encode_part", dying)
        with pytest.raises(KeyboardInterrupt):
            tokenize(records, killed, tokenizer)
    with (killed / "progress.jsonl").open("a") as journal:
        journal.write('{"part": 2, "re')  # torn by the kill
    (killed / ".part-00002.jsonl-x").write_text("half")
    with pytest.raises(DataError, match="unfinished"):
        Shards(killed, {"image": tokenizer})

    def counting(tokenizers: object, job: shard_worker.Job) -> object:
        made.append(job.part)
        return shard_worker.encode_part(tokenizers, job)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "encode_part", counting)
    tokenize(records, killed, tokenizer)
    assert made == [0, 1, 2]
    assert same_files(killed, alone)
    tokenize(records, killed, tokenizer)
    assert made == [0, 1, 2]


def same_files(one: Path, other: Path) -> bool:
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    return files[0] == files[1]


KILLED = """
import sys, torch
from anytoken.data.shards import tokenize_records
from anytoken.tokenizers.base import load_tokenizer
if __name__ == "__main__":
    tokenizers = {"image": load_tokenizer(sys.argv[1])}
    options = {"workers": 2, "part_size": 4, "batch_size": 2, "progress": False, "engine": sys.argv[4]}
    tokenize_records(sys.argv[2], tokenizers, sys.argv[3], **options)
"""


RAY_AGENTS = (
    "ray::RuntimeEnv",
    "ray::Dashboard",
)  # they look for their head once a minute, and end without it


def journalled(out: Path) -> dict[str, int]:
    """When each file of the parts that a journal holds was written."""
    lines = (out / "progress.jsonl").read_text().splitlines(keepends=True)
    parts = [json.loads(line) for line in lines[1:] if line.endswith("\n")]
    return {name: (out / name).stat().st_mtime_ns for part in parts for name in part["files"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_kill_9_at_any_moment_does_no_work_twice_and_leaves_no_process(
    records: Path, tmp_path: Path, engine: str
) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    line = records.read_text().splitlines()[0]
    records.write_text("".join(f"{line}\n" for _ in range(800)))
    tokenizer = tiny_tokenizer()
    saved = tokenizer.save_pretrained(tmp_path / "image")
    alone = tokenize(records, tmp_path / "alone", tokenizer)
    out, script = tmp_path / "out", tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(saved), str(records), str(out), engine]
    found = os.environ | {"PYTHONPATH": str(Path(shards.__file__).parents[2])}
    moments, done, agents = random.Random(), {}, []
    for parts in (1, 40, 80, 120) if engine == "local" else (1, 80):  # starting Ray takes long
        with subprocess.Popen(command, env=found) as running:
            while len(list(out.glob("part-*.safetensors"))) < parts and running.poll() is None:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.02))
            workers = psutil.Process(running.pid).children(recursive=True) if running.poll() is None else []
            running.kill()
        assert running.returncode == -signal.SIGKILL
        left = psutil.wait_procs(workers, timeout=20)[1]
        assert all(engine == "ray" and one.name().startswith(RAY_AGENTS) for one in left)
        agents += left
        now = journalled(out)
        assert len(now) > len(done) and done.items() <= now.items()
        done = now
    subprocess.run(command, env=found, check=True)
    assert same_files(out, alone)
    assert all((out / name).stat().st_mtime_ns == written for name, written in done.items())
    assert psutil.wait_procs(agents, timeout=120)[1] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_gives_the_same_bytes(records: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    tokenizer = tiny_tokenizer()
    alone = tokenize(records, tmp_path / "alone", tokenizer)
    try:
        spread = tokenize(records, tmp_path / "spread", tokenizer, workers=2, engine="ray")
        assert ray.cluster_resources()["CPU"] == 2
    finally:
        ray.shutdown()
    assert same_files(spread, alone)


def test_an_engine_that_is_not_there(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="choose from local, ray"):
        tokenize(records, tmp_path / "out", tiny_tokenizer(), engine="spark")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"anytoken\[ray\]"):
        tokenize(records, tmp_path / "out", tiny_tokenizer(), engine="ray")


def test_another_tokenizer_is_refused_and_replaces_shards_only_if_asked(
    records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = tiny_tokenizer(0), tiny_tokenizer(1)
    out = tokenize(records, tmp_path / "out", old)
    both = rf"another image tokenizer \(fingerprint {old.fingerprint()[:12]}.*{new.fingerprint()[:12]}"
    with pytest.raises(DataError, match=both):
        Shards(out, {"image": new})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DataError, match=r"shards of other records, settings or tokenizers.*--overwrite"):
        tokenize(records, out, new)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    tokenize(records, out, new, overwrite=True)
    assert "are replaced" in caplog.text
    assert len(Shards(out, {"image": new})) == 9


def test_a_file_that_changed_is_noticed_and_only_its_part_made_again(records: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    alone = tokenize(records, tmp_path / "alone", tokenizer)
    out = tokenize(records, tmp_path / "out", tokenizer)
    damaged = out / "part-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    Shards(out, {"image": tokenizer})  # of the same size: only its checksum tells
    with pytest.raises(DataError, match=r"part-00001\.safetensors does not match its checksum"):
        Shards(out, {"image": tokenizer}, verify=True)
    damaged.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"part-00001\.safetensors does not match its checksum"):
        Shards(out, {"image": tokenizer})
    first = (out / "part-00000.safetensors").stat().st_mtime_ns
    tokenize(records, out, tokenizer)
    assert (out / "part-00000.safetensors").stat().st_mtime_ns == first and same_files(out, alone)


def test_sets_of_version_1_open_and_are_kept(
    records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    out = tokenize(records, tmp_path / "out", tokenizer)
    new = json.loads((out / "manifest.json").read_text())
    old = {
        key: new[key] for key in ("source", "source_sha256", "tokenizers", "part_size", "parts", "records")
    }
    (out / "manifest.json").write_text(json.dumps(old | {"version": 1}))
    assert (
        tokenize(records, out, tokenizer) == out and len(Shards(out, {"image": tokenizer}, verify=True)) == 9
    )
    assert json.loads((out / "manifest.json").read_text())["version"] == 1
    del old["tokenizers"]
    (out / "manifest.json").write_text(json.dumps(old | {"version": 1}))
    Shards(out, {"image": tokenizer})
    assert "does not say which tokenizers made it" in caplog.text
    (out / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Shards(out, {"image": tokenizer})


class Picky(ImageTokenizer):
    """Refuses wide pictures, and with one all of its batch."""

    def encode_batch(self, segments: Sequence[Segment]) -> list[Codes]:
        if any(segment.width > 1000 for segment in segments if isinstance(segment, Image)):
            raise TokenizerError("too wide")
        return super().encode_batch(segments)


def test_bad_records_are_left_out_and_counted_up_to_a_share(records: Path, tmp_path: Path) -> None:
    tokenizer = Picky(**tiny_tokenizer().config).eval()
    Image(np.zeros((16, 2000, 3), dtype=np.uint8)).save(records.parent / "wide.png")
    lines = records.read_text().splitlines()
    lines[1:1] = ['{"image": "none.png"}', "{", '{"image": "wide.png"}', '{"image": "none.png"}']
    records.write_text("\n".join(lines))
    with pytest.raises(RecordError, match=r"3 of the 4 records read are bad, more than the share 0\.01"):
        tokenize(records, tmp_path / "out", tokenizer)
    out = tokenize(records, tmp_path / "out", tokenizer, max_bad=0.5)
    found = Shards(out, {"image": tokenizer})
    assert len(found) == 9 and found.records[1]["text"] == "picture 1"
    skipped = found.manifest["skipped"]
    assert {reason: count for reason, (count, _) in skipped.items()} == {
        "missing file": 2, "not JSON": 1, "refused image": 1,
    }  # fmt: skip
    assert skipped["missing file"][1].startswith("line 2: ") and "none.png" in skipped["missing file"][1]


def test_one_bad_record_of_a_small_set_does_not_end_the_run(records: Path, tmp_path: Path) -> None:
    records.write_text(records.read_text() + "{\n")
    assert len(Shards(tokenize(records, tmp_path / "out", tiny_tokenizer()), {})) == 9
    with pytest.raises(RecordError, match="more than the share 0"):
        tokenize(records, tmp_path / "strict", tiny_tokenizer(), max_bad=0.0)


def test_line_separators_in_a_text_do_not_split_a_record(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\u2029d", "e\u0085f"]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tokenize(tmp_path / "set.jsonl", tmp_path / "out", tiny_tokenizer())
    assert [record["text"] for record in Shards(out, {}).records] == texts


@pytest.mark.parametrize("name", ["metrics.jsonl", "manifest.json", "progress.jsonl", ".git/HEAD"])
def test_a_folder_that_holds_something_else_is_left_alone(records: Path, tmp_path: Path, name: str) -> None:
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text('{"parts": 1, "records": 1}\n')
    with pytest.raises(DataError, match="--overwrite"):
        tokenize(records, tmp_path / "out", tiny_tokenizer())
    assert foreign.read_text() == '{"parts": 1, "records": 1}\n'
    tokenize(records, tmp_path / "out", tiny_tokenizer(), overwrite=True)
    assert foreign.exists() == (name != "progress.jsonl")


def test_what_cannot_be_tokenized_is_named(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"text": "a", "image": "missing.png"}\n')
    with pytest.raises(RecordError, match=r"missing\.png"):
        tokenize(tmp_path / "set.jsonl", tmp_path / "out", tiny_tokenizer())
    assert not list((tmp_path / "out").glob("*.safetensors"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RecordError, match="no record"):
        tokenize(tmp_path / "empty.jsonl", tmp_path / "out", tiny_tokenizer())
    with pytest.raises(DataError, match="not a shard folder"):
        Shards(tmp_path / "nowhere", {})


def test_tars_and_folders_give_the_codes_of_their_files(records: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    folder = tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for index in range(7):
            (folder / f"{index}.png").write_bytes((records.parent / f"{index}.png").read_bytes())
            (folder / f"{index}.txt").write_text(f"picture {index}")
            for suffix in ("png", "txt"):
                tar.add(folder / f"{index}.{suffix}", f"{index}.{suffix}")
    lines = Shards(tokenize(records, tmp_path / "lines", tokenizer), {"image": tokenizer})
    for source in (folder, tmp_path / "set.tar"):
        found = Shards(tokenize(source, tmp_path / f"{source.name}-out", tokenizer), {"image": tokenizer})
        assert [record["text"] for record in found.records] == [f"picture {index}" for index in range(7)]
        assert all(found.codes(index, "image") == lines.codes(index, "image") for index in range(7))
    assert found.records[3]["image"] == "set.tar/3.png"


def test_load_tokenizers_takes_all_but_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "image")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text("{}")
    found = load_tokenizers(tmp_path)
    assert list(found) == ["image"] and found["image"].fingerprint() == tokenizer.fingerprint()
    with pytest.raises(DataError, match="no tokenizer"):
        load_tokenizers(tmp_path / "none")
