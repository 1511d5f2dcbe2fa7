"""Originals and reconstructions: the samples on a tokenizer's card, as files and as Markdown.

Images and clips on one sheet, two short audio clips, letters with their codes, or whatever a plug-in's segment can
show: its `to_image`, or its `str`. A card's files stay under 150 kB together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from anytoken.evaluation.tokenizers.evaluate import EvalResult
from anytoken.evaluation.tokenizers.image_metrics import frames_of
from anytoken.evaluation.tokenizers.test_sets import TestExample
from anytoken.segments import DNA, Image, Speech, Text
from anytoken.tokenizers.text import TextTokenizer

SHEET_BYTES, SHEET_PX, SHEET_COLUMNS, GAP_PX = 90_000, 1_000, (10, 8, 6, 4, 2), 4  # wider: shown too small
SHOWN_PX = 200  # the longer side of an image on a sheet, at most
CLIP_FRAMES = 4  # of each clip on a sheet
AUDIO_SECONDS = 1.2  # 16-bit samples at 16 kHz are then at most 38 kB, and FLAC halves that
LETTERS, TEXTS, VOICES = 60, 3, 2
Row = tuple[str, ...]


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table; the first is the head."""
    head, *body = rows
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Three significant digits, thousands with a comma."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def share(value: float) -> str:
    """A share as a percentage; 100 % only for all."""
    text = f"{100 * value:.1f}"
    return "100 %" if value == 1 else f"{min(text, '99.9', key=float)} %"


# ---- files ----


def _one_of_each(items: list[TestExample]) -> list[int]:
    """Indices of items, alternating between groups, each in its order, so that samples are not selected by hand."""
    turns: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        turns.setdefault(item.group, []).append(index)
    rank = {index: (turn, group) for group, rows in turns.items() for turn, index in enumerate(rows)}
    return sorted(rank, key=lambda index: rank[index])


def _sheet(found: EvalResult, card: Path) -> list[dict[str, Any]]:
    """samples.png: originals above reconstructions, as many columns as fit into SHEET_BYTES and SHEET_PX."""
    columns, size = [], None
    for index in _one_of_each(found.items):
        item, output = found.items[index], found.outputs[index]
        before, after = frames_of(item.segment), frames_of(output)
        size = size or _shown_size(*before.shape[1:3])
        for place in range(0, len(before), max(1, len(before) // CLIP_FRAMES)):
            back = Image(after[place * len(after) // len(before)])
            pair = [Image(before[place]).resize(*size).pixels, back.resize(*size).pixels]
            columns.append((item, np.stack(pair)))
    assert size is not None
    fits = [count for count in SHEET_COLUMNS if count * (size[1] + GAP_PX) <= SHEET_PX]
    for count in fits or SHEET_COLUMNS[-1:]:
        shown = columns[:count]
        _grid(np.stack([pair for _, pair in shown])).save(card / "samples.png", optimize=True)
        if (card / "samples.png").stat().st_size <= SHEET_BYTES:
            break
    names = dict.fromkeys(f"{item.name} ({item.group})" if item.group else item.name for item, _ in shown)
    return [{"file": "samples.png", "names": list(names), "columns": len(shown)}]


def _shown_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of an image on a sheet: its own, or smaller."""
    scale = min(1.0, SHOWN_PX / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _grid(pairs: np.ndarray) -> PILImage.Image:
    """Images uint8 [N, 2, H, W, 3] as one: N columns, two rows, on white."""
    count, rows, height, width, _ = pairs.shape
    sheet = np.full((rows * (height + GAP_PX) - GAP_PX, count * (width + GAP_PX) - GAP_PX, 3), 255, np.uint8)
    for column in range(count):
        for row in range(rows):
            top, left = row * (height + GAP_PX), column * (width + GAP_PX)
            sheet[top : top + height, left : left + width] = pairs[column, row]
    return PILImage.fromarray(sheet)


def _audio(found: EvalResult, card: Path) -> list[dict[str, Any]]:
    """One clip per voice, the first short one: sample_1.flac, sample_1_decoded.flac, ..."""
    order = sorted(_one_of_each(found.items), key=lambda index: _seconds(found.items[index]) > AUDIO_SECONDS)
    chosen = {found.items[index].group: index for index in reversed(order)}
    samples = []
    for number, (voice, index) in enumerate(sorted(chosen.items())[:VOICES], 1):
        clip, back = found.items[index].segment, found.outputs[index]
        assert isinstance(clip, Speech) and isinstance(back, Speech)
        names = {"original": f"sample_{number}.flac", "decoded": f"sample_{number}_decoded.flac"}
        clip.resample(back.sample_rate_hz).save(card / names["original"])
        back.save(card / names["decoded"])
        samples.append({**names, "says": found.items[index].name, "voice": voice})
    return samples


def _seconds(item: TestExample) -> float:
    assert isinstance(item.segment, Speech)
    return item.segment.seconds


def _bases(found: EvalResult, card: Path) -> list[dict[str, Any]]:
    item, output = found.items[0], found.outputs[0]
    assert isinstance(item.segment, DNA) and isinstance(output, DNA)
    codes = found.codes[0][: LETTERS // 3]
    return [{"original": item.segment.bases[:LETTERS], "codes": codes, "decoded": output.bases[:LETTERS]}]


def _pieces(found: EvalResult, card: Path) -> list[dict[str, Any]]:
    """One text per group, with the bytes of each id."""
    samples = []
    for index in _one_of_each(found.items)[:TEXTS]:
        ids, output = found.codes[index], found.outputs[index]
        assert isinstance(output, Text) and isinstance(found.tokenizer, TextTokenizer)
        pieces = [found.tokenizer.id_bytes(id_).decode(errors="replace") for id_ in ids]
        samples.append(
            {"original": found.items[index].name, "pieces": pieces, "ids": ids, "decoded": output.text}
        )
    return samples


def _others(found: EvalResult, card: Path) -> list[dict[str, Any]]:
    """Images of a plug-in's segments if they have `to_image`, else their `str`."""
    if hasattr(found.items[0].segment, "to_image"):
        return _sheet(found, card)
    samples = []
    for index in _one_of_each(found.items)[:TEXTS]:
        words = [str(one)[:LETTERS] for one in (found.items[index].segment, found.outputs[index])]
        samples.append(
            {"original": words[0], "codes": found.codes[index][: LETTERS // 4], "decoded": words[1]}
        )
    return samples


_WRITE: dict[str, Callable[[EvalResult, Path], list[dict[str, Any]]]] = {
    "image": _sheet, "video": _sheet, "speech": _audio, "dna": _bases, "text": _pieces,
}  # fmt: skip


def write_samples(found: EvalResult, card: Path) -> list[dict[str, Any]]:
    """Write originals and reconstructions of a few items into the folder `card`; returns what the page needs."""
    return _WRITE.get(found.figures["kind"], _others)(found, card)


# ---- the page ----


def _show_sheet(samples: list[dict[str, Any]]) -> str:
    (sheet,) = samples
    names = ", ".join(sheet["names"])
    return f"![Originals above reconstructions]({sheet['file']})\n\nOriginals above, reconstructions below: {names}."


def _show_audio(samples: list[dict[str, Any]]) -> str:
    rows: list[Row] = [("text", "voice", "original", "reconstruction")]
    for one in samples:
        links = (f"[{one[key]}]({one[key]})" for key in ("original", "decoded"))
        rows.append((one["says"], one["voice"], *links))
    return table(rows)


def _show_text(samples: list[dict[str, Any]]) -> str:
    """Codes of letters, or pieces and ids of a text, as blocks."""
    blocks = []
    for one in samples:
        if "pieces" in one:
            head, codes = (
                "text    ",
                f"pieces  {'|'.join(one['pieces'])}\nids     {' '.join(map(str, one['ids']))}",
            )
        else:
            head, codes = "input   ", f"codes   {' '.join(map(str, one['codes']))}"
        blocks.append(f"{head}{one['original']}\n{codes}\ndecoded {one['decoded']}")
    return "```text\n" + "\n\n".join(blocks) + "\n```"


def show_samples(samples: list[dict[str, Any]]) -> str:
    """Markdown of what `write_samples` returned: its keys tell what kind of sample it is."""
    for key, show in (("file", _show_sheet), ("voice", _show_audio)):
        if key in samples[0]:
            return show(samples)
    return _show_text(samples)
