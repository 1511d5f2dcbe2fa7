"""Reading and writing the files that segments come from and go to: images, animations, audio, text.

Plain functions from a file's bytes to arrays and back, over Pillow and libsndfile; `video_io.py` has the
containers. Whatever is wrong with a file is one `SegmentError` that names it and says what is expected, and what it
decodes to is counted against the limits in force. Files are written whole or not at all.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage

from anytoken.utils.errors import MediaLimitError, SegmentError, reason
from anytoken.utils.limits import current_limits
from anytoken.video_io import REPEATED_PIXELS, AudioTrack, Timing, constant_rate, sample

MAX_SIDE_PX = {".webp": 16_383, ".jpg": 65_500, ".jpeg": 65_500, ".gif": 65_535}  # what the formats can say
AUDIO_BLOCK = 1 << 20  # samples read at once: a header that lies about the length cannot ask for all memory
CANCELLED = 0.01  # of the loudest channel's energy: below, averaging has cancelled channels of opposite phase
MAX_RATIO = 1000  # the largest term of a ratio of sample rates
MIN_STEP_MS = 20  # no player shows the frames of a gif faster
# Formats of pixels alone: others that Pillow opens start programs (EPS) or read further files.
FORMATS = "PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF", "PCX"
IMAGE_HEADS = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
PNG_ORIENTATION = (
    b"XML:com.adobe.xmp\0",
    b"Raw profile type exif\0",
)  # texts that say how an image is turned
RANGES = {"I;16": 65_535, "I;16L": 65_535, "I;16B": 65_535, "I;16N": 65_535, "I": None, "F": None}
_IMAGE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, ArithmeticError, struct.error,
    zlib.error, PILImage.DecompressionBombError,
)  # fmt: skip
TIMING = re.compile(r"(\d{1,9}) frames at (\d[\d.e+-]*) Hz")
Given = str | Path | bytes | BinaryIO  # what openers take: a path, encoded bytes, a file opened with "rb"


# ---- bytes ----


@contextmanager
def opened(source: Given, kind: str) -> Iterator[tuple[IO[bytes], object]]:
    """A path, bytes or binary file as a seekable file, and its name for errors.

    SegmentError if it cannot be read, is empty, or is no regular file: a device never ends, a pipe may never begin.
    TypeError for anything else. What is held in memory has at most max_bytes.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        yield _held(bytes(source), "the given bytes", kind), "the given bytes"
    elif isinstance(source, str | os.PathLike):
        with _regular_file(source, kind) as file:
            yield file, source
    elif hasattr(source, "read"):
        name = source_name(source)
        data = source.read(int(current_limits().max_bytes) + 1)
        yield _held(data.encode() if isinstance(data, str) else data, name, kind), name
    else:
        raise TypeError(
            f"{type(source).__name__} is not {kind}: expected a path, bytes, or a file opened with 'rb'"
        )


def source_name(source: Any) -> object:
    """What errors call a source."""
    if isinstance(source, str | Path):
        return source
    return getattr(source, "name", "the given bytes" if isinstance(source, bytes) else "the given file")


def read_bytes(source: Given, kind: str) -> tuple[bytes, object]:
    """All bytes of what `opened` takes, at most max_bytes, and its name for errors."""
    with opened(source, kind) as (file, name):
        return read_rest(file, name), name


def read_rest(file: IO[bytes], name: object) -> bytes:
    """What is left of a file; MediaLimitError if that is more than max_bytes."""
    data = file.read(int(current_limits().max_bytes) + 1)
    current_limits().check("max_bytes", len(data), name, stopped=True)
    return data


def _held(data: bytes, name: object, kind: str) -> IO[bytes]:
    if not data:
        raise SegmentError(f"{name} is empty: there is no {kind} in it.")
    current_limits().check("max_bytes", len(data), name)
    return io.BytesIO(data)


def _regular_file(path: str | os.PathLike[str], kind: str) -> IO[bytes]:
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SegmentError(f"{str(path)!r:.300} cannot be read as {kind}: {why}.") from error
    found = os.fstat(file.fileno())
    try:
        if not stat.S_ISREG(found.st_mode):
            raise SegmentError(
                f"{path} is not a regular file but a device or pipe; pass its content as bytes."
            )
        if not found.st_size:
            raise SegmentError(f"{path} is empty: there is no {kind} in it.")
    except SegmentError:
        file.close()
        raise
    return file


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; of a pipe that nobody writes to, without waiting for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def is_below(path: str | Path, folders: Sequence[str | Path | None]) -> bool:
    """Whether a path lies in one of the folders once links are followed."""
    real = os.path.realpath(path)
    allowed = (os.path.realpath(folder).rstrip(os.sep) + os.sep for folder in folders if folder is not None)
    return any(real.startswith(folder) for folder in allowed)


def save_suffix(path: str | Path, allowed: tuple[str, ...], what: str) -> str:
    """The suffix to save under, in lower case; SegmentError if it is none of `allowed`."""
    suffix = Path(path).suffix.lower()
    if suffix not in allowed:
        raise SegmentError(
            f"Cannot save {what} as {suffix or 'a file without suffix'}; allowed: {' '.join(allowed)}."
        )
    return suffix


# ---- images and animations ----


def is_image(data: bytes) -> bool:
    """Whether bytes begin like an image or animation, and not like a video container."""
    return data.startswith(IMAGE_HEADS) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def decode_image(data: bytes, name: object, kind: str) -> PILImage.Image:
    """An image or animation whose first frame is fully read; SegmentError for damage, or more than max_pixels."""
    try:
        image = PILImage.open(io.BytesIO(_without_texts(data)), formats=FORMATS)
        current_limits().check("max_pixels", image.width * image.height, name)
        image.load()
    except PILImage.DecompressionBombError as error:
        raise SegmentError(
            f"{name}: {error} For pixels beyond max_pixels and PIL.Image.MAX_IMAGE_PIXELS, raise both."
        ) from error
    except _IMAGE_ERRORS as error:
        if isinstance(error, SegmentError):
            raise
        expected = "gif or animated webp" if kind == "video" else "png, jpg or webp"
        raise SegmentError(
            f"{name} is not a readable {kind} ({reason(error)}); expected {expected}."
        ) from error
    return image


def _without_texts(data: bytes) -> bytes:
    """A PNG without texts and colour profiles, which Pillow would unpack, and refuse the image if they are large."""
    if not data.startswith(b"\x89PNG"):
        return data
    kept, place = [data[:8]], 8
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if kind not in PNG_TEXTS or data.startswith(PNG_ORIENTATION, place + 8):
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]])


def upright(image: PILImage.Image, name: object) -> np.ndarray:
    """RGB pixels uint8 [H, W, 3], turned as EXIF says."""
    try:
        current_limits().check("max_pixels", image.width * image.height, name)
        return flatten(ImageOps.exif_transpose(image))
    except _IMAGE_ERRORS as error:
        if isinstance(error, SegmentError):
            raise
        raise SegmentError(f"{name} is not a readable image ({reason(error)}).") from error


def flatten(image: PILImage.Image) -> np.ndarray:
    """RGB pixels uint8 [H, W, 3] of any mode: transparency on white, deep grey scaled from its range to 8 bits."""
    if image.mode in RANGES:
        return _flatten_deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = PILImage.new("RGB", rgba.size, (255, 255, 255))
        canvas.paste(rgba, (0, 0), rgba)
        return np.array(canvas)
    return np.array(image.convert("RGB"))


def _flatten_deep_grey(image: PILImage.Image) -> np.ndarray:
    """16-bit modes have one range, however dark the image is; of "I" and "F" it is the smallest usual one."""
    grey = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0)
    usual = (1.0, 255.0, 65_535.0, 2.0**31) if image.mode == "F" else (255.0, 65_535.0, 2.0**31)
    top = RANGES[image.mode] or next((one for one in usual if grey.max() <= one), float(grey.max()))
    scaled = (grey * np.float32(255 / top)).clip(0, 255).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        scaled[grey == clear] = 255
    return np.repeat(scaled[..., None], 3, axis=2)


def image_frames(data: bytes, name: object) -> tuple[np.ndarray, float]:
    """Frames uint8 [T, H, W, 3] of a gif or animated webp at a constant rate, and that rate in Hz.

    Two passes: the first reads the times, so that the second keeps no more frames than are returned.
    """
    limits = current_limits()
    with decode_image(data, name, "video") as clip:
        size = clip.size
        try:
            note = timing_note(clip)
            milliseconds, area = [], 0
            for frame in _each_frame(clip, name):
                milliseconds.append(round(frame.info.get("duration", 0)) or 100)
                area += frame.width * frame.height
                limits.check("max_frames", len(milliseconds), name, stopped=True)
                limits.check("max_video_pixels", area, name, stopped=True)
            times = timing(milliseconds, note, size[0] * size[1])
            limits.check("max_seconds", times.count / times.rate_hz, name)
            shown = zip(times.ends(), _each_frame(clip, name), strict=False)
            return sample(shown, times, lambda frame: _of_size(frame, size), name)
        except MediaLimitError:
            raise
        except _IMAGE_ERRORS as error:
            raise SegmentError(f"{name} is not a readable video ({reason(error)}).") from error


def _each_frame(clip: PILImage.Image, name: object) -> Iterator[PILImage.Image]:
    """The frames of an animation, each decoded in place."""
    for index in range(int(current_limits().max_frames) + 1):
        try:
            clip.seek(index)
        except EOFError:
            return
        current_limits().check("max_pixels", clip.width * clip.height, name)
        clip.load()
        yield clip


def _of_size(frame: PILImage.Image, size: tuple[int, int]) -> np.ndarray:
    pixels = flatten(frame.copy())
    return pixels if frame.size == size else np.array(PILImage.fromarray(pixels).resize(size))


def timing_note(clip: PILImage.Image) -> str:
    """What `Video.save` wrote into a gif or webp; another program's words, or none, otherwise."""
    note = clip.info.get("comment") or clip.getexif().get(ExifTags.Base.ImageDescription, "")
    return note.decode("latin-1") if isinstance(note, bytes) else str(note)


def timing(milliseconds: list[int], note: str, pixels: int) -> Timing:
    """How images of this many pixels that are shown for these times are spread at a constant rate."""
    total, ours = sum(milliseconds), TIMING.fullmatch(note)
    most = max(len(milliseconds), REPEATED_PIXELS // pixels)
    starts = [0, *accumulate(milliseconds[:-1])]
    if ours and int(ours[1]) <= most and 0 < float(ours[2]) < math.inf:
        count, rate = int(ours[1]), float(ours[2])
        times = [round(one * count / total) for one in milliseconds]
        if all(times) and sum(times) == count:
            return Timing([start / rate for start in (0, *accumulate(times[:-1]))], rate, count)
    step = math.gcd(*milliseconds)
    if step >= MIN_STEP_MS and total // step <= most:
        return Timing([start / 1000 for start in starts], 1000 / step, total // step)
    mean = 1000 * len(milliseconds) / total
    return constant_rate([start / 1000 for start in starts], total / 1000, [mean], pixels)


def write_frames(path: Path, frames: np.ndarray, rate_hz: float, suffix: str) -> None:
    """Frames uint8 [T, H, W, 3] as a gif or a lossless animated webp.

    The writers join equal neighbours and round the rate, so the file also says in words what it was.
    """
    first, *rest = map(PILImage.fromarray, frames)
    note = f"{len(frames)} frames at {rate_hz!r} Hz"
    step = 10 * round(100 / rate_hz) if suffix == ".gif" else round(1000 / rate_hz)
    options: dict[str, Any] = {"comment": note.encode()}
    if suffix == ".webp":
        description = PILImage.Exif()
        description[ExifTags.Base.ImageDescription] = note
        options = {"lossless": True, "exif": description}
    duration = min(max(step, 10), 655_350)
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0, **options)


# ---- audio ----


def read_audio(source: Given) -> tuple[np.ndarray, int]:
    """Samples float32 [T] and the rate in Hz of a wav, flac, ogg or mp3 file, or of the audio of a webm, m4a or mp4.

    Channels are averaged. Where that cancels them, as of a pair in opposite phase, the loudest one is taken.
    """
    import soundfile

    with opened(source, "speech") as (file, name):
        try:
            head = file.read(8)
            file.seek(0)
            contained = head[:4] == b"\x1aE\xdf\xa3" or head[4:] == b"ftyp"  # matroska and webm; mp4 and m4a
            with AudioTrack(file, name) if contained else soundfile.SoundFile(file) as audio:
                samples, energies = _read_channels(audio, None, name)
                if energies[0] < CANCELLED * energies[1:].max(initial=0):
                    audio.seek(0)
                    samples, _ = _read_channels(audio, int(energies[1:].argmax()), name)
                rate = int(audio.samplerate)
        except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
            raise SegmentError(
                f"{name} is not readable audio ({reason(error)}); expected wav, flac, ogg, mp3, webm or m4a."
            ) from error
    if not len(samples):
        raise SegmentError(f"{name} holds no audio: its length is zero.")
    return samples, rate


def _read_channels(audio: Any, channel: int | None, name: object) -> tuple[np.ndarray, np.ndarray]:
    """One channel, or their mean if None, float32 [T]; and the energy of the mean and of each channel."""
    limits, blocks, count = current_limits(), [], 0
    energies = np.zeros(1 + audio.channels)
    size = max(1, AUDIO_BLOCK // audio.channels)
    while len(block := audio.read(size, dtype="float32", always_2d=True)):
        count += len(block)
        limits.check("max_seconds", count / audio.samplerate, name, stopped=True)
        limits.check("max_decoded_bytes", 4 * count, name, stopped=True)
        mean = block.mean(axis=1)
        energies += [np.square(mean).sum(), *np.square(block).sum(axis=0)]
        blocks.append(mean if channel is None else block[:, channel].copy())
    samples, start = np.empty(count, np.float32), 0
    while blocks:  # each is freed as it is copied; a damaged mp3 gives short ones midway
        block = blocks.pop(0)
        samples[start : start + len(block)] = block
        start += len(block)
    return samples, energies


def in_unit_range(samples: np.ndarray) -> np.ndarray:
    """Samples float32: integers by the range of their type. Of 64 bits, as Python's lists give, only -1, 0 and 1."""
    bits = 8 * samples.dtype.itemsize
    if samples.dtype.kind not in "iu":
        return samples.astype(np.float32, copy=False)
    if bits == 64:
        if samples.size and np.abs(samples).max() > 1:
            raise SegmentError(
                f"Speech holds numbers in [-1, 1] or integers of 8, 16 or 32 bits; received {samples.dtype} up to "
                f"{np.abs(samples).max()}: divide by their range."
            )
        return samples.astype(np.float32)
    half = 2.0 ** (bits - 1)
    return ((samples.astype(np.float64) - (half if samples.dtype.kind == "u" else 0)) / half).astype(
        np.float32
    )


def write_audio(path: Path, samples: np.ndarray, rate_hz: int, suffix: str, exact: bool) -> None:
    """Samples [T] as an audio file of the suffix's format, or as 32-bit numbers if `exact`."""
    import soundfile

    block, subtype = 1 << 16, "FLOAT" if exact else None
    advice = "resample(48000) gives it a rate that every format has"
    if suffix == ".ogg" and rate_hz > 200_000:  # libsndfile would end the process
        raise SegmentError(
            f"Cannot save speech of {rate_hz} Hz as .ogg, whose maximum is 200000 Hz; {advice}."
        )
    try:
        with soundfile.SoundFile(path, "w", rate_hz, 1, subtype, format=suffix[1:].upper()) as audio:
            for start in range(0, len(samples), block):  # a minute of ogg at once ends the process, too
                audio.write(samples[start : start + block])
    except soundfile.LibsndfileError as error:
        raise SegmentError(
            f"Cannot save speech of {rate_hz} Hz as {suffix} ({reason(error)}); {advice}."
        ) from error


def resampled(samples: np.ndarray, rate_hz: int, new_rate_hz: int) -> np.ndarray:
    """Samples [T] at another rate (windowed sinc, torchaudio).

    The filter holds a row for each term of the ratio of the rates: for 44,101 to 16,000 Hz it would take gigabytes.
    Such a ratio is rounded to terms of at most MAX_RATIO, which changes speed and pitch by less than 0.1 %.
    """
    import torch
    from torchaudio.functional import resample

    low, high = sorted((rate_hz, new_rate_hz))
    ratio = Fraction(low, high).limit_denominator(max(MAX_RATIO, 2 * high // low))
    terms = ratio.numerator, ratio.denominator
    before, after = terms if rate_hz == low else reversed(terms)
    found = resample(torch.from_numpy(samples), before, after)
    return found[: math.ceil(len(samples) * new_rate_hz / rate_hz)].numpy()


# ---- text ----


def text_lines(source: Given) -> Iterator[str]:
    """The lines of a text file, plain or gzipped, without trailing white space; none is longer than max_letters."""
    limits = current_limits()
    most = int(limits.max_letters)
    with opened(source, "dna") as (file, name):
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        lines: Any = gzip.GzipFile(fileobj=file) if packed else file
        try:
            encoding = "utf-8-sig"
            while line := lines.readline(most + 2):
                limits.check("max_letters", len(line.rstrip()), name, stopped=True)
                yield line.decode(encoding).rstrip()
                encoding = "utf-8"
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise SegmentError(
                f"{name} cannot be read as DNA: {reason(error)}; expected FASTA or plain bases."
            ) from error


def check_side(suffix: str, height: int, width: int) -> None:
    """SegmentError if a format cannot hold images of this size."""
    limit = MAX_SIDE_PX.get(suffix, max(height, width))
    if max(height, width) > limit:
        raise SegmentError(
            f"Cannot save {width}x{height} pixels as {suffix}, which has sides up to {limit}; "
            "resize it, or use another suffix."
        )
