"""A second opinion on speech with an open vocabulary: Whisper (arXiv 2212.04356) through faster-whisper.

The judge with a closed grammar (`anytoken.evaluation.keyword_asr`) chooses the nearest name of a list; Whisper writes
down whatever it hears. It spells isolated synthetic words badly, so its score is read next to that on the originals.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from anytoken.evaluation.keyword_asr import RATE_HZ
from anytoken.segments import Speech
from anytoken.utils.errors import EvaluationError


class Transcriber:
    """Writes down what a clip says, in English: greedy decoding, the same text every time."""

    def __init__(self, model: str | Path, threads: int = 1) -> None:
        """model: a size such as "base", a hub id, or a CTranslate2 folder. EvaluationError if it cannot be loaded."""
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise EvaluationError("--asr needs faster-whisper: pip install 'anytoken[eval]'.") from error
        local = Path(model).is_dir()
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        try:
            self._model: Any = WhisperModel(
                str(model), device="cpu", compute_type="int8", cpu_threads=threads,
                local_files_only=local or offline,
            )  # fmt: skip
        except (ValueError, OSError, RuntimeError) as error:
            raise EvaluationError(
                f"--asr {model} cannot be loaded ({str(error).splitlines()[0]:.200}); give a Whisper for CTranslate2: "
                "a size such as base, a hub id, or a folder with model.bin, config.json and tokenizer.json."
            ) from error

    def transcribe(self, clip: Speech) -> str:
        """The words of a clip; empty if nothing is recognized."""
        samples = clip.resample(RATE_HZ).samples
        segments, _ = self._model.transcribe(
            samples, language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False,
            without_timestamps=True,
        )  # fmt: skip
        return " ".join(one.text.strip() for one in segments)
