"""Nextcloud's uploads in chunks: whose they are by their path, and the order in which they are joined. Pure.

1. `.../remote.php/dav/uploads/USER/ID` collects chunks; moving its `.file` joins them by the natural order of
   their names (developer manual, "Chunked file upload"; apps/dav/lib/Upload in nextcloud/server).
2. Names are numbers (the official clients; 1 to 10000 where the server streams to an object store), or the
   first and last byte (rclone). Where the natural order could be read in two ways the upload is refused.
3. The manifest goes behind the last chunk: as one more chunk, or joined to it where that is a small one, for
   an object store wants 5 MiB of every chunk but the last.
"""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from envelope.multipart import LISTED, RISING, Manifest, block_number, upload_ref
from proxy import refusals
from proxy.refusals import RefusedError
from proxy.uploads import KeptPart

MIN_CHUNK_BYTES: Final = 5 * 1024 * 1024
"""Of plaintext; sealed it is more."""
FUTURE_FILE: Final = ".file"


_BELOW: Final = re.compile(r"(?:/.*)?/remote\.php/dav/uploads/[^/]+/[^/]", re.DOTALL)
_COLLECTION: Final = re.compile(
    r"(?P<collection>(?:/[^?]*)?/remote\.php/dav/uploads/[^/?]+/[^/?]+)(?:/(?P<name>[^/?]*))?"
)
_NUMBERED: Final = re.compile(r"[0-9]{1,16}")
_SPANNED: Final = re.compile(r"([0-9]{8,20})-([0-9]{8,20})")
_MAX_NUMBER: Final = 2**32 - 2
_LAST_NUMBER: Final = 10_000


@dataclass(frozen=True, slots=True)
class UploadPath:
    """A place in an upload. `collection`: its path as it is spelt; `name` empty: the collection itself."""

    collection: str
    name: str

    @property
    def ref(self) -> bytes:
        """However its path is spelt."""
        return upload_ref(unquote(self.collection))

    @property
    def number(self) -> int:
        """Of the chunk's message. RefusedError(CHUNK_NAME)."""
        if _NUMBERED.fullmatch(self.name):
            if int(self.name) > _MAX_NUMBER:
                raise RefusedError(refusals.CHUNK_NAME)
            return int(self.name)
        if _is_span(self.name):
            return block_number(self.name.encode())
        raise RefusedError(refusals.CHUNK_NAME)

    def may_be_held(self, plain_bytes: int | None) -> bool:
        """Whether an object store would take it as the last chunk only."""
        return (
            plain_bytes is not None
            and plain_bytes < MIN_CHUNK_BYTES
            and _NUMBERED.fullmatch(self.name) is not None
        )

    def sibling(self, name: str) -> str:
        return f"{self.collection}/{name}"


def upload_path(target: str) -> UploadPath | None:
    """None: it is not in an upload. RefusedError for a spelling that others might read otherwise."""
    path = target.partition("?")[0]
    match, plain = _COLLECTION.fullmatch(path), unquote(path)
    canonical = posixpath.normpath(plain)
    if match is None and not _BELOW.match(canonical):
        return None
    if match is None or plain.rstrip("/") != canonical or plain.count("/") != path.count("/"):
        raise RefusedError(refusals.BAD_MESSAGE)
    return UploadPath(match["collection"], match["name"] or "")


def _is_span(name: str) -> bool:
    match = _SPANNED.fullmatch(name)
    return match is not None and len(match[1]) == len(match[2])


def in_order(kept: Sequence[KeptPart]) -> list[KeptPart]:
    """Chunks, tagged by their names, as the server joins them. RefusedError(CHUNK_NAME, CHUNKS_UNKNOWN)."""
    if not kept:
        raise RefusedError(refusals.CHUNKS_UNKNOWN)
    names = [each.tag for each in kept]
    one_width = len({len(name) for name in names}) == 1
    if all(map(_is_span, names)) and one_width:
        return sorted(kept, key=lambda each: each.tag)
    unpadded = all(name == "0" or not name.startswith("0") for name in names)
    if all(map(_NUMBERED.fullmatch, names)) and (one_width or unpadded):
        return sorted(kept, key=lambda each: int(each.tag))
    raise RefusedError(refusals.CHUNK_NAME)


def manifest_of(ref: bytes, ordered: Sequence[KeptPart]) -> Manifest:
    version = LISTED if _is_span(ordered[0].tag) else RISING
    return Manifest(ref, tuple(each.part for each in ordered), version)


def name_behind(ordered: Sequence[KeptPart], size_bytes: int) -> str:
    """Name of a chunk of *size_bytes* that is joined behind all. RefusedError(TOO_MANY_CHUNKS)."""
    last = ordered[-1].tag
    if _is_span(last):
        width, end = len(last) // 2, int(last.rpartition("-")[2])
        behind = f"{end + 1:0{width}}-{end + size_bytes:0{width}}"
    elif any(each.tag.startswith("0") and each.tag != "0" for each in ordered):
        behind = f"{int(last) + 1:0{len(last)}}"
    else:
        behind = str(int(last) + 1)
        if int(last) == _LAST_NUMBER:
            raise RefusedError(refusals.TOO_MANY_CHUNKS)
        return behind
    if len(behind) != len(last):
        raise RefusedError(refusals.TOO_MANY_CHUNKS)
    return behind
