"""The one reader of JSON lines: training sets, indexes and logs.

A line ends at ``\\n`` and nowhere else. ``str.splitlines`` also splits at U+2028, U+2029 and U+0085, which JSON allows
unescaped inside a string, so it tears records apart. A byte order mark, ``\\r\\n`` and blank lines are accepted. A key
that appears twice in an object and a lone surrogate are errors: the first loses a value silently, the second
is not Unicode and fails later, in whatever encodes it.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anytoken.utils.errors import DataError
from anytoken.utils.limits import current_limits

DAMAGE = (OSError, EOFError, zlib.error)  # what reading a file, compressed or not, fails with
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def load_json(data: bytes | str) -> Any:
    """The value of one JSON text; ValueError in one short line for anything else.

    Also for a key that appears twice in one object, and for a string with a lone surrogate.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if _SURROGATE.search(text):
        check_unicode(json.dumps(value, ensure_ascii=False))
    return value


def check_unicode(text: str) -> None:
    """ValueError for a text with a lone surrogate, which no encoder takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        letter = text[error.start]
        raise ValueError(f"not Unicode text: the lone surrogate \\u{ord(letter):04x}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.80} appears twice in one object")
    return found


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank, also of a ``.gz``; one of DAMAGE if it cannot be read.

    MediaLimitError for a line of more than max_bytes.
    """
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    limits = current_limits()
    with opener(path, "rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(int(limits.max_bytes) + 1), b""), start=1):
            limits.check("max_bytes", len(line), f"{path} line {number}", stopped=True)
            bare = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if bare.strip():
                yield number, bare


def read_json_lines(path: str | Path, torn_end: bool = False) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, in order.

    torn_end: a last line without its newline that is not JSON, as a killed process leaves in a log, is skipped.
    DataError names the file and the line that is not a JSON object, or that the file is damaged.
    """
    path = Path(path)
    try:
        for number, line in numbered_lines(path):
            try:
                value = load_json(line)
            except ValueError as error:
                if torn_end and not line.endswith(b"\n"):
                    return
                raise DataError(f"{path} line {number}: {error}") from None
            if not isinstance(value, dict):
                raise DataError(f"{path} line {number}: expected a JSON object, got {type(value).__name__}")
            yield value
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read completely: {error}") from error
