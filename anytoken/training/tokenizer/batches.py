"""Endless training batches for the tokenizers, drawn from packed arrays or from a user's own files.

Packed arrays (sprites with alpha, animations, audio) are composed on the fly: backgrounds, sizes and positions vary, so
the tokenizer sees every shift. Files are read once and cut or scaled. Batch `n` depends on the seed and `n` alone, so
an interrupted training resumes exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from anytoken.segments import Image, Speech, Video
from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.image import PATCH_PX, fit_image, to_unit_range
from anytoken.tokenizers.speech import HOP, SAMPLE_RATE_HZ
from anytoken.tokenizers.video import MAX_STEPS, fit_clip
from anytoken.utils.json_lines import read_json_lines

Batches = Callable[[int], Tensor]  # step -> batch
BACKGROUNDS = [
    (255, 255, 255), (20, 20, 20), (225, 60, 60), (245, 150, 50),
    (250, 225, 90), (80, 175, 90), (70, 120, 225), (150, 90, 190),
]  # fmt: skip
OBJECT_SHARE = 56 / 64  # of the side, in the composed set
CROP_SECONDS = 1.0
EQ_SPREAD_DB, EQ_POINTS = 5.0, 9  # of a random filter
CROP_SHARES = 1.0, 1.0, 1.0, 0.8, 0.6, 0.4  # of that: down to a word of one syllable
SUFFIXES = {  # of a user's own files, for each kind that has batches here
    "image": (".png", ".jpg", ".jpeg", ".webp"),
    "video": (".mp4", ".webm", ".gif", ".webp"),
    "speech": (".wav", ".flac", ".ogg", ".mp3"),
}
LAYERED = ("layered_image", "layered_video")
KINDS = (*SUFFIXES, *LAYERED)  # a tokenizer of another kind has `training_batches` of its own


def batches_for(
    kind: str,
    source: Path,
    batch_size: int,
    seed: int,
    config: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> Batches:
    """The batches of a kind from `source`: an .npy array, or a folder or glob of files.

    config: of the tokenizer to train; own files are scaled to its sizes. An array is kept on `device`, where batches
    are composed; between machines or devices they may differ in the last bits. TokenizerError if there is nothing
    there, naming what is expected.
    """
    if kind in LAYERED:
        layers = layer_batches(source, batch_size, seed)
        return lambda step: layers(step).to(device)
    if source.suffix == ".npy":
        makers = {"image": sprite_batches, "video": sprite_batches, "speech": audio_batches}
        if not source.is_file():
            raise TokenizerError(
                f"{source} is missing: build the set first, or name your own files in `data`."
            )
        halves = {"seconds": crop_seconds(config or {})} if kind == "speech" else {}
        return makers[kind](source, batch_size, seed, device=device, **halves)
    batches = file_batches(kind, source, batch_size, seed, config or {})
    return lambda step: batches(step).to(device)


def crop_seconds(config: Mapping[str, Any]) -> float:
    """The maximum length of an audio crop: doubled if the voice is taken from another clip than the words."""
    return CROP_SECONDS * (2 if config.get("num_global_codes") else 1)


def training_rows(index: Path) -> np.ndarray:
    """Row numbers of an index.jsonl whose concepts tokenizers may see."""
    return np.array([line["row"] for line in read_json_lines(index) if not line["tokenizer_held_out"]])


def sprite_batches(path: Path, batch_size: int, seed: int, device: str | torch.device = "cpu") -> Batches:
    """Images [B, 3, H, W] in [-1, 1]: sprites on a color, half of them as the composed set has them.

    Animations give clips [B, 3, T, 64, 64], placed identically in all frames.
    """
    sprites, rows = _on(device, path), training_rows(path.with_suffix(".jsonl"))

    def batch(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        picked = sprites[torch.from_numpy(rng.choice(rows, batch_size)).to(device)]
        if picked.ndim == 5:
            placed = place(picked.flatten(0, 1), 64, 64, rng, repeat=picked.shape[1])
            return placed.unflatten(0, picked.shape[:2]).transpose(1, 2)
        height = width = 64
        if rng.random() < 0.15:  # other sizes, so that the size header means something
            height, width = (PATCH_PX * int(n) for n in rng.integers(4, 13, 2))
        return place(picked, height, width, rng)

    return batch


def _on(device: str | torch.device, path: Path) -> Tensor:
    """An array as a tensor on a device; on the CPU it stays on disk until it is read."""
    return torch.from_numpy(np.load(path, mmap_mode="c")).to(device)


def layer_batches(path: Path, batch_size: int, seed: int) -> Batches:
    """Layers and two plain colours to compose them on, as planes: [B, 4 + 3 + 3, 64, 64], or [.., T, 64, 64] of clips.

    A layer is premultiplied colour in [-1, 1] and coverage in [0, 1] (see `layered.py`). One batch in ten holds items
    without a plain border instead: opaque layers, on a gradient.
    """
    if path.suffix != ".npy" or not path.is_file():
        raise TokenizerError(f"{path} is not an array of drawings with coverage, such as sprites.npy.")
    sprites, rows = _on("cpu", path), training_rows(path.with_suffix(".jsonl"))

    def batch(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        picked = sprites[torch.from_numpy(rng.choice(rows, batch_size))]
        count = picked.shape[1] if picked.ndim == 5 else 1  # frames of a clip stand alike
        drawn = draw(picked.reshape(-1, *picked.shape[-3:]), *_places(batch_size, 64, 64, rng), 64, 64, count)
        colors = [torch.from_numpy(_plain_colors(batch_size, rng) / 255).to(drawn) for _ in range(2)]
        bases = [
            one.repeat_interleave(count, 0)[:, :, None, None].expand(-1, -1, 64, 64) * 2 - 1 for one in colors
        ]
        layer = torch.cat([2 * drawn[:, :3] - drawn[:, 3:], drawn[:, 3:]], 1)
        if rng.random() < 0.1:
            ramp = torch.linspace(0, 1, 64, device=drawn.device)
            ramp = ramp[:, None] if rng.random() < 0.5 else ramp[None]
            back = (1 - ramp) * bases[0] + ramp * bases[1]
            opaque = layer[:, :3] + (1 - layer[:, 3:]) * back
            layer = torch.cat([opaque, torch.ones_like(layer[:, 3:])], 1)
        planes = torch.cat([layer, *bases], 1)
        return planes if picked.ndim == 4 else planes.unflatten(0, (batch_size, count)).transpose(1, 2)

    return batch


def place(sprites: Tensor, height: int, width: int, rng: np.random.Generator, repeat: int = 1) -> Tensor:
    """Compose sprites uint8 [B, S, S, 4] on plain colours: float [B, 3, H, W] in [-1, 1].

    Half stand as in the composed set (56/64 of the side, centred), half at a random size and position; groups of
    `repeat` consecutive sprites share color, size and position.
    """
    count = len(sprites) // repeat
    scale, offset = _places(count, height, width, rng)
    return compose(sprites, _plain_colors(count, rng), scale, offset, height, width, repeat)


def _places(count: int, height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Side of each sprite in pixels [count], and rows and columns before it [count, 2]."""
    side = min(height, width)
    fixed = rng.random(count) < 0.5
    scale = np.where(fixed, OBJECT_SHARE, rng.uniform(0.4, 1.0, count)) * side
    room = np.array([height, width]) - scale[:, None]
    return scale, np.where(fixed[:, None], room / 2, rng.random((count, 2)) * room)


def compose(
    sprites: Tensor,
    color: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    height: int,
    width: int,
    repeat: int = 1,
) -> Tensor:
    """Sprites uint8 [B * repeat, S, S, 4] on plain colours [B, 3] (0 to 255): float [B * repeat, 3, H, W] in [-1, 1].

    scale: side of each in pixels [B]; offset: rows and columns before it [B, 2].
    """
    drawn = draw(sprites, scale, offset, height, width, repeat)
    back = torch.from_numpy(color.astype(np.float32) / 255).to(sprites.device)
    back = back.repeat_interleave(repeat, 0)[:, :, None, None]
    return (drawn[:, :3] + back * (1 - drawn[:, 3:])) * 2 - 1


def draw(
    sprites: Tensor, scale: np.ndarray, offset: np.ndarray, height: int, width: int, repeat: int = 1
) -> Tensor:
    """Sprites uint8 [B * repeat, S, S, 4] where `compose` puts them: premultiplied RGBA in [0, 1], [.., 4, H, W]."""
    count = len(sprites) // repeat
    # Affine map from output coordinates [-1, 1] to sprite coordinates [-1, 1].
    theta = np.zeros((count, 2, 3), dtype=np.float32)
    for axis, (row, size) in enumerate(((1, height), (0, width))):
        theta[:, row, row] = size / scale
        theta[:, row, 2] = (size - 2 * offset[:, axis]) / scale - 1
    full = torch.from_numpy(theta).to(sprites.device).repeat_interleave(repeat, 0)
    rgba = sprites.permute(0, 3, 1, 2).float() / 255
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)  # premultiplied: no dark fringes
    grid = F.affine_grid(full, [len(sprites), 4, 2 * height, 2 * width], align_corners=False)
    return F.avg_pool2d(F.grid_sample(rgba, grid, align_corners=False), 2)


def _plain_colors(count: int, rng: np.random.Generator) -> np.ndarray:
    """Colours float [count, 3] of 0 to 255: most of them backgrounds of the composed set."""
    known = np.array(BACKGROUNDS, dtype=np.float32)[rng.integers(len(BACKGROUNDS), size=count)]
    return np.where(rng.random((count, 1)) < 0.7, known, rng.uniform(0, 255, (count, 3)))


def audio_batches(
    path: Path, batch_size: int, seed: int, device: str | torch.device = "cpu", seconds: float = CROP_SECONDS
) -> Batches:
    """Crops [B, samples] of one long int16 recording, at varied level, speed and timbre.

    Half of the batches have `batch_size` crops of `seconds` at 16 kHz, the others more, shorter ones. If an index next
    to the recording lists its clips, a third of the crops begin with a clip and a third end with one, since random
    crops rarely contain the beginning or end of a clip.
    """
    from torchaudio.functional import resample

    audio, edges = _on(device, path), _clip_edges(path.with_suffix(".jsonl"))

    def batch(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        # Ten in `ratio` out: pitch and speed of other speakers.
        ratio = int(rng.choice([8, 9, 10, 10, 11, 12]))
        length, count = _crop_size(batch_size, seconds, rng)
        need = length * 10 // ratio + 10
        starts = rng.integers(0, max(1, len(audio) - need), count)
        if edges is not None:
            first, last = (rng.choice(one, count) for one in edges)
            kind = rng.integers(0, 3, count)
            starts = np.choose(kind, [starts, first, last - need]).clip(0, max(0, len(audio) - need))
        rows = torch.from_numpy(starts).to(device)[:, None] + torch.arange(need, device=device)
        crops = audio[rows].float() / 32768
        crops = random_eq((crops if ratio == 10 else resample(crops, 10, ratio))[:, :length], rng)
        return crops * torch.from_numpy(rng.uniform(0.3, 1.3, (count, 1)).astype(np.float32)).to(device)

    return batch


def _clip_edges(index: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Starts and ends of the clips in a recording, in samples; None without an index."""
    if not index.is_file():
        return None
    lines = list(read_json_lines(index))
    begins = np.array([line["start"] for line in lines])
    return begins, begins + np.array([line["samples"] for line in lines])


def _crop_size(batch_size: int, seconds: float, rng: np.random.Generator) -> tuple[int, int]:
    """Length in samples and number of the crops in a batch; the total amount of audio is about constant."""
    share = float(rng.choice(CROP_SHARES))
    return int(share * seconds * SAMPLE_RATE_HZ), int(batch_size / share)


def random_eq(crops: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the crops [B, samples] through a smooth random filter: other voices, rooms and microphones."""
    decibels = rng.normal(0, EQ_SPREAD_DB, (len(crops), 1, EQ_POINTS)) * (
        rng.random((len(crops), 1, 1)) < 0.5
    )
    bins = crops.shape[1] // 2 + 1
    curve = F.interpolate(
        torch.from_numpy(decibels).float().to(crops.device), bins, mode="linear", align_corners=True
    )[:, 0]
    filtered = torch.fft.irfft(torch.fft.rfft(crops) * 10 ** (curve / 20), crops.shape[1])
    return filtered / filtered.abs().amax(1, keepdim=True).clamp_min(1.0)


def list_media_files(source: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files with these suffixes in a folder (recursively) or of a glob such as photos/*.png, sorted."""
    pattern = source / "**" / "*" if source.is_dir() else source
    root = Path(pattern.anchor or ".")
    names = sorted(root.glob(str(pattern.relative_to(root) if pattern.is_absolute() else pattern)))
    return [path for path in names if path.is_file() and path.name.lower().endswith(tuple(suffixes))]


def file_batches(
    kind: str, source: Path, batch_size: int, seed: int, config: Mapping[str, Any] | None = None
) -> Batches:
    """Batches from a user's own images, clips or recordings, in a folder or of a glob.

    Images and clips are scaled as by a tokenizer with this `config`; a batch has one size, that of a random item.
    Recordings are cropped at random to at most `crop_seconds`.
    """
    files, config = list_media_files(source, SUFFIXES[kind]), config or {}
    if not files:
        raise TokenizerError(f"{source} holds no {kind} files; expected {', '.join(SUFFIXES[kind])}.")
    if kind == "speech":
        return _own_audio_batches([_audio(path) for path in files], batch_size, seed, crop_seconds(config))
    side_px, most = config.get("side_px", 64), config.get("max_steps", MAX_STEPS)
    if kind == "image":
        items = [fit_image(Image.open(path), side_px) for path in files]
    else:
        items = [fit_clip(Video.open(path), side_px, most) for path in files]

    def batch(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        shape = items[rng.integers(len(items))].shape
        alike = [row for row, item in enumerate(items) if item.shape == shape]
        x = to_unit_range(np.stack([items[row] for row in rng.choice(alike, batch_size)]))
        return x if kind == "image" else x.transpose(1, 2)

    return batch


def _own_audio_batches(items: Sequence[Tensor], batch_size: int, seed: int, seconds: float) -> Batches:
    def batch(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        length, count = _crop_size(batch_size, seconds, rng)
        length -= length % HOP
        return torch.stack([_crop(items[row], length, rng) for row in rng.integers(0, len(items), count)])

    return batch


def _audio(path: Path) -> Tensor:
    return torch.from_numpy(Speech.open(path).resample(SAMPLE_RATE_HZ).samples)


def _crop(samples: Tensor, length: int, rng: np.random.Generator) -> Tensor:
    if len(samples) <= length:
        return samples.repeat(-(-length // len(samples)))[:length]
    last = len(samples) - length
    start = (int(rng.integers(0, last)), 0, last)[int(rng.integers(3))]  # a clip's ends are trained on, too
    return samples[start : start + length]
