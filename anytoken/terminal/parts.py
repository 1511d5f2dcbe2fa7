"""What the commands share at a terminal: reading prompt parts, writing replies, and the chat loop.

Nothing heavy is imported at the top: `anytoken --help` must answer at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken
    from anytoken.inference.chat import Chat
    from anytoken.inference.reply import Reply
    from anytoken.segments import Segment

PART_KINDS = ("text", "image", "speech", "video", "dna")
MARK = "\0"  # no argument of a process can hold it, so a marked part is never mistaken for a string
OUTPUTS = {"/say": "speech", "/draw": "image", "/animate": "video", "/tell": "text"}
HELP = """\
/image PATH  /speech PATH  /video PATH  /dna PATH   attach a file to your next message
/draw TEXT   /say TEXT     /animate TEXT  /tell TEXT   ask for a picture, speech, a video, text
/save DIR    keep the conversation and its files       /help   /quit"""


class PartError(ValueError):
    """A prompt part that is neither a file that exists nor meant as text."""


def mark_parts(arguments: Sequence[str]) -> list[str]:
    """Rewrite `--image PATH` and the like as marked positional arguments, so that their order is kept."""
    marked: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*marked, argument, *rest]
        name, equals, value = argument.partition("=")
        kind = name.removeprefix("--")
        if not name.startswith("--") or kind not in PART_KINDS:
            marked.append(argument)
            continue
        found = value if equals else next(rest, None)
        if found is None:
            raise PartError(f"{name} needs a value.")
        marked.append(f"{MARK}{kind}{MARK}{found}")
    return marked


def read_part(argument: str) -> Segment:
    """One part of a prompt: marked (see `mark_parts`), or a bare string or file path.

    A bare argument that names a file is opened by its content; one that looks like a media path but names no file
    is a PartError, since sending "cat.png" as words is never what was meant.
    """
    from anytoken.segments import Text, open_segment

    if argument.startswith(MARK):
        _, kind, value = argument.split(MARK, 2)
        return read_typed(kind, value)
    if _is_file(argument):
        return open_segment(argument)
    words = argument.split()
    if len(words) == 1 and Path(argument).suffix.lower() in _media_suffixes():
        raise PartError(f"There is no file {argument}; to say it as words, write --text {argument}.")
    return Text(argument)


def read_typed(kind: str, value: str) -> Segment:
    """A part whose kind is known: a path, words for text, or bases for DNA."""
    from anytoken.segments import DNA, KINDS, Text

    if kind == "text":
        return Text(value)
    if kind == "dna" and value.isalpha() and not _is_file(value):
        return DNA(value)
    if not _is_file(value):
        raise PartError(f"There is no {kind} file {value}.")
    return KINDS[kind].open(value)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # longer than a path can be: words
        return False


def _media_suffixes() -> set[str]:
    from anytoken.segments import DNA_SUFFIXES, IMAGE_SUFFIXES, SPEECH_SUFFIXES, VIDEO_SUFFIXES

    known = IMAGE_SUFFIXES + SPEECH_SUFFIXES + VIDEO_SUFFIXES + DNA_SUFFIXES
    return {Path(f"a{suffix}").suffix for suffix in known}


def write_segments(segments: Iterable[Segment], out: Path) -> list[dict[str, str]]:
    """Media as files in `out` under the first free number; the parts in chat form, text inline."""
    from anytoken.inference.chat import SUFFIXES

    parts = []
    for segment in segments:
        if segment.kind == "text":
            parts.append({"type": "text", "text": getattr(segment, "text", "")})
            continue
        out.mkdir(parents=True, exist_ok=True)
        suffix = SUFFIXES.get(segment.kind, f".{segment.kind}")
        number = 0
        while (path := out / f"{segment.kind}-{number:03d}{suffix}").exists():
            number += 1
        segment.save(path)
        parts.append({"type": segment.kind, segment.kind: str(path)})
    return parts


def show_parts(parts: Iterable[dict[str, str]]) -> None:
    """Print text as it is, and each file's path on a line."""
    for part in parts:
        print(part[part["type"]])


def show_reply(reply: Reply, out: Path, as_json: bool) -> None:
    """Print a reply and write its media; as JSON one line with ids, usage and finish reason."""
    parts = write_segments(reply.segments, out)
    if as_json:
        usage = {**asdict(reply.usage), "tokens_per_second": reply.usage.tokens_per_second}
        record = {"segments": parts, "ids": reply.ids, "finish_reason": reply.finish_reason, "usage": usage}
        print(json.dumps(record, ensure_ascii=False))
    else:
        show_parts(parts)


def show_model(model: AnyToken) -> None:
    """Print a model's size, id ranges, sampling defaults, and the versions underneath."""
    from importlib.metadata import version

    config, space = model.lm.config, model.token_space
    console = Console()
    console.print(repr(model), markup=False)
    console.print(
        f"from {config._name_or_path}, {model.lm.dtype}, context {config.max_position_embeddings} tokens"
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


def read_ids(source: str) -> list[int]:
    """Ids from a file or "-" (standard input): a JSON list, or an object with "ids" as `generate --json` prints."""
    import sys

    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        data = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PartError(f"{source} does not hold token ids as JSON ({error}).") from error
    ids = data.get("ids") if isinstance(data, dict) else data
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise PartError(
            f'{source} must hold a JSON list of whole numbers, or an object with such a list as "ids".'
        )
    return ids


def chat_loop(chat: Chat, out: Path, console: Console, read: Callable[[], str], **options: Any) -> None:
    """Talk until /quit or the end of input; a mistake costs one red line, never the conversation."""
    attached: list[Segment] = []
    console.print(HELP, style="dim", markup=False, highlight=False)
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        try:
            if command == "/help":
                console.print(HELP, style="dim", markup=False, highlight=False)
            elif command == "/save":
                console.print(f"saved {chat.save(rest.strip() or out / 'chat')}", markup=False)
            elif command[1:] in PART_KINDS and command.startswith("/"):
                attached.append(read_typed(command[1:], rest.strip()))
                console.print(f"attached {attached[-1]!r}", style="dim", markup=False, highlight=False)
            elif command.startswith("/") and command not in OUTPUTS:
                raise PartError(f"Unknown command {command}; /help lists them.")
            elif line or attached:
                words = rest if command in OUTPUTS else line
                prompt = [*attached, *([words] if words.strip() else [])]
                _answer(chat, prompt, OUTPUTS.get(command), out, console, options)
                attached = []
        except (ValueError, OSError) as error:
            console.print(" ".join(str(error).split()), style="red", markup=False, highlight=False)


def _answer(
    chat: Chat, prompt: list[Any], output: str | None, out: Path, console: Console, options: dict[str, Any]
) -> None:
    from anytoken.inference.stream import SegmentFinished, TextDelta

    for event in chat.stream(prompt, output, **options):
        if isinstance(event, TextDelta):
            console.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
        elif isinstance(event, SegmentFinished):
            if event.segment.kind == "text":
                console.print()
            else:
                [part] = write_segments([event.segment], out)
                console.print(part[part["type"]], style="cyan", markup=False, highlight=False)
