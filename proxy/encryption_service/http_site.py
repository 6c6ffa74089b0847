"""What all connections of one listener of the encryption service share: dialects, limits, heads, the time.

The sweeper looks at them all: it sets the time, and tells every connection that has waited too long.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from http import HTTPStatus
from typing import Final, Protocol

from proxy.encryption_service.call import Answer, Peer
from proxy.encryption_service.dialects.dialect import Dialect
from proxy.encryption_service.http_messages import answer_head
from proxy.encryption_service.kept_bodies import KeptBodies
from proxy.encryption_service.metrics import ServiceMetrics
from proxy.encryption_service.settings import HttpLimits

MAX_PREFIXES: Final = 64
"""Heads of answers kept for a second; most answers are alike but for their length."""
_PROBLEM: Final = "application/problem+json"

type _Prefix = tuple[int, str, tuple[tuple[str, str], ...], bool]


class Waiting(Enum):
    """What a connection waits for, and by that how long."""

    HEAD = auto()
    BODY = auto()
    ANSWER = auto()
    NEXT = auto()
    WRITE = auto()
    LINGER = auto()


class Connection(Protocol):
    """What its site needs of an `http_connection.HttpConnection`."""

    deadline_s: float
    """The sweeper's time at which its present wait is over."""

    def is_too_slow(self, now_s: float) -> bool:
        """Whether the body under way comes slower than any honest one."""

    def expired(self) -> None:
        """The wait is over."""

    def stop(self) -> None:
        """Close if nothing is under way; else the answer under way is the last."""

    def abort(self) -> None:
        """Cut: what was begun has no proper end."""


@dataclass(slots=True, kw_only=True)
class Site:
    """What all connections of one listener share. `now_s` and `date` are the sweeper's, of its last look."""

    dialects: tuple[Dialect, ...]
    scheme: str
    limits: HttpLimits
    metrics: ServiceMetrics
    identify: Callable[[asyncio.BaseTransport, str], Peer | None]
    """The peer behind a new transport and its address; None: close without a word."""
    now_s: float = 0.0
    date: str = ""
    stopping: bool = False
    kept: KeptBodies = field(default_factory=KeptBodies)
    connections: set[Connection] = field(default_factory=set)
    longest_s: Mapping[Waiting, float] = field(init=False)
    _prefixes: dict[_Prefix, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = self.limits
        self.longest_s = {
            Waiting.HEAD: limits.head_s,
            Waiting.BODY: limits.body_idle_s,
            Waiting.ANSWER: 2 * limits.answer_s,  # the call's own end comes first
            Waiting.NEXT: limits.keep_alive_s,
            Waiting.WRITE: limits.write_s,
            Waiting.LINGER: limits.linger_s,
        }

    def dialect_of(self, path: str) -> Dialect | None:
        """Who claims *path*. Of an unclaimed one the listener's only dialect may speak."""
        for dialect in self.dialects:
            if dialect.claims(path):
                return dialect
        return self.dialects[0] if len(self.dialects) == 1 else None

    def head_of(self, answer: Answer, *, length: int, close: bool) -> bytes:
        """The head of *answer*, whose body has *length* bytes; what repeats is made once a second."""
        key = (answer.status, answer.content_type, answer.headers, close)
        prefix = self._prefixes.get(key)
        if prefix is None:
            prefix = answer_head(
                answer.status, answer.content_type, None, answer.headers, close=close, date=self.date
            )
            prefix = prefix.replace(b"Transfer-Encoding: chunked\r\n", b"", 1).removesuffix(b"\r\n")
            if len(self._prefixes) < MAX_PREFIXES:
                self._prefixes[key] = prefix
        if answer.status == HTTPStatus.NO_CONTENT:  # which must not have a length
            return prefix + b"\r\n"
        return b"%bContent-Length: %d\r\n\r\n" % (prefix, length)

    def tick(self, now_s: float, date: str) -> None:
        """A look of the sweeper: every connection that has waited too long hears of it."""
        self.now_s = now_s
        if date != self.date:
            self.date = date
            self._prefixes.clear()
        for connection in list(self.connections):
            if now_s >= connection.deadline_s or connection.is_too_slow(now_s):
                connection.expired()


def problem_answer(status: HTTPStatus, code: str, detail: str) -> Answer:
    """RFC 9457 on one line, for what no dialect speaks for."""
    document = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "code": code,
        "detail": detail,
        "next_step": "See the documentation of the encryption service's dialects.",
    }
    return Answer(
        status=status.value,
        body=json.dumps(document).encode() + b"\n",
        content_type=_PROBLEM,
        headers=(("Cache-Control", "no-store"),),
    )
