"""Judges: right on what is real, unimpressed by silence, noise and grey, and honest about what they lack."""

from pathlib import Path

import numpy as np
import pytest

from anytoken.data.sources import read_records
from anytoken.emoji_world import judges
from anytoken.evaluation import keyword_asr
from anytoken.segments import DNA, Image, Speech, Video
from anytoken.utils.errors import EvaluationError

ASSETS = Path(__file__).parents[1] / "assets"


def test_real_speech_is_heard_and_silence_and_noise_are_not():
    records = list(read_records(ASSETS / "speech.jsonl"))
    judge = keyword_asr.KeywordRecognizer(sorted({record["name"] for record in records}))
    known = [record for record in records if judge.knows(record["name"])]
    heard = [judge.transcribe(Speech.open(ASSETS / record["speech"])) == record["name"] for record in known]
    assert len(heard) >= 8 and np.mean(heard) >= 0.8
    noise = np.random.default_rng(0).normal(size=16_000).astype(np.float32) * 0.1
    for samples in (np.zeros(16_000, np.float32), noise, np.zeros(1, np.float32)):
        assert judge.transcribe(Speech(samples, 16_000)) is None


def test_names_outside_the_dictionary_are_said_to_be_unknown():
    judge = keyword_asr.KeywordRecognizer(["red apple", "qwrtzpf"])
    assert judge.knows("red apple") and not judge.knows("qwrtzpf")
    with pytest.raises(EvaluationError, match="None of the 1 names"):
        keyword_asr.KeywordRecognizer(["qwrtzpf"])


def test_a_voice_is_told_by_its_spectrum():
    rng = np.random.default_rng(0)

    def clip(pitch):
        time = np.arange(8_000) / 16_000
        wave = sum(np.sin(2 * np.pi * pitch * n * time + rng.random() * 6) / n for n in range(1, 6))
        return Speech((0.2 * wave + 0.02 * rng.normal(size=8_000)).astype(np.float32), 16_000)

    judge = judges.SpeakerClassifier([clip(p) for p in (140, 145, 300, 310)], ["low", "low", "high", "high"])
    assert [judge.predict(clip(p)) for p in (142, 305)] == ["low", "high"]
    with pytest.raises(EvaluationError, match="two voices"):
        judges.SpeakerClassifier([clip(140)], ["low"])


def test_a_shape_is_named_in_a_style_never_seen(world):
    judge = world.concepts("3d")
    pictures = [one for one in world.records("emoji/images.jsonl") if one["style"] == "3d"]
    right = [judge.predict(Image(world.pixels(one))) == one["name"] for one in pictures]
    assert np.mean(right) >= 0.8
    shuffled = [
        judge.predict(Image(world.pixels(one))) == other["name"]
        for one, other in zip(pictures, pictures[3:], strict=False)
    ]
    assert np.mean(shuffled) < 0.5


def test_training_a_judge_is_deterministic_and_leaves_the_global_seed_alone():
    import torch

    pictures = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, other = (judges.fit_classifier(pictures, list("abab"), 3, width=8) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_background_and_motion(world):
    for record in world.records("emoji/images.jsonl"):
        assert world.backgrounds.predict(Image(world.pixels(record))) == record["background"]
    still = Video(np.full((4, 64, 64, 3), 9, np.uint8), 4.0)
    moving = Video(np.stack([still.frames[0], still.frames[0] + 90]), 4.0)
    assert judges.motion(still) == 0 and judges.motion(moving) == pytest.approx(90 / 255)


def test_judges_refuse_what_they_cannot_see():
    with pytest.raises(EvaluationError, match="received DNA"):
        judges.pixels_of(DNA("ACGT"))
    with pytest.raises(EvaluationError, match="received none"):
        judges.fit_classifier(np.zeros((0, 64, 64, 3), np.uint8), [])
