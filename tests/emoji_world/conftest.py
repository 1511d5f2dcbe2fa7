"""A toy world in the layout of the built sets, and models that answer from it: one knows all, one knows nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from anytoken.emoji_world.tasks import EvalDatasets
from anytoken.segments import DNA, Image, Speech, Text, Video

SHAPES = ("disc", "bar", "cross")
STYLES = ("3d", "line", "flat")
COLOURS = {"blue": (30, 60, 220), "white": (250, 250, 250), "green": (20, 170, 60)}
PAIRS = {("bar", "green"), ("cross", "white")}
VOICES = {"low": 140.0, "high": 330.0}


def draw(shape, style, background, turn=0):
    rows, columns = np.mgrid[:64, :64] - 31.5
    columns = columns - turn
    inside = {
        "disc": rows**2 + columns**2 < 400,
        "bar": (abs(rows) < 8) & (abs(columns) < 26),
        "cross": ((abs(rows) < 6) | (abs(columns) < 6)) & (abs(rows) < 24) & (abs(columns) < 24),
    }[shape]
    pixels = np.empty((64, 64, 3), np.uint8)
    pixels[:] = COLOURS[background]
    ink = {"3d": (220, 140, 60), "line": (10, 10, 10), "flat": (230, 60, 160)}[style]
    if style == "line":
        core = np.roll(inside, 3, 0) & np.roll(inside, -3, 0) & np.roll(inside, 3, 1) & np.roll(inside, -3, 1)
        inside = inside & ~core
    pixels[inside] = ink
    return pixels


def say(voice, seconds=0.4):
    time = np.arange(int(16_000 * seconds)) / 16_000
    wave = sum(np.sin(2 * np.pi * VOICES[voice] * n * time) / n for n in range(1, 6))
    return (0.2 * wave + 0.01 * np.random.default_rng(len(voice)).normal(size=len(time))).astype(np.float32)


def write(folder, name, records):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    emoji, speech = root / "emoji", root / "speech"
    for folder in (emoji / "images", emoji / "videos", speech / "audio"):
        folder.mkdir(parents=True)
    images, videos, joint = [], [], []
    for shape in SHAPES:
        for background in COLOURS:
            common = {"name": shape, "hexcode": shape, "background": background}
            for style in STYLES:
                held = (
                    "style"
                    if (shape, style) == ("disc", "3d")
                    else "pair"
                    if (shape, background) in PAIRS
                    else None
                )
                path = f"images/{shape}-{style}-{background}.png"
                Image(draw(shape, style, background)).save(emoji / path)
                split = {"split": "test" if held else "train", "holdout": held}
                text = f"a {shape}, {style}, {background} background"
                images.append({"text": text, "image": path, "style": style, **common, **split})
            frames = np.stack([draw(shape, "3d", background, turn) for turn in (-9, -3, 3, 9)])
            path = f"videos/{shape}-{background}.webp"
            Video(frames, 4.0).save(emoji / path)
            split = {"split": "test" if (shape, background) in PAIRS else "train"}
            text = f"a {shape}, animated, {background} background"
            videos.append({"text": text, "video": path, **common, **split})
            joint.append({"image": f"images/{shape}-3d-{background}.png", "video": path, **common, **split})
    write(emoji, "images.jsonl", images)
    write(emoji, "videos.jsonl", videos)
    write(emoji, "joint.jsonl", joint)
    spoken = []
    for shape in SHAPES:
        for voice in VOICES:
            path = f"audio/{shape}-{voice}.wav"
            Speech(say(voice), 16_000).save(speech / path)
            held = (shape, voice) == ("bar", "high")
            split = {"split": "test" if held else "train", "holdout": "spoken" if held else None}
            spoken.append(
                {"text": shape, "name": shape, "speech": path, "voice": voice, "core": True, **split}
            )
    write(speech, "speech.jsonl", spoken)
    (root / "words").mkdir()
    words = []
    for seconds, (text, split) in enumerate((("table", "train"), ("river", "test"), ("garden", "test")), 1):
        Speech(say("low", 0.3 * seconds), 16_000).save(root / "words" / f"{text}.wav")
        held = {"split": split, "holdout": "word" if split == "test" else None}
        words.append({"text": text, "name": text, "speech": f"{text}.wav", "voice": "low", **held})
    write(root / "words", "words.jsonl", words)
    proteins = {"train": ("MKLAA", "MWWGG", "MKKLA"), "test": ("MKLAG", "MWGGG", "MVVAA")}
    located = [
        {"product": f"{kind} {split}", "dna": "ATG" * 4, "protein": protein, "short": True, "split": split}
        for split, found in proteins.items()
        for protein, kind in zip(found, ("kinase", "transporter", "ligase"), strict=True)
    ]
    write(root / "dna", "genes.jsonl", located)
    genes = [("M K L", "ATGAAACTG"), ("M A W", "ATGGCCTGG"), ("M K W", "ATGAAATGG"), ("M V L", "ATGGTTCTG")]
    lines = [{"text": t, "dna": d, "split": "test" if n > 2 else "train"} for n, (t, d) in enumerate(genes)]
    write(root / "dna", "translate.jsonl", lines)
    return root


@pytest.fixture(scope="session")
def world(sets):
    return EvalDatasets(sets, judge_steps=45)


class FakeModel:
    """Answers each prompt by a function of it; a reply's one id stands for its segments.

    single: the function that answers if the best of one reply is asked for, by default the same.
    """

    kinds = ("text", "image", "speech", "video", "dna")
    token_space = SimpleNamespace(end=-1)

    def __init__(self, function, folder="nowhere", single=None):
        self.function, self.single = function, single or function
        self.best_of = {}
        config = SimpleNamespace(_name_or_path=str(folder))
        self.lm = SimpleNamespace(config=config, num_parameters=lambda: 7)
        self.memory = []

    def _reply(self, prompt, output, best_of=None):
        self.memory.append((self.single if best_of == 1 else self.function)(prompt, output))
        usage = SimpleNamespace(new_tokens=3)
        return SimpleNamespace(
            segments=self.memory[-1],
            steps=[],
            ids=[len(self.memory) - 1, -1],
            finish_reason="stop",
            usage=usage,
        )

    def generate(self, prompt, output, batch=False, seed=None, best_of=None):
        found = [self._reply(one, output, best_of) for one in (prompt if batch else [prompt])]
        return found if batch else found[0]

    def detokenize(self, ids):
        [place] = ids
        return self.memory[place]


@pytest.fixture
def fake_model():
    return FakeModel


@pytest.fixture
def anything():
    """A segment of a kind that is never a right answer."""
    return {
        "text": Text("nothing"),
        "image": Image(np.full((64, 64, 3), 128, np.uint8)),
        "speech": Speech(np.zeros(8_000, np.float32), 16_000),
        "video": Video(np.full((4, 64, 64, 3), 128, np.uint8), 4.0),
        "dna": DNA("CCC"),
    }.__getitem__


@pytest.fixture
def ignorant(fake_model, anything):
    return fake_model(lambda prompt, output: [anything(output)])
