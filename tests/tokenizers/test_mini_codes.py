"""The bundled tokenizers give the codes that mini was trained on, bit for bit, and read them back as before.

A model and its codes must never be out of step, so this golden is not to be written anew while mini is the same:
`python tests/tokenizers/test_mini_codes.py` writes it, for another edition of mini.
"""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from anytoken.segments import Segment, open_segment
from anytoken.tokenizers.base import load_tokenizer

ROOT = Path(__file__).parents[2]
MINI, ASSETS = ROOT / "anytoken" / "pretrained" / "mini" / "tokenizers", ROOT / "tests" / "assets"
GOLDEN = ROOT / "tests" / "goldens" / "mini_codes.json"
FILES = {
    "image": ["images/1F300-3d-red.png", "images/sample.png", "images/2708-flat-blue.png"],
    "speech": ["audio/awb/1F41B-100.flac", "audio/rms/2708-100.flac"],
    "video": ["videos/1F407-yellow.webp", "videos/1F688-black.webp"],
    "dna": ["genes.fasta"],
}  # fmt: skip


def segments(kind: str) -> list[Segment]:
    """Real files of a kind; of the genes the first 600 bases of each."""
    from anytoken.segments import DNA

    if kind == "dna":
        return [DNA(gene.bases[:600]) for gene in DNA.open_all(ASSETS / "genes.fasta")]
    return [open_segment(ASSETS / name) for name in FILES[kind]]


def observed(kind: str) -> dict[str, object]:
    """Codes of the files, the tokenizer's fingerprint, and a digest of what the codes decode to."""
    tokenizer = load_tokenizer(MINI / kind)
    codes = [tokenizer.encode(segment) for segment in segments(kind)]
    return {
        "fingerprint": tokenizer.fingerprint(),
        "sizes": [list(one.size) for one in codes],
        "headers": [one.header.tolist() for one in codes],
        "codes": [one.values[:, 0].tolist() for one in codes],
        "decoded": [digest(tokenizer.decode(one)) for one in codes],
    }


def digest(segment: Segment) -> list[float] | str:
    """Mean and deviation of what is decoded (rounding differs between processors), or the bases' sha256."""
    for name in ("pixels", "samples", "frames"):
        if hasattr(segment, name):
            values = getattr(segment, name).astype(np.float64)
            return [round(float(values.mean()), 3), round(float(values.std()), 3)]
    return sha256(segment.bases.encode()).hexdigest()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", FILES)
def test_the_bundled_tokenizers_give_the_codes_mini_was_trained_on(kind):
    golden, found = json.loads(GOLDEN.read_text())[kind], observed(kind)
    for key in ("fingerprint", "sizes", "headers", "codes"):
        assert found[key] == golden[key], key
    for one, other in zip(found["decoded"], golden["decoded"], strict=True):
        assert one == (other if isinstance(other, str) else pytest.approx(other, abs=2e-3, rel=1e-3))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FILES)
def test_on_a_gpu_codes_are_the_same_but_for_rounding(kind):
    """A code is another one where two are as near; decoding the same codes rounds, too."""
    here, there = (load_tokenizer(MINI / kind).to(device) for device in ("cpu", "cuda"))
    for segment in segments(kind):
        codes = here.encode(segment)
        assert (there.encode(segment).values == codes.values).mean() >= 0.95
        one, other = digest(here.decode(codes)), digest(there.decode(codes))
        assert one == (other if isinstance(other, str) else pytest.approx(other, abs=2e-3, rel=1e-3))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({kind: observed(kind) for kind in FILES}) + "\n")
