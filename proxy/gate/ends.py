"""Whether a peer ended its connection, or something cut it.

An HTTP/1 body without a length or chunks ends with its connection, so that whoever can cut that decides where
the body ends: mitmproxy passes a reset, or anybody's FIN, on as a proper end. Here:

1. Over TLS the peer has ended it if close_notify was received: that alone is authenticated (RFC 8446, 6.1;
   RFC 9112, 9.8). What the transport does before or after says nothing.
2. OpenSSL sets RECEIVED_SHUTDOWN for a fatal alert as well. It is no end, and mitmproxy, which takes it for a
   close_notify that it has dealt with, tells nobody of the close after it: the flow would hang.
3. Without TLS (a side-car on this machine) the peer has ended it by a FIN, after all of its bytes were read.
4. What cannot be proven is a cut.
"""

from collections.abc import Generator
from typing import Any

from mitmproxy.connection import Connection
from mitmproxy.proxy import commands, context, events
from mitmproxy.proxy.layers import tls
from OpenSSL import SSL

from proxy.gate.keeper import keeper_of

type Commands = Generator[commands.Command, Any, None]


def is_ended_by_peer(below: context.Context, connection: Connection) -> bool:
    """Ask it at the `ConnectionClosed` of *connection*, for a layer above it whose context is *below*."""
    if connection.tls:
        # The innermost: that is the one with the origin, not the one with a parent proxy.
        layers = (x for x in reversed(below.layers) if isinstance(x, tls.TLSLayer) and x.conn == connection)
        layer = next(layers, None)
        return layer is not None and _is_notified(layer)
    keeper = keeper_of(below.client.id)
    return keeper is not None and keeper.has_finished(connection)


def receive_close(self: tls.TLSLayer) -> Commands:
    """Stands in for `mitmproxy.proxy.layers.tls.TLSLayer.receive_close`: the transport has closed."""
    if not _is_notified(self):  # else the child was told when close_notify came
        yield from self.event_to_child(events.ConnectionClosed(self.conn))


def _is_notified(layer: tls.TLSLayer) -> bool:
    return bool(layer.tls.get_shutdown() & SSL.RECEIVED_SHUTDOWN) and layer.tls.get_state_string() != b"error"
