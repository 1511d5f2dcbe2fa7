"""How well a language model learns a tokenizer's codes: `anytoken tokenizer eval --learnability`.

Two tokenizers with the same rate and distortion may differ in bits per code for a language model. So a small decoder
of fixed size is trained on the codes of a captioned set for a fixed number of steps, once given the captions and once
without, and measured: bits of items it saw and of held-out ones, how near what it generates from held-out captions is
to the true items, and how many local codes stay as they are when only the global changes. The decoder is that of a
GPT with RoPE, RMS norms and SwiGLU; Muon (torch.optim.Muon) trains its matrices, AdamW the rest.

Shapes: B items, T targets of an item, P phrases of a caption, A axes of a grid, K ranges that codes come from, V ids.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anytoken.evaluation.tokenizers.image_metrics import at_size, frames_of, psnr_db
from anytoken.evaluation.tokenizers.speech_metrics import OPTIONAL, stoi
from anytoken.evaluation.tokenizers.test_sets import TEST_SETS, read_lines
from anytoken.segments import Segment
from anytoken.tokenizers.base import CodeGrid, Codes, ModalityTokenizer, TokenizerError
from anytoken.training.config_parts import ScheduleSpec
from anytoken.training.optim.lr_schedule import Schedule

WIDTH, LAYERS, HEADS, HIDDEN = 192, 4, 4, 512
STEPS, BATCH, WARMUP_STEPS, DECAY_SHARE = 1000, 24, 50, 0.4
MUON_LR, ADAMW_LR = 0.02, 2e-3
CAPTION_DROPOUT = 0.1  # as in training for classifier-free guidance
MEASURED, GENERATED = 512, 64  # items whose bits are measured; that are generated
VARIED = 48  # held-out items in variants that differ in global codes
ENCODED_AT_ONCE = 32
LONGEST = 512  # targets of an item; longer items are left out
NONE, UNKNOWN = 0, 1  # phrases: no caption or phrase, and one that training never saw
log = logging.getLogger(__name__)


@dataclass
class Sequences:
    """Items as the decoder reads them; past an item's end targets are -100."""

    prompts: Tensor  # int64 [B, P]
    targets: Tensor  # int64 [B, T]
    kinds: Tensor  # int64 [B, T], the range of each target
    places: Tensor  # int64 [B, T, A + 1], of each target

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor | slice) -> Sequences:
        """Some of the items."""
        return Sequences(self.prompts[index], self.targets[index], self.kinds[index], self.places[index])

    def captioned(self, how: str, generator: torch.Generator) -> Sequences:
        """The items with their captions "given", "none" of them, or those of other items, "shuffled"."""
        order = torch.randperm(len(self), generator=generator)
        prompts = {
            "given": self.prompts,
            "none": torch.full_like(self.prompts, NONE),
            "shuffled": self.prompts[order],
        }
        return Sequences(prompts[how], self.targets, self.kinds, self.places)


class Layout:
    """Codes as targets: global codes, then frame after frame; an end id after the last frame of a sequence.

    Each target competes within its own range: codebook q is kind q, global codes are the last kind. The end of a run
    competes with the codes of the first codebook. A target's place are the coordinates of its frame (of a grid), and
    its codebook or number among the global codes.
    """

    def __init__(self, tokenizer: ModalityTokenizer) -> None:
        self.shape = tokenizer.shape
        sizes = [*tokenizer.codebook_sizes, tokenizer.global_codebook_size]
        self.books, self.globals = len(sizes) - 1, self.shape.num_global_codes
        self.starts = np.cumsum([0, *sizes])[:-1]
        self.end = sum(sizes)
        self.ends = not isinstance(self.shape, CodeGrid)
        self.allowed = torch.zeros(len(sizes), self.end + 1, dtype=torch.bool)
        for kind, (start, size) in enumerate(zip(self.starts, sizes, strict=True)):
            self.allowed[kind, start : start + size] = True
        self.allowed[0, self.end] = self.ends
        axes = self.shape.max_size if isinstance(self.shape, CodeGrid) else ()
        self.places = [*(most + 1 for most in axes), self.books + self.globals]

    def length(self, codes: Codes) -> int:
        """The number of targets of an item."""
        return self.globals + codes.values.size + self.ends

    def form(self, size: Sequence[int], frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Kinds [T] and places [T, A + 1] of the targets of an item of this grid size or this many frames."""
        frame, book = np.divmod(np.arange(frames * self.books + self.ends), self.books)
        cells = [axis.ravel()[frame] for axis in np.indices(size)] if size else []
        local = np.stack([*cells, book], 1)
        none = [most - 1 for most in self.places[:-1]]
        header = np.array([[*none, self.books + i] for i in range(self.globals)], dtype=int)
        kinds = np.concatenate([np.full(self.globals, self.books), book])
        return kinds, np.concatenate([header.reshape(-1, len(self.places)), local])

    def targets(self, codes: Codes) -> np.ndarray:
        """Ids int64 [T]."""
        local = (codes.values + self.starts[:-1]).ravel()
        end = np.full(int(self.ends), self.end)
        return np.concatenate([codes.header + self.starts[-1], local, end])

    def codes(self, ids: np.ndarray, size: tuple[int, ...]) -> Codes:
        """Back from ids [T], up to an end; an incomplete frame is dropped."""
        header, local = np.split(ids, [self.globals])
        local = local[: int(np.argmax(local == self.end)) if self.end in local else None]
        frames = len(local) // self.books
        values = local[: frames * self.books].reshape(frames, self.books) - self.starts[:-1]
        return Codes(values, size, header - self.starts[-1])


# ---- the captioned set ----


@dataclass
class Captioned:
    """Codes of a set's items, with their files and the phrases of their captions."""

    codes: list[Codes]
    phrases: list[tuple[str, ...]]
    paths: list[Path]


def phrases_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A record's caption in phrases: its text between commas; of speech, who says it."""
    voice = (f"voice {record['voice']}",) if "voice" in record else ()
    return (*(phrase.strip() for phrase in record["text"].split(",")), *voice)


def captioned_sets(tokenizer: ModalityTokenizer, data: Path, seed: int) -> tuple[Captioned, Captioned]:
    """Training items, and at most MEASURED held-out ones whose first phrase training has.

    TokenizerError for a modality without a captioned set, or a set that is not there.
    """
    captioned = {name: one.captioned for name, one in TEST_SETS.items() if one.captioned}
    if tokenizer.name not in captioned:
        raise TokenizerError(
            f"Learnability is measured where a set has captions: of {', '.join(captioned)}; received a tokenizer of "
            f"{tokenizer.name}."
        )
    path = data / captioned[tokenizer.name]
    records = read_lines(path)
    train = [one for one in records if one["split"] == "train"]
    known = {phrases_of(one)[0] for one in train}
    held = [one for one in records if one["split"] == "test" and phrases_of(one)[0] in known]
    if not train or not held:
        raise TokenizerError(f"{path} has no training or no held-out items; build the complete set.")
    chosen = np.random.default_rng((seed, 4)).permutation(len(held))[:MEASURED]
    encoded = (_encoded(tokenizer, path.parent, some) for some in (train, [held[i] for i in chosen]))
    return next(encoded), next(encoded)


def _encoded(tokenizer: ModalityTokenizer, root: Path, records: Sequence[Mapping[str, Any]]) -> Captioned:
    """Codes of records of at most LONGEST targets."""
    found, layout = Captioned([], [], []), Layout(tokenizer)
    for start in range(0, len(records), ENCODED_AT_ONCE):
        some = records[start : start + ENCODED_AT_ONCE]
        paths = [root / one[tokenizer.name] for one in some]
        encoded = tokenizer.encode_batch(list(map(tokenizer.segment_type.open, paths)))
        for record, path, codes in zip(some, paths, encoded, strict=True):
            if layout.length(codes) <= LONGEST:
                found.codes.append(codes)
                found.phrases.append(phrases_of(record))
                found.paths.append(path)
    return found


def sequences(layout: Layout, items: Captioned, phrases: Mapping[str, int], width: int) -> Sequences:
    """Items with the first `width` phrases of their captions."""
    longest = max(map(layout.length, items.codes))
    prompts = torch.full((len(items.codes), width), NONE)
    targets = torch.full((len(items.codes), longest), -100)
    kinds = torch.zeros_like(targets)
    places = torch.zeros(*targets.shape, len(layout.places), dtype=torch.long)
    for row, (codes, caption) in enumerate(zip(items.codes, items.phrases, strict=True)):
        ids = [phrases.get(phrase, UNKNOWN) for phrase in caption[:width]]
        prompts[row, : len(ids)] = torch.tensor(ids)
        length = layout.length(codes)
        targets[row, :length] = torch.from_numpy(layout.targets(codes))
        form = layout.form(codes.size, len(codes))
        kinds[row, :length], places[row, :length] = map(torch.from_numpy, form)
    return Sequences(prompts, targets, kinds, places)


# ---- the decoder ----


class Block(nn.Module):
    """Attention and SwiGLU, each on a norm of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, WIDTH]; cos and sin [T, WIDTH / HEADS / 2] turn queries and keys."""
        normed = self.norm_attention(x)
        q, k, v = (one(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        q, k = (_turned(F.rms_norm(one, one.shape[-1:]), cos, sin) for one in (q, k))
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(heard.transpose(1, 2).flatten(2))
        normed = self.norm_mlp(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Decoder(nn.Module):
    """Phrases, then targets one by one; each gets the position of what it predicts."""

    allowed: Tensor

    def __init__(self, layout: Layout, phrases: int) -> None:
        super().__init__()
        vocab = layout.end + 1
        self.phrase, self.begin = nn.Embedding(phrases, WIDTH), nn.Parameter(torch.empty(WIDTH))
        self.code, self.head = nn.Embedding(vocab, WIDTH), nn.Linear(WIDTH, vocab, bias=False)
        self.place = nn.ModuleList(nn.Embedding(most, WIDTH) for most in layout.places)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.register_buffer("allowed", layout.allowed, persistent=False)
        for name, weight in self.named_parameters():
            if "norm" not in name:
                last = name.endswith((".o.weight", ".down.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * LAYERS) if last else 1))

    def forward(self, items: Sequences) -> Tensor:
        """Logits [B, T, V] of the targets, of which all but the last are read; other ranges have -inf."""
        before = items.targets[:, :-1].clamp_min(0)
        prompts = self.phrase(items.prompts)
        read = torch.cat([self.begin.expand(len(before), 1, -1), self.code(before)], 1)
        read = read + torch.stack([one(items.places[..., i]) for i, one in enumerate(self.place)]).sum(0)
        x = torch.cat([prompts, read], 1)
        half = WIDTH // HEADS // 2
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * 10_000 ** (
            -torch.arange(half, device=x.device) / half
        )
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        logits = self.head(self.norm(x[:, prompts.shape[1] :])).float()
        return logits.masked_fill(~self.allowed[items.kinds], -torch.inf)


def _autocast() -> torch.autocast:
    """bfloat16 on processors with bfloat16 instructions."""
    quick = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=quick)


def bits(model: Decoder, items: Sequences) -> Tensor:
    """Bits of each target, float [B, T]; 0 past an item's end."""
    with _autocast():
        logits = model(items)
    nats = F.cross_entropy(logits.transpose(1, 2), items.targets, reduction="none", ignore_index=-100)
    return nats / math.log(2)


def trained(layout: Layout, items: Sequences, phrases: int, seed: int, steps: int = STEPS) -> Decoder:
    """A decoder after `steps` batches of BATCH items, the same for the same seed and number of threads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(layout, phrases)
    matrices = [one for one in model.blocks.parameters() if one.ndim == 2]
    hidden = {id(one) for one in matrices}
    rest = [one for one in model.parameters() if id(one) not in hidden]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, MUON_LR, weight_decay=0.0),
        torch.optim.AdamW(rest, ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    factor = Schedule(ScheduleSpec(kind="wsd", warmup_steps=WARMUP_STEPS, decay_fraction=DECAY_SHARE), steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in optimizers]
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(items), generator=generator)])
        batch, order = items.rows(order[:BATCH]), order[BATCH:]
        dropped = torch.rand(BATCH, 1, generator=generator) < CAPTION_DROPOUT
        batch.prompts = batch.prompts.masked_fill(dropped, NONE)
        (bits(model, batch).sum() / (batch.targets >= 0).sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
    return model.eval()


@torch.inference_mode()
def mean_bits(model: Decoder, layout: Layout, items: Sequences) -> tuple[float, float]:
    """Bits per code and per item; the end of a run counts with its codes."""
    total = sum(bits(model, items.rows(slice(i, i + 64))).sum().item() for i in range(0, len(items), 64))
    codes = int(((items.targets >= 0) & (items.targets != layout.end)).sum())
    return total / codes, total / len(items)


@torch.inference_mode()
def generated(
    model: Decoder, layout: Layout, items: Sequences, sizes: Sequence[tuple[int, ...]]
) -> list[Codes]:
    """Greedily generated codes for the captions of items, on grids of their sizes."""
    longest = items.targets.shape[1]
    kinds, places = items.kinds, items.places
    if layout.ends:
        form = [torch.from_numpy(one)[:longest] for one in layout.form((), -(-longest // layout.books))]
        kinds, places = (one.expand(len(items), *one.shape) for one in form)
    targets = torch.zeros_like(items.targets)
    for now in range(longest):
        read = Sequences(items.prompts, targets[:, : now + 1], kinds[:, : now + 1], places[:, : now + 1])
        with _autocast():
            logits = model(read)[:, -1]
        if now == layout.globals:  # a run has a frame at least
            logits[:, layout.end] = -torch.inf
        targets[:, now] = logits.argmax(-1)
    lengths = [layout.globals + math.prod(size) * layout.books if size else longest for size in sizes]
    rows = zip(targets.numpy(), lengths, sizes, strict=True)
    return [layout.codes(ids[:length], size) for ids, length, size in rows]


# ---- the measures ----


def learnability(
    tokenizer: ModalityTokenizer, data: str | Path, seed: int = 0, steps: int = STEPS
) -> dict[str, Any]:
    """Learnability of a tokenizer's codes on the captioned set in `data`; see the module's docstring.

    `given`, `none`: bits of items with their captions and by a decoder that never saw any. TokenizerError as
    `captioned_sets`.
    """
    began = time.perf_counter()
    layout = Layout(tokenizer)
    with torch.no_grad():
        train_items, held_items = captioned_sets(tokenizer, Path(data), seed)
    words = sorted({phrase for caption in train_items.phrases for phrase in caption})
    phrases = {word: number for number, word in enumerate(words, UNKNOWN + 1)}
    width = max(map(len, train_items.phrases))
    train, held = (sequences(layout, one, phrases, width) for one in (train_items, held_items))
    found: dict[str, Any] = {
        "items": len(train), "held_out_items": len(held), "steps": steps, "batch": BATCH, "parameters": 0,
    }  # fmt: skip
    for how in ("none", "given"):
        shuffle = torch.Generator().manual_seed(seed)
        model = trained(layout, train.captioned(how, shuffle), len(phrases) + 2, seed, steps)
        sample = train.rows(torch.randperm(len(train), generator=shuffle)[:MEASURED])
        found[how] = {}
        for name, items in (("train", sample), ("held_out", held)):
            code, item = mean_bits(model, layout, items.captioned(how, shuffle))
            found[how] |= {f"{name}_bits_per_code": code, f"{name}_bits_per_item": item}
    found["parameters"] = sum(one.numel() for one in model.parameters())
    with torch.no_grad():
        found |= _generated_kept(tokenizer, model, layout, held, held_items)
        found |= global_change(tokenizer, Path(data), seed)
    return found | {"seconds": time.perf_counter() - began}


def _generated_kept(
    tokenizer: ModalityTokenizer, model: Decoder, layout: Layout, held: Sequences, items: Captioned
) -> dict[str, float]:
    """Similarity of items generated from held-out captions to the true ones: mean PSNR, or STOI if pystoi is installed.

    It stands between other items of the set, and what the true items' own codes decode to. Clips in which STOI finds no
    speech once decoded are not scored; generated ones without speech count 0.
    """
    if tokenizer.name == "speech" and not find_spec(OPTIONAL["stoi"]):
        return {}
    name, score = ("stoi", stoi) if tokenizer.name == "speech" else ("psnr_db", _psnr_db)
    codes = items.codes[:GENERATED]
    true = [tokenizer.segment_type.open(path) for path in items.paths[: len(codes)]]
    made = generated(model, layout, held.rows(slice(len(codes))), [one.size for one in codes])
    others = {
        f"generated_{name}": tokenizer.decode_batch(made),
        f"other_items_{name}": [*true[1:], true[0]],
        f"reconstructed_{name}": tokenizer.decode_batch(codes),
    }
    scores = {key: [score(*pair) for pair in zip(true, some, strict=True)] for key, some in others.items()}
    scored = [row for row, one in enumerate(scores[f"reconstructed_{name}"]) if one is not None]
    return {
        key: float(np.mean([some[row] or 0.0 for row in scored])) for key, some in scores.items() if scored
    }


def _psnr_db(true: Segment, other: Segment) -> float:
    frames = frames_of(true)
    return psnr_db(frames, at_size(frames_of(other), frames.shape))


def global_change(tokenizer: ModalityTokenizer, data: Path, seed: int) -> dict[str, float]:
    """Stability of local codes when only the global codes change; {} if the test set has no such variants.

    Of images and clips the share of equal local codes, in pairs of variants. Of speech the edit distance of frames, as
    a share of the longer clip, of a word by two voices; and of different words.
    """
    variants = TEST_SETS[tokenizer.name].variants
    if variants is None:
        return {}
    if tokenizer.name != "speech":
        encoded = [
            [one.values for one in tokenizer.encode_batch(group)] for group in variants(data, VARIED, seed)
        ]
        pairs = [pair for group in encoded for pair in combinations(group, 2)]
        return {"equal_local_codes": float(np.mean([np.mean(a == b) for a, b in pairs]))}
    if not find_spec("rapidfuzz"):
        log.warning("Edit distances are not measured: the package rapidfuzz is missing.")
        return {}
    from rapidfuzz.distance.Levenshtein import normalized_distance

    ours, theirs = (
        [[tuple(frame) for frame in one.values.tolist()] for one in tokenizer.encode_batch(side)]
        for side in zip(*variants(data, VARIED, seed), strict=True)
    )
    apart = {"same_word": theirs, "other_word": [*theirs[1:], theirs[0]]}
    return {
        f"{name}_edit_distance": float(np.mean(list(map(normalized_distance, ours, side))))
        for name, side in apart.items()
    }
