"""The card of a measured tokenizer: `anytoken tokenizer eval FOLDER --data data/sets --card tokenizers/image`.

Writes figures.json and, from it alone, README.md; also originals and reconstructions of a few held-out items, and the
training curve. `render` reads only the numbers in figures.json, so a card cannot report what was not measured. A card's
files stay under 150 kB together, small enough to commit.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from anytoken import moved
from anytoken.evaluation.tokenizers.card_samples import Row, number, share, show_samples, table, write_samples
from anytoken.evaluation.tokenizers.evaluate import EvalResult, measure
from anytoken.evaluation.tokenizers.test_sets import data_provenance
from anytoken.tokenizers.base import TokenizerError, class_source
from anytoken.utils.atomic import write_file
from anytoken.utils.json_lines import read_json_lines


def make_card(
    tokenizer: str | Path,
    data: str | Path,
    card: str | Path,
    count: int | None = None,
    seed: int = 0,
    genomes: Sequence[Path] = (),
    image: Path | None = None,
    files: str | None = None,
    learnable: bool = False,
) -> Path:
    """Measure a tokenizer (see `measure`) and write its card into the folder `card`; returns the README.md.

    TokenizerError as `measure` raises it, or if matplotlib or pystoi (the `eval` extra) is missing.
    """
    missing = [name for name in ("matplotlib", "pystoi") if find_spec(name) is None]
    if missing:
        raise TokenizerError(f"A card needs {' and '.join(missing)}: pip install 'anytoken[eval]'.")
    tokenizer, data, card = Path(tokenizer), Path(data), Path(card)
    found = measure(tokenizer, data, count, seed, genomes, image, files, learnable)
    card.mkdir(parents=True, exist_ok=True)
    training = _read_json(tokenizer / "training.json")
    consent = f"--modality {_shown(tokenizer)} " if class_source(type(found.tokenizer)) else ""
    options = "" if count is None else f" --count {count}"
    options += "".join(f" --genome {_shown(path)}" for path in genomes)
    options += f" --image {_shown(image)}" if image else ""
    options += f" --files {shlex.quote(files)}" if files else ""
    options += " --learnability" if learnable else ""
    figures = {
        **found.figures,
        "about": _about(found),
        "command": f"anytoken {consent}tokenizer eval {_shown(tokenizer)} --data {_shown(data)} --card {_shown(card)}"
        f"{options} --seed {seed}",
        "data": []
        if files
        else data_provenance(found.figures["kind"], data, training.get("recipe", {}).get("data", "")),
        "training": training,
        "curve": read_curve(tokenizer / "metrics.jsonl"),
        "samples": write_samples(found, card),
    }
    if figures["curve"]:
        _plot(figures["curve"], card / "curve.png")
    write_file(card / "figures.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return write_file(card / "README.md", render(figures))


def read_curve(path: Path) -> list[dict[str, float]]:
    """The training log in order of steps; [] without a log. A step logged twice counts once."""
    if not path.is_file():
        return []
    by_step = {line["step"]: line for line in read_json_lines(path, torn_end=True)}
    return sorted(by_step.values(), key=lambda line: line["step"])


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _shown(path: Path) -> str:
    """A portable path: relative to the working directory, or only its name."""
    absolute, here = path.absolute(), Path.cwd()
    return absolute.relative_to(here).as_posix() if absolute.is_relative_to(here) else path.name


def _about(found: EvalResult) -> str:
    """The first two paragraphs of the docstring of the tokenizer's module."""
    text = sys.modules[type(found.tokenizer).__module__].__doc__ or ""
    return "\n\n".join(text.strip().split("\n\n")[:2])


def _plot(curve: list[dict[str, float]], path: Path) -> None:
    """Plot the training loss and the next logged metric."""
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
    """The card as Markdown, from the content of figures.json alone."""
    kind = figures["kind"]
    parts = [
        f"# The {figures.get('tokenizer', kind)} tokenizer\n\n{figures['about']}",
        f"## Rate\n\n{table(_rate(figures))}",
        f"## Reconstruction\n\n{_kept_intro(figures)}\n\n{table(metric_rows(figures))}",
        _groups(figures),
        _learnability(figures),
        _bars(figures),
        f"## Codebook\n\n{_codebook(figures)}",
        f"## Speed\n\n{_speed(figures)}",
        _training(figures),
        f"## Samples\n\n{_before_after(figures)}",
        _data(figures),
        f"## How to reproduce\n\n{_origin(figures)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def overview(
    cards: Path, models: Mapping[str, Collection[str]] | None = None, page: Path | None = None
) -> str:
    """The cards in a folder and below it as one Markdown table, one line per tokenizer; TokenizerError without any.

    models: fingerprints of the tokenizers of each model, which are named next to the tokenizer. page: where the table
    will stand; names are links then.
    """
    folders = sorted(path.parent for path in Path(cards).rglob("figures.json"))
    found = {folder: _read_json(folder / "figures.json") for folder in folders}
    if not found:
        raise TokenizerError(f"{cards} holds no figures.json; `anytoken tokenizer eval --card` writes them.")
    head: Row = (
        "tokenizer",
        "part of",
        "rate",
        "held-out items",
        "reconstruction",
        "baseline",
        "codebook usage",
    )
    rows = [head]
    for folder, figures in found.items():
        name = folder.relative_to(cards).as_posix()
        name = f"[{name}]({os.path.relpath(folder, page.parent)})" if page else name
        part_of = [model for model, prints in (models or {}).items() if figures["fingerprint"] in prints]
        rows.append((name, ", ".join(part_of), *_overview_row(figures)))
    return table(rows if models else [(row[0], *row[2:]) for row in rows])


def _overview_row(figures: dict[str, Any]) -> Row:
    rate = f"{number(figures['tokens_per_unit'])} codes per {unit_name(figures)}"
    head, (title, *columns), *_ = metric_rows(figures)
    baseline = head[2] if len(columns) > 1 else ""
    kept = f"{title}: {columns[0]}"
    compared = f"{baseline}: {columns[1]}" if baseline else ""
    usage = f"{share(figures['codebook_usage'])} of {sum(figures['codebook_sizes']):,}"
    return (rate, f"{figures['items']:,}", kept, compared, usage)


def unit_name(figures: dict[str, Any]) -> str:
    """The unit of rates: image, second, base, ...; older figures use another name for image."""
    unit = str(figures["unit"])
    return "image" if unit == "picture" else unit


def _rate(figures: dict[str, Any]) -> list[Row]:
    unit = unit_name(figures)
    rows: list[Row] = [
        ("", ""),
        (f"codes per {unit}", number(figures["tokens_per_unit"])),
        (f"bits per {unit}", number(figures["bits_per_unit"])),
        ("codebook sizes", ", ".join(f"{size:,}" for size in figures["codebook_sizes"])),
        *([("global codebook size", f"{size:,}")] if (size := figures.get("global_codebook_size")) else []),
        ("segment length", _limits(figures["shape"])),
    ]
    if figures["parameters"]:
        rows.append(("parameters", f"{figures['parameters']:,}"))
    settings = ", ".join(
        f"{key} {_flow(value)}" for key, value in _current(figures.get("config", {})).items()
    )
    return [*rows, ("settings", settings)] if settings else rows


def _current(config: dict[str, Any]) -> dict[str, Any]:
    """Settings by their current names, which older figures do not have."""
    return moved.current_settings(config, warn=False)


def _flow(value: Any) -> str:
    """A setting as a recipe has it, on one line."""
    if not isinstance(value, dict):
        return str(value)
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=10_000).strip()


def _limits(shape: dict[str, Any]) -> str:
    count = shape.get("num_global_codes", 0)
    return (f"{count} global codes, then " if count else "") + _local_limits(shape)


def _local_limits(shape: dict[str, Any]) -> str:
    if shape["type"] == "grid":
        sizes = zip(shape["axes"], shape["min_size"], shape["max_size"], strict=True)
        return " × ".join(f"{low} to {high} {axis}" for axis, low, high in sizes)
    if shape["type"] == "run":
        books = shape["num_codebooks"]
        what = "codes" if books == 1 else f"frames of {books} codes"
        return f"{shape['min_length']} to {shape['max_length']} {what}"
    return "any number of ids"


def _kept_intro(figures: dict[str, Any]) -> str:
    if "files" in figures:
        return (
            f"Measured on {figures['items']:,} items from the files `{figures['files']}`, chosen by the author of this "
            "card. The author is responsible for keeping them out of training."
        )
    what = {
        "image": "images of concepts that the tokenizer never saw in any style, composed as in training",
        "video": "clips of concepts that the tokenizer never saw, composed as in training",
        "speech": "clips of voices that are not in the training set. All speech is synthetic",
        "dna": "genes whose products are not in the training split. Every possible window of letters is also checked",
        "text": "texts of the test split, which the tokenizer was not trained on",
    }.get(
        figures["kind"],
        "the examples returned by `held_out` of the tokenizer's class, which training never saw",
    )
    return f"Measured on {figures['items']:,} held-out items: {what}."


def _kept_images(figures: dict[str, Any]) -> list[Row]:
    peers = {
        "": "this tokenizer",
        "thumbnail_": "thumbnail with the same bits",
        "mean_colour_": "mean color",
        "webp_": f"WebP at {figures.get('webp_bytes', 0):.0f} bytes",
        "every_frame_": f"each frame as a small image, {figures.get('every_frame_codes', 0):.0f} codes",
        "held_frames_": f"a few frames held, {figures.get('held_frames_codes', 0):.0f} codes",
    }
    peers = {who: title for who, title in peers.items() if f"{who}psnr_db" in figures}
    rows: list[Row] = [("", *peers.values())]
    for title, key, digits in (
        ("PSNR in dB (higher is better)", "psnr_db", 2),
        ("SSIM (1 is identical)", "ssim", 3),
    ):
        values = (figures[f"{who}{key}"] for who in peers)
        rows.append((title, *(f"{value:.{digits}f}" for value in values)))
    return rows


def _kept_speech(figures: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [("", "this tokenizer", "random codes", "clips")]
    titles = {
        "stoi": "STOI, intelligibility (1 is best)",
        "pesq": "PESQ, quality (1 to 4.6)",
        "log_mel_l1": "log-mel L1 distance (0 is identical)",
    }
    for key, title in titles.items():
        if key in figures:
            both = (f"{figures[key]:.3f}", f"{figures[f'random_codes_{key}']:.3f}")
            rows.append((title, *both, str(figures[f"{key}_items"])))
    if "words" in figures:
        originals = share(figures["words_originals"])
        title = f"keyword accuracy, {figures['words_names']} names ({originals} on the originals)"
        both = (share(figures["words"]), share(figures["random_codes_words"]))
        rows.append((title, *both, str(figures["words_items"])))
    return rows


def _kept_dna(figures: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [
        ("", "share of items"),
        ("genes reconstructed exactly", share(figures["exact"])),
        ("exact with 10 % of the letters replaced by N", share(figures["with_n_exact"])),
        ("lower case decoded as upper case", share(figures["lower_case_as_upper"])),
        ("lower case decoded exactly (codes carry no case)", share(figures["lower_case_exact"])),
        ("other IUPAC letters decoded as N (A written as R)", share(figures["other_iupac_as_n"])),
        ("bits per base (plain A C G T: 2)", number(figures["bits_per_unit"])),
    ]
    if "windows_lost" in figures:
        rows.append(("windows not reconstructed, of all possible ones", str(figures["windows_lost"])))
    if "context_bits_with_class" in figures:
        both = (number(figures[f"context_bits_{one}"]) for one in ("without", "with_class"))
        rows.append(("bits per letter around a window, given the window -> and its class", " -> ".join(both)))
    if "genome_bases" in figures:
        exact = "exact" if figures["genome_exact"] else "NOT exact"
        count = len(figures.get("genome_files", [0]))
        what = f"{count} held-out genomes, {figures['genome_bases']:,} bases, streamed"
        rows.append((what, exact))
    return rows


def _kept_text(figures: dict[str, Any]) -> list[Row]:
    strings = f"{figures['any_unicode_strings']} strings of random Unicode"
    return [
        ("", "this tokenizer", "one id per byte"),
        ("held-out texts decoded exactly", share(figures["exact"]), share(1.0)),
        (f"{strings} decoded exactly", share(figures["any_unicode_exact"]), share(1.0)),
        ("bytes per id, held-out texts", f"{figures['bytes_per_token']:.2f}", "1.00"),
        ("bytes per id, random Unicode", f"{figures['any_unicode_bytes_per_token']:.2f}", "1.00"),
    ]


def _kept_other(figures: dict[str, Any]) -> list[Row]:
    """Results of the `distortion` of the tokenizer's own class."""
    rows: list[Row] = [("", "this tokenizer", "random codes")]
    for name, value in figures["distortion"].items():
        floor = figures["random_codes_distortion"][name]
        rows.append((name, f"{value:.4g}", f"{floor:.4g}"))
    return rows


def metric_rows(figures: dict[str, Any]) -> list[Row]:
    """Reconstruction metrics as a table: a head, then one metric per line with its baselines."""
    return _KEPT.get(figures["kind"], _kept_other)(figures)


_KEPT: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "image": _kept_images, "video": _kept_images, "speech": _kept_speech, "dna": _kept_dna, "text": _kept_text,
}  # fmt: skip


def learnability_rows(figures: dict[str, Any]) -> list[Row]:
    """How well a language model learns the codes, one metric per line; empty if not measured."""
    found = figures.get("learnability", {})
    rows: list[Row] = []
    for which, title in (("train", "training"), ("held_out", "held-out")) if found else ():
        for unit in ("code", "item"):
            given, none = (found[how][f"{which}_bits_per_{unit}"] for how in ("given", "none"))
            rows.append(
                (f"bits per {unit}, {title} items", f"{number(given)} ({number(none)} without captions)")
            )
    for key, title in (("psnr_db", "PSNR in dB"), ("stoi", "STOI")):
        if f"generated_{key}" in found:
            made, other, back = (
                number(found[f"{how}_{key}"]) for how in ("generated", "other_items", "reconstructed")
            )
            what = f"{title} of items generated from held-out captions"
            rows.append((what, f"{made} (other items {other}, true codes {back})"))
    if "equal_local_codes" in found:
        rows.append(("local codes equal on two backgrounds", share(found["equal_local_codes"])))
    if "same_word_edit_distance" in found:
        same, other = (number(found[f"{which}_word_edit_distance"]) for which in ("same", "other"))
        rows.append(
            ("edit distance between two voices saying one word, 0 to 1", f"{same} (different words {other})")
        )
    return rows


def _learnability(figures: dict[str, Any]) -> str:
    found = figures.get("learnability")
    if not found:
        return ""
    intro = (
        f"A decoder of {found['parameters']:,} parameters was trained on the codes of {found['items']:,} captioned "
        f"items for {found['steps']:,} steps at batch size {found['batch']}, once with and once without captions; "
        f"{found['held_out_items']:,} items were held out."
    )
    rows = [("", "with captions"), *learnability_rows(figures)]
    return f"## How well a language model learns the codes\n\n{intro}\n\n{table(rows)}"


def _groups(figures: dict[str, Any]) -> str:
    """The main metrics by style, voice or source, one column each; empty without groups."""
    titles = {
        "psnr_db": "PSNR in dB",
        "stoi": "STOI",
        "pesq": "PESQ",
        "log_mel_l1": "log-mel L1",
        "bytes_per_token": "bytes per id",
    }
    found = {title: figures.get(f"{key}_by_group") for key, title in titles.items()}
    found |= figures.get("distortion_by_group", {})
    columns = {title: values for title, values in found.items() if values}
    if not columns:
        return ""
    groups = next(iter(columns.values()))
    rows = [(group, *(f"{values[group]:.3g}" for values in columns.values())) for group in groups]
    return table([("", *columns), *rows])


def shown_bar(bar: dict[str, Any]) -> str:
    """The measured value, its threshold, and whether it is met."""
    ours, least = (f"{bar[key]:,.0f}" if bar[key] >= 1000 else f"{bar[key]:.4g}" for key in ("ours", "bar"))
    return f"{ours} (threshold {least}: {'met' if bar['met'] else 'NOT met'})"


def _bars(figures: dict[str, Any]) -> str:
    """Measured values next to their thresholds; empty for figures without thresholds."""
    if not figures.get("bars"):
        return ""
    rows = [(bar["what"], shown_bar(bar)) for bar in figures["bars"]]
    return f"## Thresholds\n\n{table([('', ''), *rows])}"


def _codebook(figures: dict[str, Any]) -> str:
    streamed = " and the genomes" if "genome_bases" in figures else ""
    return (
        f"The held-out items{streamed} encode to {figures['codes_measured']:,} codes. "
        f"They use {share(figures['codebook_usage'])} of the {sum(figures['codebook_sizes']):,} codebook entries, "
        f"with a perplexity of {number(figures['code_perplexity'])}"
        f"{' (mean over codebooks)' if len(figures['codebook_sizes']) > 1 else ''}."
    )


def _speed(figures: dict[str, Any]) -> str:
    encode, decode = (f"{number(figures[f'{verb}_units_per_second'])}" for verb in ("encode", "decode"))
    unit = "seconds of speech" if figures["kind"] == "speech" else f"{unit_name(figures)}s"
    threads = figures["threads"]
    text = f"Encoding: {encode} {unit} per second. Decoding: {decode}"
    if "stream_encode_bases_per_second" in figures:
        stream = (number(figures[f"stream_{verb}_bases_per_second"]) for verb in ("encode", "decode"))
        text += f". Streaming: {' and '.join(stream)}"
    return (
        f"{text}. Measured on {figures['machine']}, with {threads} {'thread' if threads == 1 else 'threads'} "
        f"(load average {figures['load_average']})."
    )


def _training(figures: dict[str, Any]) -> str:
    training = dict(figures["training"])
    if not training:
        return ""
    recipe, last = dict(training.pop("recipe", {})), training.pop("last", {})
    rows: list[Row] = [("", "")]
    rows += [(key.replace("_", " "), _value(value)) for key, value in training.items()]
    rows += [(f"last {key.replace('_', ' ')}", _value(value)) for key, value in last.items()]
    parts = ["## Training", table(rows)]
    if figures["curve"]:
        parts.append("![The training curve](curve.png)")
    if recipe:
        if isinstance(recipe.get("config"), dict):
            recipe["config"] = _current(recipe["config"])
        text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=110)
        parts.append(f"The recipe, defaults included:\n\n```yaml\n{text}```")
    return "\n\n".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, (int, float)) else str(value)


def _before_after(figures: dict[str, Any]) -> str:
    first = (
        "the first short clip of each voice"
        if figures["kind"] == "speech"
        else "the first ones of each group in turn"
    )
    choice = (
        f"The samples are {first}, in the seeded order of the held-out items. They were not selected by hand."
    )
    return f"{show_samples(figures['samples'])}\n\n{choice}"


def _data(figures: dict[str, Any]) -> str:
    rows = [(one["set"], one["name"], one["version"], one["licence"]) for one in figures["data"]]
    if not rows:
        return ""
    text = "## Data and licences\n\n" + table([("set", "package", "version", "licence"), *rows])
    if figures["kind"] == "speech":
        text += "\n\nAll speech here is synthetic, made by text-to-speech engines."
    return (
        text + "\n\nThe samples on this page show these works or their reconstructions, under their licences."
    )


def _origin(figures: dict[str, Any]) -> str:
    commit = f"commit {figures['commit']}" if figures["commit"] else "outside a checkout"
    where = f"anytoken {figures['anytoken']}, torch {figures['torch']}, {figures['machine']}"
    return (
        f"```bash\n{figures['command']}\n```\n\n{figures['date']}, {commit}, seed {figures['seed']}, {where}. "
        f"Fingerprint of the tokenizer: `{figures['fingerprint'][:16]}`. "
        "Every number comes from [figures.json](figures.json)."
    )
