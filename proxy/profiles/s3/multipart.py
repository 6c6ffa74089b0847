"""Uploads in parts: what the client completes, and what the service is asked in its place. Without I/O.

1. Each part is a message of its own. What ends the object, the manifest of its parts, is one part more; where
   S3 would find the last part too small to have another one behind it, it is joined to that part.
2. The client's list decides which parts make the object, by number and ETag. A part that is not remembered
   under that ETag cannot be in a manifest: InvalidPart, as if the service had never had it.
3. Sizes are judged on plaintext, before the service is asked: a part that is not the last has at least
   `min_part_bytes`.
4. One part number, the highest, is ours, unless the part that has it is so small that it will be joined.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat
from xml.sax.saxutils import escape

from envelope.multipart import Manifest
from envelope.objects import sealed_length
from proxy import refusals
from proxy.refusals import RefusedError
from proxy.uploads import KeptPart

MAX_COMPLETION_BYTES: Final = 4 * 1024 * 1024
"""10,000 parts with an ETag and a checksum each take less than 3 MiB."""
_NAMESPACE: Final = "http://s3.amazonaws.com/doc/2006-03-01/"
_MAX_TEXT: Final = 1024
_MAX_DEPTH: Final = 3
_MAX_NUMBER: Final = 10_000
_CHECKSUM: Final = "Checksum"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRules:
    """What the service demands of parts."""

    min_part_bytes: int = 5 * 1024 * 1024
    """Of every part but the last."""
    max_parts: int = _MAX_NUMBER
    """The highest part number."""

    def is_held(self, plain_bytes: int) -> bool:
        """Whether a part of *plain_bytes* could not have the manifest behind it as a part of its own."""
        return sealed_length(plain_bytes) < self.min_part_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedPart:
    """One entry of a CompleteMultipartUpload. `tag`: the ETag without quotes, as the client knows it."""

    number: int
    tag: str
    checksums: Mapping[str, str] = field(default_factory=dict)
    """By the names of the elements: `ChecksumCRC32` ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completing:
    """How an upload is completed: the parts that count, and where its manifest goes."""

    parts: tuple[KeptPart, ...]
    manifest: Manifest
    final_number: int
    joined: KeptPart | None
    """The last part, if the manifest is joined to it."""

    def request(self, final_tag: str) -> bytes:
        """The document to complete with; *final_tag*: the service's ETag of the part with the manifest."""
        entries = [(kept.part.number, kept.tag) for kept in self.parts if kept is not self.joined]
        return completion_document([*entries, (self.final_number, final_tag)])


def check_part_number(text: str, plain_bytes: int | None, rules: PartRules) -> int:
    """The number of a part of *plain_bytes* that is to be uploaded. RefusedError if it is not usable."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 5 else 0
    if not 0 < number <= rules.max_parts:
        raise RefusedError(refusals.PART_NUMBER)
    if number == rules.max_parts and (plain_bytes is None or not rules.is_held(plain_bytes)):
        raise RefusedError(refusals.PART_NUMBER)
    return number


def plan_completion(
    listed: Iterable[ListedPart], kept: Iterable[KeptPart], rules: PartRules, *, upload_ref: bytes
) -> Completing:
    """How to complete an upload of which *kept* is remembered. RefusedError where S3 would refuse it.

    `ListedPart.tag` is the service's here (etags.to_service).
    """
    known = {(found.part.number, found.tag.lower()): found for found in kept}
    highest = max((number for number, _ in known), default=0)
    parts: list[KeptPart] = []
    for entry in listed:
        if parts and entry.number <= parts[-1].part.number:
            raise RefusedError(refusals.PART_ORDER)
        found = known.get((entry.number, entry.tag.lower()))
        if found is None:
            raise RefusedError(refusals.PART_UNKNOWN)
        parts.append(found)
    if not parts:
        raise RefusedError(refusals.MALFORMED_DOCUMENT)
    last = parts[-1]
    if any(found.part.plain_bytes < rules.min_part_bytes for found in parts[:-1]):
        raise RefusedError(refusals.PART_TOO_SMALL)
    is_joined = rules.is_held(last.part.plain_bytes)
    if is_joined and not last.is_held:
        raise RefusedError(refusals.PART_UNKNOWN)
    # Behind parts that are left out, too: they may be wanted still if this is refused.
    number = last.part.number if is_joined else highest + 1
    if number > rules.max_parts:
        number = last.part.number + 1
    if number > rules.max_parts:
        raise RefusedError(refusals.PART_NUMBER)
    return Completing(
        parts=tuple(parts),
        manifest=Manifest(upload_ref, tuple(found.part for found in parts)),
        final_number=number,
        joined=last if is_joined else None,
    )


# Documents.


def completion_document(parts: Iterable[tuple[int, str]]) -> bytes:
    entries = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>&quot;{escape(tag)}&quot;</ETag></Part>"
        for number, tag in parts
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<CompleteMultipartUpload xmlns="{_NAMESPACE}">{entries}</CompleteMultipartUpload>'
    ).encode()


def read_completion(document: bytes) -> list[ListedPart]:
    """The entries of a CompleteMultipartUpload. RefusedError(MALFORMED_DOCUMENT) for anything else."""
    reader = _CompletionReader()
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    # A DTD is the root of all entities but the five that XML itself has.
    parser.StartDoctypeDeclHandler = reader.refuse
    try:
        parser.Parse(document, True)
    except (expat.ExpatError, ValueError):
        raise RefusedError(refusals.MALFORMED_DOCUMENT) from None
    return reader.parts


def asked_for(listed: Iterable[ListedPart], also: Iterable[str] = ()) -> bytes:
    """SHA-256 of a list of parts, and of what else is said: two of the same are one wish, asked for again."""
    digest = hashlib.sha256()
    for entry in listed:
        digest.update(f"{entry.number} {entry.tag.lower()}\n".encode())
        for name, text in sorted(entry.checksums.items()):
            digest.update(f"{name}={text}\n".encode("utf-8", "surrogatepass"))
    for line in also:
        digest.update(f"{line}\n".encode())
    return digest.digest()


class _CompletionReader:
    """`CompleteMultipartUpload` > `Part` > small texts. What clients make up beside these is read over."""

    def __init__(self) -> None:
        self.parts: list[ListedPart] = []
        self._path: list[str] = []
        self._found: dict[str, str] = {}
        self._text: str | None = None

    def refuse(self, *_args: object) -> None:
        raise ValueError

    def start(self, name: str, _attributes: Mapping[str, str]) -> None:
        self._path.append(_local(name))
        if len(self._path) > _MAX_DEPTH or self._path[0] != "CompleteMultipartUpload":
            raise ValueError
        if len(self._path) == 2:
            if self._path[1] != "Part" or len(self.parts) >= _MAX_NUMBER:
                raise ValueError
            self._found = {}
        self._text = "" if len(self._path) == _MAX_DEPTH else None

    def text(self, data: str) -> None:
        if self._text is None:
            if data.strip():
                raise ValueError
            return
        self._text += data
        if len(self._text) > _MAX_TEXT:
            raise ValueError

    def end(self, _name: str) -> None:
        name = self._path.pop()
        if self._text is not None:
            if name in self._found:
                raise ValueError
            self._found[name] = self._text.strip()
            self._text = None
        elif len(self._path) == 1:
            self.parts.append(_listed(self._found))


def _listed(found: Mapping[str, str]) -> ListedPart:
    number, tag = found.get("PartNumber", ""), found.get("ETag", "").strip('"')
    if not (number.isascii() and number.isdecimal() and len(number) <= 5 and 0 < len(tag) <= 255):
        raise ValueError
    return ListedPart(
        number=int(number),
        tag=tag,
        checksums={name: text for name, text in found.items() if name.startswith(_CHECKSUM)},
    )


def _local(name: str) -> str:
    space, _, local = name.rpartition(" ")
    if space not in ("", _NAMESPACE):
        raise ValueError
    return local
