"""Show replies in a terminal: streamed text, media as files with a progress bar, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import category

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from anytoken.terminal.inline_images import COLUMNS, HalfBlockImage, image_of, protocol, show_image

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken
    from anytoken.inference.outputs import GenerationOutput
    from anytoken.inference.streaming import Event, SegmentPreview, SegmentProgress
    from anytoken.segments import Segment


def write_segments(segments: Iterable[Segment], out: Path) -> list[dict[str, str]]:
    """Media as files in `out` under the first free number; the parts in chat form, text inline."""
    from anytoken.segments import Text, usual_suffix

    parts = []
    for segment in segments:
        if isinstance(segment, Text):
            parts.append({"type": "text", "text": segment.text})
            continue
        out.mkdir(parents=True, exist_ok=True)
        number = 0
        while (path := out / f"{segment.kind}-{number:03d}{usual_suffix(segment.kind)}").exists():
            number += 1
        segment.save(path)
        parts.append({"type": segment.kind, segment.kind: str(path)})
    return parts


def show_segments(segments: Iterable[Segment], out: Path, console: Console) -> None:
    """Print text, show images if the console supports it, write media and print each file's path."""
    for segment in segments:
        [part] = write_segments([segment], out)
        show_image(console, segment)
        console.out(_harmless(part[part["type"]]), highlight=False)


def show_reply(reply: GenerationOutput, out: Path, console: Console, as_json: bool) -> None:
    """Print a reply and write its media; as JSON one line with ids, usage and finish reason."""
    if as_json:
        _print_line(**_record(reply, write_segments(reply.segments, out)))
    else:
        show_segments(reply.segments, out, console)


def _record(reply: GenerationOutput, parts: list[dict[str, str]]) -> dict[str, Any]:
    usage = {**asdict(reply.usage), "tokens_per_second": reply.usage.tokens_per_second}
    return {"segments": parts, "ids": reply.ids, "finish_reason": reply.finish_reason, "usage": usage}


def show_events(
    events: Generator[Event, None, GenerationOutput], out: Path, console: Console
) -> GenerationOutput:
    """Print a reply while it is generated: streamed text; a progress bar and a preview for a medium, then its file."""
    from anytoken.inference.streaming import finish

    screen = _Screen(out, console)
    try:
        return finish(events, screen.show)
    finally:
        screen.stop_waiting()


class _Screen:
    """The display of events."""

    def __init__(self, out: Path, console: Console) -> None:
        self.out, self.console = out, console
        self._live: Live | None = None
        self._bar = ProgressBar(width=COLUMNS)
        self._preview: HalfBlockImage | None = None

    def show(self, event: Event) -> None:
        """Show one event."""
        from anytoken.inference import streaming

        if isinstance(event, streaming.TextDelta):
            self.console.out(_harmless(event.text), end="", highlight=False)
            self.console.file.flush()
        elif isinstance(event, streaming.SegmentFinished):
            self.stop_waiting()
            if event.segment.kind == "text":
                self.console.out()  # the line that the deltas wrote ends here
            else:
                show_segments([event.segment], self.out, self.console)
        elif (
            isinstance(event, streaming.SegmentStarted) and event.kind != "text" and self.console.is_terminal
        ):
            self._bar, self._preview = ProgressBar(total=None, width=COLUMNS), None
            self._live = Live(console=self.console, transient=True)
            self._live.start()
        elif isinstance(event, streaming.SegmentProgress | streaming.SegmentPreview):
            self._wait(event)

    def _wait(self, event: SegmentProgress | SegmentPreview) -> None:
        from anytoken.inference.streaming import SegmentProgress

        if self._live is None:
            return
        if isinstance(event, SegmentProgress):
            self._bar = ProgressBar(total=event.total, completed=event.done, width=COLUMNS)
        elif protocol(self.console) is not None and (image := image_of(event.segment)) is not None:
            self._preview = HalfBlockImage(image)
        self._live.update(Group(self._preview, self._bar) if self._preview else self._bar)

    def stop_waiting(self) -> None:
        """Remove the progress bar."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _harmless(text: str) -> str:
    """Text without control characters other than line ends and tabs: generated text must not control the terminal."""
    return "".join("\ufffd" if category(one) == "Cc" and one not in "\n\t" else one for one in text)


def print_events(events: Generator[Event, None, GenerationOutput], out: Path) -> None:
    """A reply as JSON lines while it is generated, one per event; the last is the whole reply, as in `generate
    --json`."""
    from anytoken.inference.streaming import (
        SegmentFinished,
        SegmentProgress,
        SegmentStarted,
        TextDelta,
        finish,
    )

    parts: list[dict[str, str]] = []

    def see(event: Event) -> None:
        if isinstance(event, SegmentFinished):
            parts.extend(write_segments([event.segment], out))
            _print_line(event="SegmentFinished", segment=parts[-1])
        elif isinstance(event, SegmentStarted | SegmentProgress | TextDelta):
            _print_line(event=type(event).__name__, **asdict(event))

    reply = finish(events, see)
    _print_line(event="Reply", **_record(reply, parts))


def _print_line(**fields: Any) -> None:
    print(json.dumps(fields, ensure_ascii=False), flush=True)


def show_model(model: AnyToken) -> None:
    """Print a model's size, id ranges, sampling defaults, and library versions."""
    from importlib.metadata import version

    config, space = model.lm.config, model.token_space
    console = Console()
    console.print(repr(model), markup=False)
    console.print(
        f"from {config._name_or_path}, {model.lm.dtype}, context {config.max_position_embeddings} tokens, "
        f"attention {config._attn_implementation}"
    )
    table = Table("ids", "range", "kind", "modality", "codebook")
    for one in space.ranges:
        book = "" if one.codebook is None else str(one.codebook)
        table.add_row(f"{one.start}–{one.stop - 1}", one.name, one.kind, one.modality, book)
    console.print(table)
    for kind, sampling in model.sampling.items():
        console.print(f"{kind}: {sampling}", markup=False)
    names = ("anytoken", "torch", "transformers", "peft", "vector-quantize-pytorch")
    console.print(", ".join(f"{name} {version(name)}" for name in names), markup=False, highlight=False)
