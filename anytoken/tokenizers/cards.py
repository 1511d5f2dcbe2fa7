"""The card of a measured tokenizer: `anytoken tokenizer eval FOLDER --data data/sets --card tokenizers/image`.

Writes figures.json and, from it alone, README.md; beside them what went in and what came back of a few held-out
items, and the training curve. `render` reads no other number than those in figures.json, so a card cannot say
what was not measured. Together a card's files stay under 150 kB, small enough to lie in a repository.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image as Picture

from anytoken.segments import DNA, Image, Speech, Text
from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.held_out import HeldOut, made_of
from anytoken.tokenizers.measures import Measured, frames_of, measure
from anytoken.tokenizers.text import TextTokenizer

SHEET_BYTES, SHEET_COLUMNS, GAP_PX = 90_000, (10, 8, 6, 4, 2), 4
CLIP_FRAMES = 4  # of each clip on a sheet
SOUND_SECONDS = 1.2  # 16-bit samples at 16 kHz are then at most 38 kB, and FLAC halves that
BASES, TEXTS, VOICES = 60, 3, 2
Row = tuple[str, ...]


def make_card(
    tokenizer: str | Path, data: str | Path, card: str | Path, count: int = 400, seed: int = 0
) -> Path:
    """Measure a tokenizer (see `measure`) and write its card into the folder `card`; returns the README.md.

    TokenizerError as `measure` raises it, or if matplotlib or pystoi (the `eval` extra) is missing.
    """
    missing = [name for name in ("matplotlib", "pystoi") if find_spec(name) is None]
    if missing:
        raise TokenizerError(f"A card needs {' and '.join(missing)}: pip install 'anytoken[eval]'.")
    tokenizer, data, card = Path(tokenizer), Path(data), Path(card)
    found = measure(tokenizer, data, count, seed)
    card.mkdir(parents=True, exist_ok=True)
    figures = {
        **found.figures,
        "about": _about(found),
        "command": f"anytoken tokenizer eval {_shown(tokenizer)} --data {_shown(data)} --card {_shown(card)} "
        f"--count {count} --seed {seed}",
        "data": made_of(found.figures["kind"], data),
        "training": _read_json(tokenizer / "training.json"),
        "curve": read_curve(tokenizer / "metrics.jsonl"),
        "samples": _SAMPLES[found.figures["kind"]](found, card),
    }
    if figures["curve"]:
        _plot(figures["curve"], card / "curve.png")
    (card / "figures.json").write_text(
        json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (card / "README.md").write_text(render(figures), encoding="utf-8")
    return card / "README.md"


def read_curve(path: Path) -> list[dict[str, float]]:
    """What a training logged, in order of steps; [] without a log. A step logged again after a kill counts once."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted({line["step"]: line for line in lines}.values(), key=lambda line: line["step"])


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _shown(path: Path) -> str:
    """A path as a reader can use it: relative to the working directory, or its name alone."""
    absolute, here = path.absolute(), Path.cwd()
    return absolute.relative_to(here).as_posix() if absolute.is_relative_to(here) else path.name


def _about(found: Measured) -> str:
    """What the tokenizer's module says of itself: its first two paragraphs."""
    text = sys.modules[type(found.tokenizer).__module__].__doc__ or ""
    return "\n\n".join(text.strip().split("\n\n")[:2])


# ---- samples ----


def _one_of_each(items: list[HeldOut]) -> list[int]:
    """Indices of items, the groups taking turns, each in its order: the first ones are nobody's choice."""
    turns: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        turns.setdefault(item.group, []).append(index)
    rank = {index: (turn, group) for group, rows in turns.items() for turn, index in enumerate(rows)}
    return sorted(rank, key=lambda index: rank[index])


def _sheet(found: Measured, card: Path) -> list[dict[str, Any]]:
    """samples.png: originals above what came back, as many columns as fit into SHEET_BYTES."""
    columns = []
    for index in _one_of_each(found.items):
        item, output = found.items[index], found.outputs[index]
        before, after = frames_of(item.segment), frames_of(output)
        for place in range(0, len(before), max(1, len(before) // CLIP_FRAMES)):
            back = Image(after[place * len(after) // len(before)])
            columns.append((item, np.stack([before[place], back.resize(*before.shape[1:3]).pixels])))
    for count in SHEET_COLUMNS:
        shown = columns[:count]
        _grid(np.stack([pair for _, pair in shown])).save(card / "samples.png", optimize=True)
        if (card / "samples.png").stat().st_size <= SHEET_BYTES:
            break
    names = dict.fromkeys(f"{item.name} ({item.group})" if item.group else item.name for item, _ in shown)
    return [{"file": "samples.png", "names": list(names), "columns": len(shown)}]


def _grid(pairs: np.ndarray) -> Picture.Image:
    """Pictures uint8 [N, 2, H, W, 3] as one: N columns, two rows, on white."""
    count, rows, height, width, _ = pairs.shape
    sheet = np.full((rows * (height + GAP_PX) - GAP_PX, count * (width + GAP_PX) - GAP_PX, 3), 255, np.uint8)
    for column in range(count):
        for row in range(rows):
            top, left = row * (height + GAP_PX), column * (width + GAP_PX)
            sheet[top : top + height, left : left + width] = pairs[column, row]
    return Picture.fromarray(sheet)


def _sounds(found: Measured, card: Path) -> list[dict[str, Any]]:
    """A clip of each of two voices, the first that is short: sample_1.flac, sample_1_decoded.flac, ..."""
    order = sorted(_one_of_each(found.items), key=lambda index: _seconds(found.items[index]) > SOUND_SECONDS)
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


def _seconds(item: HeldOut) -> float:
    assert isinstance(item.segment, Speech)
    return item.segment.seconds


def _bases(found: Measured, card: Path) -> list[dict[str, Any]]:
    item, output = found.items[0], found.outputs[0]
    assert isinstance(item.segment, DNA) and isinstance(output, DNA)
    codes = found.codes[0][: BASES // 3]
    return [{"original": item.segment.bases[:BASES], "codes": codes, "decoded": output.bases[:BASES]}]


def _pieces(found: Measured, card: Path) -> list[dict[str, Any]]:
    """One text of each group, and its pieces: the bytes of each id."""
    samples = []
    for index in _one_of_each(found.items)[:TEXTS]:
        ids, output = found.codes[index], found.outputs[index]
        assert isinstance(output, Text) and isinstance(found.tokenizer, TextTokenizer)
        pieces = [found.tokenizer.id_bytes(id_).decode(errors="replace") for id_ in ids]
        samples.append(
            {"original": found.items[index].name, "pieces": pieces, "ids": ids, "decoded": output.text}
        )
    return samples


_SAMPLES: dict[str, Callable[[Measured, Path], list[dict[str, Any]]]] = {
    "image": _sheet, "video": _sheet, "speech": _sounds, "dna": _bases, "text": _pieces,
}  # fmt: skip


def _plot(curve: list[dict[str, float]], path: Path) -> None:
    """The training loss, and beside it whatever else was logged first."""
    from matplotlib.figure import Figure  # without pyplot it needs no display and keeps no state

    names = [name for name in curve[0] if name not in ("step", "seconds")][:2]
    figure = Figure(figsize=(3.2 * len(names), 2.2), layout="tight")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot([line["step"] for line in curve], [line[name] for line in curve])
        axis.set(xlabel="step", title=name)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80, metadata={"Software": None})


# ---- the page ----


def render(figures: dict[str, Any]) -> str:
    """The card as Markdown, from what figures.json holds and nothing else."""
    kind = figures["kind"]
    parts = [
        f"# The {kind} tokenizer\n\n{figures['about']}",
        f"## Rate\n\n{_table(_rate(figures))}",
        f"## What it keeps\n\n{_kept_intro(figures)}\n\n{_table(_KEPT[kind](figures))}",
        _groups(figures),
        f"## Codebook\n\n{_codebook(figures)}",
        f"## Speed\n\n{_speed(figures)}",
        _training(figures),
        f"## Before and after\n\n{_before_after(figures)}",
        _data(figures),
        f"## How this page was made\n\n{_origin(figures)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: list[Row]) -> str:
    head, *body = rows
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def overview(cards: Path) -> str:
    """The cards in a folder's subfolders as one Markdown table, a line a tokenizer; TokenizerError without any."""
    found = [_read_json(path) for path in sorted(Path(cards).glob("*/figures.json"))]
    if not found:
        raise TokenizerError(
            f"{cards} holds no */figures.json; `anytoken tokenizer eval --card` writes them."
        )
    head = ("tokenizer", "rate", "held-out items", "what comes back", "beside", "codebook usage")
    return _table([head, *(_overview_row(figures) for figures in found)])


def _overview_row(figures: dict[str, Any]) -> Row:
    kind, unit = figures["kind"], figures["unit"]
    rate = f"{_number(figures['tokens_per_unit'])} codes a {unit}"
    title, *columns = _KEPT[kind](figures)[1]
    baseline = _KEPT[kind](figures)[0][2] if len(columns) > 1 else ""
    kept = f"{title}: {columns[0]}"
    beside = f"{baseline}: {columns[1]}" if baseline else ""
    usage = f"{_share(figures['codebook_usage'])} of {figures['codebook_size']:,}"
    return (kind, rate, f"{figures['items']:,}", kept, beside, usage)


def _number(value: float) -> str:
    """Three digits that matter, thousands with a comma."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _share(value: float) -> str:
    """A share as a percentage; 100 % only for all."""
    text = f"{100 * value:.1f}"
    return "100 %" if value == 1 else f"{min(text, '99.9', key=float)} %"


def _rate(figures: dict[str, Any]) -> list[Row]:
    unit = figures["unit"]
    rows: list[Row] = [
        ("", ""),
        (f"codes a {unit}", _number(figures["tokens_per_unit"])),
        (f"bits a {unit}", _number(figures["bits_per_unit"])),
        ("codebook sizes", ", ".join(f"{size:,}" for size in figures["codebook_sizes"])),
        ("a segment has", _limits(figures["shape"])),
    ]
    if figures["parameters"]:
        rows.append(("parameters", f"{figures['parameters']:,}"))
    settings = ", ".join(f"{key} {value}" for key, value in figures.get("config", {}).items())
    return [*rows, ("settings", settings)] if settings else rows


def _limits(shape: dict[str, Any]) -> str:
    if shape["type"] == "grid":
        sizes = zip(shape["axes"], shape["min_size"], shape["max_size"], strict=True)
        return " × ".join(f"{low} to {high} {axis}" for axis, low, high in sizes)
    if shape["type"] == "run":
        return f"{shape['min_length']} to {shape['max_length']} codes"
    return "any number of ids"


def _kept_intro(figures: dict[str, Any]) -> str:
    what = {
        "image": "pictures of concepts that the tokenizer never saw in any style, composed as in training",
        "video": "clips of concepts that the tokenizer never saw, composed as in training",
        "speech": "clips of voices that the tokenizer never heard. All of this speech is synthetic",
        "dna": "genes whose products are not in the training split. Every window of letters is checked besides",
        "text": "texts of the test split, which were not learnt from",
    }[figures["kind"]]
    return f"Measured on {figures['items']:,} held-out items: {what}."


def _kept_pictures(figures: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [("", "this tokenizer", "a thumbnail of as many bits", "the mean colour")]
    for title, key, digits in (
        ("PSNR in dB (higher is better)", "psnr_db", 2),
        ("SSIM (1 is equal)", "ssim", 3),
    ):
        values = (figures[f"{who}{key}"] for who in ("", "thumbnail_", "mean_colour_"))
        rows.append((title, *(f"{value:.{digits}f}" for value in values)))
    return rows


def _kept_speech(figures: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [("", "this tokenizer", "random codes", "clips")]
    titles = {
        "stoi": "STOI, intelligibility (1 is equal)",
        "log_mel_l1": "difference of log-mel energies (0 is equal)",
    }
    for key, title in titles.items():
        if key in figures:
            both = (f"{figures[key]:.3f}", f"{figures[f'random_codes_{key}']:.3f}")
            rows.append((title, *both, str(figures[f"{key}_items"])))
    return rows


def _kept_dna(figures: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [
        ("", "share of items"),
        ("genes that come back letter for letter", _share(figures["exact"])),
        ("with a tenth of the letters made N: exact", _share(figures["with_n_exact"])),
        ("in lower case: comes back in upper case", _share(figures["lower_case_as_upper"])),
        ("in lower case: exact (case is not part of the codes)", _share(figures["lower_case_exact"])),
        ("other IUPAC letters (A written as R): come back as N", _share(figures["other_iupac_as_n"])),
        ("windows lost, of all that exist", str(figures["windows_lost"])),
        ("bits a base, beside 2 for A C G T written plainly", _number(figures["bits_per_unit"])),
    ]
    if "genome_bases" in figures:
        exact = "exact" if figures["genome_exact"] else "NOT exact"
        rows.append((f"a genome of {figures['genome_bases']:,} bases, streamed", exact))
    return rows


def _kept_text(figures: dict[str, Any]) -> list[Row]:
    strings = f"{figures['any_unicode_strings']} strings of random Unicode"
    return [
        ("", "this tokenizer", "one id a byte"),
        ("held-out texts that come back exactly", _share(figures["exact"]), _share(1.0)),
        (f"{strings} that come back exactly", _share(figures["any_unicode_exact"]), _share(1.0)),
        ("bytes an id, held-out texts", f"{figures['bytes_per_token']:.2f}", "1.00"),
        ("bytes an id, random Unicode", f"{figures['any_unicode_bytes_per_token']:.2f}", "1.00"),
    ]


_KEPT: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "image": _kept_pictures, "video": _kept_pictures, "speech": _kept_speech, "dna": _kept_dna, "text": _kept_text,
}  # fmt: skip


def _groups(figures: dict[str, Any]) -> str:
    """The main measures by style, voice or source, one column each; nothing without groups."""
    titles = {
        "psnr_db": "PSNR in dB",
        "stoi": "STOI",
        "log_mel_l1": "log-mel difference",
        "bytes_per_token": "bytes an id",
    }
    found = {title: figures.get(f"{key}_by_group") for key, title in titles.items()}
    columns = {title: values for title, values in found.items() if values}
    if not columns:
        return ""
    groups = next(iter(columns.values()))
    rows = [(group, *(f"{values[group]:.3g}" for values in columns.values())) for group in groups]
    return _table([("", *columns), *rows])


def _codebook(figures: dict[str, Any]) -> str:
    return (
        f"The held-out items are {figures['codes_measured']:,} codes. They use {_share(figures['codebook_usage'])} of "
        f"the {figures['codebook_size']:,} there are, with a perplexity of {_number(figures['code_perplexity'])}."
    )


def _speed(figures: dict[str, Any]) -> str:
    encode, decode = (f"{_number(figures[f'{verb}_units_per_second'])}" for verb in ("encode", "decode"))
    unit = "seconds of speech" if figures["unit"] == "second" else f"{figures['unit']}s"
    threads = figures["threads"]
    text = f"{encode} {unit} a second to encode and {decode} to decode"
    if "stream_encode_bases_per_second" in figures:
        stream = (_number(figures[f"stream_{verb}_bases_per_second"]) for verb in ("encode", "decode"))
        text += f"; as a stream {' and '.join(stream)}"
    return (
        f"{text}, on {figures['machine']}, with {threads} {'thread' if threads == 1 else 'threads'} "
        f"(load average {figures['load_average']} while measuring)."
    )


def _training(figures: dict[str, Any]) -> str:
    training = dict(figures["training"])
    if not training:
        return ""
    recipe, last = training.pop("recipe", None), training.pop("last", {})
    rows: list[Row] = [("", "")]
    rows += [(key.replace("_", " "), _value(value)) for key, value in training.items()]
    rows += [(f"last {key.replace('_', ' ')}", _value(value)) for key, value in last.items()]
    parts = ["## Training", _table(rows)]
    if figures["curve"]:
        parts.append("![The training curve](curve.png)")
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=110)
        parts.append(f"The recipe, defaults included:\n\n```yaml\n{text}```")
    return "\n\n".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _number(value) if isinstance(value, (int, float)) else str(value)


def _before_after(figures: dict[str, Any]) -> str:
    first = (
        "The first short clip of each voice"
        if figures["kind"] == "speech"
        else "The first, groups taking turns"
    )
    choice = f"{first}, of the held-out items in the order the seed gives; none was picked by hand."
    return f"{_SHOW[figures['kind']](figures['samples'])}\n\n{choice}"


def _show_sheet(samples: list[dict[str, Any]]) -> str:
    (sheet,) = samples
    names = ", ".join(sheet["names"])
    return f"![Originals above what came back]({sheet['file']})\n\nOriginals above, what came back below: {names}."


def _show_sounds(samples: list[dict[str, Any]]) -> str:
    rows: list[Row] = [("says", "voice", "original", "what came back")]
    for one in samples:
        links = (f"[{one[key]}]({one[key]})" for key in ("original", "decoded"))
        rows.append((one["says"], one["voice"], *links))
    return _table(rows)


def _show_bases(samples: list[dict[str, Any]]) -> str:
    one = samples[0]
    codes = " ".join(map(str, one["codes"]))
    return f"```text\nbases   {one['original']}\ncodes   {codes}\ndecoded {one['decoded']}\n```"


def _show_pieces(samples: list[dict[str, Any]]) -> str:
    blocks = [
        f"text    {one['original']}\npieces  {'|'.join(one['pieces'])}\nids     {' '.join(map(str, one['ids']))}"
        f"\ndecoded {one['decoded']}"
        for one in samples
    ]
    return "```text\n" + "\n\n".join(blocks) + "\n```"


_SHOW: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "image": _show_sheet, "video": _show_sheet, "speech": _show_sounds, "dna": _show_bases, "text": _show_pieces,
}  # fmt: skip


def _data(figures: dict[str, Any]) -> str:
    rows = [(one["set"], one["name"], one["version"], one["licence"]) for one in figures["data"]]
    if not rows:
        return ""
    text = "## Data and licences\n\n" + _table([("set", "made of", "version", "licence"), *rows])
    if figures["kind"] == "speech":
        text += "\n\nThe speech is synthetic: these engines said it, no person did."
    return (
        text
        + "\n\nThe samples on this page show these works, or what came back of them, under their licences."
    )


def _origin(figures: dict[str, Any]) -> str:
    commit = f"commit {figures['commit']}" if figures["commit"] else "outside a checkout"
    where = f"anytoken {figures['anytoken']}, torch {figures['torch']}, {figures['machine']}"
    return (
        f"```bash\n{figures['command']}\n```\n\n{figures['date']}, {commit}, seed {figures['seed']}, {where}. "
        f"Fingerprint of the tokenizer: `{figures['fingerprint'][:16]}`. "
        "Every number comes from [figures.json](figures.json)."
    )
