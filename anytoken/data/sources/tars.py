"""Records of webdataset tars: adjacent members with the same key are one record.

They are read with the standard library.
"""

import re
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

from anytoken.data.records import Blob, Medium, Record, Source
from anytoken.data.sources.file_groups import record_of_files
from anytoken.data.sources.tables import digest_files
from anytoken.utils.errors import RecordError
from anytoken.utils.json_lines import DAMAGE
from anytoken.utils.limits import current_limits

TARS = (".tar", ".tar.gz", ".tgz")
EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
              tarfile.GNUTYPE_LONGLINK)  # fmt: skip
# webdataset's key and suffix: a key ends at the first dot of the file name
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")


def tar_files(name: str, files: list[Path]) -> Source:
    """The samples of one or more tars."""

    def entries() -> Iterator[tuple[str, list[tuple[str, Blob]]]]:
        for file in files:
            for key, found in groupby(_members(file), key=lambda one: one[0]):
                yield f"{key} in {file.name}", [(suffix, blob) for _, suffix, blob in found]

    return Source(name, files[0].parent, entries, _from_blobs, partial(digest_files, files))


class _Member(tarfile.TarInfo):
    """A header that must be valid: `tarfile` treats a truncated or damaged one, except the first, as the archive's
    end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        """A header; extensions are read into memory, so they must be short."""
        found = super().frombuf(buf, encoding, errors)
        if found.type in EXTENSIONS and found.size > 1 << 20:
            raise tarfile.ReadError(f"a header of {found.size:,} bytes")
        return found

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


def _members(path: Path) -> Iterator[tuple[str, str, Blob]]:
    """(key, suffix, content) of the files of a tar, in order; MediaLimitError for one larger than max_bytes."""
    limits = current_limits()
    try:
        with tarfile.open(path, tarinfo=_Member) as tar:
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # they would be kept for a second look
                match = _KEY.fullmatch(member.name.removeprefix("./")) if member.isfile() else None
                if match:  # a sparse member is zeros that the archive does not hold
                    limits.check("max_bytes", member.size, f"{match[0]} in {path.name}")
                file = tar.extractfile(member) if match else None
                if match and file is not None:
                    yield match[1], match[2].lower(), Blob(f"{path.name}/{match[0]}", file.read())
    except (*DAMAGE, tarfile.TarError) as error:
        raise RecordError(f"{path} cannot be read completely: {error}", "damaged file") from error


def _from_blobs(entry: list[tuple[str, Blob]]) -> Record:
    members: dict[str, Medium] = dict(entry)
    if len(members) < len(entry):
        raise RecordError(f"two members with the same name: {', '.join(suffix for suffix, _ in entry)}")
    return record_of_files(members, lambda blob: blob.data if isinstance(blob, Blob) else b"")
