"""Typed content: the parts of prompts and replies.

A segment is a value of one kind: `Text`, `Image`, `Speech`, `Video` or `DNA`. It opens and saves common file formats,
is displayed in notebooks, and is independent of tokens. A new kind subclasses `Segment`. Segments are immutable by
convention and compare by value.
"""

from __future__ import annotations

import base64
import gzip
import html
import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self, TypeVar

import numpy as np
from PIL import Image as PILImage

from anytoken.media_io import (
    TIMING,
    Given,
    check_side,
    decode_image,
    image_frames,
    in_unit_range,
    is_image,
    opened,
    read_audio,
    read_bytes,
    read_rest,
    resampled,
    save_suffix,
    source_name,
    text_lines,
    timing_note,
    upright,
    write_audio,
    write_frames,
)
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import SegmentError
from anytoken.utils.limits import current_limits
from anytoken.video_io import container_frames, write_container

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPEECH_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
CONTAINER_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv")
FRAMES_SUFFIXES = (".gif", ".webp")
VIDEO_SUFFIXES = CONTAINER_SUFFIXES + FRAMES_SUFFIXES
DNA_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".seq", ".fa.gz", ".fasta.gz", ".fna.gz", ".ffn.gz")
TEXT_SUFFIXES = (".txt", ".md")
_IUPAC = "ACGTURYSWKMBDHVNacgturyswkmbdhvn"
_NOT_IUPAC = re.compile(f"[^{_IUPAC}]")


Kind = TypeVar("Kind", bound="Segment")


class Segment:
    """Base class of all kinds. A subclass sets `kind` and compares by value."""

    kind: ClassVar[str]

    @classmethod
    def open(cls, source: Any) -> Self:
        """Read a file. SegmentError if it does not contain this kind, MediaLimitError if it exceeds a limit."""
        raise SegmentError(f"{cls.__name__} cannot be opened; implement {cls.__name__}.open(path).")

    def save(self, path: str | Path) -> Path:
        """Write a file, completely or not at all; SegmentError for an unknown suffix."""
        raise SegmentError(f"{type(self).__name__} cannot be saved; implement its save(path).")


@dataclass(frozen=True)
class Text(Segment):
    """Unicode text."""

    text: str
    kind: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise SegmentError(f"Text holds a string; received {type(self.text).__name__}.")

    @classmethod
    def open(cls, source: Given) -> Text:
        """Read UTF-8 text from a file or its bytes."""
        data, name = read_bytes(source, "text")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SegmentError(f"{name} is not UTF-8 text ({error}).") from error
        current_limits().check("max_letters", len(text), name)
        return cls(text)

    def save(self, path: str | Path) -> Path:
        """Write a UTF-8 text file."""
        return write_file(path, self.text, sync=False)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f"<p style='white-space:pre-wrap'>{html.escape(self.text)}</p>"


@dataclass(frozen=True, eq=False, repr=False)
class Image(Segment):
    """An image: `pixels` uint8 [H, W, 3], RGB."""

    pixels: np.ndarray
    kind: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        pixels = np.asarray(self.pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise SegmentError(f"Image holds uint8 [H, W, 3]; received {pixels.dtype} {pixels.shape}.")
        object.__setattr__(self, "pixels", np.ascontiguousarray(pixels))

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(self.pixels.shape[1])

    @classmethod
    def open(cls, source: Given | PILImage.Image | np.ndarray) -> Image:
        """An image from a path, encoded bytes, a binary file, a PIL image or an array.

        EXIF orientation is applied, transparency is composed on white, and gray and palette images become RGB. For an
        animation this is the first frame.
        """
        if isinstance(source, np.ndarray):
            return cls(source)
        if isinstance(source, PILImage.Image):
            return cls(upright(source, "the given image"))
        data, name = read_bytes(source, "image")
        with decode_image(data, name, "image") as image:
            return cls(upright(image, name))

    def save(self, path: str | Path) -> Path:
        """Write png, jpg, webp (lossless) or bmp, chosen by the suffix."""
        suffix = save_suffix(path, IMAGE_SUFFIXES, "an image")
        check_side(suffix, self.height, self.width)
        options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
        return write_file(path, lambda scratch: self.to_pil().save(scratch, **options), sync=False)

    def resize(self, height: int, width: int) -> Image:
        """The image resized (Lanczos); the same object if it already has this size."""
        if (height, width) == (self.height, self.width):
            return self
        return Image(np.asarray(self.to_pil().resize((width, height), PILImage.Resampling.LANCZOS)))

    def to_pil(self) -> PILImage.Image:
        """As a PIL image."""
        return PILImage.fromarray(self.pixels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and np.array_equal(self.pixels, other.pixels)

    def __hash__(self) -> int:
        return hash((self.pixels.shape, self.pixels.tobytes()))

    def __repr__(self) -> str:
        return f"Image({self.width}x{self.height})"

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.to_pil().save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True, eq=False, repr=False)
class Speech(Segment):
    """Audio: `samples` float32 [T] mono in [-1, 1] at `sample_rate_hz`.

    Integer samples of 8, 16 or 32 bits, as in wav files, are scaled by their range.
    """

    samples: np.ndarray
    sample_rate_hz: int = 16_000
    kind: ClassVar[str] = "speech"

    def __post_init__(self) -> None:
        samples = in_unit_range(np.asarray(self.samples))
        if samples.ndim != 1 or not samples.size:
            raise SegmentError(f"Speech holds at least one sample, [T] mono; received shape {samples.shape}.")
        if not np.isfinite(samples).all():
            raise SegmentError("Speech samples must be finite; received NaN or infinity.")
        if int(self.sample_rate_hz) < 1:
            raise SegmentError(f"sample_rate_hz must be positive; received {self.sample_rate_hz}.")
        object.__setattr__(self, "samples", np.ascontiguousarray(samples))
        object.__setattr__(self, "sample_rate_hz", int(self.sample_rate_hz))

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.samples) / self.sample_rate_hz

    @classmethod
    def open(cls, source: Given) -> Speech:
        """Audio from a wav, flac, ogg, mp3, webm, m4a or mp4 file or its bytes, at its own sample rate.

        Channels are averaged; if that cancels them, as with opposite phase, the loudest one is used. The available
        part of a truncated wav or mp3 is read, since these formats can be streamed.
        """
        return _named(source_name(source), partial(cls, *read_audio(source)))

    def save(self, path: str | Path, exact: bool = False) -> Path:
        """Write wav, flac, ogg or mp3, chosen by the suffix; samples are clipped to [-1, 1].

        With `exact`, a 32-bit float wav that preserves every sample; otherwise wav and flac have 16 bits. SegmentError
        for a sample rate that the format does not support.
        """
        suffix = save_suffix(path, SPEECH_SUFFIXES[:1] if exact else SPEECH_SUFFIXES, "speech")
        samples = self.samples if exact else self.samples.clip(-1, 1)
        rate = self.sample_rate_hz
        return write_file(
            path, lambda scratch: write_audio(scratch, samples, rate, suffix, exact), sync=False
        )

    def resample(self, sample_rate_hz: int) -> Speech:
        """The audio resampled (windowed sinc, torchaudio); the same object if it already has this rate.

        The size of the filter grows with the terms of the ratio of the rates, so a ratio with large terms (44,101 to
        16,000 Hz would need gigabytes) is rounded to terms of at most 1,000: speed and pitch change by less than
        0.1 %, usually by millionths. Ratios of common rates are exact.
        """
        if sample_rate_hz == self.sample_rate_hz:
            return self
        return Speech(resampled(self.samples, self.sample_rate_hz, sample_rate_hz), sample_rate_hz)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Speech)
            and self.sample_rate_hz == other.sample_rate_hz
            and np.array_equal(self.samples, other.samples)
        )

    def __hash__(self) -> int:
        return hash((self.sample_rate_hz, self.samples.tobytes()))

    def __repr__(self) -> str:
        return f"Speech({self.seconds:.2f} s, {self.sample_rate_hz} Hz)"

    def _repr_html_(self) -> str:
        import soundfile

        buffer = io.BytesIO()
        soundfile.write(buffer, self.samples.clip(-1, 1), self.sample_rate_hz, format="WAV")
        return f"<audio controls src='data:audio/wav;base64,{_base64(buffer)}'></audio>"


@dataclass(frozen=True, eq=False, repr=False)
class Video(Segment):
    """Frames without audio: `frames` uint8 [T, H, W, 3], RGB, at `frame_rate_hz`."""

    frames: np.ndarray
    frame_rate_hz: float = 4.0
    kind: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        frames = np.asarray(self.frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise SegmentError(f"Video holds uint8 [T, H, W, 3]; received {frames.dtype} {frames.shape}.")
        if not 0 < self.frame_rate_hz < math.inf:
            raise SegmentError(f"frame_rate_hz must be positive and finite; received {self.frame_rate_hz}.")
        object.__setattr__(self, "frames", np.ascontiguousarray(frames))
        object.__setattr__(self, "frame_rate_hz", float(self.frame_rate_hz))

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.frames) / self.frame_rate_hz

    @classmethod
    def open(cls, source: Given) -> Video:
        """Frames of an mp4, webm, mov, mkv, gif or animated webp file or its bytes; a still image is one frame.

        Frames are as players show them: upright, with square pixels, at a constant rate, where longer frames are
        repeated. If a video would exceed max_decoded_bytes, only every second, third... frame is kept, at that lower
        rate. The complete frames of a truncated file are read if its format allows finding them.
        """
        with opened(source, "video") as (file, name):
            if is_image(file.read(12)):
                file.seek(0)
                return cls(*image_frames(read_rest(file, name), name))
            file.seek(0)
            return cls(*container_frames(file, name))

    def save(self, path: str | Path) -> Path:
        """Write mp4 (h264), webm (vp9), gif or animated webp (lossless), chosen by the suffix.

        In mp4 and webm an odd height or width is increased by one: the last row or column is repeated.
        """
        suffix = save_suffix(path, (".mp4", ".webm", ".gif", ".webp"), "a video")
        check_side(suffix, *self.frames.shape[1:3])
        write = write_frames if suffix in FRAMES_SUFFIXES else write_container
        return write_file(
            path, lambda scratch: write(scratch, self.frames, self.frame_rate_hz, suffix), sync=False
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Video)
            and self.frame_rate_hz == other.frame_rate_hz
            and np.array_equal(self.frames, other.frames)
        )

    def __hash__(self) -> int:
        return hash((self.frame_rate_hz, self.frames.shape, self.frames.tobytes()))

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        return f"Video({count} frames of {width}x{height}, {self.frame_rate_hz:g} Hz)"

    def _repr_html_(self) -> str:
        buffer = io.BytesIO()
        first, *rest = (PILImage.fromarray(frame) for frame in self.frames)
        first.save(
            buffer,
            "WEBP",
            save_all=True,
            append_images=rest,
            duration=round(1000 / self.frame_rate_hz),
            loop=0,
        )
        return f"<img alt='{self!r}' src='data:image/webp;base64,{_base64(buffer)}'>"


@dataclass(frozen=True, repr=False)
class DNA(Segment):
    """A nucleotide sequence in IUPAC letters, in upper or lower case; `name` is the FASTA header, if any."""

    bases: str
    name: str = ""
    kind: ClassVar[str] = "dna"

    def __post_init__(self) -> None:
        if not isinstance(self.bases, str) or not self.bases:
            raise SegmentError("DNA holds at least one base; received an empty sequence.")
        if self.bases.isascii() and not self.bases.encode().translate(None, _IUPAC.encode()):
            return  # several times as fast as the search, which locates the error
        if wrong := _NOT_IUPAC.search(self.bases):
            raise SegmentError(
                f"DNA takes IUPAC letters (ACGT, U, N, RYSWKMBDHV, either case); received {wrong[0]!r} "
                f"at position {wrong.start() + 1} of {self.name or 'the sequence'}."
            )

    @classmethod
    def open(cls, source: Given) -> DNA:
        """The only sequence of a FASTA or plain file (also gzipped) or its bytes; SegmentError if there are several."""
        records = cls.iter_records(source)
        first = next(records)
        if next(records, None) is not None:
            raise SegmentError(
                f"{source_name(source)} holds several sequences; DNA.open_all(path) reads them all."
            )
        return first

    @classmethod
    def open_all(cls, source: Given) -> list[DNA]:
        """All sequences of a FASTA or plain file (also gzipped), of at most max_letters in total."""
        found, letters = [], 0
        for record in cls.iter_records(source):
            letters += len(record.bases)
            current_limits().check("max_letters", letters, source_name(source), stopped=True)
            found.append(record)
        return found

    @classmethod
    def iter_records(cls, source: Given) -> Iterator[DNA]:
        """Yield the sequences of a FASTA or plain file, with one at a time in memory.

        SegmentError for a file or a record without bases: skipping a record would misalign the others with labels.
        """
        path, limits = source_name(source), current_limits()
        name, named, letters = "", False, 0
        lines: list[str] = []
        for line in text_lines(source):
            if line.startswith(">"):
                if lines:
                    yield _named(path, partial(cls, "".join(lines), name))
                elif named:
                    raise _no_bases(path, name)
                name, named, lines, letters = line[1:].strip(), True, [], 0
            elif line and not line.startswith(";"):
                lines.append("".join(line.split()))
                letters += len(lines[-1])
                limits.check("max_letters", letters, path, stopped=True)
        if lines:
            yield _named(path, partial(cls, "".join(lines), name))
        elif named:
            raise _no_bases(path, name)
        else:
            raise SegmentError(f"{path} holds no sequence; expected FASTA or plain bases.")

    def save(self, path: str | Path) -> Path:
        """Write FASTA, 70 letters per line, compressed if the suffix is .gz."""
        rows = [self.bases[i : i + 70] for i in range(0, len(self.bases), 70)]
        name = " ".join(self.name.splitlines()).strip() or "sequence"  # a header is one line
        data = "\n".join([f">{name}", *rows, ""]).encode()
        packed = gzip.compress(data, mtime=0) if Path(path).suffix.lower() == ".gz" else data
        return write_file(path, packed, sync=False)

    def __repr__(self) -> str:
        head = self.bases if len(self.bases) <= 24 else f"{self.bases[:21]}..."
        return f"DNA({head}, {len(self.bases)} bases)"

    def _repr_html_(self) -> str:
        colors = {"A": "#2a9d3a", "C": "#2a62c9", "G": "#c98a1b", "T": "#c9302c", "U": "#c9302c"}
        letters = "".join(
            f"<span style='color:{colors.get(b.upper(), '#888')}'>{b}</span>" for b in self.bases[:600]
        )
        more = f"… {len(self.bases)} bases" if len(self.bases) > 600 else ""
        return f"<code style='word-break:break-all'>{letters}{more}</code>"


def _no_bases(path: object, name: str) -> SegmentError:
    return SegmentError(f"{path} holds no sequence in the record {name!r:.80}; remove it or give its bases.")


KINDS: dict[str, type[Segment]] = {cls.kind: cls for cls in (Text, Image, Speech, Video, DNA)}


def usual_suffix(kind: str) -> str:
    """The default file suffix of a kind: a lossless format that browsers display."""
    return {"text": ".txt", "image": ".png", "speech": ".wav", "video": ".webp", "dna": ".fasta"}.get(
        kind, f".{kind}"
    )


def open_segment(source: str | Path | BinaryIO) -> Segment:
    """Open a path, or a binary file with a name, as the kind of segment that its suffix names.

    A webp is a video if it is animated or was saved as a video, else an image. SegmentError for an unknown suffix,
    listing the known ones, or for a file that cannot be opened.
    """
    path = str(getattr(source, "name", source) if hasattr(source, "read") else source)
    name = path.lower()
    if name.endswith(".webp"):
        data, _ = read_bytes(source, "image or video")
        with decode_image(data, path, "image") as image:
            moving = getattr(image, "n_frames", 1) > 1 or TIMING.fullmatch(timing_note(image))
        if moving:
            return Video(*image_frames(data, path))
        with decode_image(data, path, "image") as image:
            return Image(upright(image, path))
    openers: list[tuple[tuple[str, ...], Callable[[Any], Segment]]] = [
        (IMAGE_SUFFIXES, Image.open), (SPEECH_SUFFIXES, Speech.open), (VIDEO_SUFFIXES, Video.open),
        (DNA_SUFFIXES, DNA.open), (TEXT_SUFFIXES, Text.open),
    ]  # fmt: skip
    for suffixes, opener in openers:
        if name.endswith(suffixes):
            return opener(source)
    known = " ".join(dict.fromkeys(suffix for suffixes, _ in openers for suffix in suffixes))
    raise SegmentError(f"{path} has no suffix of a known kind; known: {known}.")


def _named(path: object, build: Callable[[], Kind]) -> Kind:
    """Call `build` on a file's content, with the file's name in errors."""
    try:
        return build()
    except SegmentError as error:
        raise SegmentError(f"{path}: {error}") from error


def _base64(buffer: io.BytesIO) -> str:
    return base64.b64encode(buffer.getvalue()).decode()
