"""Objects uploaded in parts, joined by the service: composites (docs/format.md 3.5).

    composite = part message 1 ‖ ... ‖ part message n ‖ manifest message ‖ trailer (16)

1. A part is an object of its own with a salt of its own, bound to (upload, part number); a part sent again is
   a new message, or the same one byte by byte (synthetic salts). Nothing is ever sealed "at an offset".
2. The manifest, sealed last, lists every part with number, stored length and commitment: what was dropped,
   moved, superseded or taken from another upload does not fit it.
3. A reader needs the trailer and the manifest first, then the parts in any stretch. Lengths must add up
   exactly.
4. Manifests are bounded before memory is spent on them.
5. Version 1 is for services that join parts by rising number (S3), and says so by rising numbers. Version 2
   is for those that join named blocks in the order of a list that comes last (Azure): a number is then made
   of the block's name, and the manifest's order is the order of the bytes.
"""

import hashlib
import hmac
import itertools
from collections.abc import Buffer, Iterator
from dataclasses import dataclass
from typing import Final, Self, override

from envelope.cobblestone import COMMITMENT_SIZE, Stream, invalid, truncated
from envelope.errors import FormatError, MisuseError
from envelope.keys import KeyId, NetworkService
from envelope.objects import (
    PREFIX_SIZE,
    Bind,
    FindKey,
    Opener,
    RangeOpener,
    Sealer,
    plain_length,
    sealed_length,
    sealed_range,
)

UPLOAD_REF_SIZE: Final = 16
TRAILER_SIZE: Final = 16
TRAILER_MAGIC: Final = b"SGT-MPU\n"
MAX_PARTS: Final = 65_536
"""More than any service joins (S3 10 000, Azure 50 000 blocks); a manifest stays below 3 MiB."""

RISING: Final = 1
LISTED: Final = 2
_FIXED_SIZE: Final = 1 + UPLOAD_REF_SIZE + 4
_ENTRY_SIZE: Final = 4 + 8 + COMMITMENT_SIZE
_MAX_NUMBER: Final = 2**32 - 1


def upload_ref(upload_id: str) -> bytes:
    """16 bytes that name the service's upload *upload_id*, the same at every proxy."""
    return hashlib.sha256(upload_id.encode()).digest()[:UPLOAD_REF_SIZE]


@dataclass(frozen=True, slots=True)
class Part:
    """One uploaded part: its number, the bytes it has at the service, the commitment of its message."""

    number: int
    stored_bytes: int
    commitment: bytes

    def __post_init__(self) -> None:
        """FormatError for a part that cannot be."""
        if not 0 <= self.number <= _MAX_NUMBER:
            raise FormatError(f"part number {self.number} is out of range")
        if len(self.commitment) != COMMITMENT_SIZE:
            raise FormatError(f"a commitment has {COMMITMENT_SIZE} bytes, not {len(self.commitment)}")
        plain_length(self.stored_bytes)

    @property
    def plain_bytes(self) -> int:
        return plain_length(self.stored_bytes)


def block_number(name: bytes) -> int:
    """The part number of the block *name*, where blocks have names and no numbers (version 2)."""
    return int.from_bytes(hashlib.sha256(name).digest()[:4])


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parts of a composite in their order, at least one.

    *version*: RISING or LISTED (rule 5). FormatError for another, or if numbers do not rise in RISING.
    """

    upload_ref: bytes
    parts: tuple[Part, ...]
    version: int = RISING

    def __post_init__(self) -> None:
        if len(self.upload_ref) != UPLOAD_REF_SIZE:
            raise FormatError(f"an upload reference has {UPLOAD_REF_SIZE} bytes, not {len(self.upload_ref)}")
        if not 0 < len(self.parts) <= MAX_PARTS:
            raise FormatError(f"a composite has 1 to {MAX_PARTS} parts, not {len(self.parts)}")
        if self.version not in (RISING, LISTED):
            raise FormatError(f"there is no manifest of version {self.version}")
        if self.version == RISING and any(
            after.number <= before.number for before, after in itertools.pairwise(self.parts)
        ):
            raise FormatError("part numbers do not rise")

    @property
    def plain_bytes(self) -> int:
        return sum(part.plain_bytes for part in self.parts)

    @property
    def parts_bytes(self) -> int:
        """Stored bytes of all part messages: where the manifest message begins."""
        return sum(part.stored_bytes for part in self.parts)

    def encode(self) -> bytes:
        entries = (
            part.number.to_bytes(4) + part.stored_bytes.to_bytes(8) + part.commitment for part in self.parts
        )
        return bytes((self.version,)) + self.upload_ref + len(self.parts).to_bytes(4) + b"".join(entries)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Inverse of `encode`. FormatError for anything else."""
        if len(data) < _FIXED_SIZE or data[0] not in (RISING, LISTED):
            raise FormatError("not a manifest of this version")
        count = int.from_bytes(data[_FIXED_SIZE - 4 : _FIXED_SIZE])
        if len(data) != _FIXED_SIZE + count * _ENTRY_SIZE:
            raise FormatError(f"a manifest of {len(data)} bytes does not list {count} parts")
        entries = (data[at : at + _ENTRY_SIZE] for at in range(_FIXED_SIZE, len(data), _ENTRY_SIZE))
        parts = (
            Part(int.from_bytes(entry[:4]), int.from_bytes(entry[4:12]), entry[12:]) for entry in entries
        )
        return cls(data[1 : 1 + UPLOAD_REF_SIZE], tuple(parts), data[0])


@dataclass(frozen=True, slots=True)
class Ending:
    """What stands behind the parts, opened and authenticated: the manifest, and its bytes as stored."""

    manifest: Manifest
    stored: bytes


def part_sealer(
    object_key: Buffer,
    owner: NetworkService,
    key_id: KeyId,
    *,
    upload: bytes,
    number: int,
    content_sha256: bytes | None = None,
) -> Sealer:
    """A sealer for part *number* of the upload *upload* (an upload reference). Its `commitment` goes in the
    manifest. *content_sha256* as in `Sealer`.

    MisuseError or FormatError for arguments that do not fit.
    """
    name = _part_name(upload, number)
    return Sealer(object_key, owner, key_id, bind=Bind.PART, name=name, content_sha256=content_sha256)


def seal_ending(
    object_key: Buffer,
    owner: NetworkService,
    key_id: KeyId,
    manifest: Manifest,
    *,
    name: bytes = b"",
    is_synthetic: bool = False,
) -> bytes:
    """Manifest message and trailer: what is uploaded as, or behind, the last part.

    *name*: the object's name where policy binds names, else empty. *is_synthetic*: the same manifest gives
    the same bytes.
    """
    plain = manifest.encode()
    digest = hashlib.sha256(plain).digest() if is_synthetic else None
    sealer = Sealer(object_key, owner, key_id, bind=Bind.MANIFEST, name=name, content_sha256=digest)
    message = sealer.update(plain)
    message += sealer.finalize()
    return bytes(message) + len(message).to_bytes(8) + TRAILER_MAGIC


def ending_range(trailer: Buffer, *, stored_bytes: int) -> tuple[int, int]:
    """The stored bytes [from, to) of manifest message and trailer, from the last 16 bytes of *stored_bytes*.

    FormatError if that is no trailer, or names a manifest that cannot be.
    """
    raw = bytes(memoryview(trailer))
    if len(raw) != TRAILER_SIZE or raw[8:] != TRAILER_MAGIC:
        raise FormatError("a composite's trailer is missing")
    size = int.from_bytes(raw[:8])
    begin = stored_bytes - TRAILER_SIZE - size
    if begin < listed_parts(size + TRAILER_SIZE) * sealed_length(0):
        raise FormatError(f"no manifest of {size} bytes ends an object of {stored_bytes}")
    return begin, stored_bytes


def listed_parts(ending_bytes: int) -> int:
    """How many parts a manifest lists that takes *ending_bytes* with its trailer. FormatError if none can."""
    count, rest = divmod(plain_length(ending_bytes - TRAILER_SIZE) - _FIXED_SIZE, _ENTRY_SIZE)
    if rest or not 0 < count <= MAX_PARTS:
        raise FormatError(f"no manifest has {ending_bytes - TRAILER_SIZE} bytes")
    return count


def open_ending(
    owner: NetworkService, find_key: FindKey, ending: Buffer, *, stored_bytes: int, name: bytes = b""
) -> Ending:
    """Open the bytes `ending_range` names. Errors as `Opener`; IntegrityError if lengths do not add up."""
    stored = bytes(memoryview(ending))
    begin, end = ending_range(stored[-TRAILER_SIZE:], stored_bytes=stored_bytes)
    if len(stored) != end - begin:
        raise truncated()
    opener = Opener(owner, find_key, bind=Bind.MANIFEST, name=name)
    plain = opener.update(stored[:-TRAILER_SIZE])
    plain += opener.finalize()
    manifest = Manifest.parse(bytes(plain))
    if manifest.parts_bytes != begin:
        raise invalid()
    return Ending(manifest, stored)


class CompositeOpener(Stream):
    """Opens a whole composite read from its first byte, its ending already known.

    `update` takes the stored bytes, parts and ending, in order. *find_key* is asked once per part. The ending
    must come again byte by byte as it was opened, so that an object exchanged between the two reads is
    noticed. Errors as `Opener`.
    """

    def __init__(self, owner: NetworkService, find_key: FindKey, ending: Ending) -> None:
        super().__init__()
        self._owner = owner
        self._find_key = find_key
        self._upload = ending.manifest.upload_ref
        self._parts: Iterator[Part] = iter(ending.manifest.parts)
        self._ending = memoryview(ending.stored)
        self._part: _WholePart | None = self._next()

    def _next(self) -> "_WholePart | None":
        part = next(self._parts, None)
        if part is None:
            return None
        opener = Opener(
            self._owner, self._find_key, bind=Bind.PART, name=_part_name(self._upload, part.number)
        )
        return _WholePart(part, opener)

    @override
    def _update(self, piece: memoryview) -> bytearray:
        out = bytearray()
        while piece and self._part is not None:
            taken = piece[: self._part.missing]
            piece = piece[len(taken) :]
            plain = self._part.update(taken)
            # A piece mostly lies within one part: then its output is handed on as it is.
            if out:
                out += plain
            else:
                out = plain
            if not self._part.missing:
                out += self._part.finalize()
                self._part = self._next()
        if piece:
            if not hmac.compare_digest(piece, self._ending[: len(piece)]):
                raise invalid()
            self._ending = self._ending[len(piece) :]
        return out

    @override
    def _finalize(self) -> bytes:
        if self._part is not None or self._ending:
            raise truncated()
        return b""

    @override
    def _forget(self) -> None:
        self._part = None


def composite_range(manifest: Manifest, start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """The stored intervals [from, to) that hold plaintext [start, stop): fetch them in order.

    Of each part that is touched its prefix, then whole records; neighbours are joined. MisuseError for an
    empty range or one outside the composite.
    """
    intervals: list[tuple[int, int]] = []
    for stretch in _stretches(manifest, start, stop):
        begin, end = sealed_range(stretch.start, stretch.stop, plain_bytes=stretch.part.plain_bytes)
        for low, high in ((0, PREFIX_SIZE), (begin, end)):
            at, to = stretch.offset + low, stretch.offset + high
            if intervals and intervals[-1][1] == at:
                intervals[-1] = (intervals[-1][0], to)
            else:
                intervals.append((at, to))
    return tuple(intervals)


class CompositeRangeOpener(Stream):
    """Opens plaintext [start, stop) of a composite from the intervals `composite_range` names, one behind the
    other.

    Errors as `RangeOpener`; MisuseError for an empty range or one outside the composite.
    """

    def __init__(
        self, owner: NetworkService, find_key: FindKey, manifest: Manifest, *, start: int, stop: int
    ) -> None:
        super().__init__()
        self._owner = owner
        self._find_key = find_key
        self._upload = manifest.upload_ref
        self._stretches = iter(_stretches(manifest, start, stop))
        self._stretch: _Stretch | None = next(self._stretches)
        self._prefix = bytearray()
        self._opener: RangeOpener | None = None
        self._missing = 0

    @override
    def _update(self, piece: memoryview) -> bytearray:
        out = bytearray()
        while piece:
            if self._stretch is None:
                raise invalid()
            if self._opener is None:
                taken = piece[: PREFIX_SIZE - len(self._prefix)]
                piece = piece[len(taken) :]
                self._prefix += taken
                if len(self._prefix) == PREFIX_SIZE:
                    self._begin(self._stretch)
                continue
            taken = piece[: self._missing]
            piece = piece[len(taken) :]
            self._missing -= len(taken)
            plain = self._opener.update(taken)
            if out:
                out += plain
            else:
                out = plain
            if not self._missing:
                self._opener.finalize()
                self._opener = None
                self._stretch = next(self._stretches, None)
        return out

    def _begin(self, stretch: "_Stretch") -> None:
        _compare(self._prefix, stretch.part)
        plain_bytes = stretch.part.plain_bytes
        begin, end = sealed_range(stretch.start, stretch.stop, plain_bytes=plain_bytes)
        self._opener = RangeOpener(
            self._owner,
            self._find_key,
            bytes(self._prefix),
            start=stretch.start,
            stop=stretch.stop,
            plain_bytes=plain_bytes,
            bind=Bind.PART,
            name=_part_name(self._upload, stretch.part.number),
        )
        self._missing = end - begin
        self._prefix.clear()

    @override
    def _finalize(self) -> bytes:
        if self._stretch is not None:
            raise truncated()
        return b""

    @override
    def _forget(self) -> None:
        self._opener = None


class _WholePart:
    """One part on its way: nothing goes to its opener before its commitment is the listed one."""

    def __init__(self, part: Part, opener: Opener) -> None:
        self._part = part
        self._opener = opener
        self._prefix = bytearray()
        self.missing = part.stored_bytes

    def update(self, piece: memoryview) -> bytearray:
        self.missing -= len(piece)
        room = PREFIX_SIZE - len(self._prefix)
        if not room:
            return self._opener.update(piece)
        self._prefix += piece[:room]
        if len(self._prefix) < PREFIX_SIZE:
            return bytearray()
        _compare(self._prefix, self._part)
        self._opener.update(self._prefix)
        return self._opener.update(piece[room:])

    def finalize(self) -> bytes:
        return self._opener.finalize()


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Plaintext [start, stop) of one part, whose message begins at the stored *offset*."""

    part: Part
    offset: int
    start: int
    stop: int


def _stretches(manifest: Manifest, start: int, stop: int) -> list[_Stretch]:
    if not 0 <= start < stop <= manifest.plain_bytes:
        raise MisuseError(f"[{start}, {stop}) is not a range of {manifest.plain_bytes} bytes")
    stretches: list[_Stretch] = []
    offset = plain_offset = 0
    for part in manifest.parts:
        low, high = max(start - plain_offset, 0), min(stop - plain_offset, part.plain_bytes)
        if low < high:
            stretches.append(_Stretch(part, offset, low, high))
        offset += part.stored_bytes
        plain_offset += part.plain_bytes
    return stretches


def _part_name(upload: bytes, number: int) -> bytes:
    if len(upload) != UPLOAD_REF_SIZE:
        raise MisuseError(f"an upload reference has {UPLOAD_REF_SIZE} bytes, not {len(upload)}")
    if not 0 <= number <= _MAX_NUMBER:
        raise MisuseError(f"part number {number} is out of range")
    return upload + number.to_bytes(4)


def _compare(prefix: Buffer, part: Part) -> None:
    stored = bytes(prefix)[PREFIX_SIZE - COMMITMENT_SIZE : PREFIX_SIZE]
    if not hmac.compare_digest(stored, part.commitment):
        raise invalid()
