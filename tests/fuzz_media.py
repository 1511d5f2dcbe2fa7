"""Damaged files for every opener and for `data check`: each is opened or refused with a ValueError, and nothing else.

    python tests/fuzz_media.py --count 300 --seed 0

Prints a line of JSON with what became of the files. Ends with an error, and the file kept in --keep, at the first that
raises anything else, takes more than a gigabyte, or more than --seconds of CPU time. A test runs it in a process of its
own, which libraries in C may end.
"""

import argparse
import collections
import gzip
import io
import json
import logging
import resource
import signal
import sys
import tarfile
import tempfile
import time
import warnings
from pathlib import Path
from types import FrameType

import numpy as np
from PIL import Image as Picture

from anytoken.data.validate import Census, check_source
from anytoken.segments import DNA, KINDS, Image, SegmentError, Speech, Text, Video, open_segment

GIB = 1 << 30
WORDS = (b"", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\xff\xff", b"\xed\xa0\x80")


def originals(folder: Path) -> list[Path]:
    """A small file of every format that is opened."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 40, 3), np.uint8)
    picture, clip = Image(pixels), Video(np.stack([np.roll(pixels, 3 * n, 1) for n in range(4)]))
    tone, gene = Speech(0.5 * np.sin(np.arange(3_000) / 7)), DNA("ACGTN" * 60, "gene 1")
    made = [picture.save(folder / f"a{one}") for one in (".png", ".jpg", ".webp", ".bmp")]
    made += [tone.save(folder / f"b{one}") for one in (".wav", ".flac", ".ogg", ".mp3")]
    made += [clip.save(folder / f"c{one}") for one in (".mp4", ".webm", ".gif", ".webp")]
    made += [
        gene.save(folder / "d.fa"),
        gene.save(folder / "d.fa.gz"),
        Text("héllo\n" * 20).save(folder / "e.txt"),
    ]
    for name, mode in [("p.png", "P"), ("l.png", "LA"), ("f.tif", "F"), ("c.jpg", "CMYK")]:
        picture.to_pil().convert("RGBA" if mode == "LA" else "L").convert(mode).save(folder / name)
        made.append(folder / name)
    Picture.fromarray(rng.integers(0, 65_536, (9, 9), np.uint16)).save(folder / "g.png")
    return [*made, folder / "g.png", *sources(folder, made)]


def sources(folder: Path, media: list[Path]) -> list[Path]:
    """Small sets of every form that `data check` reads without `datasets`; their media are in them."""
    messages = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "é?"}]},
                {"role": "assistant", "content": "a cat"}]  # fmt: skip
    records = [
        {"text": "a cat", "image": "a.png", "speech": "b.wav"}, {"messages": messages}, {"text": "b", "dna": "ACGT"},
        {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}],
         "images": ["a.png"]},
        {"instruction": "say", "output": "hi"},
    ]  # fmt: skip
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    found = {
        "s.jsonl": lines, "s.jsonl.gz": gzip.compress(lines), "s.json": json.dumps(records).encode(),
        "s.csv": b'text,image\n"a, cat",a.png\nb,a.png\n', "s.tsv": b"text\tdna\na\tACGT\n",
    }  # fmt: skip
    for name, mode in (("s.tar", "w"), ("s.tar.gz", "w:gz")):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
            for path in media[:3]:
                tar.add(path, f"one/{path.stem}.{path.suffix[1:]}")
            entry = tarfile.TarInfo("one/a.txt")
            entry.size = 5
            tar.addfile(entry, io.BytesIO(b"a cat"))
        found[name] = buffer.getvalue()
    for name, data in found.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in found]


def mutated(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A file with one to four kinds of damage, half of them near its beginning, where formats say their sizes."""
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(0, max(1, len(data) if rng.random() < 0.5 else min(len(data), 100))))
        length = int(rng.integers(1, 33))
        kind = rng.integers(0, 7)
        if kind == 0:
            changed = bytearray(data)
            for at in rng.integers(0, max(1, len(data)), length):
                changed[at : at + 1] = bytes([int(rng.integers(0, 256))])
            data = bytes(changed)
        elif kind == 1:
            word = WORDS[rng.integers(0, len(WORDS))]
            data = data[:place] + word + data[place + len(word) :]
        elif kind == 2:
            data = data[:place]
        elif kind == 3:
            data = data[:place] + data[place + length :]
        elif kind == 4:
            data = (
                data[:place]
                + data[place : place + length] * int(rng.integers(2, 20))
                + data[place + length :]
            )
        elif kind == 5:
            data = data[:place] + other[place:]
        elif place < len(data):
            data = data[:place] + bytes([data[place] ^ (1 << int(rng.integers(0, 8)))]) + data[place + 1 :]
    return data


def try_file(path: Path, source: bool, rng: np.random.Generator) -> str:
    """What becomes of a file: opened, refused, or records that are good or bad."""
    try:
        if source:
            census = Census()
            bad = sum(1 for _ in check_source(path, census, decode=True))
            return "checked with faults" if bad else "checked"
        kind = list(KINDS)[rng.integers(0, len(KINDS))] if rng.random() < 0.2 else None
        (KINDS[kind].open if kind else open_segment)(path)
        return "opened"
    except SegmentError:
        return "refused"
    except ValueError:
        return "source refused" if source else "wrong error"


def too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("too much CPU time")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-failure")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGPROF, too_long)
    outcomes: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = originals(folder)
        contents = {path: path.read_bytes() for path in files}
        for path in files:  # all libraries are loaded now, and no original is refused
            outcome = try_file(path, path.name.startswith("s."), np.random.default_rng(1))
            assert outcome != "source refused", path
        before = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (before + GIB, before + GIB))
        for number in range(given.count):
            rng = np.random.default_rng((given.seed, number))
            path = files[number % len(files)]
            data = mutated(contents[path], contents[files[rng.integers(0, len(files))]], rng)
            damaged = folder / f"x{''.join(path.suffixes)}"
            damaged.write_bytes(data)
            given.keep.mkdir(parents=True, exist_ok=True)
            kept = given.keep / f"{given.seed}-{number}{''.join(path.suffixes)}"
            kept.write_bytes(data)
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, given.seconds)
            outcomes[try_file(damaged, path.name.startswith("s."), rng)] += 1
            signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - start)
            if outcomes["wrong error"]:
                sys.exit(f"{kept}: a ValueError that is no SegmentError")
            kept.unlink()
            damaged.unlink(missing_ok=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {"files": given.count, **outcomes, "slowest_s": round(slowest, 2), "peak_rss_mb": round(peak)}
        )
    )


if __name__ == "__main__":
    main()
