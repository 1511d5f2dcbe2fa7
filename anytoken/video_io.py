"""Video containers to frames and audio, as a stream.

The packets' times are read first, then only the frames needed are kept.
Players show a frame from its own time until the next one's, turned by the display matrix, with square pixels. So do we:
a variable frame rate becomes a constant one by repeating frames for as long as they are shown.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from anytoken.utils.errors import SegmentError, reason
from anytoken.utils.limits import current_limits

REPEATED_PIXELS = 64_000_000  # of all frames of a clip whose images are repeated
# Containers alone: playlists and the like would open further files and addresses.
CONTAINERS = "mov,mp4,matroska,webm,mpegts,mpeg,avi,flv,ogg,asf,mjpeg,h264,hevc,ivf,mpegvideo"
MAX_ASPECT = 8  # of a pixel; more is damage
MAX_RATE_HZ = 240.0  # steps between frames that are shorter are damage
Shown = TypeVar("Shown")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """How frames are spread in time."""

    # When each begins to be shown, in seconds; None: each for one step of the rate.
    starts: list[float] | None
    rate_hz: float
    count: int  # steps in all

    def ends(self) -> Iterator[float]:
        """When each frame ends to be shown."""
        if self.starts is None:
            yield from ((index + 1) / self.rate_hz for index in range(self.count))
        else:
            yield from (*self.starts[1:], math.inf)


def constant_rate(starts: Sequence[float], end: float, rates: Sequence[float], pixels: int) -> Timing:
    """A constant rate for frames of this many pixels that begin at `starts`, in seconds; the last is shown until `end`.

    If every frame is within half a frame of its place at one of `rates`, that is the rate, and each comes once.
    Otherwise it is that of the short frames, and longer ones are repeated, up to REPEATED_PIXELS in all.
    """
    number = len(starts)
    times = np.array([*starts, end]) - starts[0]
    for rate in rates:
        if rate > 0 and np.abs(times * rate - np.arange(number + 1)).max() <= 0.5:
            return Timing(None, rate, number)
    steps = np.sort(np.diff(times))
    steps = steps[steps >= 1 / MAX_RATE_HZ]
    rate = 1 / float(steps[len(steps) // 5]) if len(steps) else MAX_RATE_HZ
    rate = min([one for one in rates if abs(one / rate - 1) < 0.03], default=rate)
    count = max(1, round(float(times[-1]) * rate))
    stride = math.ceil(count / max(number, REPEATED_PIXELS // pixels))
    return Timing(times[:-1].tolist(), rate / stride, math.ceil(count / stride))


def sample(
    shown: Iterable[tuple[float, Shown]], timing: Timing, pixels: Callable[[Shown], np.ndarray], name: object
) -> tuple[np.ndarray, float]:
    """Frames uint8 [T, H, W, 3] at each step of a constant rate, and the rate in Hz.

    shown: for each frame the time in seconds at which it ends, and whatever `pixels` makes uint8 [H, W, 3] of; only
    what is taken is converted and kept. If all frames would take more than max_decoded_bytes, every second, third...
    step is taken, at that lower rate.
    """
    step = 1 / timing.rate_hz
    rounding = min(step / 4, 0.001)  # times may be rounded to milliseconds
    frames, done, stride = np.empty((0, 0, 0, 3), np.uint8), 0, 1
    for end, one in shown:
        taken: np.ndarray | None = None
        while done * stride < timing.count and done * stride * step + rounding < end:
            if taken is None:
                taken = pixels(one)
            if not done:
                stride = math.ceil(
                    timing.count / max(1, int(current_limits().max_decoded_bytes) // taken.nbytes)
                )
                frames = np.empty((math.ceil(timing.count / stride), *taken.shape), np.uint8)
            frames[done] = taken
            done += 1
    if not done:
        raise SegmentError(f"{name} holds no frame.")
    if stride > 1:
        log.warning("%s: %d frames would take more than max_decoded_bytes; one in %d is kept, at %g Hz.",
                    name, timing.count, stride, timing.rate_hz / stride)  # fmt: skip
    return frames[:done], timing.rate_hz / stride


# ---- containers ----


def container_frames(file: IO[bytes], name: object) -> tuple[np.ndarray, float]:
    """Frames uint8 [T, H, W, 3] of an mp4, webm, mov or mkv file at a constant rate, and that rate in Hz.

    They are turned as the display matrix says, and scaled where pixels are not square or the size changes midway. A
    cover image is no film: SegmentError for a file that holds no other video stream.
    """
    import av

    try:
        with _open(file) as container:
            stream = _film(container, name)
            timing, first = _timing(container, stream, name)
        file.seek(0)
        with _open(file) as container:
            stream = _film(container, name)
            frames = container.decode(stream)
            ends = timing.ends() if timing.starts is None else None
            shown = zip(ends, frames, strict=False) if ends else _until_next(frames, first)
            return sample(shown, timing, _Screen(stream, name), name)
    except SegmentError:
        raise
    except (av.FFmpegError, LookupError, ValueError, EOFError, ArithmeticError) as error:
        raise SegmentError(
            f"{name} is not a readable video ({reason(error)}); expected mp4, webm, mov, mkv, gif or animated webp."
        ) from error


def write_container(path: Path, frames: np.ndarray, rate_hz: float, suffix: str) -> None:
    """Frames uint8 [T, H, W, 3] as mp4 (h264) or webm (vp9)."""
    import av

    odd_rows, odd_columns = (n % 2 for n in frames.shape[1:3])  # 4:2:0 chroma needs even sides
    margin = ((0, odd_rows), (0, odd_columns), (0, 0))
    try:
        with av.open(str(path), "w", format=suffix[1:]) as container:
            rate = Fraction(rate_hz).limit_denominator(1000)
            stream: Any = container.add_stream("libx264" if suffix == ".mp4" else "libvpx-vp9", rate=rate)
            stream.height = frames.shape[1] + odd_rows
            stream.width = frames.shape[2] + odd_columns
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "14"}
            for frame in frames:
                even = np.pad(frame, margin, mode="edge")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        size = f"{frames.shape[2]}x{frames.shape[1]}"
        raise SegmentError(
            f"Cannot save {len(frames)} frames of {size}, {rate_hz:g} Hz, as {suffix} ({reason(error)})."
        ) from error


class AudioTrack:
    """The audio of a webm, m4a or mp4 file, as browsers record it, through what is used of `soundfile.SoundFile`.

    SegmentError if the file holds none, or it cannot be decoded.
    """

    def __init__(self, file: IO[bytes], name: object) -> None:
        self._file, self._name = file, name
        self.seek(0)

    def __enter__(self) -> AudioTrack:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def seek(self, frames: int) -> None:
        """Begin again; there is no other place to go to."""
        import av

        self._file.seek(0)
        with self._named():
            self._container = _open(self._file)
            tracks = self._container.streams.audio
            if not tracks or tracks[0].codec_context is None:
                raise SegmentError(f"{self._name} holds no audio in a known codec.")
            self.channels, self.samplerate = tracks[0].codec_context.channels, tracks[0].codec_context.rate
            self._frames = self._container.decode(tracks[0])
            self._planes = av.AudioResampler(format="fltp")

    def read(self, *_: object, **__: object) -> np.ndarray:
        """The next decoded samples, float32 [T, C], however many they are; none at the end."""
        with self._named():
            for frame in self._frames:
                for one in self._planes.resample(frame):
                    return one.to_ndarray().T
        return np.empty((0, self.channels), np.float32)

    @contextmanager
    def _named(self) -> Iterator[None]:
        import av

        try:
            yield
        except SegmentError:
            raise
        except (av.FFmpegError, LookupError, ValueError, EOFError, ArithmeticError) as error:
            raise SegmentError(f"{self._name} is not readable audio ({reason(error)}).") from error


def _open(file: IO[bytes]) -> Any:
    import av

    options = {"format_whitelist": CONTAINERS, "max_pixels": str(int(current_limits().max_pixels))}
    return av.open(file, "r", metadata_errors="replace", options=options)


def _film(container: Any, name: object) -> Any:
    """The stream that players show: no cover image, the default one if there are several."""
    from av.stream import Disposition

    films = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
    if not films:
        cover = " but a cover image" if container.streams.video else ""
        raise SegmentError(f"{name} holds no video stream{cover}.")
    film = max(films, key=lambda one: bool(one.disposition & Disposition.default))
    if film.codec_context is None:
        raise SegmentError(f"{name} holds video in an unknown codec.")
    limits = current_limits()
    limits.check("max_pixels", film.codec_context.width * film.codec_context.height, name)
    film.codec_context.options = {"max_pixels": str(int(limits.max_pixels))}  # the size may change midway
    return film


def _timing(container: Any, stream: Any, name: object) -> tuple[Timing, int]:
    """How the frames are spread, from the packets alone, and when the first begins; limits are checked meanwhile."""
    limits, area = current_limits(), max(1, stream.codec_context.width * stream.codec_context.height)
    packets: list[tuple[int | None, int]] = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            packets.append((packet.pts, packet.duration or 0))
            limits.check("max_frames", len(packets), name, stopped=True)
            limits.check("max_video_pixels", len(packets) * area, name, stopped=True)
    if not packets:
        raise SegmentError(f"{name} holds no frame.")
    rates = [float(one) for one in (stream.average_rate, stream.guessed_rate) if one]
    begins = sorted(pts for pts, _ in packets if pts is not None)
    timing = Timing(None, (*rates, 25.0)[0], len(packets))
    if len(set(begins)) == len(packets):  # streams that were joined begin again
        unit = float(stream.time_base)
        if stream.duration:
            end = (stream.start_time or 0) + stream.duration
        else:
            end = max((pts or 0, length) for pts, length in packets)
            end = end[0] + (end[1] or round(1 / (timing.rate_hz * unit)))
        end = max(end, begins[-1] + 1)
        timing = constant_rate([pts * unit for pts in begins], end * unit, rates, area)
    limits.check("max_seconds", timing.count / timing.rate_hz, name)
    return timing, begins[0] if begins else 0


def _until_next(frames: Iterable[Any], first: int) -> Iterator[tuple[float, Any]]:
    """Each frame with the time in seconds at which the next one begins; the last one stays."""
    last = None
    for frame in frames:
        if last is not None:
            pts = frame.pts if frame.pts is not None else first
            yield float((pts - first) * frame.time_base), last
        last = frame
    if last is not None:
        yield math.inf, last


class _Screen:
    """Frames as they are shown: all of one size, with square pixels, turned upright."""

    def __init__(self, stream: Any, name: object) -> None:
        self.stream, self.name = stream, name
        self.size: tuple[int, int] | None = None
        self.quarter_turns = 0

    def __call__(self, frame: Any) -> np.ndarray:
        """A decoded frame as uint8 [H, W, 3]."""
        if self.size is None:
            aspect = Fraction(self.stream.sample_aspect_ratio or 1)
            if not Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
                aspect = Fraction(1)
            # The longer side of a pixel grows, so that no detail is lost.
            self.size = round(frame.width * max(aspect, 1)), round(frame.height / min(aspect, 1))
            current_limits().check("max_pixels", self.size[0] * self.size[1], self.name)
            self.quarter_turns = round((frame.rotation or 0) / 90)
        width, height = self.size
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
        return np.rot90(pixels, self.quarter_turns)
