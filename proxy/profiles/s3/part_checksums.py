"""What a client says of a whole object when it completes it from parts, compared with what it sent. No I/O.

1. Checksums of a part's plaintext, which its own request named and which were compared as it came
   (bodies.py), are remembered sealed, for this upload, number and message alone: in clear they would confirm
   contents.
2. FULL_OBJECT: CRCs of parts make the CRC of the whole (checksums.py). COMPOSITE: the checksum of the parts'
   values, one behind the other. Which of them a bare CRC is, only the upload's beginning has said: either
   will do.
3. A part that came without the algorithm leaves nothing to compare: refused, never taken unseen.
4. A listed part's own checksum must be the one that was compared, where there is one.
5. Of one algorithm there is one checksum of the whole: each costs as much for every part as the next, and a
   head has room for a thousand.
6. What a completion asked is remembered for its repetition, by a digest that nobody makes without the key:
   by checksums in clear, or a digest of them, guessed contents could be confirmed.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from envelope.errors import FormatError, IntegrityError
from envelope.multipart import Part
from envelope.objects import Bind, Header, Opener, Sealer
from proxy import refusals
from proxy.keys.data_key import DataKey
from proxy.messages.checksums import CHECKSUMS, COMBINED, CombinedCrc, new_checksum
from proxy.messages.message import Fields
from proxy.profiles.s3.multipart import ListedPart
from proxy.refusals import RefusedError
from proxy.uploads import KeptPart

PREFIX: Final = "x-amz-checksum-"
_TYPE: Final = "x-amz-checksum-type"
_NO_VALUES: Final = frozenset({"x-amz-checksum-algorithm", "x-amz-checksum-mode", _TYPE})
_ELEMENT: Final = "Checksum"
_NAME: Final = b"s3 part checksums "
_ASKED: Final = b"s3 completion asked "
_AT_ONCE: Final = 32
"""Parts that are looked at before others have their turn."""


class Kind(StrEnum):
    FULL_OBJECT = "FULL_OBJECT"
    COMPOSITE = "COMPOSITE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One checksum of a whole object. `kinds`: what it may be. `parts`: of how many it is, if it says so."""

    algorithm: str
    value: bytes
    kinds: frozenset[Kind]
    parts: int | None = None

    def spelt(self) -> str:
        kinds = ",".join(sorted(self.kinds))
        return f"{self.algorithm} {self.value.hex()} {kinds} {self.parts}"


def said_of_whole(fields: Fields) -> tuple[Said, ...]:
    """What the head of a completion says. RefusedError(INVALID_DIGEST) for what is no such checksum."""
    try:
        kinds = frozenset(Kind) if _TYPE not in fields else frozenset({Kind(fields.sole(_TYPE) or "")})
        return tuple(
            _said(name.removeprefix(PREFIX), fields.sole(name) or "", kinds)  # rule 5
            for name in fields
            if name.startswith(PREFIX) and name not in _NO_VALUES
        )
    except ValueError:  # binascii.Error is one
        raise RefusedError(refusals.INVALID_DIGEST) from None


def _said(algorithm: str, text: str, kinds: frozenset[Kind]) -> Said:
    encoded, mark, count = text.partition("-")
    if algorithm not in CHECKSUMS or (
        mark and not (count.isascii() and count.isdecimal() and len(count) < 6)
    ):
        raise ValueError
    if mark or algorithm not in COMBINED:
        kinds &= {Kind.COMPOSITE}
    if algorithm == "crc64nvme":  # S3 has no composite one of it
        kinds &= {Kind.FULL_OBJECT}
    value = base64.b64decode(encoded, validate=True)
    if not kinds or len(value) != CHECKSUMS[algorithm][1]:
        raise ValueError
    return Said(algorithm=algorithm, value=value, kinds=kinds, parts=int(count) if mark else None)


# What is remembered.


def sealed_sums(sums: Mapping[str, bytes], key: DataKey, upload_ref: bytes, part: Part) -> bytes:
    sealer = Sealer(key.object_key, key.owner, key.key_id, bind=Bind.NAME, name=_name(upload_ref, part))
    return bytes(sealer.update(msgspec.msgpack.encode(dict(sums)))) + sealer.finalize()


def opened_sums(
    data: bytes, find_key: Callable[[Header], DataKey], upload_ref: bytes, part: Part
) -> dict[str, bytes]:
    """RefusedError(PART_UNKNOWN) for what was not sealed for this part; what *find_key* raises."""
    try:
        key = find_key(Header.parse(data))
        name = _name(upload_ref, part)
        opener = Opener(key.owner, lambda _header: key.object_key, bind=Bind.NAME, name=name)
        plain = bytes(opener.update(data)) + opener.finalize()
        return msgspec.msgpack.decode(plain, type=dict[str, bytes])
    except (FormatError, IntegrityError, msgspec.MsgspecError) as error:
        raise RefusedError(refusals.PART_UNKNOWN) from error


def _name(upload_ref: bytes, part: Part) -> bytes:
    return _NAME + upload_ref + part.number.to_bytes(4) + part.commitment


def keyed(asked: bytes, key: DataKey, upload_ref: bytes) -> bytes:
    """What stands for *asked*, a digest of checksums of plaintext, without confirming any of them (rule 6).

    The same every time, under one key: of a message whose salt is synthetic (docs/format.md 2.4).
    """
    sealer = Sealer(
        key.object_key,
        key.owner,
        key.key_id,
        bind=Bind.NAME,
        name=_ASKED + upload_ref,
        content_sha256=hashlib.sha256(asked).digest(),
    )
    return hashlib.sha256(bytes(sealer.update(asked)) + sealer.finalize()).digest()


# Comparing.


def is_asked(said: Sequence[Said], listed: Iterable[ListedPart]) -> bool:
    """Whether there is anything to compare."""
    return bool(said) or any(entry.checksums for entry in listed)


async def compare(
    said: Sequence[Said],
    listed: Sequence[ListedPart],
    kept: Sequence[KeptPart],
    *,
    find_key: Callable[[Header], DataKey],
    upload_ref: bytes,
) -> None:
    """*kept*: what *listed* names, in its order.

    RefusedError: BAD_DIGEST where a checksum of the whole is another, CHECKSUM_OF_PARTS where that cannot be
    told, PART_UNKNOWN where a listed part's own is another.
    """
    wholes = [_Whole(item, len(kept)) for item in said]
    for at, (entry, found) in enumerate(zip(listed, kept, strict=True)):
        if at % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)
        sums = opened_sums(found.digests, find_key, upload_ref, found.part) if found.digests else {}
        for name, text in entry.checksums.items():
            known = sums.get(name.removeprefix(_ELEMENT).lower())
            if known is not None and not _is(text, known):
                raise RefusedError(refusals.PART_UNKNOWN)
        for whole in wholes:
            whole.add(sums.get(whole.said.algorithm), found.part.plain_bytes)
    for whole in wholes:
        whole.check()


def _is(text: str, value: bytes) -> bool:
    try:
        return hmac.compare_digest(base64.b64decode(text, validate=True), value)
    except (binascii.Error, ValueError):
        return False


class _Whole:
    """One checksum of the whole, as the parts' values make it."""

    def __init__(self, said: Said, parts: int) -> None:
        self.said = said
        self._parts = parts
        self._full = CombinedCrc(said.algorithm) if Kind.FULL_OBJECT in said.kinds else None
        self._composite = new_checksum(said.algorithm) if Kind.COMPOSITE in said.kinds else None

    def add(self, value: bytes | None, plain_bytes: int) -> None:
        if value is None:
            raise RefusedError(refusals.CHECKSUM_OF_PARTS)
        if self._full is not None:
            self._full.add(value, plain_bytes)
        if self._composite is not None:
            self._composite.update(value)

    def check(self) -> None:
        if self.said.parts not in (None, self._parts):
            raise RefusedError(refusals.BAD_DIGEST)
        made = [item.digest() for item in (self._full, self._composite) if item is not None]
        if not any(hmac.compare_digest(value, self.said.value) for value in made):
            raise RefusedError(refusals.BAD_DIGEST)
