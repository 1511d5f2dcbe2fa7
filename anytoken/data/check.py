"""Look at a source before anything is spent on it: every bad record with its place and reason, and what there is.

Without opening media this takes thousands of records a second: shape, types, unknown keys, and whether the files
exist. A shard folder is a source, too: its checksums are compared.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from anytoken.data.records import Blob, Record, RecordError, is_inline, media_parts, open_media
from anytoken.data.sources import Source, open_source
from anytoken.segments import KINDS, Segment
from anytoken.tokenizers.base import MODALITIES

NEAR_NAMES = {"audio": "speech", "sound": "speech", "caption": "text", "picture": "image", "sequence": "dna"}


@dataclass
class Census:
    """What was found: records, conversations among them, keys, media, and the bad ones by reason."""

    records: int = 0
    conversations: int = 0
    keys: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)

    def hints(self) -> list[str]:
        """Keys that look like a modality and are none, with what to do."""
        kinds = list(_kinds())
        near = {
            key: NEAR_NAMES.get(key) or (get_close_matches(key, kinds, 1, 0.8) or [""])[0]
            for key in self.keys
        }
        return [
            f"the key {key!r} of {self.keys[key]:,} records is metadata; if it means {kind}: --rename {key}={kind}"
            for key, kind in near.items()
            if kind and key not in kinds
        ]


def _kinds() -> dict[str, type[Segment]]:
    return {**KINDS, **{kind: tokenizer.segment_type for kind, tokenizer in MODALITIES.items()}}


def check_source(
    source: Any, census: Census, decode: bool = False, rename: Mapping[str, str] | None = None
) -> Iterator[tuple[str, RecordError]]:
    """Yield place and fault of every bad record, and count everything in ``census``; with ``decode``, open all media.

    RecordError if the source itself is missing or damaged.
    """
    opened = open_source(source, rename)
    kinds = {kind: segment_type for kind, segment_type in _kinds().items() if kind != "text"}
    for place, entry in opened.entries():
        census.records += 1
        try:
            record = opened.parse(entry)
            _check_media(record, opened, kinds, census, decode)
        except RecordError as error:
            census.bad[error.reason] += 1
            yield place, error
            continue
        census.conversations += "messages" in record
        census.keys.update(record.keys())


def _check_media(
    record: Record, source: Source, kinds: dict[str, type[Segment]], census: Census, decode: bool
) -> None:
    media = media_parts(record, kinds)
    if not media and "messages" not in record and "text" not in record:
        raise RecordError(f"nothing to learn from: none of text, {', '.join(kinds)} among {sorted(record)}")
    for kind, value, _ in media:
        if decode:
            open_media(value, kinds[kind], source.root)
        elif isinstance(value, Blob):
            if not value.data:
                raise RecordError(f"{value.name} is empty", f"unreadable {kind}")
        elif kind in KINDS and not is_inline(kind, value) and not Path(source.root, value).is_file():
            raise RecordError(f"{kind} {value!r} does not exist in {source.root}", "missing file")
        census.media[kind] += 1
