"""The tokenizers' benchmark: every comparison is made, both sides have one rate, and a bar says what is met."""

import json

import pytest
import torch
from typer.testing import CliRunner

from anytoken.benchmarks.tokenizers import CODECS, items
from anytoken.cli import app
from anytoken.tokenizers.dna.kmer_bpe import DNAKmerTokenizer
from anytoken.tokenizers.pretrained import PretrainedSpeech
from anytoken.tokenizers.speech import SpeechTokenizer
from anytoken.utils.errors import EvaluationError


def test_speech_is_timed_beside_one_by_one_and_beside_codecs(tmp_path):
    torch.manual_seed(0)
    speech = SpeechTokenizer(width=16, encoder_depth=1, decoder_depth=1, levels=[4, 3]).eval()
    folders = [
        speech.save_pretrained(tmp_path / "speech"),
        DNAKmerTokenizer(3).save_pretrained(tmp_path / "dna"),
    ]
    out = tmp_path / "bench.json"
    words = ["bench", "tokenizers", *map(str, folders), "--batch", "2", "--repeats", "1", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["what"], row["peer"]) for row in rows] == [
        ("speech, encode, 2 at once", "one by one"), ("speech, decode, 2 at once", "one by one"),
        ("speech, encode, 2 at once", "EnCodec"), ("speech, decode, 2 at once", "EnCodec"),
        ("speech, encode, 2 at once", "DAC"), ("speech, decode, 2 at once", "DAC"),
        ("dna, encode, 2 at once", "one by one"), ("dna, decode, 2 at once", "one by one"),
    ]  # fmt: skip
    assert all(row["ratio"] == pytest.approx(row["items/s"] / row["peer items/s"]) for row in rows)
    assert {row["tokenizer"]: row["what"].split(",")[0] for row in rows} == {
        folder.as_posix(): folder.name for folder in folders
    }
    assert all(row["met"] == (row["ratio"] >= row["bar"]) for row in rows)


@pytest.mark.parametrize("name", CODECS)
def test_codecs_have_fifty_codes_a_second(name):
    codec = PretrainedSpeech(CODECS[name], num_codebooks=1).eval()
    assert codec.frame_rate_hz == 50 and len(codec.encode(items("speech", 1)[0])) == 50


def test_a_kind_without_items_is_an_error():
    with pytest.raises(EvaluationError, match="time a smell tokenizer on; there is for image"):
        items("smell", 1)
