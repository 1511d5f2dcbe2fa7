"""The demo: held-out files answered in every direction, on one page with images, players and scores.

`anytoken demo` runs it. The page is plain HTML next to its files, so it opens without a server; the scores on it are
those that `anytoken eval` wrote into the checkpoint (`scores.json`).
"""

import html
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image as PILImage
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from anytoken.data.records import open_media
from anytoken.data.sources import read_records
from anytoken.emoji_world.dna import translate
from anytoken.emoji_world.report import percent, read, rows
from anytoken.evaluation.keyword_asr import KeywordRecognizer
from anytoken.evaluation.metrics import same_text, sequence_identity
from anytoken.evaluation.suite.page import table
from anytoken.segments import KINDS, Image, Segment, Text, usual_suffix
from anytoken.utils.errors import EvaluationError

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
section { border-top: 1px solid #ddd; padding: 1rem 0; }
.case { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 1.5rem; align-items: start; margin: .5rem 0; }
.case h3 { font-size: .8rem; margin: 0; color: #777; font-weight: 600; }
img { width: 128px; image-rendering: pixelated; border-radius: 8px; vertical-align: top; margin: 2px; }
audio { width: 100%; } code { overflow-wrap: anywhere; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #eee; }
td:first-child, th:first-child { text-align: left; } .note { color: #777; }
"""


@dataclass(frozen=True)
class DemoExample:
    """One question of the demo, with the true answer to show next to the model's."""

    direction: str
    prompt: list[Segment]
    target: str
    truth: Segment


def run_demo(model: "AnyToken", assets: Path, out: Path, each: int = 2, seed: int = 0) -> Path:
    """Answer `each` held-out prompts per direction and write `out`/index.html with its files; returns the page.

    `out`/images.png is a strip of the images generated from text, in order and unselected. assets: a folder with
    images.jsonl, videos.jsonl, speech.jsonl and translate.jsonl. EvaluationError if one is missing.
    """
    began = time.perf_counter()
    questions = list(exhibits(assets, each))
    words = _word_judge(assets)
    out.mkdir(parents=True, exist_ok=True)
    sections: dict[str, list[str]] = {}
    drawn: list[Image] = []
    table = Table(
        "direction", "prompt", "answer", "verdict", title="Held-out files, answered", title_justify="left"
    )
    for number, one in enumerate(tqdm(questions, desc="demo", leave=False)):
        reply = model.generate(one.prompt, one.target, seed=seed)
        if one.direction == "text->image":
            drawn += [part for part in reply.segments if isinstance(part, Image)]
        verdict = judge(one, reply.segments, words)
        columns = [_shown(part, out, f"{number:02d}-{role}") for role, part in _roles(one, reply.segments)]
        sections.setdefault(one.direction, []).append(_case(columns, verdict))
        table.add_row(one.direction, _words(one.prompt), _words(reply.segments), verdict)
    if drawn:
        strip(drawn).save(out / "images.png")
    report = _scores(model)
    page = out / "index.html"
    page.write_text(_page(sections, report, time.perf_counter() - began), encoding="utf-8")
    console = Console()
    console.print(table)
    if report is not None:
        console.print(score_table(report))
    console.print(f"{page}  ({time.perf_counter() - began:.0f} s)", highlight=False)
    return page


def exhibits(assets: Path, each: int) -> Iterator[DemoExample]:
    """The demo's questions, `each` per direction, in a fixed order."""
    images, videos = _open(assets, "images", "image", 2 * each), _open(assets, "videos", "video", each)
    clips, genes = _open(assets, "speech", "speech", each), _open(assets, "translate", "dna", each)
    by_name = {record["name"]: image for record, image in reversed(images)}
    text, same = (lambda record, _: Text(record["text"])), (lambda _, medium: medium)
    for direction, records, prompt, truth in (
        ("text->image", images[:each], text, same),
        ("image->text", images[:each], same, text),
        ("text->speech", clips, text, same),
        ("speech->text", clips, same, text),
        ("speech->image", clips, same, lambda record, _: by_name.get(record["name"], Text(record["text"]))),
        ("image->speech", images[:each], same, lambda record, _: Text(record["name"])),
        ("text->video", videos, text, same),
        ("video->text", videos, same, text),
        ("image->video", videos, lambda _, video: Image(video.frames[0]), same),
        ("dna->text", genes, same, text),
        ("text->dna", genes, text, same),
    ):
        for given in records:
            yield DemoExample(direction, [prompt(*given)], direction.split("->")[1], truth(*given))
    for (one, first), (other, second) in zip(images[::2], images[1::2], strict=False):
        names = " and ".join(str(record["text"]).split(",")[0] for record in (one, other))
        yield DemoExample("image,image->text", [first, second, Text("What are these?")], "text", Text(names))


def strip(images: Sequence[Image], side: int = 128, gap: int = 4) -> PILImage.Image:
    """Images side by side, each scaled to `side` pixels."""
    row = PILImage.new("RGB", (len(images) * (side + gap) - gap, side), "white")
    for place, image in enumerate(images):
        scaled = image.to_pil().convert("RGB").resize((side, side), PILImage.Resampling.NEAREST)
        row.paste(scaled, (place * (side + gap), 0))
    return row


def _open(assets: Path, name: str, kind: str, count: int) -> list[tuple[dict[str, Any], Any]]:
    """The first records of an asset file with distinct names, with their medium."""
    path = assets / f"{name}.jsonl"
    if not path.is_file():
        raise EvaluationError(
            f"{path} is missing: the demo reads its held-out files from there; see --assets."
        )
    chosen: dict[str, dict[str, Any]] = {}
    for record in read_records(path):
        chosen.setdefault(record.get("name") or record["text"], record)
    return [
        (record, open_media(record[kind], KINDS[kind], assets)) for record in list(chosen.values())[:count]
    ]


def _word_judge(assets: Path) -> KeywordRecognizer | None:
    names = {
        record["name"] for file in ("speech", "images") for record in read_records(assets / f"{file}.jsonl")
    }
    try:
        return KeywordRecognizer(sorted(names))
    except EvaluationError as error:
        Console(stderr=True).print(f"Spoken answers are not judged: {error}", style="yellow", markup=False)
        return None


def judge(one: DemoExample, answer: list[Segment], words: KeywordRecognizer | None) -> str:
    """A short verdict if one is available at once: words, recognized words, translated DNA."""
    segment: Any = answer[0] if answer else None
    truth: Any = one.truth
    if segment is None or segment.kind != one.target:
        return "no segment of this kind"
    if one.target == "text" and "dna" in one.direction:
        return f"{percent(sequence_identity(segment.text.split(), truth.text.split()))} of residues"
    if one.target == "text":
        return "exact" if same_text(segment.text, truth.text) else f"expected: {truth.text}"
    if one.target == "dna":
        residues = getattr(one.prompt[0], "text", "").split()
        return f"{percent(sequence_identity(translate(segment.bases), residues))} of residues"
    if one.target == "speech" and words is not None:
        return f"recognized: {words.transcribe(segment) or 'no known name'}"
    return "see the page"


def _roles(one: DemoExample, answer: list[Segment]) -> list[tuple[str, list[Segment]]]:
    return [("prompt", one.prompt), ("answer", answer), ("truth", [one.truth])]


def _shown(segments: list[Segment], out: Path, stem: str) -> str:
    """Segments as HTML; media are written to files next to the page."""
    shown = []
    for place, segment in enumerate(segments):
        if isinstance(segment, Text):
            shown.append(f"<p>{html.escape(segment.text)}</p>")
            continue
        path = out / f"{stem}-{place}{usual_suffix(segment.kind)}"
        segment.save(path)
        if segment.kind == "speech":
            shown.append(f'<audio controls src="{path.name}"></audio>')
        elif segment.kind in ("image", "video"):
            shown.append(f'<img src="{path.name}" alt="{segment.kind}">')
        else:
            shown.append(
                f'<p><a href="{path.name}"><code>{html.escape(getattr(segment, "bases", ""))}</code></a></p>'
            )
    return "".join(shown)


def _case(columns: list[str], verdict: str) -> str:
    heads = ("prompt", f"answer ({html.escape(verdict)})", "truth")
    cells = "".join(
        f"<div><h3>{head}</h3>{column}</div>" for head, column in zip(heads, columns, strict=True)
    )
    return f'<div class="case">{cells}</div>'


def _page(sections: dict[str, list[str]], report: dict[str, Any] | None, seconds: float) -> str:
    parts = [
        f"<section><h2>{html.escape(name)}</h2>{''.join(cases)}</section>" for name, cases in sections.items()
    ]
    if report is None:
        scores = (
            "<p class='note'>This checkpoint has no scores; write them with <code>anytoken eval</code>.</p>"
        )
    else:
        scores = table(rows(report))
        scores += (
            f"<p class='note'>Written by anytoken eval, seed {report['seed']}, commit {report['commit']}.</p>"
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>AnyToken demo</title><style>{STYLE}</style>'
        "<h1>AnyToken demo</h1><p>Every prompt below was held out of training: a new style or background for the "
        f"concept, a new voice, or a new gene. Generated in {seconds:.0f} seconds.</p>"
        f"{''.join(parts)}<section><h2>Held-out scores</h2>{scores}</section></html>\n"
    )


def _scores(model: "AnyToken") -> dict[str, Any] | None:
    path = Path(str(model.lm.config._name_or_path)) / "scores.json"
    try:
        return read(path)
    except EvaluationError:
        return None


def score_table(report: dict[str, Any]) -> Table:
    """The report as a table that fits a terminal of 80 columns: figures in percent, without the sign."""
    head, *body = rows(report)
    table = Table(
        title="Held-out scores and baselines, in %",
        caption="* of residues",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
    )
    for place, name in enumerate(head):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=place < len(head) - 1)
    for row in body:
        table.add_row(*(cell.replace(" % of residues", "*").removesuffix(" %") for cell in row))
    return table


def _words(segments: list[Segment]) -> str:
    """Segments as one short line."""
    shown = [segment.text if isinstance(segment, Text) else f"[{segment.kind}]" for segment in segments]
    line = " ".join(shown)
    return line if len(line) <= 44 else line[:43] + "…"
