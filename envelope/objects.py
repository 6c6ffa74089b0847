"""Sealed objects, SGT-1 (docs/format.md 2): a 32-byte header that names the key, then a Cobblestone message.

1. The header is authenticated as the message's context, together with tenant, service and bound name.
2. The reader's policy says which bind it accepts; a header never relaxes it.
3. Lengths are arithmetic both ways (3.1), unauthenticated until the last chunk was opened.
4. Ranges are whole records plus the first 88 bytes; mixed versions of an object fail (3.2).
5. Everything fails closed and stays failed; see envelope/cobblestone.py for the rules of the message.
"""

from collections.abc import Buffer, Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Self, override

from envelope.cobblestone import (
    CHUNK_LIMIT,
    CHUNK_SIZE,
    HEAD_SIZE,
    RECORD_SIZE,
    TAG_SIZE,
    ChunkOpener,
    MessageKeys,
    MessageSealer,
    Stream,
    invalid,
    truncated,
    unlock_any,
)
from envelope.derive import lp, scope
from envelope.errors import FormatError, MisuseError, UnsupportedVersion
from envelope.keys import KeyId, NetworkService

__all__ = [
    "CHUNK_SIZE",
    "HEADER_SIZE",
    "MAGIC",
    "MAX_CANDIDATES",
    "PLAIN_LIMIT",
    "PREFIX_SIZE",
    "RECORD_SIZE",
    "TAG_SIZE",
    "Bind",
    "Candidate",
    "Header",
    "Opener",
    "RangeOpener",
    "Sealer",
    "has_magic",
    "matching",
    "plain_length",
    "sealed_length",
    "sealed_range",
]

MAGIC: Final = b"\x89SGT\r\n\x1a\n"
HEADER_SIZE: Final = 32
PREFIX_SIZE: Final = HEADER_SIZE + HEAD_SIZE
PLAIN_LIMIT: Final = CHUNK_LIMIT * CHUNK_SIZE
"""An object's plaintext is shorter than this: 2^52 bytes."""
MAX_CANDIDATES: Final = 64
"""Keys tried for an anonymous object (docs/format.md 6.4)."""

_VERSION: Final = 1
_SUITE: Final = 1

type FindKey = Callable[[Header], Buffer]
"""K_obj (32 bytes) of the header's key id; raises KeyUnavailableError where there is none to use."""


class Bind(IntEnum):
    """What the *name* in an object's context is (docs/format.md 2.1)."""

    NOTHING = 0
    NAME = 1
    CALLER = 2
    PART = 3
    MANIFEST = 4


@dataclass(frozen=True, slots=True)
class Header:
    """The first 32 bytes of an object."""

    key_id: KeyId
    bind: Bind = Bind.NOTHING

    def encode(self) -> bytes:
        return (
            MAGIC
            + bytes((_VERSION, _SUITE))
            + HEADER_SIZE.to_bytes(2)
            + self.key_id.raw
            + bytes((self.bind, 0, 0, 0))
        )

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """From the first 32 bytes of *data*.

        FormatError if they are no header, UnsupportedVersion if they are one this reader refuses.
        """
        raw = bytes(memoryview(data)[:HEADER_SIZE])
        if not raw.startswith(MAGIC):
            raise FormatError("not a sealed object: it does not begin with the magic bytes")
        if len(raw) < HEADER_SIZE:
            raise truncated()
        if raw[8] != _VERSION:
            raise UnsupportedVersion(f"object version {raw[8]}, this reader knows {_VERSION}")
        if raw[9] != _SUITE:
            raise UnsupportedVersion(f"object suite {raw[9]}, this reader knows {_SUITE}")
        if int.from_bytes(raw[10:12]) != HEADER_SIZE:
            raise FormatError(f"header length {int.from_bytes(raw[10:12])}, not {HEADER_SIZE}")
        if raw[28] not in Bind:
            raise UnsupportedVersion(f"bind {raw[28]} is unknown")
        if any(raw[29:32]):
            raise FormatError("reserved header bytes are not zero")
        return cls(KeyId(raw[12:28]), Bind(raw[28]))


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A key that an anonymous object may have been sealed with."""

    owner: NetworkService
    object_key: Buffer = field(repr=False)
    """K_obj, 32 bytes, derived with the zero key id."""


type FindCandidates = Callable[[], Sequence[Candidate]]
"""The keys to try for an anonymous object, at most MAX_CANDIDATES. Asked once, after its header."""


def has_magic(data: Buffer) -> bool:
    """Whether *data* begins like a sealed object. If so, a failure to open is an error, never plaintext."""
    return bytes(memoryview(data)[: len(MAGIC)]) == MAGIC


def matching(prefix: Buffer, candidates: Sequence[Candidate]) -> int:
    """The place of the one that opens the anonymous object which begins so: its first 88 bytes, bind NOTHING.

    Every candidate is compared, in constant time. FormatError, IntegrityError as `Opener`.
    """
    raw = bytes(memoryview(prefix)[:PREFIX_SIZE])
    header = Header.parse(raw)
    if len(raw) < PREFIX_SIZE:
        raise truncated()
    if header.bind is not Bind.NOTHING or not header.key_id.is_anonymous:
        raise invalid()
    _check_number(candidates)
    return _unlocked(candidates, raw, b"")[0]


def sealed_length(plain_bytes: int) -> int:
    """Stored bytes of an object of *plain_bytes*. FormatError if it is negative or 2^52 and more."""
    if not 0 <= plain_bytes < PLAIN_LIMIT:
        raise FormatError(f"an object has 0 to 2^52 - 1 bytes, not {plain_bytes}")
    return PREFIX_SIZE + plain_bytes + TAG_SIZE * (plain_bytes // CHUNK_SIZE + 1)


def plain_length(sealed_bytes: int) -> int:
    """Plaintext bytes of an object stored in *sealed_bytes*. FormatError if no object has that length."""
    records, rest = divmod(sealed_bytes - PREFIX_SIZE, RECORD_SIZE)
    if records < 0 or rest < TAG_SIZE or records >= CHUNK_LIMIT:
        raise FormatError(f"no sealed object has {sealed_bytes} bytes")
    return sealed_bytes - PREFIX_SIZE - TAG_SIZE * (records + 1)


def sealed_range(start: int, stop: int, *, plain_bytes: int) -> tuple[int, int]:
    """The stored bytes [from, to), whole records, that hold plaintext [start, stop) of *plain_bytes* in all.

    `start == stop == plain_bytes` names the last record alone: opening it proves the object's length, which
    must be done before the length is stated to anyone. MisuseError for any other empty range, or one outside.
    """
    first, last = _records(start, stop, plain_bytes)
    return (
        PREFIX_SIZE + RECORD_SIZE * first,
        min(PREFIX_SIZE + RECORD_SIZE * (last + 1), sealed_length(plain_bytes)),
    )


class Sealer(MessageSealer):
    """Seals one object.

    *object_key*: K_obj, 32 bytes (`derive.object_key`). *name* is what *bind* says, empty for Bind.NOTHING.
    MisuseError for a key or name that does not fit; FormatError from `update` beyond 2^52 - 1 bytes.
    *content_sha256* as in `MessageSealer`: the same content of the same name gives the same bytes.
    """

    def __init__(
        self,
        object_key: Buffer,
        owner: NetworkService,
        key_id: KeyId,
        *,
        bind: Bind = Bind.NOTHING,
        name: bytes = b"",
        content_sha256: bytes | None = None,
    ) -> None:
        self.header: Final = Header(key_id, bind)
        raw = self.header.encode()
        context = _context(raw, owner, _checked(bind, name))
        super().__init__(object_key, context, lead=raw, content_sha256=content_sha256)


class Opener(ChunkOpener):
    """Opens one object of *owner*, read from its first byte.

    *find_key* is asked once, as soon as the header is known, and may raise KeyUnavailableError.
    *bind* and *name* are this reader's policy. *candidates*, if given, is asked when the object is anonymous;
    then commitments are compared, never a tag tried, and `matched` is the place of the one that opens it.
    `update` and `finalize` raise FormatError, UnsupportedVersion, IntegrityError, TruncatedError and
    KeyUnavailableError.
    """

    def __init__(
        self,
        owner: NetworkService,
        find_key: FindKey,
        *,
        bind: Bind = Bind.NOTHING,
        name: bytes = b"",
        candidates: FindCandidates | None = None,
    ) -> None:
        super().__init__(None)
        self.header: Header | None = None
        self.matched: int | None = None
        """Which of the candidates opens it; None while that is not known, and for objects that name a key."""
        self._owner = owner
        self._find_key = find_key
        self._candidates = candidates
        self._bind = bind
        self._name = _checked(bind, name)
        self._prefix = bytearray()
        self._found: Sequence[Candidate] = ()

    @override
    def _update(self, piece: memoryview) -> bytearray:
        if self._keys is None:
            missing = PREFIX_SIZE - len(self._prefix)
            self._prefix += piece[:missing]
            piece = piece[missing:]
            if self.header is None and len(self._prefix) >= HEADER_SIZE:
                # Before the salt is here: a reader without the key learns it at once.
                self.header = Header.parse(self._prefix)
                self._found = _find_keys(
                    self.header, self._owner, self._bind, self._find_key, self._candidates
                )
            if len(self._prefix) < PREFIX_SIZE:
                return bytearray()
            place, self._keys = _unlocked(self._found, bytes(self._prefix), self._name)
            if self.header is not None and self.header.key_id.is_anonymous:
                self.matched = place
            self._found = ()
        return super()._update(piece)

    @override
    def _finalize(self) -> bytes:
        if self._keys is None:
            # Says why: another magic is "no object", a good beginning is "truncated".
            Header.parse(self._prefix)
            raise truncated()
        return super()._finalize()

    @override
    def _forget(self) -> None:
        super()._forget()
        self._found = ()


class RangeOpener(Stream):
    """Opens plaintext [start, stop) of an object of *plain_bytes*, from its prefix and its records.

    *prefix*: the first 88 bytes. `update` takes exactly the bytes `sealed_range` names, in order, and returns
    plaintext cut to the range; `finalize` proves that all of it came. The constructor already checks the
    header and the commitment. Errors as `Opener`; MisuseError for a range outside the object.
    """

    def __init__(
        self,
        owner: NetworkService,
        find_key: FindKey,
        prefix: Buffer,
        *,
        start: int,
        stop: int,
        plain_bytes: int,
        bind: Bind = Bind.NOTHING,
        name: bytes = b"",
        candidates: FindCandidates | None = None,
    ) -> None:
        super().__init__()
        first, last = _records(start, stop, plain_bytes)
        begin, end = sealed_range(start, stop, plain_bytes=plain_bytes)
        raw = bytes(memoryview(prefix))
        self.header: Final = Header.parse(raw)
        if len(raw) != PREFIX_SIZE:
            raise truncated()
        found = _find_keys(self.header, owner, bind, find_key, candidates)
        place, keys = _unlocked(found, raw, _checked(bind, name))
        self.matched: Final = place if self.header.key_id.is_anonymous else None
        """As `Opener.matched`."""
        self._chunks: ChunkOpener | None = ChunkOpener(keys, first=first)
        self._ends_object = last == plain_bytes // CHUNK_SIZE
        self._missing = end - begin
        self._skip = start - first * CHUNK_SIZE
        self._wanted = stop - start

    @override
    def _update(self, piece: memoryview) -> bytearray:
        if not piece:
            return bytearray()
        self._missing -= len(piece)
        if self._missing < 0:
            raise invalid()
        chunks = _present(self._chunks)
        out = chunks.update(piece)
        if self._ends_object and not self._missing:
            out += chunks.finalize()
        skipped = min(self._skip, len(out))
        self._skip -= skipped
        del out[:skipped]
        del out[self._wanted :]
        self._wanted -= len(out)
        return out

    @override
    def _finalize(self) -> bytes:
        if self._missing:
            raise truncated()
        return b""

    @override
    def _forget(self) -> None:
        self._chunks = None


def _records(start: int, stop: int, plain_bytes: int) -> tuple[int, int]:
    """Numbers of the first and last chunk that hold plaintext [start, stop)."""
    if start == stop == plain_bytes >= 0:
        return plain_bytes // CHUNK_SIZE, plain_bytes // CHUNK_SIZE
    if not 0 <= start < stop <= plain_bytes:
        raise MisuseError(f"[{start}, {stop}) is not a range of an object of {plain_bytes} bytes")
    return start // CHUNK_SIZE, (stop - 1) // CHUNK_SIZE


def _context(header: bytes, owner: NetworkService, name: bytes) -> bytes:
    return lp(b"sealgate/v1 body") + header + scope(owner) + lp(name)


def _checked(bind: Bind, name: bytes) -> bytes:
    """*name* if it fits *bind*: none where nothing is bound, one where something is (but for a manifest)."""
    if bind is Bind.NOTHING and name:
        raise MisuseError("a name was given but nothing is to be bound")
    if bind not in (Bind.NOTHING, Bind.MANIFEST) and not name:
        raise MisuseError(f"bind {bind.name} needs a name")
    return name


def _find_keys(
    header: Header,
    owner: NetworkService,
    bind: Bind,
    find_key: FindKey,
    candidates: FindCandidates | None,
) -> Sequence[Candidate]:
    if header.bind is not bind:
        raise invalid()
    if candidates is None or not header.key_id.is_anonymous:
        return (Candidate(owner, find_key(header)),)
    found = candidates()
    _check_number(found)
    return found


def _check_number(candidates: Sequence[Candidate]) -> None:
    if len(candidates) > MAX_CANDIDATES:
        raise MisuseError(f"{len(candidates)} candidate keys, {MAX_CANDIDATES} may be tried")


def _unlocked(found: Sequence[Candidate], prefix: bytes, name: bytes) -> tuple[int, MessageKeys]:
    header = prefix[:HEADER_SIZE]
    keys = [(one.object_key, _context(header, one.owner, name)) for one in found]
    return unlock_any(keys, prefix[HEADER_SIZE:])


def _present[T](part: T | None) -> T:
    if part is None:
        raise MisuseError("this stream is finished")
    return part
