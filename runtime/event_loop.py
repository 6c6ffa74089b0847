"""The event loop of every program: uvloop's, with one hole closed.

1. A socket that is given to `create_connection` (`sock=`: aiohttp does so for every connection, asyncpg for
   TLS) belongs to the loop from the moment that uvloop takes its descriptor, and to nobody else.
   uvloop 0.23 lets the caller's object keep the descriptor too, and detaches it only where it closes the
   transport *after* having remembered the object. A peer that resets the connection before that is closed
   twice: by the loop at once, and when the forgotten object is collected. By then the number is another
   connection's: that one ends without a cause, and what is written to it goes to whoever has the number next.
"""

import socket
from typing import Any, override

import uvloop


class _Handover:
    """Stands for a connected socket until uvloop asks for its descriptor, which then leaves the socket."""

    def __init__(self, held: socket.socket) -> None:
        self._held = held
        self.family = held.family
        self.type = held.type

    def setblocking(self, flag: bool, /) -> None:
        self._held.setblocking(flag)

    def fileno(self) -> int:
        return self._held.detach()

    def detach(self) -> int:
        """What was not taken stays with the caller."""
        return -1

    def close(self) -> None:
        """uvloop calls it after it has closed the descriptor itself."""


class EventLoop(uvloop.Loop):
    """uvloop's loop; of a *sock* that it was given nothing is left to close twice."""

    # All else is passed through as it is: the signatures are uvloop's.
    @override
    async def create_connection(self, *args: Any, sock: Any = None, **options: Any) -> Any:
        """(transport, protocol). *sock* is detached when the loop takes it, even if this raises later."""
        return await super().create_connection(*args, sock=_handed_over(sock), **options)

    @override
    async def create_unix_connection(self, *args: Any, sock: Any = None, **options: Any) -> Any:
        """As `create_connection`, which uvloop has call this for a *sock* of that family."""
        return await super().create_unix_connection(*args, sock=_handed_over(sock), **options)


def _handed_over(given: socket.socket | _Handover | None) -> Any:
    return _Handover(given) if isinstance(given, socket.socket) else given
