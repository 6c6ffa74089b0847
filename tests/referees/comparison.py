"""Zero difference: what a client sees directly and through us, and what lies at the service behind us.

1. Two answers to the same request are compared whole: status, every field, body. What may differ is named by
   the caller, field by field, never "the rest".
2. What is stored is judged by tests/vectors/reference.py, which shares no code with the product: each object
   opens under its own key and owner and under no other, and no 16 bytes of any plaintext are in it.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from envelope.keys import KeyId, NetworkService
from tests.vectors import reference

MAGIC = bytes.fromhex("8953 4754 0D0A 1A0A")
WINDOW_BYTES = 16
_HALF_BYTES = WINDOW_BYTES // 2

# RFC 9110 7.6.1, 6.6.1: of the connection and of the moment.
OF_THE_CONNECTION = frozenset({"connection", "keep-alive", "proxy-connection", "transfer-encoding", "date"})


@dataclass(frozen=True, slots=True)
class Seen:
    """An answer as a client saw it; field names in lower case."""

    status: int
    fields: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """Differences that a profile declares, and what differs between any two runs."""

    unequal: frozenset[str] = frozenset()
    """Fields that both have, with values of their own."""
    direct_only: frozenset[str] = frozenset()
    """Fields that may be missing through us."""
    through_only: frozenset[str] = frozenset()
    """Fields that may be missing directly."""
    refusals: frozenset[str] = frozenset()
    """Codes by which we say, in our words and with the service's status, what the service says directly."""
    volatile: Sequence[tuple[re.Pattern[bytes], bytes]] = field(default_factory=tuple)
    """What to put in place of times, versions and tokens, in bodies and fields of both."""

    def differences(self, direct: Seen, through: Seen) -> list[str]:
        """One line each; none: the client cannot tell."""
        found = []
        if direct.status != through.status:
            found.append(f"status {direct.status}, through us {through.status}")
        if through.fields.get("sealgate-error") in self.refusals:
            return found
        names = (direct.fields.keys() | through.fields.keys()) - OF_THE_CONNECTION
        for name in sorted(names):
            ours, theirs = through.fields.get(name), direct.fields.get(name)
            if ours is None and name in self.direct_only:
                continue
            if theirs is None and name in self.through_only:
                continue
            if ours is not None and theirs is not None and name in self.unequal:
                continue
            if self._settled(ours) != self._settled(theirs):
                found.append(f"{name}: {theirs!r}, through us {ours!r}")
        before, after = self._settled_body(direct.body), self._settled_body(through.body)
        if before != after:
            found.append(f"body {before[:2000]!r}, through us {after[:2000]!r}")
        return found

    def _settled(self, value: str | None) -> bytes | None:
        return None if value is None else self._settled_body(value.encode("utf-8", "surrogateescape"))

    def _settled_body(self, body: bytes) -> bytes:
        for pattern, text in self.volatile:
            body = pattern.sub(text, body)
        return body


class Plaintexts:
    """Finds any 16 bytes of them in what is stored, at any offset in both."""

    def __init__(self, plaintexts: Iterable[bytes]) -> None:
        self._plaintexts = list(plaintexts)
        self._halves: set[int] = set()
        for plain in self._plaintexts:
            for offset in range(_HALF_BYTES):
                self._halves.update(_numbers(plain, offset))

    def leak_into(self, stored: bytes) -> bool:
        # Half a window is a number, and numbers are compared quickly; only what agrees is looked at closely.
        if all(self._halves.isdisjoint(_numbers(stored, offset)) for offset in range(_HALF_BYTES)):
            return False
        places = (stored[at : at + WINDOW_BYTES] for at in range(len(stored) - WINDOW_BYTES + 1))
        return any(window in plain for window in places for plain in self._plaintexts)


def _numbers(data: bytes, offset: int) -> "memoryview[int]":
    size = max(0, len(data) - offset) // _HALF_BYTES * _HALF_BYTES
    return memoryview(data)[offset : offset + size].cast("Q")


def opened(
    stored: Iterable[tuple[str, bytes]],
    *,
    owner: NetworkService,
    materials: Mapping[KeyId, bytes],
    plaintexts: Iterable[bytes],
) -> dict[str, bytes]:
    """Name -> plaintext of all that lies at the service. AssertionError if any of it is not as it must be."""
    known = Plaintexts(plaintexts)
    return {name: _opened(name, data, owner, materials, known) for name, data in stored}


def _opened(
    name: str, data: bytes, owner: NetworkService, materials: Mapping[KeyId, bytes], known: Plaintexts
) -> bytes:
    assert data[:8] == MAGIC, f"{name} is no sealed object: {data[:16]!r}"
    assert not known.leak_into(data), f"{name} holds plaintext"
    material = materials[KeyId(data[12:28])]
    mine = (owner.tenant, owner.service)
    plain = _open(material, mine, data)
    strangers = [
        (os.urandom(32), mine),
        (bytes(32), mine),
        (material, ("other", owner.service)),
        (material, (owner.tenant, "other")),
    ]
    for key, whose in strangers:
        try:
            _open(key, whose, data)
        except ValueError:
            continue
        raise AssertionError(f"{name} opens under what is not its key")
    return plain


def _open(material: bytes, owner: tuple[str, str], data: bytes) -> bytes:
    is_composite = data[28] == 3
    return (reference.open_composite if is_composite else reference.open_object)(material, owner, data)
