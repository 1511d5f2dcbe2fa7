"""The second opinion on speech: how it is asked for, what counts as the same words, and Whisper itself where it is."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from anytoken.emoji_world import report
from anytoken.emoji_world.tasks import EvalDatasets
from anytoken.evaluation.metrics import same_words
from anytoken.evaluation.transcriber import Transcriber
from anytoken.segments import Speech
from anytoken.utils.errors import EvaluationError

WHISPER = os.environ.get("ANYTOKEN_WHISPER", "")  # a folder of Whisper for CTranslate2


@pytest.mark.parametrize(
    ("heard", "name", "same"),
    [
        (" Red Apple.", "red apple", True),
        ("T-Rex!", "t-rex", True),
        ("a red apple", "red apple", False),
        ("", "x", False),
    ],
)
def test_punctuation_and_case_do_not_count(heard: str, name: str, same: bool) -> None:
    assert same_words(heard, name) == same


def test_words_are_given_as_a_share_of_those_of_the_originals(sets: Path, fake_model) -> None:
    """The ear knows a low voice only: half of the originals, and none of what a silent model says."""

    def transcribe(clip: Speech) -> str:
        return "bar." if len(clip.samples) and np.abs(clip.samples).max() > 0.01 else ""

    world = EvalDatasets(sets, judge_steps=5, asr=SimpleNamespace(transcribe=transcribe))
    original = world.media("speech/speech.jsonl", world.records("speech/speech.jsonl")[0], "speech")
    model = fake_model(lambda prompt, output: [original])
    found = report.evaluate(model, world, ["text->speech"], count=4, progress=False)["directions"][
        "text->speech"
    ]
    assert found["parts"]["words, open vocabulary"] == 1.0
    assert found["share_of_ceiling"]["words, open vocabulary"] == 1.0
    silent = fake_model(lambda prompt, output: [Speech(np.zeros(9_000, np.float32), 16_000)])
    found = report.evaluate(silent, world, ["text->speech"], count=4, progress=False)["directions"][
        "text->speech"
    ]
    assert found["share_of_ceiling"]["words, open vocabulary"] == 0.0


def test_a_missing_package_or_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(EvaluationError, match=r"pip install 'anytoken\[eval\]'"):
        Transcriber("base")
    monkeypatch.undo()
    pytest.importorskip("faster_whisper")
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        Transcriber(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EvaluationError, match="--asr no-such-size cannot be loaded"):
        Transcriber("no-such-size")


@pytest.mark.skipif(not WHISPER, reason="ANYTOKEN_WHISPER names no folder of Whisper for CTranslate2")
def test_whisper_writes_down_real_speech() -> None:
    pytest.importorskip("faster_whisper")
    from anytoken.data.sources import read_records

    assets = Path(__file__).parents[1] / "assets"
    ear = Transcriber(WHISPER)
    records = list(read_records(assets / "speech.jsonl"))
    right = [same_words(ear.transcribe(Speech.open(assets / one["speech"])), one["name"]) for one in records]
    assert sum(right) >= 1
