"""Encode one part of a source: entries to records and codes, as the bytes of its files.

A part is the unit of work of a worker, and what a killed run loses. It depends only on its entries and the tokenizers,
so any worker on any machine can compute it. A record that cannot be read, or whose media a tokenizer rejects, is
skipped and counted.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save

from anytoken.data.records import MediaPart, Medium, Record, bad_record, media_parts, open_media, record_line
from anytoken.segments import Image, Segment
from anytoken.tokenizers.base import Codes, ModalityTokenizer
from anytoken.utils.errors import RecordError
from anytoken.utils.limits import MediaLimits, media_limits

FIRST_FRAME = (
    "first_frame"  # the arrays of the image codes of first frames, which have the rows of the videos
)
Tokenizers = Mapping[str, ModalityTokenizer]
Encode = Callable[[Sequence[Any]], list[Any]]
Entry = dict[str, Any]  # what the journal says of a part
Skipped = dict[str, list[Any]]  # reason -> [count, the first one's place and error]


class Job(NamedTuple):
    """One part to encode."""

    part: int
    parse: Callable[[Any], Record]
    root: Path
    entries: list[tuple[str, Any]]
    batch_size: int
    data_root: Path | None = None
    limits: MediaLimits = MediaLimits()
    first_frames: bool = False


def part_names(index: int) -> tuple[str, str]:
    """Names of the records file and the arrays file."""
    return f"part-{index:05d}.jsonl", f"part-{index:05d}.safetensors"


class Encoded(NamedTuple):
    """The result for some entries: records with their rows of codes, and the errors of the others by location."""

    lines: list[str]
    codes: dict[str, list[Codes]]
    faults: list[tuple[str, RecordError]]


def encode_entries(tokenizers: Tokenizers, job: Job) -> Encoded:
    """Encode entries to records and codes; an error in one entry does not affect the others."""
    with media_limits(job.limits):  # in a worker's process, too
        return _encode_entries(tokenizers, job)


def _encode_entries(tokenizers: Tokenizers, job: Job) -> Encoded:
    faults: list[tuple[str, RecordError]] = []
    parsed: list[tuple[str, Record, list[MediaPart]]] = []
    for place, entry in job.entries:
        try:
            record = job.parse(entry)
            media = media_parts(record, tokenizers)
            record_line(record).encode()
            parsed.append((place, record, media))
        except Exception as error:
            faults.append((place, bad_record(error)))
    values: dict[str, dict[Medium, None]] = {kind: {} for kind in tokenizers}
    for _, _, media in parsed:
        for kind, value, _ in media:
            values[kind][value] = None
    codes = {
        kind: _encode_all(_encoder(tokenizers, kind, job), tokenizers[kind].segment_type, list(found), job)
        for kind, found in values.items()
    }
    rows: dict[str, dict[Medium, int]] = {kind: {} for kind in tokenizers}
    lines = []
    for place, record, media in parsed:
        wrong = [fault for kind, value, _ in media if isinstance(fault := codes[kind][value], RecordError)]
        if wrong:
            faults.append((place, wrong[0]))
        else:
            lines.append(record_line({"record": record, "rows": _place(media, rows)}))
    kept: dict[str, list[Any]] = {kind: [codes[kind][one] for one in found] for kind, found in rows.items()}
    if job.first_frames:
        kept[FIRST_FRAME], kept["video"] = ([pair[part] for pair in kept["video"]] for part in (0, 1))
    return Encoded(lines, kept, faults)


def encode_part(tokenizers: Tokenizers, job: Job) -> tuple[dict[str, bytes], Entry]:
    """Encode one part to files, {name: bytes}, and its journal entry."""
    encoded = encode_entries(tokenizers, job)
    arrays: dict[str, np.ndarray] = {}
    for kind, found in encoded.codes.items():
        if found:
            arrays |= {f"{kind}.{name}": array for name, array in _pack_codes(found).items()}
    names = part_names(job.part)
    files = dict(zip(names, ("".join(encoded.lines).encode(), save(arrays)), strict=True))
    skipped: Skipped = {}
    for place, error in encoded.faults:
        skipped.setdefault(error.reason, [0, f"{place}: {error}"])[0] += 1
    entry = {
        "part": job.part,
        "read": len(job.entries),
        "records": len(encoded.lines),
        "kinds": [kind for kind, found in encoded.codes.items() if found and kind != FIRST_FRAME],
        "skipped": skipped,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    return files, entry


def _place(media: list[MediaPart], rows: dict[str, dict[Medium, int]]) -> dict[str, int]:
    """Assign a row to each medium of a record: {kind: row}, or in the content parts of a conversation."""
    own = {}
    for kind, value, part in media:
        row = rows[kind].setdefault(value, len(rows[kind]))
        if part is None:
            own[kind] = row
        else:
            part["row"] = row
    return own


def _encoder(tokenizers: Tokenizers, kind: str, job: Job) -> Encode:
    """What encodes a batch of a kind; with first frames, a video becomes two items: codes of the frame, and its own."""
    encode = tokenizers[kind].encode_batch
    if not job.first_frames or kind != "video":
        return encode

    def both(segments: Sequence[Any]) -> list[Any]:
        frames = tokenizers["image"].encode_batch([Image(one.frames[0]) for one in segments])
        return list(zip(frames, encode(segments), strict=True))

    return both


def _encode_all(
    encode: Encode, segment_type: type[Segment], values: Sequence[Medium], job: Job
) -> dict[Medium, Codes | RecordError]:
    """Codes of every medium, or its error."""
    found: dict[Medium, Codes | RecordError] = {}
    for start in range(0, len(values), job.batch_size):
        opened: dict[Medium, Segment] = {}
        for value in values[start : start + job.batch_size]:
            try:
                opened[value] = open_media(value, segment_type, job.root, job.data_root)
            except RecordError as error:
                found[value] = error
        with torch.no_grad():
            found |= _encode_opened(encode, opened)
    return found


def _encode_opened(encode: Encode, opened: Mapping[Medium, Segment]) -> dict[Medium, Codes | RecordError]:
    """Encode as one batch; if the tokenizer rejects it, one by one, to find the cause."""
    try:
        return dict(zip(opened, encode(list(opened.values())), strict=True)) if opened else {}
    except Exception as error:  # of a plug-in's encoder, too
        if len(opened) == 1:
            [segment] = opened.values()
            return dict.fromkeys(opened, RecordError(str(bad_record(error)), f"refused {segment.kind}"))
    return {
        value: found for one in opened.items() for value, found in _encode_opened(encode, dict([one])).items()
    }


def _pack_codes(codes: Sequence[Any]) -> dict[str, np.ndarray]:
    headers = np.stack([item.header for item in codes]).astype(np.int32)
    values = np.concatenate([item.values for item in codes]).astype(np.int32)
    return {
        "values": values.astype(np.uint16) if values.max(initial=0) < 2**16 else values,
        "offsets": np.cumsum([0, *(len(item.values) for item in codes)]).astype(np.int64),
        "sizes": np.array([item.size for item in codes], dtype=np.int32).reshape(len(codes), -1),
        **({"headers": headers} if headers.size else {}),
    }
