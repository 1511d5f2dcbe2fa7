"""Batches of texts by two voices: what is paired, lengths, determinism, errors, a short training with them."""

import json

import numpy as np
import pytest
import torch

from anytoken.segments import Speech
from anytoken.tokenizers.base import TokenizerError, load_tokenizer
from anytoken.training.tokenizer.spoken_pairs import FILLED, LENGTHS_MS, spoken_pairs
from anytoken.training.tokenizer.trainer import train_tokenizer

PITCHES = {"anna": 150, "bert": 300, "carl": 600}
TEXTS = {"fox": 0.5, "red apple": 0.9}


def tone(pitch, seconds):
    time = np.arange(round(seconds * 16_000)) / 16_000
    return Speech((0.4 * np.sin(2 * np.pi * pitch * time)).astype(np.float32), 16_000)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Two texts by three voices, each voice a pitch; a held-out voice, and a text that only one voice says."""
    folder = tmp_path_factory.mktemp("said")
    lines = []
    for voice, pitch in [*PITCHES.items(), ("test", 1200)]:
        for text, seconds in {**TEXTS, **({"alone": 0.7} if voice == "anna" else {})}.items():
            name = f"{voice}-{text[:3]}.wav"
            tone(pitch, seconds).save(folder / name)
            split = "test" if voice == "test" else "train"
            lines.append({"speech": name, "text": text, "voice": voice, "split": split})
    path = folder / "said.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.save(folder / "audio.npy", np.tile(np.round(tone(200, 4).samples * 32767).astype(np.int16), 2))
    return path


def pitch_of(samples):
    spectrum = np.abs(np.fft.rfft(samples))
    return np.fft.rfftfreq(len(samples), 1 / 16_000)[spectrum.argmax()]


def test_pairs_say_one_text_in_two_trained_voices(said):
    make = spoken_pairs([said], 4, 0)
    for step in range(6):
        pairs = make(step)
        count = len(pairs.texts)
        assert pairs.samples.shape == (2 * count, pairs.samples.shape[1]) and set(pairs.texts) <= set(TEXTS)
        assert pairs.samples.shape[1] / 16 in LENGTHS_MS
        for row, text in enumerate(pairs.texts):
            halves = [pairs.samples[row], pairs.samples[count + row]]
            # A clip is played at 0.8 to 1.25 times its speed; the voices' pitches are further apart.
            voices = [
                min(PITCHES, key=lambda voice: abs(np.log(pitch_of(one.numpy()) / PITCHES[voice])))
                for one in halves
            ]
            assert voices[0] != voices[1]
            for half, place in zip(halves, (row, count + row), strict=True):
                assert pitch_of(pairs.others[place].numpy()) == pytest.approx(
                    pitch_of(half.numpy()), rel=0.02
                )
                assert (half.abs() > 1e-4).float().mean() > 0.9 * FILLED
            fits = (
                TEXTS[text] * 16_000 * 0.8 <= pairs.samples.shape[1] <= TEXTS[text] * 16_000 * 1.25 / FILLED
            )
            assert fits


def test_a_batch_depends_on_seed_and_number_only(said):
    first, again, other = (spoken_pairs([said], 4, seed) for seed in (3, 3, 4))
    five = first(5)
    first(2)
    assert torch.equal(first(5).samples, five.samples) and torch.equal(again(5).others, five.others)
    other_five = other(5)
    assert other_five.samples.shape != five.samples.shape or not torch.equal(other_five.samples, five.samples)


def test_lines_that_will_not_do_are_named(said, tmp_path):
    with pytest.raises(TokenizerError, match="missing"):
        spoken_pairs([tmp_path / "none.jsonl"], 4, 0)
    lines = said.read_text().splitlines()
    broken = said.with_name("broken.jsonl")
    broken.write_text(lines[0] + "\n" + json.dumps({"speech": "a.wav"}) + "\n")
    with pytest.raises(TokenizerError, match=r"line 2 has no text, voice"):
        spoken_pairs([broken], 4, 0)
    single = said.with_name("single.jsonl")
    single.write_text("\n".join(line for line in lines if '"anna"' in line))
    with pytest.raises(TokenizerError, match="two voices"):
        spoken_pairs([single], 4, 0)


RECIPE = """
kind: speech
config: {width: 32, encoder_depth: 1, decoder_depth: 1, quantizer: {kind: vq, code_dim: 8}, codebook_size: 16,
  frames_per_code: 2, num_global_codes: 2}
data: audio.npy
pairs: [said.jsonl]
loss: {mel: 1, spelling: 1, agreement: 1}
steps: 6
batch_size: 4
warmup_steps: 1
log_every: 1
"""


def test_training_takes_crops_and_pairs_in_turn(said, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    out = train_tokenizer(recipe, said.parent, tmp_path / "out")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert ["spelling" in row for row in rows] == [False, True, True, True, False, True]
    assert load_tokenizer(out).encode(tone(200, 0.5)).header.shape == (2,)


def test_pairs_are_for_speech(said, tmp_path, sets):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kind: image\ndata: emoji/sprites.npy\npairs: [said.jsonl]\nsteps: 1\n")
    with pytest.raises(TokenizerError, match="for speech tokenizers"):
        train_tokenizer(recipe, sets, tmp_path / "image")


def test_terms_of_pairs_need_pairs(said, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(TokenizerError, match="spelling and agreement need `pairs`"):
        train_tokenizer(recipe, said.parent, tmp_path / "out", ["pairs=[]"])


def test_frozen_parts_keep_their_weights_and_codes(said, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    begun = train_tokenizer(recipe, said.parent, tmp_path / "begun")
    frozen = [f"init_from={begun}", "freeze=[encoder., quantize., voice.]", "loss={mel: 1}", "pairs=[]"]
    out = train_tokenizer(recipe, said.parent, tmp_path / "out", frozen)
    before, after = (load_tokenizer(folder) for folder in (begun, out))
    clip = tone(200, 0.7)
    assert after.encode(clip) == before.encode(clip) and after.decode(after.encode(clip)) != before.decode(
        before.encode(clip)
    )
    theirs = after.state_dict()
    same = {name for name, one in before.state_dict().items() if torch.equal(one, theirs[name])}
    parts = ("encoder.", "quantize.", "voice.")
    assert same == {name for name in theirs if name.startswith(parts)}


@pytest.mark.parametrize("freeze", [["coder."], ["encoder.", "decoder.", "quantize.", "voice."]])
def test_what_cannot_be_frozen_is_named(said, tmp_path, freeze):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + f"freeze: {json.dumps(freeze)}\n")
    with pytest.raises(TokenizerError, match="must name some of the weights and not all"):
        train_tokenizer(recipe, said.parent, tmp_path / "out")
