"""Keyword recognition: pocketsphinx with a grammar of a closed list of names.

It scores reconstructed and generated speech; its score on the originals is the ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anytoken.segments import Speech
from anytoken.utils.errors import EvaluationError

RATE_HZ = 16_000


class KeywordRecognizer:
    """Recognizes which name of a closed list is spoken in a clip."""

    def __init__(self, names: Sequence[str]) -> None:
        try:
            from pocketsphinx import Decoder
        except ImportError as error:
            raise EvaluationError(
                "Judging speech needs pocketsphinx: pip install 'anytoken[eval]'."
            ) from error
        self._decoder = Decoder(lm=None, loglevel="FATAL")
        words = {name: name.lower().replace("-", " ") for name in names}
        self.names = {
            said: name for name, said in words.items() if all(map(self._decoder.lookup_word, said.split()))
        }
        if not self.names:
            raise EvaluationError(f"None of the {len(names)} names is made of words the recogniser knows.")
        rule = "#JSGF V1.0; grammar names; public <name> = " + " | ".join(self.names) + ";"
        self._decoder.add_jsgf_string("names", rule)
        self._decoder.activate_search("names")

    def knows(self, name: str) -> bool:
        """Whether all words of a name are in the recognizer's dictionary; other names cannot be judged."""
        return name in self.names.values()

    def transcribe(self, clip: Speech) -> str | None:
        """The recognized name, or None."""
        samples = clip.resample(RATE_HZ).samples
        if not len(samples):
            return None
        self._decoder.start_utt()
        self._decoder.process_raw((np.clip(samples, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return self.names.get(found.hypstr) if found else None
