"""What can be said of stored bytes without a key. Nothing said here is authenticated.

Pure, and never raises for bytes, however damaged: what is wrong is listed in `problems`.
"""

from collections.abc import Buffer
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from envelope import fields, multipart
from envelope.cobblestone import HEAD_SIZE, RECORD_SIZE, TAG_SIZE
from envelope.errors import FormatError, SealgateError
from envelope.keys import KeyId
from envelope.objects import HEADER_SIZE, MAGIC, Bind, Header, has_magic, plain_length

_SUITES: Final = {1: "Cobblestone-256", 2: "Cobblestone-128 (reserved)", 3: "FLOE (reserved)"}
_SIV: Final = "AES-256-SIV"


class Kind(StrEnum):
    OBJECT = "object"
    COMPOSITE = "composite"
    FIELD = "field"
    PLAIN = "plain"  # nothing of ours: what it is, is not for us to say


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """*plain_bytes* is None where only the key tells (composites) or the length is impossible."""

    kind: Kind
    stored_bytes: int
    version: int | None = None
    suite: str | None = None
    key_id: KeyId | None = None
    bind: Bind | None = None
    plain_bytes: int | None = None
    parts: int | None = None
    problems: tuple[str, ...] = ()


def describe(data: Buffer, *, stored_bytes: int | None = None, tail: Buffer | None = None) -> Description:
    """Describe an object, composite or field from its bytes, or from the first ones.

    *data*: all bytes, or at least the first 32. *stored_bytes*: how many there are in all, where *data* is
    only the beginning; *tail* then is the last 16, needed for composites.
    """
    raw = bytes(memoryview(data))
    size = len(raw) if stored_bytes is None else stored_bytes
    if has_magic(raw):
        if len(raw) > 28 and raw[28] == Bind.PART:
            end = raw[-multipart.TRAILER_SIZE :] if tail is None else bytes(memoryview(tail))
            return _composite(raw, size, end)
        return _object(raw, size)
    try:
        text = raw.decode("ascii").strip()
    except UnicodeDecodeError:
        text = ""
    if fields.has_prefix(text):
        return _field(text)
    problems = ("begins like a sealed object, but ends too soon",) if raw and MAGIC.startswith(raw) else ()
    return Description(kind=Kind.PLAIN, stored_bytes=size, plain_bytes=size, problems=problems)


def _object(raw: bytes, size: int) -> Description:
    problems = _header_problems(raw)
    plain_bytes = None
    try:
        plain_bytes = plain_length(size)
    except FormatError as error:
        problems.append(str(error))
    return _with_header(Kind.OBJECT, raw, size, problems, plain_bytes=plain_bytes)


def _composite(raw: bytes, size: int, tail: bytes) -> Description:
    problems = _header_problems(raw)
    parts = None
    try:
        begin, end = multipart.ending_range(tail, stored_bytes=size)
        parts = multipart.listed_parts(end - begin)
    except FormatError as error:
        problems.append(f"{error}: a single part, or a composite whose end is missing")
    return _with_header(Kind.COMPOSITE, raw, size, problems, parts=parts)


def _field(text: str) -> Description:
    try:
        header, size = fields.FieldHeader.parse(text), fields.payload_bytes(text)
    except FormatError as error:
        return Description(kind=Kind.FIELD, stored_bytes=len(text), problems=(str(error),))
    if header.kind is fields.FieldKind.DETERMINISTIC:
        plain_bytes, suite = size - TAG_SIZE, _SIV
        impossible = plain_bytes < 0
    else:
        records, rest = divmod(size - HEAD_SIZE, RECORD_SIZE)
        plain_bytes, suite = size - HEAD_SIZE - TAG_SIZE * (records + 1), _SUITES[1]
        impossible = records < 0 or rest < TAG_SIZE
    return Description(
        kind=Kind.FIELD,
        stored_bytes=len(text),
        version=1,
        suite=suite,
        key_id=header.key_id,
        plain_bytes=None if impossible else plain_bytes,
        problems=(f"no value is sealed in {size} bytes",) if impossible else (),
    )


def _with_header(
    kind: Kind,
    raw: bytes,
    size: int,
    problems: list[str],
    *,
    plain_bytes: int | None = None,
    parts: int | None = None,
) -> Description:
    return Description(
        kind=kind,
        stored_bytes=size,
        version=_byte(raw, 8),
        suite=_suite(raw),
        key_id=_key_id(raw),
        bind=_bind(raw),
        plain_bytes=plain_bytes,
        parts=parts,
        problems=tuple(problems),
    )


def _header_problems(raw: bytes) -> list[str]:
    if len(raw) < HEADER_SIZE:
        return [f"the header is cut off after {len(raw)} bytes"]
    try:
        Header.parse(raw)
    except SealgateError as error:
        return [str(error)]
    return []


def _byte(raw: bytes, at: int) -> int | None:
    return raw[at] if len(raw) > at else None


def _suite(raw: bytes) -> str | None:
    number = _byte(raw, 9)
    return None if number is None else _SUITES.get(number, f"unknown ({number})")


def _key_id(raw: bytes) -> KeyId | None:
    return KeyId(raw[12:28]) if len(raw) >= 28 else None


def _bind(raw: bytes) -> Bind | None:
    number = _byte(raw, 28)
    return Bind(number) if number in set(Bind) else None
