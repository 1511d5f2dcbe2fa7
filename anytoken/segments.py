"""Typed content: what goes into a prompt and what comes out of a reply.

A segment is a value of one kind: `Text`, `Image`, `Speech`, `Video` or `DNA`. It opens and saves the usual
files, shows itself in a notebook, and knows nothing of tokens. A researcher's new kind subclasses `Segment`.
Segments are immutable by convention and compare by value.
"""

from __future__ import annotations

import base64
import gzip
import html
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image as Picture
from PIL import ImageOps, ImageSequence

MAX_PIXELS = 64_000_000  # a picture beyond this is more likely an attack than an input
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPEECH_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
CONTAINER_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv")
FRAMES_SUFFIXES = (".gif", ".webp")
VIDEO_SUFFIXES = CONTAINER_SUFFIXES + FRAMES_SUFFIXES
DNA_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".seq", ".fa.gz", ".fasta.gz", ".fna.gz", ".ffn.gz")
TEXT_SUFFIXES = (".txt", ".md")
_NOT_IUPAC = re.compile(r"[^ACGTURYSWKMBDHVNacgturyswkmbdhvn]")


class SegmentError(ValueError):
    """A file or value that cannot become, or be saved as, a segment of the asked kind."""


class Segment:
    """Base of all kinds; a subclass sets `kind` and compares by value."""

    kind: ClassVar[str]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a file; SegmentError for one that does not hold this kind."""
        raise SegmentError(f"{cls.__name__} does not say how it is opened; write {cls.__name__}.open(path).")

    def save(self, path: str | Path) -> Path:
        """Write a file, whole or not at all; SegmentError for a suffix that is not known."""
        raise SegmentError(f"{type(self).__name__} does not say how it is saved; write its save(path).")


@dataclass(frozen=True)
class Text(Segment):
    """Unicode text."""

    text: str
    kind: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise SegmentError(f"Text holds a string; received {type(self.text).__name__}.")

    @classmethod
    def open(cls, path: str | Path) -> Text:
        """Read a UTF-8 text file."""
        try:
            return cls(_read(path, "text").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise SegmentError(f"{path} is not UTF-8 text ({error}).") from error

    def save(self, path: str | Path) -> Path:
        """Write a UTF-8 text file."""
        return _write_whole(path, lambda scratch: scratch.write_text(self.text, encoding="utf-8"))

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f"<p style='white-space:pre-wrap'>{html.escape(self.text)}</p>"


@dataclass(frozen=True, eq=False, repr=False)
class Image(Segment):
    """A picture: `pixels` uint8 [H, W, 3], RGB."""

    pixels: np.ndarray
    kind: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        pixels = np.asarray(self.pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise SegmentError(f"Image holds uint8 [H, W, 3]; received {pixels.dtype} {pixels.shape}.")
        object.__setattr__(self, "pixels", np.ascontiguousarray(pixels))

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return int(self.pixels.shape[1])

    @classmethod
    def open(cls, source: str | Path | bytes | Picture.Image | np.ndarray) -> Image:
        """A picture from a file, encoded bytes, a PIL image or an array.

        EXIF orientation is applied, transparency is flattened on white, grey and palette pictures become RGB.
        """
        if isinstance(source, np.ndarray):
            return cls(source)
        if isinstance(source, Picture.Image):
            return cls(_flatten(source))
        data, name = (
            (source, "the given bytes") if isinstance(source, bytes) else (_read(source, "image"), source)
        )
        with _decode_picture(data, name, "image") as picture:
            return cls(_flatten(ImageOps.exif_transpose(picture)))

    def save(self, path: str | Path) -> Path:
        """Write png, jpg, webp (lossless) or bmp, chosen by the suffix."""
        suffix = _suffix(path, IMAGE_SUFFIXES, "an image")
        options = {"lossless": True} if suffix == ".webp" else {}
        return _write_whole(path, lambda scratch: self.to_pil().save(scratch, **options))

    def resize(self, height: int, width: int) -> Image:
        """The picture at another size (Lanczos); itself if it already has it."""
        if (height, width) == (self.height, self.width):
            return self
        return Image(np.asarray(self.to_pil().resize((width, height), Picture.Resampling.LANCZOS)))

    def to_pil(self) -> Picture.Image:
        """As a PIL image."""
        return Picture.fromarray(self.pixels)

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
    """Sound: `samples` float32 [T] mono in [-1, 1] at `sample_rate_hz`."""

    samples: np.ndarray
    sample_rate_hz: int = 16_000
    kind: ClassVar[str] = "speech"

    def __post_init__(self) -> None:
        samples = np.asarray(self.samples, dtype=np.float32)
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
        """Duration."""
        return len(self.samples) / self.sample_rate_hz

    @classmethod
    def open(cls, source: str | Path | bytes) -> Speech:
        """Sound from a wav, flac, ogg or mp3 file or its bytes, at its own rate; channels are averaged."""
        import soundfile

        data, name = (
            (source, "the given bytes") if isinstance(source, bytes) else (_read(source, "speech"), source)
        )
        try:
            samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
            raise SegmentError(
                f"{name} is not readable sound ({error}); expected wav, flac, ogg or mp3."
            ) from error
        if not len(samples):
            raise SegmentError(f"{name} holds no sound: its length is zero.")
        return cls(samples.mean(axis=1), rate)

    def save(self, path: str | Path) -> Path:
        """Write wav, flac, ogg or mp3, chosen by the suffix; samples are clipped to [-1, 1]."""
        import soundfile

        suffix = _suffix(path, SPEECH_SUFFIXES, "speech")
        samples = self.samples.clip(-1, 1)
        return _write_whole(
            path,
            lambda scratch: soundfile.write(scratch, samples, self.sample_rate_hz, format=suffix[1:].upper()),
        )

    def resample(self, sample_rate_hz: int) -> Speech:
        """The sound at another rate (windowed sinc, torchaudio); itself if it already has it."""
        if sample_rate_hz == self.sample_rate_hz:
            return self
        import torch
        from torchaudio.functional import resample

        samples = resample(torch.from_numpy(self.samples), self.sample_rate_hz, sample_rate_hz)
        return Speech(samples.numpy(), sample_rate_hz)

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
    """Moving pictures without sound: `frames` uint8 [T, H, W, 3], RGB, at `frame_rate_hz`."""

    frames: np.ndarray
    frame_rate_hz: float = 4.0
    kind: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        frames = np.asarray(self.frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise SegmentError(f"Video holds uint8 [T, H, W, 3]; received {frames.dtype} {frames.shape}.")
        if not self.frame_rate_hz > 0:
            raise SegmentError(f"frame_rate_hz must be positive; received {self.frame_rate_hz}.")
        object.__setattr__(self, "frames", np.ascontiguousarray(frames))
        object.__setattr__(self, "frame_rate_hz", float(self.frame_rate_hz))

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.frames) / self.frame_rate_hz

    @classmethod
    def open(cls, source: str | Path) -> Video:
        """Frames of an mp4, webm, mov, mkv, gif or animated webp file; a still picture is one frame."""
        data = _read(source, "video")
        if str(source).lower().endswith(FRAMES_SUFFIXES):
            return cls(*_picture_frames(data, source))
        return cls(*_container_frames(data, source))

    def save(self, path: str | Path) -> Path:
        """Write mp4 (h264), webm (vp9), gif or animated webp (lossless), chosen by the suffix."""
        suffix = _suffix(path, (".mp4", ".webm", ".gif", ".webp"), "a video")
        if suffix in FRAMES_SUFFIXES:
            return _write_whole(path, self._save_pictures)
        return _write_whole(path, lambda scratch: self._save_container(scratch, suffix))

    def _save_pictures(self, path: Path) -> None:
        first, *rest = (Picture.fromarray(frame) for frame in self.frames)
        lossless = {"lossless": True} if path.suffix == ".webp" else {}
        first.save(
            path,
            save_all=True,
            append_images=rest,
            duration=round(1000 / self.frame_rate_hz),
            loop=0,
            **lossless,
        )

    def _save_container(self, path: Path, suffix: str) -> None:
        from fractions import Fraction

        import av

        height, width = (n + n % 2 for n in self.frames.shape[1:3])  # 4:2:0 chroma needs even sides
        with av.open(str(path), "w", format=suffix[1:]) as container:
            rate = Fraction(self.frame_rate_hz).limit_denominator(1000)
            stream: Any = container.add_stream("libx264" if suffix == ".mp4" else "libvpx-vp9", rate=rate)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.options = {"crf": "14"}
            for frame in self.frames:
                even = np.pad(
                    frame, ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0)), mode="edge"
                )
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
            container.mux(stream.encode())

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
        first, *rest = (Picture.fromarray(frame) for frame in self.frames)
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
    """A nucleotide sequence in IUPAC letters, case as read; `name` is the FASTA header, if any."""

    bases: str
    name: str = ""
    kind: ClassVar[str] = "dna"

    def __post_init__(self) -> None:
        if not isinstance(self.bases, str) or not self.bases:
            raise SegmentError("DNA holds at least one base; received an empty sequence.")
        wrong = _NOT_IUPAC.search(self.bases)
        if wrong:
            raise SegmentError(
                f"DNA takes IUPAC letters (ACGT, U, N, RYSWKMBDHV, either case); received {wrong[0]!r} "
                f"at position {wrong.start() + 1} of {self.name or 'the sequence'}."
            )

    @classmethod
    def open(cls, path: str | Path) -> DNA:
        """The one sequence of a FASTA or plain file (.gz too); SegmentError if there are several."""
        records = cls.iter_records(path)
        first = next(records)
        if next(records, None) is not None:
            raise SegmentError(f"{path} holds several sequences; DNA.open_all(path) reads them all.")
        return first

    @classmethod
    def open_all(cls, path: str | Path) -> list[DNA]:
        """Every sequence of a FASTA or plain file (.gz too)."""
        return list(cls.iter_records(path))

    @classmethod
    def iter_records(cls, path: str | Path) -> Iterator[DNA]:
        """The sequences of a FASTA or plain file one by one, holding one at a time in memory."""
        name, lines, seen = "", [], False
        for line in _text_lines(path):
            if line.startswith(">"):
                if lines:
                    seen = True
                    yield cls("".join(lines), name)
                name, lines = line[1:].strip(), []
            elif line and not line.startswith(";"):
                lines.append("".join(line.split()))
        if lines:
            yield cls("".join(lines), name)
        elif not seen:
            raise SegmentError(f"{path} holds no sequence; expected FASTA or plain bases.")

    def save(self, path: str | Path) -> Path:
        """Write FASTA, 70 bases a line, compressed if the suffix is .gz."""
        rows = [self.bases[i : i + 70] for i in range(0, len(self.bases), 70)]
        data = "\n".join([f">{self.name or 'sequence'}", *rows, ""]).encode()
        packed = gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data
        return _write_whole(path, lambda scratch: scratch.write_bytes(packed))

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


KINDS: dict[str, type[Segment]] = {cls.kind: cls for cls in (Text, Image, Speech, Video, DNA)}


def open_segment(path: str | Path) -> Segment:
    """Open a file as the segment its suffix says; an animated webp is a video, a still one an image.

    SegmentError for an unknown suffix, listing the known ones, or for a file that does not open.
    """
    name = str(path).lower()
    if name.endswith(".webp"):
        with _decode_picture(_read(path, "image or video"), path, "image") as picture:
            moving = getattr(picture, "n_frames", 1) > 1
        return Video.open(path) if moving else Image.open(path)
    openers: list[tuple[tuple[str, ...], Callable[[str | Path], Segment]]] = [
        (IMAGE_SUFFIXES, Image.open), (SPEECH_SUFFIXES, Speech.open), (VIDEO_SUFFIXES, Video.open),
        (DNA_SUFFIXES, DNA.open), (TEXT_SUFFIXES, Text.open),
    ]  # fmt: skip
    for suffixes, opener in openers:
        if name.endswith(suffixes):
            return opener(path)
    known = " ".join(dict.fromkeys(suffix for suffixes, _ in openers for suffix in suffixes))
    raise SegmentError(f"{path} has no suffix that tells its kind; known: {known}.")


# ---- files ----


def _read(path: str | Path, kind: str) -> bytes:
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SegmentError(f"{path} cannot be read as {kind}: {error.strerror or error}.") from error
    if not data:
        raise SegmentError(f"{path} is empty: there is no {kind} in it.")
    return data


def _write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write beside the target under the same suffix, then rename: no half-written file is ever seen."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    try:
        write(Path(scratch))
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path


def _suffix(path: str | Path, allowed: tuple[str, ...], what: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in allowed:
        raise SegmentError(
            f"Cannot save {what} as {suffix or 'a file without suffix'}; allowed: {' '.join(allowed)}."
        )
    return suffix


def _decode_picture(data: bytes, name: object, kind: str) -> Picture.Image:
    try:
        picture = Picture.open(io.BytesIO(data))
        if picture.width * picture.height > MAX_PIXELS:
            raise SegmentError(
                f"{name} is {picture.width}x{picture.height} pixels; at most {MAX_PIXELS:,} are taken: shrink it first."
            )
        picture.load()
    except (OSError, SyntaxError, ValueError, EOFError, Picture.DecompressionBombError) as error:
        if isinstance(error, SegmentError):
            raise
        raise SegmentError(
            f"{name} is not a readable {kind} ({error}); expected png, jpg or webp."
        ) from error
    return picture


def _flatten(picture: Picture.Image) -> np.ndarray:
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


def _picture_frames(data: bytes, name: object) -> tuple[np.ndarray, float]:
    with _decode_picture(data, name, "video") as clip:
        try:
            frames, durations = [], []
            for frame in ImageSequence.Iterator(clip):
                frames.append(_flatten(frame.copy()))
                durations.append(float(clip.info.get("duration", 0)) or 100.0)
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise SegmentError(f"{name} is not a readable video ({error}).") from error
    return np.stack(frames), 1000 * len(durations) / sum(durations)


def _container_frames(data: bytes, name: object) -> tuple[np.ndarray, float]:
    import av

    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise SegmentError(f"{name} holds no video stream.")
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            rate = float(stream.average_rate or stream.guessed_rate or 25)
    except (av.FFmpegError, IndexError, EOFError) as error:
        raise SegmentError(
            f"{name} is not a readable video ({error}); expected mp4, webm, mov, mkv, gif or animated webp."
        ) from error
    if not frames:
        raise SegmentError(f"{name} holds no frame.")
    return np.stack(frames), rate


def _text_lines(path: str | Path) -> Iterator[str]:
    path = Path(path)
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="ascii") as handle:
            for line in handle:
                yield line.rstrip()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SegmentError(
            f"{path} cannot be read as DNA: {error}; expected FASTA or plain bases."
        ) from error


def _base64(buffer: io.BytesIO) -> str:
    return base64.b64encode(buffer.getvalue()).decode()
