"""What the parts of one client connection and its handler want of each other.

mitmproxy hands its layers no way to the handler that carries their commands out. The gate's layers find it
here by the id of the client connection: they hold and cut sockets through it, and tell it what it cannot see.
"""

import weakref
from dataclasses import dataclass, field
from typing import Final, Protocol

from mitmproxy.connection import Connection
from mitmproxy.http import HTTPFlow
from mitmproxy.proxy import commands

from proxy.gate.permit import Transform
from proxy.refusals import Refusal


class Kept(Protocol):
    """What the handler of a client connection needs of each of its streams (`stream.GuardedStream`)."""

    @property
    def is_under_way(self) -> bool:
        """It is being answered. A CONNECT that became a tunnel is not: what is inside of it is asked."""

    @property
    def waits_for_service(self) -> bool:
        """The whole request has left, nothing of an answer has come, and nobody has given up."""

    def give_up(self) -> None:
        """The service is being left, for it does not answer: its connection's end is told as that."""

    def abandon(self, refusal: Refusal) -> None:
        """Every socket of this client is being aborted: let nothing out any more, and say so."""


class Keeper(Protocol):
    """What a stream needs of the handler of its client connection (`handler.GuardedConnectionHandler`)."""

    def adopt(self, stream: Kept) -> None:
        """Tell *stream* to `abandon` when every socket of this client is aborted."""

    def head_begins(self) -> None:
        """A part of a request head has come, and not the whole of it."""

    def hold(self, connection: Connection) -> None:
        """Read no more from *connection* until it was released as often as held."""

    def release(self, connection: Connection) -> None: ...

    def begin(self, hook: commands.StartHook) -> bool:
        """Start *hook* at once; True: it is over already, else it is to be yielded as ever."""

    def cut_on_close(self, connection: Connection) -> None:
        """When *connection* is closed, reset it: its peer must not take the end for a proper one."""

    def has_finished(self, connection: Connection) -> bool:
        """At the close of *connection*: True if its peer sent a FIN, and all before it was read."""

    def report(self, flow: HTTPFlow, refusal: Refusal, *, bytes_sent: bool) -> None:
        """Tell the application; what it raises means that nothing was recorded."""


@dataclass
class SettleHook(commands.StartHook):  # type: ignore[no-untyped-call]
    """Not for addons: the handler awaits `settle` of a pending transform, as if it were a hook."""

    transform: Transform
    failure: BaseException | None = field(default=None, init=False)


_keepers: Final[weakref.WeakValueDictionary[str, Keeper]] = weakref.WeakValueDictionary()


def keep(client_id: str, keeper: Keeper) -> None:
    """Streams of this client connection belong to *keeper* from now on. Held weakly."""
    _keepers[client_id] = keeper


def keeper_of(client_id: str) -> Keeper | None:
    return _keepers.get(client_id)
