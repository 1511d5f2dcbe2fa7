"""Segments through real files: what is kept, what is converted as documented, and what is refused, and how."""

import base64
import gzip
import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture

from anytoken.segments import DNA, KINDS, Image, Segment, SegmentError, Speech, Text, Video, open_segment

ROWS, COLUMNS = np.mgrid[:24, :32]
PICTURE = Image(np.stack([COLUMNS * 7, ROWS * 9, (COLUMNS + ROWS) * 4], axis=-1).astype(np.uint8))
CLIP = Video(np.stack([np.roll(PICTURE.pixels, 4 * step, axis=1) for step in range(5)]), 4.0)
TIMES = np.arange(16_000) / 16_000
TONE = Speech(0.5 * np.sin(2 * np.pi * 440 * TIMES))
GENE = DNA("".join(np.random.default_rng(0).choice(list("ACGTNacgtnRYK"), 300)), "gene 1, strand +1")
STORY = Text("Ein schöner Apfel\r\n\n\t<|image|> 🍎 \x00 end ")
NOISE = bytes(np.random.default_rng(1).integers(128, 256, 4000, dtype=np.uint8))  # no format, and no UTF-8

LOSSLESS = [
    *((PICTURE, suffix) for suffix in (".png", ".PNG", ".webp", ".bmp")),
    *((CLIP, suffix) for suffix in (".webp", ".WEBP")),
    *((GENE, suffix) for suffix in (".fasta", ".fa", ".FNA", ".fa.gz", ".FASTA.GZ")),
    *((STORY, suffix) for suffix in (".txt", ".md")),
]
FILES = [
    *LOSSLESS,
    *((PICTURE, suffix) for suffix in (".jpg", ".jpeg")),
    *((TONE, suffix) for suffix in (".wav", ".flac", ".ogg", ".mp3", ".MP3")),
    *((CLIP, suffix) for suffix in (".mp4", ".webm", ".gif")),
]


def name_of(value: Any) -> str:
    return value.kind if isinstance(value, Segment) else str(value)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def distance(given: np.ndarray, back: np.ndarray) -> float:
    """Mean difference of two arrays of one shape."""
    assert given.shape == back.shape
    return float(np.abs(given.astype(float) - back).mean())


# ---- round trips ----


@pytest.mark.parametrize(("segment", "suffix"), LOSSLESS, ids=name_of)
def test_lossless_formats_give_the_same_segment(segment: Segment, suffix: str, tmp_path: Path) -> None:
    path = segment.save(tmp_path / "new" / "folder" / f"a{suffix}")
    assert type(segment).open(path) == segment == type(segment).open(str(path))
    assert open_segment(path) == segment
    assert path.read_bytes() == segment.save(tmp_path / f"b{suffix}").read_bytes()


def test_jpeg_is_close(tmp_path: Path) -> None:
    back = Image.open(PICTURE.save(tmp_path / "a.jpg"))
    assert 0 < distance(PICTURE.pixels, back.pixels) < 4


@pytest.mark.parametrize(
    ("suffix", "bound"), [(".wav", 2e-5), (".flac", 2e-5), (".ogg", 5e-3), (".mp3", 5e-3)]
)
def test_sound_is_close(suffix: str, bound: float, tmp_path: Path) -> None:
    back = open_segment(TONE.save(tmp_path / f"a{suffix}"))
    assert isinstance(back, Speech) and back.sample_rate_hz == 16_000 and back.seconds == 1
    assert 0 < distance(TONE.samples, back.samples) < bound
    assert Speech.open((tmp_path / f"a{suffix}").read_bytes()) == back


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_videos_are_close(suffix: str, tmp_path: Path) -> None:
    back = open_segment(CLIP.save(tmp_path / f"a{suffix}"))
    assert isinstance(back, Video) and back.frame_rate_hz == 4
    # The rolled edge of the picture is sharp, and half the colour resolution blurs it.
    assert 0 < distance(CLIP.frames, back.frames) < 12
    assert all(
        distance(frame, back.frames[step]) < distance(frame, back.frames[step - 1])
        for step, frame in enumerate(CLIP.frames)
    )


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
@pytest.mark.parametrize(
    ("steps", "frame_rate_hz"),
    [([0], 4), ([0] * 5, 4), ([0, 0, 1, 1], 4), ([0, 1, 1, 1, 2, 3], 24), ([0, 1], 0.5)],
)
def test_every_frame_and_the_rate_are_kept(
    suffix: str, steps: list[int], frame_rate_hz: float, tmp_path: Path
) -> None:
    """Writers of gif and webp join equal neighbours and round times; mp4 and webm do neither."""
    clip = Video(CLIP.frames[steps], frame_rate_hz)
    back = open_segment(clip.save(tmp_path / f"a{suffix}"))
    assert isinstance(back, Video) and back.frame_rate_hz == frame_rate_hz
    assert distance(clip.frames, back.frames) < 12
    if suffix == ".webp":
        assert back == clip


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sides_grow_by_one(suffix: str, tmp_path: Path) -> None:
    for height, width in [(1, 1), (7, 8), (8, 7)]:
        frames = np.full((2, height, width, 3), 200, np.uint8)
        back = Video.open(Video(frames).save(tmp_path / f"a{suffix}")).frames
        assert back.shape == (2, height + height % 2, width + width % 2, 3)
        assert np.abs(back.astype(int) - 200).max() < 6


@settings(max_examples=40, deadline=None)
@given(st.text("ACGTURYSWKMBDHVNacgturyswkmbdhvn", min_size=1, max_size=200))
def test_any_bases_survive_a_file(tmp_path_factory: pytest.TempPathFactory, bases: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert DNA.open(DNA(bases).save(folder / "any.fa")).bases == bases
    assert DNA.open(written(folder / "any.seq", bases.encode())) == DNA(bases)


@pytest.mark.parametrize("name", ["gène β", "two\nlines\rACGT", ">", "  "])
def test_a_name_of_dna_stays_one_line(name: str, tmp_path: Path) -> None:
    back = DNA.open(DNA("ACGT", name).save(tmp_path / "a.fa"))
    assert back.bases == "ACGT" and back.name == (" ".join(name.split()) or "sequence")


# ---- documented conversions ----


def as_png(picture: Picture.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_pictures_of_every_mode_become_rgb() -> None:
    clear = Picture.new("RGBA", (3, 2), (255, 0, 0, 0))
    grey16 = Picture.fromarray(np.array([[0, 32896, 65535]], np.uint16))
    palette = Picture.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    for picture, pixels in [
        (clear, [[[255] * 3] * 3] * 2),
        (Picture.new("RGBA", (1, 1), (255, 0, 0, 51)), [[[255, 204, 204]]]),
        (Picture.new("LA", (1, 1), (0, 0)), [[[255] * 3]]),
        (Picture.new("L", (1, 1), 7), [[[7] * 3]]),
        (Picture.new("1", (1, 1), 1), [[[255] * 3]]),
        (grey16, [[[0] * 3, [128] * 3, [255] * 3]]),
        (palette, [[[10, 20, 30]]]),
    ]:
        for source in (picture, as_png(picture)):
            assert Image.open(source).pixels.tolist() == pixels, picture.mode
    assert Image.open(Picture.new("CMYK", (1, 1), (0, 0, 0, 255))).pixels.tolist() == [[[0, 0, 0]]]
    transparent_colour = as_png(Picture.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    assert Image.open(transparent_colour).pixels.tolist() == [[[255, 255, 255]]]


def test_pictures_are_turned_upright() -> None:
    exif = Picture.Exif()
    exif[0x0112] = 6  # taken with the camera on its side: turn a quarter clockwise
    data = as_png(PICTURE.to_pil(), exif=exif)
    upright = Image(np.rot90(PICTURE.pixels, -1))
    assert Image.open(data) == upright
    assert Image.open(Picture.open(io.BytesIO(data))) == upright


def test_an_animation_as_image_and_a_picture_as_video(tmp_path: Path) -> None:
    assert Image.open(CLIP.save(tmp_path / "a.webp")) == Image(CLIP.frames[0])
    clear = written(tmp_path / "a.png", as_png(Picture.new("RGBA", (3, 2), (255, 0, 0, 0))))
    assert (Video.open(clear).frames == np.full((1, 2, 3, 3), 255)).all()
    assert open_segment(PICTURE.save(tmp_path / "still.webp")) == PICTURE


def test_pictures_of_foreign_animations_are_repeated_to_one_rate(tmp_path: Path) -> None:
    frames = [Picture.fromarray(frame) for frame in CLIP.frames[:3]]
    for suffix in (".gif", ".webp"):
        for times, count, rate in [
            ([100, 300, 200], 6, 10),
            ([100] * 3, 3, 10),
            ([330, 340, 370], 3, 3000 / 1040),  # no step in common that is long enough to be meant
        ]:
            path = tmp_path / f"a{suffix}"
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, lossless=True)
            back = Video.open(path)
            assert len(back.frames) == count and back.frame_rate_hz == pytest.approx(rate)
            repeats = [round(one * rate / 1000) for one in times] if count > 3 else [1, 1, 1]
            wanted = np.repeat(CLIP.frames[:3], repeats, axis=0)
            assert distance(wanted, back.frames) < (12 if suffix == ".gif" else 1e-9)


def test_no_file_makes_a_video_larger_than_a_picture_may_be(tmp_path: Path) -> None:
    frames = [Picture.fromarray(np.full((500, 500, 3), shade, np.uint8)) for shade in (0, 255)]
    path = tmp_path / "a.gif"
    for comment in (b"", b"900000000 frames at 4.0 Hz"):
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=[20, 600_000], comment=comment)
        clip = Video.open(path)
        assert clip.frames.size < 3 * 64_000_000 and clip.seconds == pytest.approx(600, rel=0.02)
        assert clip.frames[0].max() == 0 and (clip.frames[1:] == 255).all()


def test_stereo_is_averaged_at_its_own_rate(tmp_path: Path) -> None:
    left, right = np.full(480, 0.5), np.full(480, -0.25)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 48_000, subtype="FLOAT")
    speech = Speech.open(tmp_path / "a.wav")
    assert speech.samples.dtype == np.float32 and speech.sample_rate_hz == 48_000 and speech.seconds == 0.01
    assert (speech.samples == 0.125).all()
    back = speech.resample(16_000)
    assert back.sample_rate_hz == 16_000 and len(back.samples) == 160


def test_resampling_keeps_the_tone_and_the_length() -> None:
    for rate in (8_000, 24_000, 44_100):
        there = TONE.resample(rate)
        assert there.sample_rate_hz == rate and len(there.samples) == rate
        spectrum = np.abs(np.fft.rfft(there.samples))
        assert int(spectrum.argmax()) == 440
        inner = slice(1_000, -1_000)  # the filter sees silence beyond the ends
        back = there.resample(16_000).samples
        assert np.abs(back[inner] - TONE.samples[inner]).max() < 5e-3
    assert TONE.resample(16_000) is TONE
    above = Speech(np.sin(2 * np.pi * 6_000 * TIMES)).resample(8_000)  # 8 kHz cannot hold 6 kHz
    assert np.abs(above.samples[1_000:-1_000]).max() < 0.05


def test_exact_sound_is_the_same_sample_by_sample(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 3, 1_000).astype(np.float32)
    speech = Speech(samples, 22_050)
    assert Speech.open(speech.save(tmp_path / "a.wav", exact=True)) == speech
    assert Speech.open(speech.save(tmp_path / "b.wav")) != speech
    with pytest.raises(ValueError, match=r"\.flac; allowed: \.wav"):
        speech.save(tmp_path / "a.flac", exact=True)


@pytest.mark.parametrize(
    ("rate", "new_rate"), [(44_101, 16_000), (15_999, 16_000), (16_000, 47_999), (999_983, 16_000)]
)
def test_odd_rates_keep_speed_and_pitch(rate: int, new_rate: int) -> None:
    """Their filter would have as many entries as the product of the rates: gigabytes."""
    tone = Speech(0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate), rate).resample(new_rate)
    assert tone.sample_rate_hz == new_rate and tone.seconds == pytest.approx(1, rel=1e-3)
    wave = np.sin(2 * np.pi * 440 * np.arange(len(tone.samples)) / new_rate)
    loudness = np.sqrt(2 * np.mean(tone.samples[1_000:-1_000] ** 2))
    assert loudness == pytest.approx(0.5, abs=0.01)
    spectrum = np.abs(np.fft.rfft(tone.samples, 16 * len(wave)))
    pitch = spectrum.argmax() * new_rate / (16 * len(wave))
    assert pitch == pytest.approx(440, rel=1e-3)


@given(st.integers(1, 400_000), st.integers(1, 400_000), st.integers(1, 50))
@settings(max_examples=15, deadline=None)
def test_any_two_rates(rate: int, new_rate: int, count: int) -> None:
    exact = count * new_rate / rate
    found = len(Speech(np.ones(count), rate).resample(new_rate).samples)
    assert exact * 0.999 - 1 <= found <= np.ceil(exact)


def test_resizing() -> None:
    small = PICTURE.resize(12, 16)
    assert (small.height, small.width) == (12, 16) and small.pixels.dtype == np.uint8
    assert distance(PICTURE.pixels, small.resize(24, 32).pixels) < 3
    assert PICTURE.resize(24, 32) is PICTURE
    assert (Image(np.full((1, 1, 3), 9, np.uint8)).resize(5, 7).pixels == 9).all()
    with pytest.raises(ValueError, match=r"\w"):
        PICTURE.resize(0, 16)


def test_loud_samples_are_clipped_in_files_only(tmp_path: Path) -> None:
    loud = Speech([2.0, -3.0, 0.0])
    assert loud.samples.tolist() == [2, -3, 0]
    assert np.allclose(Speech.open(loud.save(tmp_path / "a.wav")).samples, [1, -1, 0], atol=1e-4)


@pytest.mark.parametrize("text", [">a\n>b\nACGT\n", ">b\nACGT\n>a\n", ">a\n", ">b\nAC\n>a\n;none\n>c\nGT\n"])
def test_a_fasta_record_without_bases_is_named(text: str, tmp_path: Path) -> None:
    for read in (DNA.open, DNA.open_all):
        with pytest.raises(SegmentError, match="no sequence in the record 'a'"):
            read(written(tmp_path / "a.fa", text.encode()))


def test_dna_reads_letters_as_they_are(tmp_path: Path) -> None:
    text = "; a comment\n>first  gene \r\nACGT NNRY\n\nacgtu\n>second\nMKBDHVSW"
    for path, data in [
        (tmp_path / "a.fa", text.encode()),
        (tmp_path / "a.fa.gz", gzip.compress(text.encode())),
    ]:
        records = DNA.open_all(written(path, data))
        assert records == [DNA("ACGTNNRYacgtu", "first  gene"), DNA("MKBDHVSW", "second")]
        with pytest.raises(SegmentError, match=r"several sequences.*open_all"):
            DNA.open(path)
    assert DNA.open(written(tmp_path / "b.fa", b"\xef\xbb\xbf>n\nAC\n")) == DNA("AC", "n")  # a Windows mark


# ---- extremes that are no mistakes ----


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_a_picture_of_one_pixel(suffix: str, tmp_path: Path) -> None:
    white = Image(np.full((1, 1, 3), 255, np.uint8))
    assert Image.open(white.save(tmp_path / f"a{suffix}")) == white


def test_a_picture_of_25_million_pixels(tmp_path: Path) -> None:
    large = Picture.new("L", (5_000, 5_000))
    large.paste(255, (0, 0, 5_000, 2_500))
    large.save(tmp_path / "a.png", compress_level=1)
    picture = Image.open(tmp_path / "a.png")
    assert (picture.width, picture.height) == (5_000, 5_000)
    assert picture.pixels[::2_499, 4_999, 0].tolist() == [255, 255, 0]
    upper, lower = picture.resize(2, 2).pixels
    assert upper.min() > 200 and lower.max() < 50
    back = Image.open(picture.save(tmp_path / "b.jpg"))
    far = slice(50, None, 100)  # from the edge, where JPEG rings
    assert (back.pixels[far, far] == picture.pixels[far, far]).all()


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_sound_of_one_sample_and_of_a_minute(suffix: str, tmp_path: Path) -> None:
    assert len(Speech.open(Speech([0.5]).save(tmp_path / f"a{suffix}")).samples) == 1
    if suffix != ".mp3":  # seconds of encoding
        minute = Speech(np.random.default_rng(0).uniform(-0.5, 0.5, 1_500_000), 24_000)
        assert len(Speech.open(minute.save(tmp_path / f"a{suffix}")).samples) == 1_500_000


def test_sound_is_read_whole_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Speech.open(TONE.save(tmp_path / "a.flac"))
    monkeypatch.setattr("anytoken.media_io.AUDIO_BLOCK", 999)
    assert Speech.open(tmp_path / "a.flac") == whole


# ---- values ----


def test_segments_compare_and_hash_by_value() -> None:
    copies: list[Segment] = [
        Text(STORY.text), Image(PICTURE.pixels.copy()), Speech(TONE.samples.copy()),
        Video(CLIP.frames.copy(), 4), DNA(GENE.bases, GENE.name),
    ]  # fmt: skip
    others: list[Segment] = [
        Text(STORY.text + " "), Image(PICTURE.pixels[::-1]), Speech(TONE.samples, 8_000), Video(CLIP.frames, 5),
        DNA(GENE.bases),
    ]  # fmt: skip
    segments = [STORY, PICTURE, TONE, CLIP, GENE]
    assert [one.kind for one in segments] == list(KINDS) == ["text", "image", "speech", "video", "dna"]
    for segment, copy, other in zip(segments, copies, others, strict=True):
        assert segment == copy and hash(segment) == hash(copy) and segment != other
    assert len({*segments, *copies, *others}) == 10
    assert Image(PICTURE.pixels[:1]) != Image(PICTURE.pixels[:1].reshape(-1, 1, 3))


def test_segments_show_themselves_in_a_notebook() -> None:
    assert Image.open(PICTURE._repr_png_()) == PICTURE

    def data_of(html: str, kind: str) -> bytes:
        found = re.search(rf"src='data:{kind};base64,([^']+)'", html)
        assert found is not None
        return base64.b64decode(found[1])

    sound = Speech.open(data_of(Speech(TONE.samples * 4)._repr_html_(), "audio/wav"))
    assert len(sound.samples) == 16_000 and np.abs(sound.samples).max() <= 1
    moving = Picture.open(io.BytesIO(data_of(CLIP._repr_html_(), "image/webp")))
    assert moving.n_frames == 5 and moving.size == (32, 24)  # type: ignore[attr-defined]
    shown = Text("<b>&\n")._repr_html_()
    assert "&lt;b&gt;&amp;\n" in shown and "pre-wrap" in shown
    gene = DNA("ACGTacgtN" * 100)._repr_html_()
    letters = re.findall(r"<span style='color:(#\w+)'>(\w)</span>", gene)
    assert "".join(letter for _, letter in letters) == ("ACGTacgtN" * 100)[:600] and "900 bases" in gene
    assert letters[0][0] == letters[4][0] and len({color for color, _ in letters}) == 5


def test_segments_print_short() -> None:
    assert [repr(one) for one in (PICTURE, TONE, CLIP, DNA("ACGT"), DNA("A" * 30))] == [
        "Image(32x24)", "Speech(1.00 s, 16000 Hz)", "Video(5 frames of 32x24, 4 Hz)", "DNA(ACGT, 4 bases)",
        "DNA(AAAAAAAAAAAAAAAAAAAAA..., 30 bases)",
    ]  # fmt: skip
    assert str(STORY) == STORY.text and CLIP.seconds == 1.25


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Text(3), "string.*int"),
        (lambda: Image(np.zeros((4, 4), np.uint8)), r"\[H, W, 3\].*\(4, 4\)"),
        (lambda: Image(np.zeros((4, 4, 4), np.uint8)), r"\(4, 4, 4\)"),
        (lambda: Image(np.zeros((4, 4, 3))), "uint8.*float64"),
        (lambda: Image(np.zeros((0, 4, 3), np.uint8)), r"\(0, 4, 3\)"),
        (lambda: Image.open(np.zeros((4, 4))), "uint8.*float64"),
        (lambda: Speech([]), r"at least one sample.*\(0,\)"),
        (lambda: Speech(np.zeros((9, 2))), r"mono.*\(9, 2\)"),
        (lambda: Speech([0, np.nan]), "finite"),
        (lambda: Speech([0.0], 0), "positive.*0"),
        (lambda: Video(np.zeros((0, 4, 4, 3), np.uint8)), r"\[T, H, W, 3\].*\(0, 4, 4, 3\)"),
        (lambda: Video(np.zeros((4, 4, 3), np.uint8)), r"\(4, 4, 3\)"),
        (lambda: Video(CLIP.frames, 0), "positive.*0"),
        (lambda: Video(CLIP.frames, np.inf), "finite.*inf"),
        (lambda: Video(CLIP.frames, np.nan), "positive.*nan"),
        (lambda: DNA(""), "at least one base"),
        (lambda: DNA("ACGTX"), "IUPAC.*'X' at position 5"),
        (lambda: DNA("AC-GT", "gap"), "'-' at position 3 of gap"),
        (lambda: DNA("AC GT"), "' ' at position 3"),
        (lambda: Segment.open("a"), "open"),
        (lambda: Segment().save("a"), "save"),
    ],
)
def test_wrong_values_are_named(build: Callable[[], Segment], message: str) -> None:
    with pytest.raises(SegmentError, match=message):
        build()


# ---- files that are wrong ----


def refused(path: Path, opener: Callable[[Path], Any]) -> str:
    """The one error of a file: it names the file, and no address in memory."""
    with pytest.raises(SegmentError, match=re.escape(str(path))) as caught:
        opener(path)
    assert " at 0x" not in str(caught.value) and "Errno" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("segment", "suffix"), FILES, ids=name_of)
def test_missing_empty_and_foreign_files(segment: Segment, suffix: str, tmp_path: Path) -> None:
    for opener in (type(segment).open, open_segment):
        missing = refused(tmp_path / f"missing{suffix}", opener)
        assert "No such file" in missing
        (tmp_path / f"folder{suffix}").mkdir(exist_ok=True)
        assert "directory" in refused(tmp_path / f"folder{suffix}", opener)
        empty = refused(written(tmp_path / f"empty{suffix}", b""), opener)
        assert re.search("empty|no sequence|end-of-stream", empty)
        refused(written(tmp_path / f"noise{suffix}", NOISE), opener)


CUT = [(segment, suffix) for segment, suffix in FILES if not isinstance(segment, Text)]


@pytest.mark.parametrize(("segment", "suffix"), CUT, ids=name_of)
def test_a_file_cut_in_half_is_refused_or_read_as_far_as_documented(
    segment: Segment, suffix: str, tmp_path: Path
) -> None:
    path = segment.save(tmp_path / f"a{suffix}")
    whole = type(segment).open(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if suffix.lower() in (".wav", ".mp3"):
        part = Speech.open(path)
        assert isinstance(whole, Speech) and 0.2 < part.seconds < 0.6
        assert np.allclose(part.samples, whole.samples[: len(part.samples)], atol=2e-3)
    elif suffix.lower() in (".fasta", ".fa", ".fna"):  # half a sequence is a sequence
        part = DNA.open(path)
        assert isinstance(whole, DNA) and whole.bases.startswith(part.bases) and part.name == whole.name
    else:
        refused(path, type(segment).open)


@pytest.mark.parametrize(("segment", "suffix"), FILES, ids=name_of)
def test_damaged_files_open_or_are_refused_and_nothing_else(
    segment: Segment, suffix: str, tmp_path: Path
) -> None:
    """Bytes of the file replaced and cut off by chance: libraries fail in many ways, we fail in one."""
    data, chance = segment.save(tmp_path / f"a{suffix}").read_bytes(), np.random.default_rng(0)
    caught = 0
    for _ in range(12):
        damaged = np.frombuffer(data, np.uint8).copy()
        for limit in (len(data), 80):  # anywhere, and in the header
            places = chance.integers(0, min(limit, len(data)), chance.integers(1, 6))
            damaged[places] = chance.integers(0, 256, len(places))
        length = len(data) if chance.random() < 0.7 else chance.integers(1, len(data))
        try:
            opened = type(segment).open(written(tmp_path / f"b{suffix}", damaged[:length].tobytes()))
            assert type(opened) is type(segment)
        except SegmentError:
            caught += 1
    assert caught or suffix.lower() in (".wav", ".mp3", ".bmp")  # streamed, or plain pixels


@pytest.mark.parametrize(
    ("segment", "suffix"), [(one, suffix) for one, suffix in FILES if suffix.islower()], ids=name_of
)
def test_a_file_of_another_kind(segment: Segment, suffix: str, tmp_path: Path) -> None:
    path = segment.save(tmp_path / f"a{suffix}")
    convertible = {segment.kind}
    if suffix in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"):
        convertible |= {
            "image",
            "video",
        }  # a picture is a video of one frame, an animation begins with a picture
    if suffix in (".fasta", ".fa"):
        convertible |= {"text"}
    for kind in KINDS:
        if kind in convertible:
            assert KINDS[kind].open(path).kind == kind
        else:
            refused(path, KINDS[kind].open)


def test_words_are_no_dna(tmp_path: Path) -> None:
    assert "'e' at position 2" in refused(written(tmp_path / "a.txt", b"hello there"), DNA.open)
    assert "'9' at position 3 of gene" in refused(written(tmp_path / "a.fa", b">gene\nAC9T\n"), DNA.open)
    two = written(tmp_path / "b.fa", b">one\nAC*T\n>two\nACGT\n")
    assert "'*' at position 3 of one" in refused(two, DNA.open_all)


def test_a_sound_of_no_length_and_one_of_no_numbers(tmp_path: Path) -> None:
    for suffix in ("wav", "flac", "ogg"):
        soundfile.write(tmp_path / f"a.{suffix}", np.zeros(0), 16_000)
        assert re.search(
            "length is zero|is empty|not readable", refused(tmp_path / f"a.{suffix}", Speech.open)
        )
    soundfile.write(tmp_path / "nan.wav", np.full(9, np.nan), 16_000, subtype="FLOAT")
    assert "finite" in refused(tmp_path / "nan.wav", Speech.open)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_001, 12_000, 60_000])
def test_a_picture_bomb_is_not_unpacked(side: int, tmp_path: Path) -> None:
    bomb = bytearray(as_png(Picture.new("L", (8, 8))))
    bomb[16:24] = side.to_bytes(4, "big") * 2  # the header's width and height
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    for suffix, opener in [(".png", Image.open), (".webp", open_segment), (".gif", Video.open)]:
        assert "pixels" in refused(written(tmp_path / f"a{suffix}", bytes(bomb)), opener)


def test_a_picture_that_fails_late_is_refused(tmp_path: Path) -> None:
    """PIL reads no pixels before it is asked to, so a picture given as an object may turn out to be cut."""
    data = as_png(Picture.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)))
    with pytest.raises(SegmentError, match=r"the given image.*truncated"):
        Image.open(Picture.open(io.BytesIO(data[: len(data) // 2])))
    with pytest.raises(SegmentError, match="the given bytes"):
        Image.open(data[: len(data) // 2])
    with pytest.raises(SegmentError, match="the given bytes"):
        Speech.open(b"RIFF")


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_title_that_is_no_utf8_does_not_spoil_a_video(suffix: str, tmp_path: Path) -> None:
    data = CLIP.save(tmp_path / f"a{suffix}").read_bytes()
    assert b"Lavf" in data  # the name of the program that wrote the file
    renamed = written(tmp_path / f"b{suffix}", data.replace(b"Lavf", b"\xff\xfeav"))
    assert Video.open(renamed) == Video.open(tmp_path / f"a{suffix}")


def test_a_header_that_lies_about_the_length_asks_for_no_memory(tmp_path: Path) -> None:
    data = bytearray(TONE.save(tmp_path / "a.mp3").read_bytes())
    mark = max(data.find(b"Xing"), data.find(b"Info"))
    assert mark > 0
    data[mark + 8 : mark + 12] = b"\x7f\xff\xff\xff"  # two thousand million frames, terabytes of samples
    assert 0.9 < Speech.open(written(tmp_path / "b.mp3", bytes(data))).seconds < 1.2


def test_a_video_without_pictures(tmp_path: Path) -> None:
    sound = TONE.save(tmp_path / "a.ogg").rename(tmp_path / "a.mkv")
    assert "no video stream" in refused(sound, Video.open)


@pytest.mark.parametrize("name", ["a.xyz", "a", "png", "a.fa.zip", "a.pngx"])
def test_unknown_suffixes_list_the_known(name: str, tmp_path: Path) -> None:
    message = refused(written(tmp_path / name, b"ACGT"), open_segment)
    for suffix in (
        ".png",
        ".jpg",
        ".webp",
        ".wav",
        ".flac",
        ".mp3",
        ".mp4",
        ".webm",
        ".gif",
        ".fasta",
        ".fa.gz",
        ".txt",
    ):
        assert suffix in message


# ---- saving ----


@pytest.mark.parametrize(
    ("segment", "name", "message"),
    [
        (PICTURE, "a.wav", r"image as \.wav; allowed: \.png \.jpg"),
        (PICTURE, "a", "without suffix; allowed"),
        (TONE, "a.png", r"speech as \.png; allowed: \.wav"),
        (CLIP, "a.avi", r"video as \.avi; allowed: \.mp4 \.webm \.gif \.webp"),
        (Image(np.zeros((1, 16_384, 3), np.uint8)), "a.webp", r"16384x1.*\.webp.*16383.*resize"),
        (Image(np.zeros((65_501, 1, 3), np.uint8)), "a.jpg", r"1x65501.*\.jpg.*65500"),
        (Video(np.zeros((1, 1, 65_536, 3), np.uint8)), "a.gif", r"65536x1.*\.gif.*65535"),
        (Video(np.zeros((1, 2, 40_000, 3), np.uint8)), "a.mp4", r"40000x2.*\.mp4"),
        (Speech([0.0], 11_000), "a.mp3", r"11000 Hz as \.mp3.*8000.*resample\(48000\)"),
        (Speech([0.0], 250_000), "a.ogg", r"250000 Hz as \.ogg.*resample\(48000\)"),
        (Speech([0.0], 700_000), "a.flac", r"700000 Hz as \.flac.*resample\(48000\)"),
    ],
    ids=name_of,
)
def test_a_save_that_fails_says_why_and_leaves_nothing(
    segment: Segment, name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SegmentError, match=message):
        segment.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    old = written(tmp_path / name, b"old")
    with pytest.raises(SegmentError, match=message):
        segment.save(old)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(("segment", "suffix"), FILES, ids=name_of)
def test_saving_replaces_a_file_whole_and_a_folder_never(
    segment: Segment, suffix: str, tmp_path: Path
) -> None:
    path = segment.save(written(tmp_path / f"a{suffix}", b"old" * 100_000))
    assert type(type(segment).open(path)) is type(segment) and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size < 100_000 and path.stat().st_mode & 0o444 == 0o444
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        segment.save(path)
    assert list(tmp_path.iterdir()) == [path] and list(path.iterdir()) == []


def test_text_that_no_file_can_hold_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        Text("ok \ud800").save(tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []
