"""Reading and writing the files that segments come from and go to: pictures, animations, containers, sound, text.

Plain functions from a file's bytes to arrays and back, over Pillow, PyAV and libsndfile. Whatever is wrong with a
file is one `SegmentError` that names it and says what is expected; whatever is written is written whole or not at all.
"""

from __future__ import annotations

import gzip
import io
import math
import re
import struct
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import ExifTags, ImageOps, ImageSequence
from PIL import Image as Picture

from anytoken.utils.errors import SegmentError

MAX_PIXELS = 64_000_000  # a picture beyond this is more likely an attack than an input
MAX_SIDE_PX = {".webp": 16_383, ".jpg": 65_500, ".jpeg": 65_500, ".gif": 65_535}  # what the formats can say
SOUND_BLOCK = 1 << 24  # samples read at once: a header that lies about the length cannot ask for all memory
MAX_RATIO = 1000  # the largest term of a ratio of sample rates
MIN_STEP_MS = 20  # no player shows the pictures of a gif faster
_PICTURE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error,
    Picture.DecompressionBombError,
)  # fmt: skip
TIMING = re.compile(r"(\d{1,9}) frames at (\d[\d.e+-]*) Hz")


def read_bytes(path: str | Path, kind: str) -> bytes:
    """A file's bytes; SegmentError if it cannot be read or is empty."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SegmentError(f"{path} cannot be read as {kind}: {error.strerror or error}.") from error
    if not data:
        raise SegmentError(f"{path} is empty: there is no {kind} in it.")
    return data


def save_suffix(path: str | Path, allowed: tuple[str, ...], what: str) -> str:
    """The suffix to save under, in lower case; SegmentError if it is none of `allowed`."""
    suffix = Path(path).suffix.lower()
    if suffix not in allowed:
        raise SegmentError(
            f"Cannot save {what} as {suffix or 'a file without suffix'}; allowed: {' '.join(allowed)}."
        )
    return suffix


def decode_picture(data: bytes, name: object, kind: str) -> Picture.Image:
    """A picture or animation that is fully read; SegmentError for damage, or more than MAX_PIXELS."""
    try:
        picture = Picture.open(io.BytesIO(data))
        if picture.width * picture.height > MAX_PIXELS:
            raise SegmentError(
                f"{name} is {picture.width}x{picture.height} pixels; at most {MAX_PIXELS:,} are taken: shrink it first."
            )
        picture.load()
    except _PICTURE_ERRORS as error:
        if isinstance(error, SegmentError):
            raise
        expected = "gif or animated webp, as its suffix says" if kind == "video" else "png, jpg or webp"
        raise SegmentError(
            f"{name} is not a readable {kind} ({reason(error)}); expected {expected}."
        ) from error
    return picture


def upright(picture: Picture.Image, name: object) -> np.ndarray:
    """RGB pixels uint8 [H, W, 3], turned as EXIF says."""
    try:
        return flatten(ImageOps.exif_transpose(picture))
    except _PICTURE_ERRORS as error:
        raise SegmentError(f"{name} is not a readable image ({reason(error)}).") from error


def flatten(picture: Picture.Image) -> np.ndarray:
    """RGB pixels uint8 [H, W, 3] of any mode: transparency on white, 16-bit grey scaled."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        canvas = Picture.new("RGB", rgba.size, (255, 255, 255))
        canvas.paste(rgba, (0, 0), rgba)
        return np.array(canvas)
    if picture.mode in ("I;16", "I", "F"):  # 16-bit grey: scale, or everything above 255 would be white
        grey = np.asarray(picture, dtype=np.float64)
        scale = 255 / max(65535 if grey.max() > 255 else 255, 1)
        return np.repeat((grey * scale).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    return np.array(picture.convert("RGB"))


def picture_frames(data: bytes, name: object) -> tuple[np.ndarray, float]:
    """Frames uint8 [T, H, W, 3] of a gif or animated webp at a constant rate, and that rate in Hz."""
    with decode_picture(data, name, "video") as clip:
        try:
            note = timing_note(clip)
            pictures, milliseconds = [], []
            for frame in ImageSequence.Iterator(clip):
                pictures.append(flatten(frame.copy()))
                milliseconds.append(round(clip.info.get("duration", 0)) or 100)
            frames = np.stack(pictures)
        except _PICTURE_ERRORS as error:
            raise SegmentError(f"{name} is not a readable video ({reason(error)}).") from error
    times, rate = timing(milliseconds, note, max_frames=MAX_PIXELS // frames[0, ..., 0].size)
    return np.repeat(frames, times, axis=0), rate


def timing_note(clip: Picture.Image) -> str:
    """What `Video.save` wrote into a gif or webp; another program's words, or none, otherwise."""
    note = clip.info.get("comment") or clip.getexif().get(ExifTags.Base.ImageDescription, "")
    return note.decode("latin-1") if isinstance(note, bytes) else str(note)


def timing(milliseconds: list[int], note: str, max_frames: int) -> tuple[list[int], float]:
    """How often each picture comes at a constant rate, and that rate.

    Pictures without a common step, or that would be repeated beyond `max_frames`, come once, at their mean rate.
    """
    total, ours = sum(milliseconds), TIMING.fullmatch(note)
    if ours and int(ours[1]) <= max(max_frames, len(milliseconds)):
        times = [round(one * int(ours[1]) / total) for one in milliseconds]
        if all(times) and sum(times) == int(ours[1]):
            return times, float(ours[2])
    step = math.gcd(*milliseconds)
    if step < MIN_STEP_MS or total // step > max_frames:
        return [1] * len(milliseconds), 1000 * len(milliseconds) / total
    return [one // step for one in milliseconds], 1000 / step


def container_frames(data: bytes, name: object) -> tuple[np.ndarray, float]:
    """Frames uint8 [T, H, W, 3] of an mp4, webm, mov or mkv file, and the rate in Hz."""
    import av

    try:
        with av.open(io.BytesIO(data), "r", metadata_errors="replace") as container:
            if not container.streams.video:
                raise SegmentError(f"{name} holds no video stream.")
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            if not frames:
                raise SegmentError(f"{name} holds no frame.")
            return np.stack(frames), rate
    except SegmentError:
        raise
    except (av.FFmpegError, LookupError, ValueError, EOFError) as error:
        raise SegmentError(
            f"{name} is not a readable video ({reason(error)}); expected mp4, webm, mov, mkv, gif or animated webp."
        ) from error


def read_sound(data: bytes, name: object) -> tuple[np.ndarray, int]:
    """Samples float32 [T], channels averaged, and the rate in Hz of a wav, flac, ogg or mp3 file's bytes."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            blocks = []
            while len(block := sound.read(SOUND_BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1))
            rate = sound.samplerate
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise SegmentError(
            f"{name} is not readable sound ({reason(error)}); expected wav, flac, ogg or mp3."
        ) from error
    if not blocks:
        raise SegmentError(f"{name} holds no sound: its length is zero.")
    return np.concatenate(blocks), rate


def write_sound(path: Path, samples: np.ndarray, rate_hz: int, suffix: str, exact: bool) -> None:
    """Samples [T] as a sound file of the suffix's format, or as 32-bit numbers if `exact`."""
    import soundfile

    block, subtype = 1 << 16, "FLOAT" if exact else None
    advice = "resample(48000) gives it a rate that every format has"
    if suffix == ".ogg" and rate_hz > 200_000:  # libsndfile would end the process
        raise SegmentError(f"Cannot save speech of {rate_hz} Hz as .ogg, which ends at 200000 Hz; {advice}.")
    try:
        with soundfile.SoundFile(path, "w", rate_hz, 1, subtype, format=suffix[1:].upper()) as sound:
            for start in range(0, len(samples), block):  # a minute of ogg at once ends the process, too
                sound.write(samples[start : start + block])
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


def text_lines(path: str | Path) -> Iterator[str]:
    """The lines of a text file, plain or gzipped, without trailing white space."""
    path = Path(path)
    try:
        opener = gzip.open if path.suffix.lower() == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig") as handle:
            for line in handle:
                yield line.rstrip()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise SegmentError(
            f"{path} cannot be read as DNA: {getattr(error, 'strerror', None) or error}; expected FASTA or plain bases."
        ) from error


def check_side(suffix: str, height: int, width: int) -> None:
    """SegmentError if a format cannot hold pictures of this size."""
    limit = MAX_SIDE_PX.get(suffix, max(height, width))
    if max(height, width) > limit:
        raise SegmentError(
            f"Cannot save {width}x{height} pixels as {suffix}, which has sides up to {limit}; "
            "resize it, or take another suffix."
        )


def reason(error: Exception) -> str:
    """What a library says went wrong, without error numbers and the address of the buffer it read."""
    said = str(getattr(error, "error_string", error))
    return re.sub(r"\[Errno -?\d+\] |:? '?<[^>]*>'?", "", said).strip(" .")
