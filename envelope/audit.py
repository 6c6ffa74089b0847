"""Audit events and their hash chain: one event is one line of canonical JSON (rules only, no file).

    {"seq":7,"time":"2027-01-15T08:00:00.000Z","action":"envelope-accepted","outcome":"ok",...fields sorted by
     name...,"prev":"<hash of line 6>","hash":"<SHA-256 of this line up to here>"}

1. `seq` counts from 1. `prev` of the first line is 64 zeros. `hash` is SHA-256 over the line's bytes before
   `,"hash"`, closed by `}`: over the event and, by `prev`, everything before it.
2. There is one way to write an event: no spaces, ASCII (so no control character and no line break reaches a
   terminal or forges a line), field names `[a-z][a-z0-9_]*`, values strings, integers, booleans or null. A
   line that says the same otherwise does not verify.
3. The chain shows edited, deleted, inserted and reordered lines. It has no key: who can rewrite the whole
   file can forge it, and lines cut off its end leave a valid chain. Both show only against a head kept
   elsewhere: ship the lines, or record `Head` from time to time, and give it to `verify`.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, override

from envelope.errors import FormatError, IntegrityError, MisuseError

MAX_LINE_BYTES: Final = 64 * 1024
_NO_HASH: Final = "0" * 64
_RESERVED: Final = frozenset({"seq", "time", "action", "outcome", "prev", "hash"})
_FIELD: Final = re.compile(r"[a-z][a-z0-9_]*")
_WORD: Final = re.compile(r"[a-z][a-z0-9.-]*")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_HEAD: Final = re.compile(r"(0|[1-9][0-9]{0,17}):([0-9a-f]{64})")
_TAIL: Final = re.compile(rb',"hash":"([0-9a-f]{64})"\}')
_TAIL_SIZE: Final = len(',"hash":""}') + 64

# Made once: json.dumps with arguments builds an encoder per call, a third of an event's cost.
_encode: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode
_quote: Final = json.encoder.encode_basestring_ascii  # what that encoder writes a string with

type Value = str | int | None


class BrokenChainError(IntegrityError):
    """A line that does not continue the chain. `line_number` counts from 1; `reason` says what is wrong."""

    def __init__(self, line_number: int, reason: str) -> None:
        super().__init__(f"line {line_number}: {reason}")
        self.line_number = line_number
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Head:
    """Where a chain stands: the last event's number and hash. As text: `<seq>:<hash>`."""

    seq: int = 0
    hash: str = _NO_HASH

    @override
    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


EMPTY: Final = Head()


def parse_head(text: str) -> Head:
    """The head that *text* names. FormatError if it names none."""
    found = _HEAD.fullmatch(text)
    if found is None:
        raise FormatError("not a head of an audit log: <number>:<64 lower-case hexadecimal digits> is")
    return Head(int(found[1]), found[2])


def encode_event(
    head: Head, *, wall_s: float, action: str, outcome: str = "ok", fields: Mapping[str, Value]
) -> tuple[bytes, Head]:
    """The line (newline included) that continues *head*, and the head after it.

    *wall_s*: seconds since the epoch. *action* and *outcome* are words of the program (`[a-z][a-z0-9.-]*`),
    what comes from outside goes into *fields*. MisuseError for anything that is not as rule 2 says or longer
    than MAX_LINE_BYTES.
    """
    if not _is_word(action) or not _is_word(outcome):
        raise MisuseError(f"not a word for an audit event: {action!r}, {outcome!r}")
    seq = head.seq + 1
    # The words and the time need no escapes; written piece by piece it costs half of what an encoder costs.
    pieces = [f'{{"seq":{seq},"time":"{_format_time(wall_s)}","action":"{action}","outcome":"{outcome}"']
    for name, prefix in _layout(tuple(fields)):
        value = fields[name]
        if type(value) is str:
            pieces.append(prefix + _quote(value))
        elif type(value) is int:
            pieces.append(f"{prefix}{value}")
        elif value is None or isinstance(value, str | int):
            pieces.append(prefix + _encode(value))
        else:
            raise MisuseError(
                f"audit field {name} is a {type(value).__name__}; text, integer or nothing can be"
            )
    pieces.append(f'"prev":"{head.hash}"')
    body = ",".join(pieces).encode("ascii")
    digest = hashlib.sha256(body + b"}").hexdigest()
    line = b'%b,"hash":"%b"}\n' % (body, digest.encode("ascii"))
    if len(line) > MAX_LINE_BYTES:
        raise MisuseError(f"audit event {action} has {len(line)} bytes, at most {MAX_LINE_BYTES} can be")
    return line, Head(seq, digest)


def check_line(line: bytes, head: Head) -> Head:
    """The head after *line* (given without its newline), which must continue *head*.

    FormatError: not an event as rule 2 says. IntegrityError: changed, or not the next one.
    """
    tail = _TAIL.fullmatch(line[-_TAIL_SIZE:])
    if not tail:
        raise FormatError("not an audit event: it does not end with its hash")
    body = line[:-_TAIL_SIZE] + b"}"
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        raise FormatError("not an audit event: not JSON") from None
    if not isinstance(event, dict) or not _is_canonical(event, body):
        raise FormatError("not an audit event in canonical form")
    digest = hashlib.sha256(body).hexdigest()
    if digest.encode("ascii") != tail[1]:
        raise IntegrityError("the event was changed: its hash does not fit")
    if event["seq"] != head.seq + 1:
        raise IntegrityError(f"event {event['seq']} stands where {head.seq + 1} should")
    if event["prev"] != head.hash:
        raise IntegrityError("the event does not continue the one before it")
    return Head(event["seq"], digest)


def verify(lines: Iterable[bytes], *, start: Head = EMPTY, expected: Head | None = None) -> Head:
    """The head of the chain of *lines* (newline included in each). BrokenChainError names the first that is
    wrong.

    *expected* is a head recorded earlier: its event must be in the chain, which shows what was cut off the
    end or rewritten. A last line without its newline is torn, and so wrong.
    """
    head = start
    seen = expected is None or expected == start
    number = 0
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            raise BrokenChainError(number, "the line is torn: it has no end")
        try:
            head = check_line(line[:-1], head)
        except (FormatError, IntegrityError) as error:
            raise BrokenChainError(number, str(error)) from None
        seen = seen or head == expected
    if expected is not None and not seen:
        raise BrokenChainError(
            number + 1, f"event {expected.seq} with its recorded hash is not in this chain"
        )
    return head


def _is_canonical(event: dict[str, object], body: bytes) -> bool:
    names = list(event)
    fields = names[4:-1]
    return (
        names[:4] == ["seq", "time", "action", "outcome"]
        and names[-1] == "prev"
        and fields == sorted(fields)
        and all(_is_field(name) for name in fields)
        and all(value is None or isinstance(value, str | int) for value in event.values())
        and type(event["seq"]) is int
        and all(_matches(pattern, event[name]) for name, pattern in _PATTERNS)
        # The one way to write it: no spaces, no double names, no other escapes.
        and _encode(event).encode("ascii") == body
    )


_PATTERNS: Final = (("time", _TIME), ("action", _WORD), ("outcome", _WORD), ("prev", _HASH))


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _format_time(wall_s: float) -> str:
    """UTC with milliseconds, RFC 3339."""
    second, millisecond = divmod(int(wall_s * 1000), 1000)
    return f"{_format_second(second)}.{millisecond:03d}Z"


# The names and words of the program are few and every second has many events: looked up, each costs a tenth.
@functools.lru_cache(maxsize=2)
def _format_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@functools.lru_cache(maxsize=1024)
def _layout(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Each of *names*, in order, and how it stands in a line. MisuseError for what is no field name."""
    for name in names:
        if not _is_field(name):
            raise MisuseError(f"not a name for an audit field: {name!r}")
    return tuple((name, f'"{name}":') for name in sorted(names))


@functools.lru_cache(maxsize=1024)
def _is_word(word: str) -> bool:
    return _WORD.fullmatch(word) is not None


@functools.lru_cache(maxsize=1024)
def _is_field(name: str) -> bool:
    return name not in _RESERVED and _FIELD.fullmatch(name) is not None
