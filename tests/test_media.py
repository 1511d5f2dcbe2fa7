"""Media as players show them: turned, in time, with square pixels; deep grey, integer samples, opposite channels."""

import io
import struct
import zlib
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from av.stream import Disposition
from PIL import Image as Picture
from PIL import PngImagePlugin

from anytoken.media_io import _read_channels
from anytoken.segments import DNA, Image, SegmentError, Speech, Text, Video, open_segment
from anytoken.tokenizers.video import fit_clip
from anytoken.utils.errors import MediaLimitError
from anytoken.utils.limits import media_limits

RED, GREY = (250, 0, 0), (120, 120, 120)


def flat(colour: tuple[int, int, int], height: int = 32, width: int = 48) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def corner() -> np.ndarray:
    """Grey with a red upper left quarter."""
    pixels = flat(GREY)
    pixels[:16, :24] = RED
    return pixels


def write_film(
    path: Path,
    frames: list[np.ndarray],
    times: list[int] | None = None,
    aspect: Fraction | None = None,
    codec: str = "libx264",
) -> Path:
    """Frames as a file; times in tenths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (times or range(len(frames)))[index], Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.shape == wanted.shape and float(np.abs(found.astype(int) - wanted).mean()) < 6


# ---- video ----


@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)]
)
def test_a_video_is_turned_as_its_display_matrix_says(
    matrix: tuple[int, ...], turns: int, tmp_path: Path
) -> None:
    path = write_film(tmp_path / "a.mp4", [corner()] * 3)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44  # of the matrix in a track's header
    a, b, c, d = (one << 16 for one in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    clip = Video.open(path)
    assert len(clip.frames) == 3 and near(clip.frames[1], np.rot90(corner(), turns))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_frames_of_a_variable_rate_are_taken_by_their_times(suffix: str, tmp_path: Path) -> None:
    """One red frame for three seconds, then ten grey ones in one second: red is six of eight frames, not one."""
    codec = "libvpx" if suffix == ".webm" else "libx264"
    times = [0, *range(30, 40)]
    clip = Video.open(
        write_film(tmp_path / f"a{suffix}", [flat(RED), *[flat(GREY)] * 10], times, codec=codec)
    )
    assert clip.seconds == pytest.approx(4, abs=0.05) and clip.frame_rate_hz == pytest.approx(10, rel=0.01)
    assert near(clip.frames[29], flat(RED)) and near(clip.frames[30], flat(GREY))
    red = [frame for frame in fit_clip(clip, 48) if near(frame, flat(RED, *frame.shape[:2]))]
    assert len(red) == 6


def test_frames_of_an_animation_without_a_common_step_are_taken_by_their_times(tmp_path: Path) -> None:
    frames = [Picture.fromarray(flat(RED)), *[Picture.fromarray(flat((9 * n, 0, 0))) for n in range(10)]]
    frames[0].save(
        tmp_path / "a.webp",
        save_all=True,
        append_images=frames[1:],
        duration=[3000, *[101] * 10],
        lossless=True,
    )
    clip = Video.open(tmp_path / "a.webp")
    assert clip.seconds == pytest.approx(4.01, rel=0.02)
    assert clip.frames[int(2.9 * clip.frame_rate_hz), 0, 0, 0] == 250 and clip.frames[-1, 0, 0, 0] == 81


def test_the_film_is_chosen_and_not_its_cover(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mkv", [flat(RED)] * 4)
    with av.open(str(film)) as source, av.open(str(tmp_path / "a.mkv"), "w") as target:
        cover = target.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        copied = target.add_stream_from_template(source.streams.video[0])
        cover.disposition, copied.disposition = Disposition(0), Disposition.default
        picture = av.VideoFrame.from_ndarray(flat(GREY, 64, 64), format="rgb24")
        target.mux([*cover.encode(picture), *cover.encode()])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = copied
                target.mux(packet)
    clip = Video.open(tmp_path / "a.mkv")
    assert clip.frames.shape == (4, 32, 48, 3) and near(clip.frames[0], flat(RED))


def test_a_recording_with_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as target:
        sound, cover = target.add_stream("aac", rate=16_000), target.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        target.mux(cover.encode(av.VideoFrame.from_ndarray(flat(GREY, 64, 64), format="rgb24")))
        target.mux([*cover.encode(), *sound.encode(frame), *sound.encode()])
    with pytest.raises(SegmentError, match="no video stream but a cover image"):
        Video.open(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("aspect", "shape"), [(Fraction(2), (32, 96)), (Fraction(1, 2), (64, 48)), (Fraction(16, 15), (32, 51))]
)
def test_pixels_become_square(aspect: Fraction, shape: tuple[int, int], tmp_path: Path) -> None:
    clip = Video.open(write_film(tmp_path / "a.mp4", [corner()] * 2, aspect=aspect))
    assert clip.frames.shape == (2, *shape, 3)
    wanted = Image(corner()).resize(*shape).pixels
    assert np.abs(clip.frames[0].astype(int) - wanted).mean() < 8


def test_frames_that_change_size_midway_have_the_first_size(tmp_path: Path) -> None:
    parts = [
        write_film(tmp_path / "a.ts", [flat(RED)] * 5),
        write_film(tmp_path / "b.ts", [flat(GREY, 64, 96)] * 5),
    ]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    clip = Video.open(joined)
    assert clip.frames.shape == (10, 32, 48, 3) and clip.frame_rate_hz == 10
    assert near(clip.frames[0], flat(RED)) and near(clip.frames[9], flat(GREY))


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.ts", [flat(RED)] * 5)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{film}\n#EXT-X-ENDLIST\n"
    for words in (playlist, f"ffconcat version 1.0\nfile {film}\n"):
        (tmp_path / "a.mp4").write_text(words)
        with pytest.raises(SegmentError, match="not a readable video"):
            Video.open(tmp_path / "a.mp4")


# ---- images ----

RAMP = np.tile(np.linspace(0, 65_535, 64).astype(np.uint16), (4, 1))
GREYS = (RAMP[0] / 257).astype(np.uint8)


def png16(values: np.ndarray, *chunks: bytes) -> bytes:
    """A 16-bit grey PNG with further chunks after its header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)
    more = b"".join(chunk(one[:4], one[4:]) for one in chunks)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + more
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def encoded(picture: Picture.Image, form: str = "TIFF") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def tiff16(order: str) -> bytes:
    """A big- or little-endian 16-bit grey TIFF with one strip."""
    mark, data = {"<": b"II", ">": b"MM"}[order], RAMP.astype(f"{order}u2").tobytes()
    tags = [
        (256, 64),
        (257, 4),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 4),
        (279, len(data)),
    ]
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value) for tag, value in tags
    )
    head = mark + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        png16(RAMP), png16(RAMP, b"tRNS\x12\x34"), tiff16("<"), tiff16(">"),
        encoded(Picture.fromarray((RAMP / 65_535).astype(np.float32))),
        encoded(Picture.fromarray(RAMP.astype(np.float32))),
        encoded(Picture.fromarray(RAMP.astype(np.int32))),
    ],
    ids=["png", "png with a clear grey", "little endian", "big endian", "float to 1", "float", "32 bits"],
)  # fmt: skip
def test_deep_grey_is_scaled_from_its_range(data: bytes) -> None:
    pixels = Image.open(data).pixels
    assert (pixels == GREYS[:, None]).all() and pixels.shape == (4, 64, 3)


def test_a_dark_picture_of_16_bits_stays_dark_and_its_clear_grey_is_white() -> None:
    assert Image.open(png16(RAMP // 300)).pixels.max() == 0
    pixels = Image.open(png16(RAMP, b"tRNS" + int(RAMP[0, 9]).to_bytes(2, "big"))).pixels
    assert (pixels[:, 9] == 255).all() and (np.delete(pixels, 9, 1) == np.delete(GREYS, 9)[:, None]).all()


def test_a_png_with_large_texts_opens_and_is_turned_as_a_text_says() -> None:
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt("workflow", "x" * 3_000_000, zip=True)
    info.add_text("prompt", "y" * 3_000_000, zip=True)
    info.add_itxt("XML:com.adobe.xmp", '<x xmlns:tiff="t" tiff:Orientation="6"/>')
    Picture.fromarray(corner()).save(buffer, "PNG", pnginfo=info)
    assert (Image.open(buffer.getvalue()).pixels == np.rot90(corner(), -1)).all()


def test_formats_that_start_programs_are_not_images() -> None:
    """Pillow hands EPS to Ghostscript, which is a program of its own."""
    with pytest.raises(SegmentError, match="not a readable image"):
        Image.open(encoded(Picture.fromarray(corner()), "EPS"))


# ---- audio ----

WAVE = 0.5 * np.sin(np.arange(4_000) / 7)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint8, np.uint16])
def test_integer_samples_are_scaled_by_their_range(dtype: type) -> None:
    half = 2.0 ** (8 * np.dtype(dtype).itemsize - 1)
    offset = half if np.dtype(dtype).kind == "u" else 0
    speech = Speech((WAVE * half + offset).astype(dtype))
    assert np.abs(speech.samples - WAVE).max() <= 1.01 / half + 1e-7 and speech.samples.dtype == np.float32


def test_integers_without_a_range_are_refused() -> None:
    assert Speech([0, 1, -1]).samples.tolist() == [0, 1, -1]
    with pytest.raises(SegmentError, match="received int64 up to 15999: divide"):
        Speech((WAVE * 32_000).astype(np.int64))


def test_channels_of_opposite_phase_are_not_silence(tmp_path: Path) -> None:
    for second, wanted in [
        (-WAVE, WAVE),
        (-0.98 * WAVE, WAVE),
        (0 * WAVE, WAVE / 2),
        (-0.5 * WAVE, WAVE / 4),
    ]:
        soundfile.write(tmp_path / "a.flac", np.stack([WAVE, second], 1), 16_000)
        assert np.abs(Speech.open(tmp_path / "a.flac").samples - wanted).max() < 1e-3
    soundfile.write(tmp_path / "a.wav", np.zeros((100, 2)), 16_000)
    assert Speech.open(tmp_path / "a.wav").samples.max() == 0


def test_blocks_that_are_short_midway_join_to_all_samples() -> None:
    """A damaged mp3 is read so: libsndfile skips what it cannot decode."""
    parts = [np.full((length, 2), length, np.float32) for length in (5, 2, 4)]

    class Damaged:
        channels, samplerate = 2, 16_000

        def read(self, *given: object, **options: object) -> np.ndarray:
            return parts.pop(0) if parts else np.empty((0, 2), np.float32)

    samples, _ = _read_channels(Damaged(), None, "a.mp3")
    assert samples.tolist() == [5] * 5 + [2] * 2 + [4] * 4


@pytest.mark.parametrize(("suffix", "codec"), [("webm", "libopus"), ("mp4", "aac")])
def test_recordings_of_browsers_are_speech(suffix: str, codec: str) -> None:
    """Browsers record webm or mp4, with the pair of channels of the microphone."""
    tone, file = np.sin(np.arange(24_000) / 48_000 * 2 * np.pi * 440).astype(np.float32) / 2, io.BytesIO()
    with av.open(file, "w", suffix) as container:
        stream = container.add_stream(codec, rate=48_000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([tone, -tone]), "fltp", "stereo")
        frame.sample_rate = 48_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    data = file.getvalue()
    clip = Speech.open(data)
    assert clip.sample_rate_hz == 48_000 and abs(clip.seconds - 0.5) < 0.05
    assert 0.2 < np.sqrt(np.square(clip.samples[4_800:-4_800]).mean()) < 0.45, (
        "opposite phases are not silence"
    )
    with media_limits(max_seconds=0.2), pytest.raises(MediaLimitError, match="max_seconds"):
        Speech.open(data)
    for damaged in (data[: len(data) // 3], data[:64]):
        with suppress(SegmentError):
            Speech.open(damaged)


def test_a_film_without_sound_is_no_speech(tmp_path: Path) -> None:
    with pytest.raises(SegmentError, match="holds no audio"):
        Speech.open(Video(np.stack([corner()] * 2)).save(tmp_path / "silent.mp4"))


# ---- where media come from ----


def test_every_kind_opens_bytes_and_files(tmp_path: Path) -> None:
    segments = [Text("hi"), Image(corner()), Speech(WAVE), Video(np.stack([corner()] * 2)), DNA("ACGT", "x")]
    names = ["a [1].txt", "b*.png", "c[!a].wav", "d?.mp4", "e [x].fa.gz"]
    for segment, name in zip(segments, names, strict=True):
        path = segment.save(tmp_path / name)
        whole = type(segment).open(path)
        assert open_segment(path) == whole == type(segment).open(path.read_bytes())
        with path.open("rb") as file:
            assert type(segment).open(file) == whole
        with path.open("rb") as file:
            assert open_segment(file) == whole
        assert type(segment).open(io.BytesIO(path.read_bytes())) == whole
        with pytest.raises(SegmentError, match="is empty"):
            type(segment).open(io.BytesIO())


@pytest.mark.parametrize("kind", [Text, Image, Speech, Video, DNA])
def test_devices_and_pipes_are_refused_at_once(kind: type, tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(SegmentError, match="not a regular file"):
            kind.open(path)
