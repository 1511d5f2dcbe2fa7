"""The table of limits: every kind of bomb ends in one error that names the limit, before it has filled the memory."""

import gzip
import io
import json
import logging
import struct
import tarfile
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image as Picture

import anytoken
from anytoken import DNA, Image, MediaLimitError, MediaLimits, Speech, Text, Video, media_limits
from anytoken.data.sources import read_records
from anytoken.data.validate import Census, check_source
from anytoken.segments import open_segment
from anytoken.utils.limits import UNITS, current_limits, parse_limits

MB = 1 << 20


def peak_mb(act) -> float:
    """Python's and numpy's peak of memory while a function runs."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1] / MB
    finally:
        tracemalloc.stop()


def refuse(open_, source) -> None:
    with pytest.raises(MediaLimitError):
        open_(source)


def gif(width: int, height: int, count: int, hundredths: int = 10) -> bytes:
    """Frames of a whole canvas, each written as one pixel that changes."""
    frames = b"".join(
        b"!\xf9\x04\x04" + struct.pack("<H", hundredths) + b"\0\0,"
        + struct.pack("<HHHHB", n % width, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\0"
        for n in range(count)
    )  # fmt: skip
    head = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes([0, 0, 0, 255, 255, 255])
    return b"GIF89a" + head + frames + b";"


def flac(seconds: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(16_000 * seconds, np.int16), 16_000, format="FLAC")
    return buffer.getvalue()


def film(width: int, height: int, count: int) -> bytes:
    """An mp4 of one colour, whose brightness tells the frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "30"}
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes([128]) * plane.buffer_size)
        for index in range(count):
            frame.planes[0].update(bytes([16 + index * 200 // count]) * frame.planes[0].buffer_size)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Picture.new("L", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


FASTA = gzip.compress(b">x\n" + b"A" * 400_000 + b"\n")
LINES = gzip.compress(b">x\n" + b"ACGTACGTAC\n" * 40_000)
MANY = gzip.compress(b">x\nACGTACGTAC\n" * 40_000)


@pytest.mark.parametrize(
    ("limit", "value", "open_", "found"),
    [
        ("max_pixels", 9_999, lambda: Image.open(png(100)), "10,000 pixels"),
        ("max_pixels", 9_999, lambda: Image.open(Picture.new("L", (100, 100))), "10,000 pixels"),
        ("max_pixels", 9_999, lambda: Video.open(gif(100, 100, 3)), "10,000 pixels"),
        ("max_pixels", 4_000, lambda: Video.open(film(64, 64, 3)), "4,096 pixels"),
        ("max_frames", 50, lambda: Video.open(gif(8, 8, 60)), "51 or more frames"),
        ("max_frames", 50, lambda: Video.open(film(16, 16, 60)), "51 or more frames"),
        ("max_video_pixels", 4_000, lambda: Video.open(gif(8, 8, 200)), "4,032 or more pixels in all frames"),
        ("max_video_pixels", 9_999, lambda: Video.open(film(16, 16, 60)), "10,240 or more pixels in all frames"),
        ("max_seconds", 5.5, lambda: Video.open(gif(8, 8, 60)), "6 seconds"),
        ("max_seconds", 1.5, lambda: Video.open(film(16, 16, 60)), "2 seconds"),
        ("max_seconds", 9.5, lambda: Speech.open(flac(10)), "10 or more seconds"),
        ("max_decoded_bytes", 600_000, lambda: Speech.open(flac(10)), "or more bytes of decoded samples"),
        ("max_letters", 99_999, lambda: DNA.open(FASTA), "or more letters"),
        ("max_letters", 99_999, lambda: DNA.open(LINES), "100,000 or more letters"),
        ("max_letters", 99_999, lambda: DNA.open_all(MANY), "100,000 or more letters"),
        ("max_letters", 99, lambda: Text.open(b"word " * 20), "100 letters"),
        ("max_bytes", 99, lambda: Text.open(b"word " * 20), "100 bytes"),
        ("max_bytes", 99, lambda: Text.open(io.BytesIO(b"word " * 20)), "100 bytes"),
    ],
)  # fmt: skip
def test_a_medium_over_a_limit_is_one_error_that_says_all(
    limit: str, value: float, open_, found: str
) -> None:
    with media_limits(**{limit: value}), pytest.raises(MediaLimitError) as caught:
        open_()
    message, allowed = str(caught.value), f"at most {value:,} are taken ({limit})"
    assert found in message and allowed in message and f"media_limits({limit}=...)" in message
    assert f"--limits {limit}=" in message and isinstance(caught.value, ValueError)
    assert (caught.value.limit, caught.value.allowed) == (limit, value) and caught.value.found > value
    open_()  # what the limit refused is within the default


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no room
    with media_limits(max_bytes=MB):
        assert peak_mb(lambda: refuse(Image.open, path)) < 4


@pytest.mark.parametrize(
    ("data", "open_", "limits"),
    [
        (gzip.compress(b">x\n" + b"A" * 30 * MB), DNA.open, {"max_letters": MB}),
        (gzip.compress(b">x\n" + (b"A" * 60 + b"\n") * (MB // 2)), DNA.open, {"max_letters": MB}),
        (flac(600), Speech.open, {"max_seconds": 60}),
        (gif(1_000, 1_000, 60), Video.open, {"max_frames": 20}),
    ],
    ids=["one line", "lines", "flac", "gif"],
)
def test_bombs_stop_before_they_fill_the_memory(data: bytes, open_, limits: dict[str, int]) -> None:
    """Each would be 30 MB or more."""
    with media_limits(**limits):
        assert peak_mb(lambda: refuse(open_, data)) < 14


@pytest.mark.parametrize(
    ("data", "rate"), [(film(320, 240, 300), 30), (gif(320, 240, 300), 10)], ids=["mp4", "gif"]
)
def test_a_long_video_is_kept_at_a_lower_rate_and_never_whole_in_memory(
    data: bytes, rate: float, caplog: pytest.LogCaptureFixture
) -> None:
    """300 frames of 320x240 are 66 MB; with 8 MB allowed, one in nine is kept and no more are ever held."""
    clips = []
    with media_limits(max_decoded_bytes=8 * MB), caplog.at_level(logging.WARNING):
        peak = peak_mb(lambda: clips.append(Video.open(data)))
    (clip,) = clips
    assert len(clip.frames) == 34 and clip.frame_rate_hz == pytest.approx(rate / 9)
    assert clip.seconds == pytest.approx(300 / rate, rel=0.03)
    assert peak < 8 + 6 and "one in 9 is kept" in caplog.text
    if rate == 30:
        assert np.all(np.diff(clip.frames.mean((1, 2, 3))) > 2)  # frames of the whole length


# ---- archives and lines ----


def sparse_tar(size: int) -> bytes:
    """A member of zeros that the archive does not hold, in GNU's old form."""
    member = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    member[156:157] = b"S"
    member[124:136] = member[398:410] = b"%011o\0" % 512
    member[386:398] = b"%011o\0" % 0
    member[483:495] = b"%011o\0" % size
    total = sum(member[:148]) + sum(member[156:512]) + 8 * 32
    member[148:156] = b"%06o\0 " % total
    return bytes(member) + bytes(512 * 20)


def test_a_sparse_member_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(sparse_tar(3_700_000_000))
    with pytest.raises(MediaLimitError, match=r"a\.png in a\.tar holds 3,700,000,000 bytes.*max_bytes"):
        list(read_records(tmp_path / "a.tar"))


def test_a_header_of_a_tar_is_not_unpacked(tmp_path: Path) -> None:
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.XHDTYPE, 64 * MB
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(long.tobuf(tarfile.GNU_FORMAT) + bytes(64 * MB)))
    with pytest.raises(ValueError, match="a header of 67,108,864 bytes"):
        list(read_records(tmp_path / "a.tar.gz"))


def test_a_line_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"a" * (4 * MB)))
    with media_limits(max_bytes=MB), pytest.raises(MediaLimitError, match=r"line 1 holds.*max_bytes"):
        list(read_records(tmp_path / "a.jsonl.gz"))


def test_the_check_of_data_counts_media_over_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(100))
    (tmp_path / "a.flac").write_bytes(flac(10))
    lines = [{"text": "a", "image": "a.png"}, {"text": "b", "speech": "a.flac"}, {"text": "c"}]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    census = Census()
    with media_limits(max_pixels=100, max_seconds=1):
        faults = dict(check_source(tmp_path / "set.jsonl", census, decode=True))
    assert census.bad == {"over a limit": 2} and list(faults) == ["line 1", "line 2"]
    assert "max_pixels" in str(faults["line 1"]) and "max_seconds" in str(faults["line 2"])
    assert not dict(check_source(tmp_path / "set.jsonl", Census(), decode=True))


# ---- the table ----


def test_limits_are_those_of_the_block_they_are_set_in() -> None:
    before = current_limits()
    with media_limits(max_pixels=5) as outer:
        assert current_limits() is outer and outer.max_seconds == before.max_seconds
        with media_limits(max_seconds=7), pytest.raises(MediaLimitError):
            Image.open(np.zeros((9, 9, 3), np.uint8))._repr_png_() and Image.open(png(9))
        with media_limits(MediaLimits()):
            assert Image.open(png(9)).width == 9
    assert current_limits() is before
    assert anytoken.MediaLimits is MediaLimits and set(UNITS) == set(vars(before))


def test_a_plug_in_that_opens_media_has_the_limits_of_its_caller() -> None:
    class Palette(Image):
        kind = "palette"

    with media_limits(max_pixels=5), pytest.raises(MediaLimitError):
        Palette.open(png(9))


def test_wrong_limits_are_named() -> None:
    for wrong in (0, -1, True, "9"):
        with pytest.raises(ValueError, match="max_pixels is a positive number"):
            MediaLimits(max_pixels=wrong)  # type: ignore[arg-type]
    with (
        pytest.raises(ValueError, match=r"'max_size' is no limit; allowed: max_bytes"),
        media_limits(max_size=3),
    ):
        pass
    assert parse_limits(["max_pixels=1e6, max_seconds=2.5", "max_frames=9"]) == {
        "max_pixels": 1_000_000, "max_seconds": 2.5, "max_frames": 9,
    }  # fmt: skip
    for words in (["max_pixels"], ["max_pixels=many"], [""]):
        with pytest.raises(ValueError, match="NAME=NUMBER"):
            parse_limits(words)


def test_a_larger_limit_takes_more(tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_bytes(flac(20))
    with media_limits(max_seconds=10):
        refuse(open_segment, tmp_path / "a.flac")
        with media_limits(max_seconds=20):
            assert open_segment(tmp_path / "a.flac") == Speech(np.zeros(320_000), 16_000)
