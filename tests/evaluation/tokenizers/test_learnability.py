"""Learnability: codes as targets and back, a decoder that cannot look ahead, and measures that can fail."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anytoken.evaluation.tokenizers import evaluate
from anytoken.evaluation.tokenizers import learnability as module
from anytoken.evaluation.tokenizers.card import learnability_rows, make_card, render
from anytoken.evaluation.tokenizers.compare import comparison
from anytoken.evaluation.tokenizers.learnability import (
    Captioned,
    Decoder,
    Layout,
    captioned_sets,
    generated,
    global_change,
    learnability,
    mean_bits,
    phrases_of,
    sequences,
    trained,
)
from anytoken.segments import Image
from anytoken.tokenizers.base import CodeGrid, Codes, CodeSequence, ModalityTokenizer, TokenizerError
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.tokenizers.speech import SpeechTokenizer

COLORS, SHAPES = 6, 6


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that trains in a second."""
    for name, value in {"WIDTH": 48, "LAYERS": 2, "HIDDEN": 64, "WARMUP_STEPS": 5}.items():
        monkeypatch.setattr(module, name, value)


class Squares(ModalityTokenizer):
    """Images of 64 x 64 px in 4 x 4 codes: the shade of each part, or less the header's, which is the corner's."""

    kind = "image"
    segment_type = Image

    def __init__(
        self, with_header: bool, shape: CodeGrid | CodeSequence | None = None, books: tuple[int, ...] = (8,)
    ) -> None:
        shape = shape or CodeGrid(("rows", "cols"), (1, 1), (4, 4), num_global_codes=int(with_header))
        super().__init__(
            shape=shape,
            codebook_sizes=books,
            config={},
            global_codebook_size=8 if shape.num_global_codes else 0,
        )

    def encode(self, segment):
        pixels = segment.pixels[8::16, 8::16]
        shades = pixels.astype(int).sum(2) // 96
        if self.shape.num_global_codes:
            other = (pixels != pixels[0, 0]).any(2)
            return Codes(other.reshape(-1, 1) * 7, shades.shape, [shades[0, 0]])
        return Codes(shades.reshape(-1, 1), shades.shape)

    def decode(self, codes):
        self.check_codes(codes)
        shades = codes.values.reshape(codes.size) * 32
        return Image(np.repeat(shades.repeat(16, 0).repeat(16, 1)[..., None], 3, 2).astype(np.uint8))


def toy(seed: int = 0) -> tuple[Layout, Captioned, Captioned]:
    """Eight codes of an item: four say its colour, four its shape; one pair in six is held out."""
    layout = Layout(Squares(False, CodeGrid(("rows", "cols"), (1, 1), (2, 4)), (16,)))
    words = np.random.default_rng(seed).integers(0, 16, (COLORS + SHAPES, 4))
    sides: tuple[Captioned, Captioned] = Captioned([], [], []), Captioned([], [], [])
    for color in range(COLORS):
        for shape in range(SHAPES):
            side = sides[(color + shape) % 6 == 0]
            values = np.concatenate([words[color], words[COLORS + shape]])
            side.codes.append(Codes(values[:, None], (2, 4)))
            side.phrases.append((f"color {color}", f"shape {shape}"))
    return layout, *sides


@pytest.mark.parametrize(
    ("shape", "books", "sizes"),
    [
        (CodeGrid(("rows", "cols"), (1, 1), (3, 4), 2, num_global_codes=3), (5, 7), [(3, 4), (2, 1)]),
        (CodeGrid(("rows",), (1,), (6,)), (5,), [(6,), (1,)]),
        (CodeSequence(1, 9, 2, num_global_codes=2), (5, 7), [(), ()]),
        (CodeSequence(1, 9, 3, "delay"), (5, 7, 2), [(), ()]),
    ],
)
def test_codes_become_targets_and_back(shape, books, sizes) -> None:
    tokenizer, rng = Squares(True, shape, books), np.random.default_rng(0)
    layout = Layout(tokenizer)
    for size in sizes:
        frames = int(np.prod(size)) if size else int(rng.integers(1, 9))
        values = np.stack([rng.integers(0, book, frames) for book in books], 1)
        codes = Codes(values, size, rng.integers(0, 8, shape.num_global_codes))
        targets, (kinds, places) = layout.targets(codes), layout.form(size, frames)
        assert len(targets) == len(kinds) == len(places) == layout.length(codes)
        assert all(layout.allowed[kind, target] for kind, target in zip(kinds, targets, strict=True))
        assert (places >= 0).all() and (places < layout.places).all()
        assert len(np.unique(places[: len(codes.header) + values.size], axis=0)) == (
            len(codes.header) + values.size if size else len(codes.header) + len(books)
        )
        assert layout.codes(targets, size) == codes
    rest = np.concatenate([targets, targets[::-1]]) if layout.ends else targets
    assert layout.codes(rest, size) == codes


def test_the_decoder_does_not_look_ahead() -> None:
    layout, items, _ = toy()
    phrases = {phrase: n for n, phrase in enumerate(sorted({p for c in items.phrases for p in c}), 2)}
    some = sequences(layout, items, phrases, 2).rows(slice(3))
    model = Decoder(layout, len(phrases) + 2)
    logits = model(some)
    changed = some.rows(slice(3))
    changed.targets = some.targets.clone()
    changed.targets[:, 5] = (some.targets[:, 5] + 1) % 16
    other = model(changed)
    assert torch.allclose(logits[:, :6], other[:, :6], atol=1e-5)
    assert not torch.allclose(logits[:, 6], other[:, 6], atol=1e-5)
    assert (logits[..., layout.end] == -torch.inf).all()


def test_captions_help_where_they_tell_the_codes_and_nowhere_else() -> None:
    """With captions of other items held-out bits are no fewer than without any."""
    layout, train_items, held_items = toy()
    phrases = {phrase: n for n, phrase in enumerate(sorted({p for c in train_items.phrases for p in c}), 2)}
    train, held = (sequences(layout, one, phrases, 2) for one in (train_items, held_items))
    found = {}
    for how in ("given", "none", "shuffled"):
        shuffle = torch.Generator().manual_seed(1)
        model = trained(layout, train.captioned(how, shuffle), len(phrases) + 2, 0, steps=50)
        found[how] = mean_bits(model, layout, held.captioned(how, shuffle))[0]
        if how == "given":
            made = generated(model, layout, held, [(2, 4)] * len(held))
            assert (
                np.mean([np.mean(a.values == b.values) for a, b in zip(made, held_items.codes, strict=True)])
                > 0.8
            )
    assert found["given"] < 0.5 * found["none"]
    assert found["shuffled"] > found["none"] - 0.1


def test_a_seed_gives_one_decoder() -> None:
    layout, items, _ = toy()
    train = sequences(layout, items, {"color 1": 2}, 2)
    one, same, other = (trained(layout, train, 3, seed, steps=2).head.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_run_ends_where_it_was_taught_to() -> None:
    layout = Layout(Squares(True, CodeSequence(1, 9, 2, num_global_codes=1), (5, 7)))
    lengths = [1, 2, 4]
    codes = [Codes(np.full((n, 2), n), (), [n]) for n in lengths]
    items = Captioned(codes, [(f"length {n}",) for n in lengths], [])
    phrases = {f"length {n}": n + 2 for n in lengths}
    train = sequences(layout, items, phrases, 1)
    model = trained(layout, train, 10, 0, steps=40)
    assert generated(model, layout, train, [()] * 3) == codes
    per_code, per_item = mean_bits(model, layout, train)
    assert per_item * 3 == pytest.approx(per_code * sum(1 + 2 * n for n in lengths))


def test_equal_codes_are_those_of_a_header_alone(sets: Path) -> None:
    assert global_change(Squares(True), sets, 0) == {"equal_local_codes": 1.0}
    assert global_change(Squares(False), sets, 0)["equal_local_codes"] < 0.7


def test_words_of_two_voices_are_aligned(sets: Path) -> None:
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer(16, 1, 1, levels=[4, 3], num_global_codes=2).eval()
    found = global_change(tokenizer, sets, 0)
    assert 0 <= found["same_word_edit_distance"] <= 1 and 0 < found["other_word_edit_distance"] <= 1


def write_images(folder: Path) -> Path:
    """Images of a white square on a shade; the shade is a phrase of the caption, the place of the square another."""
    (folder / "emoji").mkdir(parents=True)
    lines = []
    for shade in range(4):
        for place in range(4):
            pixels = np.full((64, 64, 3), 40 * shade, np.uint8)
            pixels[16 * place : 16 * place + 16, 16:48] = 250
            name = f"{shade}-{place}.png"
            Image(pixels).save(folder / "emoji" / name)
            split = "test" if shade == place else "train"
            lines.append({"text": f"square {place}, shade {shade}", "image": name, "split": split})
    lines.append({"text": "nothing known, shade 1", "image": "no such file", "split": "test"})
    (folder / "emoji" / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_an_image_tokenizer_from_files_to_figures(sets: Path, tmp_path: Path) -> None:
    """Held-out items whose first phrase is unknown are not asked for."""
    data = write_images(tmp_path)
    for name in ("sprites.jsonl", "sprites.npy"):
        (data / "emoji" / name).symlink_to(sets / "emoji" / name)
    found = learnability(Squares(True), data, steps=30)
    assert (found["items"], found["held_out_items"], found["steps"]) == (12, 4, 30)
    for how in ("given", "none"):
        for which in ("train", "held_out"):
            bits = found[how][f"{which}_bits_per_code"]
            assert 0 < bits < 4 and found[how][f"{which}_bits_per_item"] == pytest.approx(17 * bits)
    assert found["given"]["train_bits_per_code"] < found["none"]["train_bits_per_code"]
    assert found["equal_local_codes"] == 1 and found["reconstructed_psnr_db"] > 0


def test_a_speech_tokenizer_from_files_to_figures(sets: Path) -> None:
    torch.manual_seed(0)
    found = learnability(SpeechTokenizer(16, 1, 1, levels=[4, 3], num_global_codes=2).eval(), sets, steps=1)
    assert (found["items"], found["held_out_items"]) == (3, 7) and found["generated_stoi"] < 1
    assert phrases_of({"text": "a cat, 3d", "voice": "slt"}) == ("a cat", "3d", "voice slt")


def test_what_cannot_be_measured_is_refused(sets: Path, tmp_path: Path, dna_folder: Path) -> None:
    with pytest.raises(TokenizerError, match=r"where a set has captions.*received a tokenizer of dna"):
        evaluate.measure(dna_folder, sets, 2, learnable=True)
    with pytest.raises(TokenizerError, match="on the built sets"):
        evaluate.measure(dna_folder, sets, 2, files="photos", learnable=True)
    with pytest.raises(TokenizerError, match=r"images\.jsonl is missing"):
        captioned_sets(Squares(False), tmp_path, 0)


def test_cards_and_comparisons_show_it(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = {f"{which}_bits_per_{unit}": 3.25 for which in ("train", "held_out") for unit in ("code", "item")}
    known = {
        "items": 5_604, "held_out_items": 512, "steps": 1_000, "batch": 24, "parameters": 1_790_000, "seconds": 1.0,
        "given": bits, "none": dict.fromkeys(bits, 6.5), "equal_local_codes": 0.125,
        "generated_psnr_db": 14.5, "other_items_psnr_db": 8.5, "reconstructed_psnr_db": 21.5,
    }  # fmt: skip
    monkeypatch.setattr(evaluate, "learnability", lambda *_: known)
    folder = ImageTokenizer(
        width=16, encoder_depth=1, decoder_depth=1, refine_width=8, refine_depth=1, levels=[4, 3]
    )
    folder = folder.save_pretrained(tmp_path / "image")
    page = make_card(folder, sets, tmp_path / "card", count=2, learnable=True).read_text()
    figures = json.loads((tmp_path / "card" / "figures.json").read_text())
    assert figures["learnability"] == known and "--learnability" in page
    assert "3.25 (6.5 without captions)" in page and "14.5 (other items 8.5, true codes 21.5)" in page
    assert "12.5 %" in page and "5,604 captioned items" in page
    assert "language model learns" not in render({**figures, "learnability": None})
    assert "| bits per code, held-out items | 3.25 (6.5 without captions) |" in comparison({"image": figures})
    assert learnability_rows({}) == []
