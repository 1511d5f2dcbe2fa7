"""A tiny `sets` folder in the layout of the built sets: colours for concepts, tones for voices, random genes."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from anytoken.segments import DNA, Speech

TRAINING_COLOR, HELD_OUT_COLOR = (250, 3, 190), (3, 200, 120)  # neither is a background
STYLES = ("flat", "3d")
TRAINING_NAMES = [f"training {n}" for n in range(6)]
HELD_OUT_NAMES = [f"unseen {n}" for n in range(4)]


def write_lines(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def write_pictures(folder: Path) -> None:
    """Opaque squares on transparent ground, in one colour for training concepts and one for held-out ones."""
    concepts = [(name, False) for name in TRAINING_NAMES] + [(name, True) for name in HELD_OUT_NAMES]
    drawn = [(name, held_out, style) for name, held_out in concepts for style in STYLES]
    sprites = np.zeros((len(drawn), 32, 32, 4), np.uint8)
    clips = np.zeros((len(concepts), 8, 32, 32, 4), np.uint8)
    for row, (_, held_out, _) in enumerate(drawn):
        sprites[row, 4:28, 4:28] = (*(HELD_OUT_COLOR if held_out else TRAINING_COLOR), 255)
    for row, (_, held_out) in enumerate(concepts):
        for frame in range(8):
            clips[row, frame, 4:28, frame : frame + 24] = (
                *(HELD_OUT_COLOR if held_out else TRAINING_COLOR),
                255,
            )
    folder.mkdir(parents=True)
    np.save(folder / "sprites.npy", sprites)
    np.save(folder / "animations.npy", clips)
    rows = [
        {"row": row, "name": name, "style": style, "tokenizer_held_out": held_out}
        for row, (name, held_out, style) in enumerate(drawn)
    ]
    write_lines(folder / "sprites.jsonl", rows)
    rows = [
        {"row": row, "name": name, "tokenizer_held_out": held_out}
        for row, (name, held_out) in enumerate(concepts)
    ]
    write_lines(folder / "animations.jsonl", rows)
    captions = [
        {"text": f"a {name}, {style}, red background", "split": "test" if held_out else "train"}
        for name, held_out, style in drawn
    ]
    write_lines(folder / "images.jsonl", captions)


def write_speech(folder: Path) -> None:
    """A second of a harmonic tone per clip, whose level rises and falls as that of syllables does."""
    lines, clips = [], []
    time = np.arange(16_000) / 16_000
    for voice, pitch_hz, holdout in (("slt", 120, None), ("awb", 90, "voice"), ("rms", 100, "voice")):
        for n in range(3):
            tone = sum(np.sin(2 * np.pi * k * (pitch_hz + 7 * n) * time) / k for k in range(1, 20))
            samples = (0.1 * tone * (1.1 + np.sin(2 * np.pi * (3 + n) * time))).astype(np.float32)
            path = f"audio/{voice}/{n}.flac"
            Speech(samples).save(folder / path)
            clips.append(samples)
            lines.append(
                {"text": f"name {n}", "speech": path, "voice": voice, "split": "test" if holdout else "train",
                 "holdout": holdout}
            )  # fmt: skip
    lines.append({**lines[0], "split": "test", "holdout": "spoken"})  # a voice that tokenizers do hear
    write_lines(folder / "speech.jsonl", lines)
    np.save(folder / "train_audio.npy", (np.concatenate(clips[:3]) * 32767).astype(np.int16))


def write_dna(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def draw(length: int) -> str:
        return "".join(rng.choice(list("ACGT"), length))

    genes = [
        {"dna": draw(30 + 7 * n), "product": f"product {n % 5}", "split": "test" if n % 5 == 4 else "train"}
        for n in range(20)
    ]
    too_long = {"dna": draw(1203), "product": "product 4", "split": "test"}
    write_lines(folder / "genes.jsonl", [*genes, too_long])
    proteins = [{"text": " ".join("MKLV"[: 1 + n % 4]), "split": ("train", "test")[n % 2]} for n in range(12)]
    write_lines(folder / "translate.jsonl", proteins)
    DNA(draw(5_000), "a genome").save(folder / "genome_test.fa.gz")


def write_manifests(folder: Path) -> None:
    for name in ("emoji", "speech", "dna"):
        source = {"name": f"{name}-package", "version": "1.2.3", "licence": "CC-BY-4.0", "sha256": "0"}
        (folder / name / "manifest.json").write_text(json.dumps({"sources": [source]}))


@pytest.fixture(scope="session")
def colors() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The colour of training concepts and that of held-out ones."""
    return TRAINING_COLOR, HELD_OUT_COLOR


@pytest.fixture(scope="session")
def sets(tmp_path_factory) -> Path:
    """The folder of all the sets; tests only read it."""
    import anytoken.emoji_world.test_sets  # noqa: F401 (registers them)

    folder = tmp_path_factory.mktemp("data") / "sets"
    write_pictures(folder / "emoji")
    write_speech(folder / "speech")
    write_dna(folder / "dna")
    write_manifests(folder)
    return folder


@pytest.fixture(scope="session")
def dna_folder(tmp_path_factory) -> Path:
    """A DNA tokenizer trained until it is lossless, in seconds."""
    from anytoken.training.tokenizer.trainer import train_tokenizer

    folder = tmp_path_factory.mktemp("dna")
    sizes = {"config": {"width": 64, "code_dim": 16}, "steps": 100, "batch_size": 310, "lr": 0.01}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"kind": "dna", "threads": 1, **sizes}))
    return train_tokenizer(folder / "recipe.yaml", folder, folder / "tokenizer")
