"""Prompt parts from the command line: words, files, typed parts and standard input, in the order they were written.

Nothing heavy is imported at the top: `anytoken --help` must be fast.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anytoken.utils.errors import RequestError

if TYPE_CHECKING:
    from anytoken.segments import Segment

PART_KINDS = ("text", "image", "speech", "video", "dna")
MARK = "\0"  # no argument of a process can hold it, so a marked part is never mistaken for a string
STDIN = "-"


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
            raise RequestError(f"{name} needs a value.")
        marked.append(f"{MARK}{kind}{MARK}{found}")
    return marked


def read_part(argument: str) -> Segment:
    """One part of a prompt: marked (see `mark_parts`), "-" for words on standard input, or a string or file path.

    A bare argument that names a file is opened by its content; one that looks like a media path but names no file
    is a RequestError, since "cat.png" is never meant as text.
    """
    from anytoken.segments import Text, open_segment

    if argument.startswith(MARK):
        _, kind, value = argument.split(MARK, 2)
        return read_typed(kind, value)
    if argument == STDIN:
        return Text(_words(_standard_input()))
    if is_file(argument):
        return open_segment(argument)
    words = argument.split()
    if len(words) == 1 and Path(argument).suffix.lower() in _media_suffixes():
        raise RequestError(f"There is no file {argument}; to say it as words, write --text {argument}.")
    return Text(argument)


def read_typed(kind: str, value: str) -> Segment:
    """A part whose kind is known: words for text, bases for DNA, a path, or "-" for a file on standard input."""
    from anytoken.segments import DNA, KINDS, Image, Speech, Text

    if kind == "text":
        return Text(value)
    if value == STDIN and kind == "image":
        return Image.open(_standard_input())
    if value == STDIN and kind == "speech":
        return Speech.open(_standard_input())
    if kind == "dna" and value.isalpha() and not is_file(value):
        return DNA(value)
    path = os.path.expanduser(value)
    if not is_file(path):
        what = (
            f"{kind} on standard input is not read" if value == STDIN else f"There is no {kind} file {value}"
        )
        raise RequestError(f"{what}; give the path of a file.")
    return KINDS[kind].open(path)


def _standard_input() -> bytes:
    data = sys.stdin.buffer.read()
    if not data.strip():
        raise RequestError("Standard input is empty, or was read already: - may stand for one part only.")
    return data


def _words(data: bytes) -> str:
    try:
        return data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"Standard input is not UTF-8 text ({error}); pass an image as --image -, audio as --speech -."
        ) from error


def is_file(text: str) -> bool:
    """Whether words name a file; words longer than a path can be do not."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _media_suffixes() -> set[str]:
    from anytoken.segments import DNA_SUFFIXES, IMAGE_SUFFIXES, SPEECH_SUFFIXES, VIDEO_SUFFIXES

    known = IMAGE_SUFFIXES + SPEECH_SUFFIXES + VIDEO_SUFFIXES + DNA_SUFFIXES
    return {Path(f"a{suffix}").suffix for suffix in known}


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank, without surrounding white space."""
    if not is_file(str(path)):
        raise RequestError(f"There is no file {path}; give a text file with one entry per line.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text ({error}).") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def read_ids(source: str) -> list[int]:
    """Ids from a file or "-" (standard input): a JSON list, or an object with "ids" as `generate --json` prints."""
    if source != STDIN and not is_file(source):
        raise RequestError(
            f"There is no file {source}; give one with token ids as JSON, or - for standard input."
        )
    try:
        text = sys.stdin.read() if source == STDIN else Path(source).read_text(encoding="utf-8")
        data = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(f"{source} does not hold token ids as JSON ({error}).") from error
    ids = data.get("ids") if isinstance(data, dict) else data
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise RequestError(
            f'{source} must hold a JSON list of whole numbers, or an object with such a list as "ids".'
        )
    return ids


def check_out(out: Path) -> None:
    """RequestError if files cannot be written to `out`, raised before the work instead of an OSError after it."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RequestError(f"Cannot write to {out}: {there} is a file. Choose another --out.")
    if not os.access(there, os.W_OK):
        raise RequestError(f"Cannot write to {out}: no permission in {there}. Choose another --out.")
