"""The files of one audit log: the one that is written, and those that were closed, being large or old.

1. A closed file is named after the last event in it: `audit.jsonl.000000001742`. It is never written again,
   replaced or removed by us: it is evidence. Whoever is to do so may move or compress it.
2. The chain goes on from file to file. A file that does not begin with event 1 begins with CONTINUED, which
   says so; its `prev` is the hash of the last event before, so that files prove each other.
3. The files that are there are verified as one chain. The oldest may begin anywhere: those before it were
   moved away, and a head that was recorded proves them.
4. Between two steps of a rotation, and where somebody has taken the written file away, there are closed files
   and no written one: whoever opens the log goes on from the last closed one, and CONTINUED says `recovered`.
5. So an empty file that follows closed ones was cut to nothing, or its writer ended in the instant in which
   it began it. A reader beside a writer looks again before it says so.
"""

import json
import os
import re
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from envelope import audit
from envelope.audit import BrokenChainError, Head
from envelope.errors import FormatError, IntegrityError

CONTINUED: Final = "audit-continued"
_DIGITS: Final = 12
_TRIES: Final = 100
_PAUSE_S: Final = 0.01


class RotationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the written file is closed and the next one begun."""

    max_bytes: int = 256 << 20
    """About half a million events; so much is verified at each start."""
    max_age_s: int = 0
    """Since its first event; 0: however old."""

    def __post_init__(self) -> None:
        if not 4096 <= self.max_bytes <= 1 << 50:
            raise ValueError(f"audit.max_bytes must be between 4096 and 2^50, not {self.max_bytes}")
        if self.max_age_s and not 60 <= self.max_age_s <= 10 * 366 * 86400:
            raise ValueError(f"audit.max_age_s must be 0, or from 60 up to ten years, not {self.max_age_s}")


@dataclass(frozen=True, slots=True)
class Chain:
    """What one file holds: where it begins, the head and size in bytes of its whole lines, the torn rest."""

    start: Head
    head: Head
    size_bytes: int
    torn: bytes


@dataclass(frozen=True, slots=True)
class Files:
    """What all files of one log hold that are there."""

    start: Head
    closed: tuple[Path, ...]
    written: Chain


def closed_name(path: Path, head: Head) -> Path:
    """Of the file at *path* when *head* is the last event in it."""
    return path.with_name(f"{path.name}.{head.seq:0{_DIGITS}}")


def closed_files(path: Path) -> list[Path]:
    """Those of the log at *path*, oldest first. OSError."""
    name = re.compile(re.escape(path.name) + rf"\.[0-9]{{{_DIGITS},18}}")
    found = [one for one in path.parent.iterdir() if name.fullmatch(one.name)]
    return sorted(found, key=last_seq)


def last_seq(closed: Path) -> int:
    """The number of the last event in the closed file of this name."""
    return int(closed.name.rpartition(".")[2])


def read_chain(stream: BinaryIO, *, expected: Head | None = None) -> Chain:
    """Verify the one file in *stream*. BrokenChainError names the first line that is wrong.

    It begins with event 1, or by CONTINUED wherever that says. *expected* is a head recorded earlier
    (envelope/audit.py rule 3): its event must be in it.
    """
    chain, found = _read(stream, expected)
    if expected is not None and expected != audit.EMPTY and not found:
        raise not_in_it(expected, chain.head.seq - chain.start.seq + 1)
    return chain


def read_files(path: Path, *, expected: Head | None = None) -> Files:
    """Verify all files of the log at *path* that are there, also beside the process that writes it.

    BrokenChainError, with the file's name in its reason where it is a closed one. OSError.
    """
    found = _read_files(path, expected)
    for _ in range(_TRIES):
        if not (found.closed and found.written.size_bytes == 0 and not found.written.torn):
            return found
        time.sleep(_PAUSE_S)
        found = _read_files(path, expected)
    raise BrokenChainError(1, f"it is empty, though it goes on from {found.closed[-1].name}")


def _read_files(path: Path, expected: Head | None) -> Files:
    with _opened(path) as written:
        chain, found = _read(written, None)
        closed = closed_files(path)
        earlier = [one for one in closed if not chain.size_bytes or last_seq(one) <= chain.start.seq]
        # Later ones have been closed since; this one is among them.
        if len(earlier) < len(closed) and _is_at(path, written):
            raise BrokenChainError(1, f"it begins before the end of {closed[-1].name}")
        begin, head, seen = None, None, expected in {None, audit.EMPTY}
        for file in earlier:
            before, found = _closed(file, head, expected)
            begin, head, seen = begin or before.start, before.head, seen or found
        if head is not None and chain.size_bytes and chain.start != head:
            raise BrokenChainError(1, f"it does not continue {earlier[-1].name}")
        if expected is not None and not seen:
            written.seek(0)
            if not _read(written, expected)[1]:
                raise not_in_it(expected, 1)
    return Files(begin or chain.start, tuple(earlier), chain)


def _opened(path: Path) -> BinaryIO:
    """The written file. Between two steps of a rotation nothing has its name, for a moment. OSError."""
    for _ in range(_TRIES):
        try:
            return path.open("rb")
        except FileNotFoundError:
            if not closed_files(path):
                raise  # it never was
        time.sleep(_PAUSE_S)
    return path.open("rb")


def _read(stream: BinaryIO, expected: Head | None) -> tuple[Chain, bool]:
    """The chain in *stream*, and whether *expected* is in it, or where it begins."""
    head: Head | None = None
    begin, size_bytes, line_number, found, torn = audit.EMPTY, 0, 0, False, b""
    while line := stream.readline(audit.MAX_LINE_BYTES + 1):
        if not line.endswith(b"\n") and len(line) <= audit.MAX_LINE_BYTES:
            torn = line
            break
        line_number += 1
        if head is None:
            begin = head = _beginning(line)
            found = head == expected
        try:
            head = audit.verify([line], start=head)
        except BrokenChainError as error:
            raise BrokenChainError(line_number, error.reason) from None
        size_bytes += len(line)
        found = found or head == expected
    return Chain(begin, head or begin, size_bytes, torn), found


def _closed(file: Path, before: Head | None, expected: Head | None) -> tuple[Chain, bool]:
    try:
        with file.open("rb") as stream:
            chain, found = _read(stream, expected)
    except BrokenChainError as error:
        raise BrokenChainError(error.line_number, f"of {file.name}: {error.reason}") from None
    if before is not None and chain.start != before:
        raise BrokenChainError(1, f"of {file.name}: it does not go on from event {before.seq}")
    if chain.torn or chain.head.seq != last_seq(file):
        raise BrokenChainError(
            chain.head.seq - chain.start.seq + 1,
            f"of {file.name}: it does not end with event {last_seq(file)}",
        )
    return chain, found


def lines_since(path: Path, since_ms: int) -> list[bytes]:
    """The lines, newlines included, of all files that have events from *since_ms* on. OSError."""
    with _opened(path) as written:
        lines = written.read().splitlines(keepends=True)
    begins_after = _beginning(lines[0]).seq if lines else None
    for file in reversed(closed_files(path)):
        if lines and time_ms(lines[0]) < since_ms:
            break
        if begins_after is None or last_seq(file) <= begins_after:  # else it was closed since
            lines[:0] = file.read_bytes().splitlines(keepends=True)
    return lines


def time_ms(line: bytes) -> int:
    """When the event in *line* happened, milliseconds since the epoch; 0 if that cannot be told."""
    try:
        return int(datetime.fromisoformat(json.loads(line)["time"]).timestamp() * 1000)
    except (ValueError, KeyError, TypeError):
        return 0


def last_head(closed: Path) -> Head:
    """Where the chain stands at the end of a closed file, which is verified. BrokenChainError, OSError."""
    return _closed(closed, None, None)[0].head


def tail_head(closed: Path) -> Head:
    """Where a closed file's chain stands at its end, by the last line alone. BrokenChainError, OSError."""
    with closed.open("rb") as stream:
        size_bytes = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size_bytes - audit.MAX_LINE_BYTES - 1))
        line = stream.read().removesuffix(b"\n").rpartition(b"\n")[2]
    try:
        event = json.loads(line)
        return audit.check_line(line, Head(event["seq"] - 1, event["prev"]))
    except (ValueError, KeyError, TypeError, FormatError, IntegrityError) as error:
        raise BrokenChainError(1, f"the last of {closed.name}: {error}") from None


def not_in_it(expected: Head, line_number: int) -> BrokenChainError:
    return BrokenChainError(line_number, f"event {expected.seq} with its recorded hash is not in this chain")


def _beginning(line: bytes) -> Head:
    """Where a file whose first line this is begins: EMPTY, unless it says that it goes on."""
    try:
        event = json.loads(line)
        if event["action"] == CONTINUED and event["seq"] > 1:
            return Head(event["seq"] - 1, event["prev"])
    except (ValueError, KeyError, TypeError):
        pass  # not an event: whoever verifies it says so
    return audit.EMPTY


def _is_at(path: Path, stream: BinaryIO) -> bool:
    """Whether *stream* is still what lies at *path*."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False
