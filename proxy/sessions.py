"""TLS sessions with services, taken up again: a new connection then costs no certificates and no signature.

1. A session belongs to one place: listener (so tenant and network service), address, server name. Each tenant
   has a store of its own, which goes with its CA (interception.py).
2. A resumed handshake shows no certificate, so what was verified once counts for VERIFIED_S and no longer:
   from the full handshake at the beginning, however often sessions have followed from each other.
3. A session is used once (RFC 8446 C.4): two connections cannot be told to be of one client by it. The
   service sends a new one with each handshake. How many are kept is bounded, by place and altogether.
4. Kept are those of connections whose handshake has succeeded, taken when the connection has ended: services
   send them after the handshake.
"""

from dataclasses import dataclass
from typing import Final

from cachetools import LRUCache
from OpenSSL import SSL

from runtime.clock import Clock

VERIFIED_S: Final = 600.0
"""What a service's certificate is worth after it was last seen: it may have expired or been withdrawn."""
MAX_PLACES: Final = 1024
MAX_SESSIONS: Final = 8
"""Of one place."""

type Place = tuple[str, str, int, str]
"""Listener, host, port, server name."""


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    session: SSL.Session
    verified_at_s: float
    """On the boot clock."""


class Handshake:
    """One connection to a service, from before its handshake to its end."""

    def __init__(self, sessions: "UpstreamSessions", place: Place, verified_at_s: float) -> None:
        self._sessions = sessions
        self._place = place
        self._verified_at_s = verified_at_s
        self._connection: SSL.Connection | None = None

    def succeeded(self, connection: SSL.Connection) -> None:
        self._connection = connection

    def ended(self) -> None:
        """Keep the connection's session, if its handshake had succeeded. The connection must be over."""
        connection, self._connection = self._connection, None
        if connection is None or (session := connection.get_session()) is None:
            return
        # OpenSSL spoils the session of a connection that is freed without a shutdown: an old rule, against
        # truncation of what TLS 1.0 carried. Nothing is read or written any more.
        connection.set_shutdown(SSL.SENT_SHUTDOWN | SSL.RECEIVED_SHUTDOWN)
        self._sessions.keep(self._place, _Kept(session, self._verified_at_s))


class UpstreamSessions:
    """The sessions of one tenant."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kept: LRUCache[Place, list[_Kept]] = LRUCache(maxsize=MAX_PLACES)

    def resume(self, place: Place, connection: SSL.Connection) -> Handshake:
        """Let *connection*, whose handshake is to come, take up a session of *place* if there is one."""
        now_s = self._clock.boot_s()
        kept = self._kept.get(place, [])
        while kept:
            latest = kept.pop()
            if now_s - latest.verified_at_s < VERIFIED_S:
                connection.set_session(latest.session)
                # If the service declines, its certificate is verified now, and this is earlier: that is safe.
                return Handshake(self, place, latest.verified_at_s)
        return Handshake(self, place, now_s)

    def keep(self, place: Place, kept: _Kept) -> None:
        sessions = self._kept.setdefault(place, [])
        sessions.append(kept)
        del sessions[:-MAX_SESSIONS]
