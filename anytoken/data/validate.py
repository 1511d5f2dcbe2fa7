"""Check a source before training: every bad record with its location and reason, and a summary of the rest.

Records are parsed and their media located by the code that training uses, so exactly the records that are bad here are
skipped there. Media files are opened on request (``decode``), or encoded by the tokenizers of a checkpoint, which also
finds those that are too long; otherwise this checks thousands of records per second. Media inside a record or an
archive are always opened. A shard folder is also a source: its checksums are compared.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from anytoken.data.records import (
    Blob,
    MediaPart,
    Record,
    bad_record,
    check_place,
    is_inline,
    media_parts,
    open_media,
)
from anytoken.data.shard_worker import Job, Tokenizers, encode_entries
from anytoken.data.sources import open_source
from anytoken.data.views import auto_views, held_kinds, is_used
from anytoken.segments import KINDS, Segment
from anytoken.tokenizers.base import MODALITIES
from anytoken.utils.errors import RecordError
from anytoken.utils.limits import current_limits

CHUNK = 64  # records that tokenizers encode together
NEAR_NAMES = {"audio": "speech", "sound": "speech", "caption": "text", "picture": "image", "sequence": "dna"}


@dataclass
class Census:
    """Counts of records, conversations, keys, media, and bad records by reason."""

    records: int = 0
    conversations: int = 0
    keys: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    files: tuple[str, ...] = ()  # that no record holds

    # Kinds -> records, the first one's place.
    held: dict[frozenset[str], tuple[int, str]] = field(default_factory=dict)

    def hints(self) -> list[str]:
        """Keys similar to a modality, with advice."""
        return near_names(self.keys, _kinds())

    def views(self) -> dict[str, float]:
        """The automatic views of the good records; RecordError if training would find none."""
        views = auto_views(self.held, _kinds())
        if self.held and (not views or (set(views) == {"->text"} and self.hints())):
            raise RecordError(
                f"nothing to train on: records of {', '.join(sorted(self.keys))} hold neither messages nor two of "
                f"{', '.join(_kinds())}; {' '.join([*self.hints(), 'or name the views of these keys in the recipe'])}"
            )
        return views

    def unused(self) -> list[str]:
        """Good records that no automatic view uses, with their number and the location of the first."""
        views = self.views()
        return [
            f"{number:,} records hold {' '.join(held) or 'no medium'} alone and are in no automatic view; "
            f"the first: {place}"
            for held, (number, place) in self.held.items()
            if not is_used(held, views)
        ]

    def add(self, place: str, record: Record, media: list[MediaPart]) -> None:
        """Count a good record."""
        self.conversations += "messages" in record
        self.keys.update(record.keys())
        self.media.update(kind for kind, _, _ in media)
        self.media["text"] += num_texts(record)
        held = held_kinds(record, _kinds())
        number, first = self.held.get(held, (0, place))
        self.held[held] = (number + 1, first)


def num_texts(record: Record) -> int:
    """The number of texts in a record: its caption, or the turns and parts of its conversation that are text."""
    if "messages" not in record:
        return int(record.get("text") is not None)
    contents = [message["content"] for message in record["messages"]]
    return sum(
        1 if isinstance(content, str) else sum(part["type"] == "text" for part in content)
        for content in contents
    )


def near_names(keys: Mapping[str, int], kinds: Collection[str]) -> list[str]:
    """Record keys similar to a kind, with advice."""
    near = {
        key: NEAR_NAMES.get(key) or (get_close_matches(key, list(kinds), 1, 0.8) or [""])[0] for key in keys
    }
    return [
        f"the key {key!r} of {keys[key]:,} records is metadata; if it means {kind}: --rename {key}={kind}"
        for key, kind in near.items()
        if kind and key not in kinds
    ]


def _kinds() -> dict[str, type[Segment]]:
    return {**KINDS, **{kind: tokenizer.segment_type for kind, tokenizer in MODALITIES.items()}}


def check_source(
    source: Any,
    census: Census,
    decode: bool = False,
    rename: Mapping[str, str] | None = None,
    data_root: str | Path | None = None,
    tokenizers: Tokenizers | None = None,
) -> Iterator[tuple[str, RecordError]]:
    """Yield location and error of every bad record, and count everything in ``census``; with ``decode``, open all
    media.

    data_root: an additional folder for media. tokenizers: those of a checkpoint; media that they reject are errors,
    too. RecordError if the source itself is missing or damaged.
    """
    opened = open_source(source, rename, data_root)
    census.files = opened.unused
    root = Path(data_root) if data_root else None
    kinds: dict[str, Any] = {kind: segment_type for kind, segment_type in _kinds().items() if kind != "text"}
    entries = opened.entries()
    while chunk := list(islice(entries, CHUNK if tokenizers else 1)):
        census.records += len(chunk)
        faults: dict[str, RecordError] = {}
        if tokenizers:
            job = Job(0, opened.parse, opened.root, chunk, CHUNK, root, current_limits())
            faults = dict(encode_entries(tokenizers, job).faults)
        for place, entry in chunk:
            try:
                if place in faults:
                    raise faults[place]
                record = opened.parse(entry)
                media = media_parts(record, tokenizers or kinds)
                _check_media(record, media, kinds, opened.root, root, decode)
                census.add(place, record, media)
            except Exception as error:
                bad = bad_record(error)
                census.bad[bad.reason] += 1
                yield place, bad


def _check_media(
    record: Record,
    media: list[MediaPart],
    kinds: Mapping[str, Any],
    root: Path,
    data_root: Path | None,
    decode: bool,
) -> None:
    if not media and "messages" not in record and "text" not in record:
        raise RecordError(f"nothing to learn from: none of text, {', '.join(kinds)} among {sorted(record)}")
    for kind, value, _ in media:
        if decode or isinstance(value, Blob) or is_inline(kind, value):
            open_media(value, kinds[kind], root, data_root)
        else:
            check_place(kind, value, root, data_root)
