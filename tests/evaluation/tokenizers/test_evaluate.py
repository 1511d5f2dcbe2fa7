"""Measures against known values, and held-out items that are held out."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from anytoken.evaluation.tokenizers import dna_metrics, evaluate, image_metrics, speech_metrics
from anytoken.evaluation.tokenizers.evaluate import measure
from anytoken.evaluation.tokenizers.image_metrics import psnr_db, ssim
from anytoken.evaluation.tokenizers.test_sets import TestExample, data_provenance, file_items, held_out_items
from anytoken.evaluation.tokenizers.thresholds import bars
from anytoken.segments import DNA, Image, Speech, Video
from anytoken.tokenizers.base import Codes, TokenizerError, load_tokenizer
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.tokenizers.speech import SpeechTokenizer
from anytoken.tokenizers.video import VideoTokenizer

TINY = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "levels": [4, 3]}


def noise(seed: int = 0, side: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, side, side, 3), dtype=np.uint8)


# ---- pictures ----


def test_psnr_of_known_errors():
    black = np.zeros((1, 4, 4, 3), np.uint8)
    assert psnr_db(black, black + 255) == pytest.approx(0)
    assert psnr_db(black, black + 1) == pytest.approx(10 * math.log10(255**2))
    one_of_48 = black.copy()
    one_of_48[0, 0, 0, 0] = 255
    assert psnr_db(black, one_of_48) == pytest.approx(10 * math.log10(48))
    assert psnr_db(noise(), noise()) > 100


def test_ssim_is_one_for_equal_pictures_and_near_zero_for_unrelated_ones():
    assert ssim(noise(), noise()) == pytest.approx(1)
    assert abs(ssim(noise(0, 96), noise(1, 96))) < 0.1


def test_ssim_of_flat_pictures_by_its_formula():
    a, b = (np.full((1, 16, 16, 3), value, np.uint8) for value in (51, 153))  # brightness 0.2 and 0.6
    assert ssim(a, b) == pytest.approx((2 * 0.2 * 0.6 + 0.01**2) / (0.2**2 + 0.6**2 + 0.01**2), rel=1e-4)
    assert ssim(a, b) == pytest.approx(ssim(b, a))


def test_ssim_of_an_inverted_picture_is_negative():
    gray = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 1), dtype=np.uint8).repeat(3, 3)
    assert ssim(gray, 255 - gray) < -0.5


def test_ssim_against_a_plain_computation():
    """One window of 11x11 pixels: the map has one value, which weighted means give directly."""
    a, b = noise(0, 11)[:1], noise(1, 11)[:1]
    x, y = (one[0] @ np.array([0.299, 0.587, 0.114]) / 255 for one in (a, b))
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weight = np.outer(line, line) / np.outer(line, line).sum()
    mx, my = (weight * x).sum(), (weight * y).sum()
    vx, vy, both = (
        (weight * (x - mx) ** 2).sum(),
        (weight * (y - my) ** 2).sum(),
        (weight * (x - mx) * (y - my)).sum(),
    )
    expected = (2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert ssim(a, b) == pytest.approx(expected)


def test_a_thumbnail_has_no_more_bits_than_the_codes():
    frames = np.zeros((1, 64, 64, 3), np.uint8)
    frames[:, :, 32:] = 255
    one = image_metrics._thumbnail(frames, 24 * 3.9)  # three pixels do not make two by two: one
    assert len(np.unique(one)) == 1
    assert psnr_db(frames, image_metrics._thumbnail(frames, 24 * 25)) > psnr_db(frames, one)


# ---- codes ----


def test_usage_and_perplexity_of_known_distributions():
    even = evaluate._usage(np.arange(8).repeat(5)[:, None], [16])
    assert even["codebook_usage"] == 0.5 and even["code_perplexity"] == pytest.approx(8)
    assert (even["codebook_size"], even["codes_measured"]) == (16, 40)
    one = evaluate._usage(np.full((10, 1), 3), [4])
    assert one["codebook_usage"] == 0.25 and one["code_perplexity"] == pytest.approx(1)
    skewed = evaluate._usage(np.array([[0], [0], [0], [1]]), [2])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert skewed["code_perplexity"] == pytest.approx(math.exp(entropy))
    both = evaluate._usage(np.stack([np.arange(4), np.zeros(4, int)], 1), [4, 12])
    assert both["codebook_usage"] == 5 / 16 and both["codes_measured"] == 8
    assert both["code_perplexity"] == pytest.approx(2), "the geometric mean of 4 and 1"


# ---- what is held out ----


@pytest.mark.parametrize("kind", ["image", "video", "speech", "dna", "text"])
def test_items_are_of_their_kind_at_most_as_many_as_asked_and_the_same_for_a_seed(kind, sets):
    items = held_out_items(kind, sets, 3, 0)
    assert len(items) == 3 and all(item.segment.kind == kind for item in items)
    assert held_out_items(kind, sets, 3, 0) == items
    assert any(held_out_items(kind, sets, 3, seed) != items for seed in range(1, 8))


def test_no_training_concept_ever_appears(sets, colors):
    for kind, groups in (("image", {"flat", "3d"}), ("video", {""})):
        for seed in range(4):
            items = held_out_items(kind, sets, 100, seed)
            assert {item.name for item in items} == {f"unseen {n}" for n in range(4)}
            assert {item.group for item in items} == groups
            pixels = np.concatenate(
                [image_metrics.frames_of(item.segment).reshape(-1, 3) for item in items]
            ).astype(int)
            near = [(np.abs(pixels - color).max(1) <= 2).sum() for color in colors]
            assert near[0] == 0 and near[1] > 1000


def test_only_voices_never_heard_are_measured(sets):
    items = held_out_items("speech", sets, 100, 0)
    assert {item.group for item in items} == {"awb", "rms"} and len(items) == 6


def test_genes_and_texts_are_of_the_test_split(sets):
    genes = held_out_items("dna", sets, 100, 0)
    assert {item.name for item in genes} == {"product 4"} and len(genes) == 4, (
        "the gene of 1,203 bases is left out"
    )
    texts = held_out_items("text", sets, 100, 0)
    assert {item.group for item in texts} == {"captions", "gene products", "proteins"}
    assert not [item for item in texts if "training" in item.name]


@pytest.mark.parametrize(("kind", "file"), [("image", "emoji/sprites.jsonl"), ("image", "emoji/sprites.npy"),
                                            ("speech", "speech/speech.jsonl"), ("dna", "dna/genes.jsonl")])  # fmt: skip
def test_a_missing_set_is_named(kind, file, sets, tmp_path):
    copy = shutil.copytree(sets, tmp_path / "sets")
    (copy / file).unlink()
    with pytest.raises(TokenizerError, match=file.replace(".", r"\.") + " is missing"):
        held_out_items(kind, copy, 3, 0)


def test_a_set_without_held_out_items_is_an_error(sets, tmp_path):
    copy = shutil.copytree(sets, tmp_path / "sets")
    for name in ("emoji/sprites.jsonl", "emoji/animations.jsonl"):
        kept = [
            line
            for line in (copy / name).read_text().splitlines()
            if not json.loads(line)["tokenizer_held_out"]
        ]
        (copy / name).write_text("\n".join(kept) + "\n")
    for kind in ("image", "video"):
        with pytest.raises(TokenizerError, match=f"no held-out {kind} items"):
            held_out_items(kind, copy, 3, 0)
    with pytest.raises(TokenizerError, match="no held-out set for 'smell'; there is one for image"):
        held_out_items("smell", copy, 3, 0)


def test_what_sets_are_made_of_is_read_from_their_manifests(sets, tmp_path):
    assert data_provenance("text", sets) == [
        {"set": name, "name": f"{name}-package", "version": "1.2.3", "licence": "CC-BY-4.0"}
        for name in ("emoji", "dna")
    ]
    assert data_provenance("image", tmp_path) == []


def test_own_pictures_and_clips_are_measured_at_no_more_than_a_photograph_needs(tmp_path):
    Video(np.zeros((2, 300, 600, 3), np.uint8)).save(tmp_path / "clip.gif")
    for n, (height, width) in enumerate([(700, 1400), (20, 30)]):
        Image(np.zeros((height, width, 3), np.uint8)).save(tmp_path / f"{n}.png")
    pictures = file_items(ImageTokenizer(**TINY), tmp_path, None, 0)
    assert {one.segment.pixels.shape for one in pictures} == {(256, 512, 3), (20, 30, 3)}
    (clip,) = file_items(VideoTokenizer(**TINY), tmp_path / "*.gif", None, 0)
    assert clip.segment.frames.shape == (2, 256, 512, 3) and clip.name == "clip"


# ---- whole tokenizers ----


def test_figures_of_a_picture_tokenizer(sets, tmp_path):
    torch.manual_seed(0)
    folder = ImageTokenizer(**TINY, refine_width=8, refine_depth=1).save_pretrained(tmp_path / "image")
    found = measure(folder, sets, 6, seed=2)
    figures = found.figures
    assert json.loads(json.dumps(figures)) == figures
    assert (figures["kind"], figures["items"], figures["seed"], figures["unit"]) == ("image", 6, 2, "image")
    assert figures["tokens_per_unit"] == 64 and figures["bits_per_unit"] == pytest.approx(64 * math.log2(12))
    assert (
        figures["fingerprint"] == load_tokenizer(folder).fingerprint() and figures["codes_measured"] == 6 * 64
    )
    assert figures["psnr_db"] < figures["mean_colour_psnr_db"] < figures["thumbnail_psnr_db"], (
        "weights are random"
    )
    assert set(figures["psnr_db_by_group"]) == {"3d", "flat"}
    assert figures["encode_units_per_second"] > 0 and figures["decode_units_per_second"] > 0
    assert measure(folder, sets, 6, seed=2).figures["psnr_db"] == figures["psnr_db"]
    assert len(found.items) == len(found.outputs) == len(found.codes) == 6


def test_pictures_that_come_back_get_perfect_figures(sets):
    items = held_out_items("image", sets, 5, 0)
    figures = image_metrics.image_metrics(items, [item.segment for item in items], 600)
    assert figures["psnr_db"] > 100 and figures["ssim"] == pytest.approx(1)
    assert figures["mean_colour_ssim"] < 1 and figures["thumbnail_ssim"] < 1


def test_other_sizes_are_measured_at_the_size_of_the_originals(sets, tmp_path):
    torch.manual_seed(0)
    folder = ImageTokenizer(**TINY, refine_width=8, refine_depth=1, side_px=32).save_pretrained(
        tmp_path / "image"
    )
    figures = measure(folder, sets, 3).figures
    assert figures["tokens_per_unit"] == 16 and figures["psnr_db"] > 0


def test_speech_that_comes_back_is_intelligible_and_noise_is_not(sets):
    items = held_out_items("speech", sets, 4, 0)
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer(**TINY).eval()
    codes = tokenizer.encode_batch([item.segment for item in items])
    figures = speech_metrics.speech_metrics(tokenizer, items, codes, [item.segment for item in items], 0)
    assert figures["stoi"] > 0.99 > 0.7 > figures["random_codes_stoi"] and figures["stoi_items"] == 4
    assert figures["log_mel_l1"] == 0 < figures["random_codes_log_mel_l1"]
    assert set(figures["stoi_by_group"]) <= {"awb", "rms"}


def test_clips_too_short_for_stoi_are_not_scored():
    assert speech_metrics.stoi(Speech(np.full(1_000, 0.1)), Speech(np.full(1_000, 0.1))) is None


def test_without_pystoi_intelligibility_is_left_out_and_said_so(sets, monkeypatch, caplog):
    monkeypatch.setattr(speech_metrics, "find_spec", lambda name: None)
    items = held_out_items("speech", sets, 2, 0)
    tokenizer = SpeechTokenizer(**TINY).eval()
    codes = tokenizer.encode_batch([item.segment for item in items])
    figures = speech_metrics.speech_metrics(tokenizer, items, codes, [item.segment for item in items], 0)
    assert "stoi" not in figures and "log_mel_l1" in figures and "pystoi is missing" in caplog.text


def test_figures_of_a_lossless_dna_tokenizer(sets, dna_folder):
    figures = measure(dna_folder, sets).figures
    assert figures["exact"] == figures["with_n_exact"] == figures["lower_case_as_upper"] == 1.0
    assert (
        figures["other_iupac_as_n"] == 1.0
        and figures["lower_case_exact"] == 0.0
        and figures["windows_lost"] == 0
    )
    assert figures["genome_exact"] is True and figures["genome_bases"] == 5_000
    assert 1 / 3 <= figures["tokens_per_unit"] < 0.36 and figures["unit"] == "base"


def test_a_lossy_dna_tokenizer_is_found_out(sets, dna_folder, monkeypatch):
    tokenizer = load_tokenizer(dna_folder)
    table, windows = tokenizer.tables()
    windows[:] = windows[table[0]]  # whatever the code, AAA comes back
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda folder: tokenizer)
    figures = measure(dna_folder, sets).figures
    assert figures["exact"] < 1 and figures["windows_lost"] == 154 and figures["genome_exact"] is False


def test_several_codebooks_count_all_their_bits(sets, monkeypatch):
    tokenizer = ImageTokenizer(**TINY, refine_width=8, refine_depth=1).eval()
    segments = [item.segment for item in held_out_items("image", sets, 2, 0)]
    codes = [Codes(np.zeros((64, 2)), (8, 8)) for _ in segments]
    monkeypatch.setattr(tokenizer, "encode_batch", lambda some: codes[: len(some)])
    monkeypatch.setattr(tokenizer, "decode_batch", lambda some: segments[: len(some)])
    tokenizer.codebook_sizes = (16, 4)
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda folder: tokenizer)
    object.__setattr__(tokenizer.shape, "num_codebooks", 2)
    figures = measure("anywhere", sets, 2).figures
    assert figures["tokens_per_unit"] == 128 and figures["bits_per_unit"] == 64 * (4 + 2)


def test_a_folder_without_a_tokenizer_is_an_error(sets, tmp_path):
    with pytest.raises(TokenizerError, match=r"config\.json is missing"):
        measure(tmp_path, sets)


def test_frames_of_pictures_and_clips():
    assert image_metrics.frames_of(Image(noise()[0])).shape == (1, 24, 24, 3)
    assert image_metrics.frames_of(Video(noise())).shape == (2, 24, 24, 3)
    assert evaluate._amount(ImageTokenizer(width=8), [DNA("ACGT"), DNA("A")], 0) == (5, "base")


# ---- what figures are read against ----


def test_webp_is_measured_at_the_bytes_that_were_asked_for():
    pictures = [np.asarray(noise(seed, 64)[:1]) for seed in range(3)]
    sizes = {quality: image_metrics._mean_bytes(pictures, quality) for quality in (20, 21)}
    assert sizes[20] < sizes[21]
    target = (sizes[20] + sizes[21]) / 2
    found = image_metrics.webp(pictures, target)
    assert found["webp_bytes"] == pytest.approx(target) and found["webp_quality"] == pytest.approx(20.5)
    ends = [psnr_db(one, image_metrics._webp_back(one, quality)) for quality in (20, 21) for one in pictures]
    assert found["webp_psnr_db"] == pytest.approx(np.mean(ends)) and 0 < found["webp_ssim"] < 1


@pytest.mark.parametrize(("target", "quality"), [(1.0, 0), (1e9, 100)])
def test_webp_that_cannot_be_so_small_or_large_is_measured_as_it_is(target, quality):
    pictures = [noise(0, 64)[:1]]
    found = image_metrics.webp(pictures, target)
    assert found["webp_quality"] == quality
    assert found["webp_bytes"] == image_metrics._mean_bytes(pictures, quality)


def test_a_clip_by_the_picture_tokenizer_has_as_many_codes(sets):
    torch.manual_seed(0)
    image = ImageTokenizer(**TINY, refine_width=8, refine_depth=1).eval()
    clip = np.concatenate([noise(seed, 64) for seed in range(4)])
    assert clip.shape == (8, 64, 64, 3)
    for codes, apply in ((128, image_metrics.every_frame), (128, image_metrics.held_frames)):
        back, count = apply(image, clip, codes)
        assert count == codes and back.shape == clip.shape
    assert np.array_equal(back[0], back[3]) and not np.array_equal(back[0], back[4]), "two frames, held"
    expected = image.decode(image.encode(Image(clip[1]))).pixels
    assert np.array_equal(back[0], expected)
    assert image.config["side_px"] == 64, "the tokenizer itself stays as it is"


def test_video_is_compared_with_the_picture_tokenizer_beside_it_or_named(sets, tmp_path):
    torch.manual_seed(0)
    folder = VideoTokenizer(**TINY).save_pretrained(tmp_path / "video")
    assert "every_frame_psnr_db" not in measure(folder, sets, 2).figures
    named = ImageTokenizer(**TINY, refine_width=8, refine_depth=1).save_pretrained(tmp_path / "pictures")
    figures = measure(folder, sets, 2, image=named).figures
    assert figures["image_tokenizer"] == load_tokenizer(named).fingerprint()
    assert figures["every_frame_codes"] == figures["held_frames_codes"] == figures["tokens_per_item"] == 128
    assert [bar["bar"] for bar in figures["bars"][:2]] == [
        figures["every_frame_psnr_db"], figures["held_frames_psnr_db"],
    ]  # fmt: skip
    shutil.copytree(named, tmp_path / "image")
    assert measure(folder, sets, 2).figures["image_tokenizer"] == figures["image_tokenizer"]
    with pytest.raises(TokenizerError, match="holds one of video"):
        measure(folder, sets, 2, image=folder)


def test_all_items_are_measured_on_one_thread_unless_fewer_are_asked_for(sets, tmp_path):
    torch.manual_seed(0)
    folder = ImageTokenizer(**TINY, refine_width=8, refine_depth=1).save_pretrained(tmp_path / "image")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        figures = measure(folder, sets).figures
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert figures["items"] == 8 and figures["threads"] == 1


class FakeJudge:
    """Hears what the level of a clip's first sample says."""

    def __init__(self, names):
        self.names = names

    def knows(self, name):
        return name != "name 2"

    def transcribe(self, clip):
        return f"name {round(10 * float(clip.samples[0]))}"


def test_words_are_a_share_of_what_is_heard_in_the_originals(monkeypatch):
    monkeypatch.setattr(speech_metrics, "KeywordRecognizer", FakeJudge)

    def clips(*said):
        return [Speech(np.full(10, value / 10, np.float32)) for value in said]

    items = [TestExample(clip, f"name {n}") for n, clip in enumerate(clips(0, 1, 2, 9))]
    found = speech_metrics.keyword_accuracy(items, clips(0, 5, 2, 4), clips(7, 1), 0)
    assert found["words_items"] == 3, "the recogniser does not know one name"
    assert found["words_originals"] == pytest.approx(2 / 3) and found["words"] == pytest.approx(1 / 3)
    assert found["words_share"] == pytest.approx(0.5) and found["random_codes_words"] == 0.5
    assert found["words_share_by_part"] == [0.5] and found["words_names"] == 4


def test_many_clips_are_heard_in_parts_each_with_its_own_names(monkeypatch):
    asked = []

    class Judge(FakeJudge):
        def __init__(self, names):
            super().__init__(names)
            asked.append(names)

    monkeypatch.setattr(speech_metrics, "KeywordRecognizer", Judge)
    monkeypatch.setattr(speech_metrics, "CLIPS_PER_GRAMMAR", 2)
    levels = [0, 1, 3, 4, 5]
    items = [TestExample(Speech(np.full(10, n / 10, np.float32)), f"name {n}") for n in levels]
    wrong = Speech(np.full(10, 0.9, np.float32))
    found = speech_metrics.keyword_accuracy(items, [*(item.segment for item in items[:4]), wrong], [], 0)
    assert sorted(map(len, asked)) == [1, 2, 2] and sorted(name for names in asked for name in names) == [
        f"name {n}" for n in levels
    ]
    assert found["words_items"] == 5 and found["words"] == pytest.approx(4 / 5)
    assert sorted(found["words_share_by_part"])[1:] == [1, 1] and min(found["words_share_by_part"]) < 1


def test_bars_are_those_of_the_rate_and_say_what_is_met():
    common = {
        "kind": "speech",
        "codebook_usage": 0.96,
        "units_per_second": 39.0,
        "stoi": 0.8,
        "words_share": 0.95,
    }
    met = {rate: [one["met"] for one in bars({**common, "tokens_per_unit": rate})] for rate in (50.2, 25.1)}
    assert met == {50.2: [False, False, False, True], 25.1: [True, True, False, True]}
    (only,) = bars({"kind": "text", "codebook_usage": 0.94})
    assert only == {"what": "codebook usage", "ours": 0.94, "bar": 0.95, "met": False}


def test_genomes_of_the_package_beside_the_set_are_streamed_but_not_the_one_trained_on(sets, tmp_path):
    assert dna_metrics.untrained_genomes(sets) == [sets / "dna" / "genome_test.fa.gz"]
    examples = tmp_path / "packages" / "ragout.unpacked" / dna_metrics.EXAMPLES
    for name in ("E.Coli/references/K12", "H.Pylori/references/G27", "S.Aureus/references/COL"):
        DNA("ACGT").save(examples / f"{name}.fasta.gz")
    names = [path.name for path in dna_metrics.untrained_genomes(tmp_path)]
    assert names == ["G27.fasta.gz", "COL.fasta.gz"]
    assert dna_metrics.untrained_genomes(tmp_path / "nowhere") == []
