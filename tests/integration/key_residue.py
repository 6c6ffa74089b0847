"""Where key material can be found: its spellings, searched in the memory of processes and in files.

known = Known.of(material, owner, key_id)        # whoever has opened the wrap knows it
in_memory(pid, known)                            # {"KM", "object key"}: what is there
in_files(directory, known)                       # by file
"""

import base64
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Final, Self

from envelope.derive import object_key
from envelope.keys import KeyId, NetworkService

PIECE_BYTES: Final = 1 << 24
TORN_BYTES: Final = 256
"""Pieces of a mapping overlap by so much: longer than any spelling."""


def spellings(secret: bytes) -> set[bytes]:
    """Text and bytes that tell *secret*, or half of it; as JSON in a JWS has it, too: encoded twice."""
    once = [
        secret,
        secret[:16],
        secret[16:],
        secret.hex().encode(),
        secret.hex().upper().encode(),
        *_in_base64(secret),
    ]
    written = base64.urlsafe_b64encode(secret).rstrip(b"=")
    return {*once, *_in_base64(written)}


def _in_base64(secret: bytes) -> Iterator[bytes]:
    """What base64 of a text with *secret* in it contains, wherever in the text it begins."""
    for lead in range(3):
        encoded = base64.b64encode(bytes(lead) + secret)
        # Without the characters that what stands before and behind has a part in.
        inner = encoded[(0, 2, 3)[lead] : (lead + len(secret)) * 8 // 6]
        yield inner
        yield inner.translate(bytes.maketrans(b"+/", b"-_"))


@dataclass(frozen=True, slots=True)
class Known:
    """One key of a service, as nobody but a test may know it."""

    needles: dict[str, set[bytes]] = field(repr=False)

    @classmethod
    def of(cls, material: bytes, owner: NetworkService, key_id: KeyId) -> Self:
        """Its material, and the key of objects that is derived from it."""
        return cls({"KM": spellings(material), "object key": spellings(object_key(material, owner, key_id))})

    def seen_in(self, piece: bytes) -> set[str]:
        return {name for name, told in self.needles.items() if any(needle in piece for needle in told)}


def memory_of(pid: int) -> Iterator[bytes]:
    """Every writable mapping of the process, a piece at a time. It has ended: nothing."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        mappings = Path(f"/proc/{pid}/maps").read_text().splitlines()
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for line in mappings:
                if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) [r-]w", line):
                    yield from _pieces(memory, int(found[1], 16), int(found[2], 16))


def _pieces(memory: FileIO, at: int, stop: int) -> Iterator[bytes]:
    while at < stop:
        size = min(PIECE_BYTES, stop - at)
        try:
            memory.seek(at)
            yield memory.read(size)
        except (OSError, ValueError, OverflowError):
            return  # unmapped meanwhile, or one of the kernel's own
        at += size if at + size == stop else size - TORN_BYTES


def in_memory(pid: int, known: Known) -> set[str]:
    return set().union(*map(known.seen_in, memory_of(pid)))


def in_files(directory: Path, known: Known) -> dict[str, set[str]]:
    found = {}
    for path in directory.rglob("*"):
        if path.is_file() and (seen := known.seen_in(path.read_bytes())):
            found[str(path.relative_to(directory))] = seen
    return found


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
