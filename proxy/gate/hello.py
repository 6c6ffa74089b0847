"""A ClientHello has an end. Replaces how mitmproxy collects it.

mitmproxy keeps what a client sends until the ClientHello is whole, up to the 16 MiB that its length field
allows, and with each piece that comes puts all of it together anew: a few connections that send it in small
records, slowly, would stop everybody else. Here:

1. A ClientHello has at most MAX_HELLO_BYTES, records' headers included. OpenSSL's own limit is 128 KiB, what
   browsers send, post-quantum keys included, 2 KiB.
2. Each byte is looked at once. mitmproxy is given the ClientHello when it is whole, or found to be none.
3. A client for whose server name the addon has no context, and has not failed either, is told so by the
   alert `unrecognized_name` (RFC 6066, 3); mitmproxy just closes.
"""

import logging
import struct
import weakref
from collections.abc import Generator
from typing import Any, Final

from mitmproxy.net.tls import starts_like_tls_record
from mitmproxy.proxy import commands
from mitmproxy.proxy.layers import tls

MAX_HELLO_BYTES: Final = 64 * 1024
UNRECOGNIZED_NAME: Final = b"\x15\x03\x03\x00\x02\x02\x70"
"""An alert in a record of its own: fatal, 112."""
_RECORD_HEAD: Final = 5
_MESSAGE_HEAD: Final = 4

log = logging.getLogger(__name__)

type Answer = Generator[commands.Command, Any, tuple[bool, str | None]]

PINNED: Final[tuple[object, ...]] = (
    tls.ClientTLSLayer,
    tls.handshake_record_contents,
    tls.get_client_hello,
    tls.parse_client_hello,
)


class Hello:
    """How far the ClientHello in a growing buffer has been looked at."""

    __slots__ = ("_at", "_begin", "_message_bytes")

    def __init__(self) -> None:
        self._at = 0  # where the next record begins
        self._message_bytes = 0  # of the whole records
        self._begin = b""  # the message's head: its type and length

    def is_decided(self, buffer: bytes | bytearray) -> bool:
        """True if *buffer*, which has grown since, holds a whole ClientHello, or something else."""
        while len(buffer) >= self._at + _RECORD_HEAD:
            head = buffer[self._at : self._at + _RECORD_HEAD]
            (size,) = struct.unpack("!H", head[3:])
            if not starts_like_tls_record(bytes(head)) or not size:
                return True
            end = self._at + _RECORD_HEAD + size
            if len(buffer) < end:
                return False
            missing = _MESSAGE_HEAD - len(self._begin)
            if missing > 0:
                body = self._at + _RECORD_HEAD
                self._begin += bytes(buffer[body : min(end, body + missing)])
            self._at = end
            self._message_bytes += size
            if len(self._begin) == _MESSAGE_HEAD:
                wanted = int.from_bytes(self._begin[1:]) + _MESSAGE_HEAD
                if self._message_bytes >= wanted:
                    return True
        return False


_hellos: Final[weakref.WeakKeyDictionary[tls.ClientTLSLayer, Hello]] = weakref.WeakKeyDictionary()
_stock_receive: Final = tls.ClientTLSLayer.receive_handshake_data


def receive_handshake_data(self: tls.ClientTLSLayer, data: bytes) -> Answer:
    """Stands in for `ClientTLSLayer.receive_handshake_data`."""
    if self.client_hello_parsed:
        return (yield from _stock_receive(self, data))
    hello = _hellos.get(self)
    if hello is None:
        hello = _hellos[self] = Hello()
    self.recv_buffer.extend(data)
    if hello.is_decided(self.recv_buffer):
        _hellos.pop(self, None)
        return (yield from _told(self, _stock_receive(self, b"")))
    if len(self.recv_buffer) > MAX_HELLO_BYTES:
        return False, f"a ClientHello of more than {MAX_HELLO_BYTES} bytes"
    return False, None


def _told(self: tls.ClientTLSLayer, stock: Answer) -> Answer:
    """Rule 3."""
    reply: Any = None
    has_asked = False
    while True:
        try:
            command = stock.send(reply)
        except StopIteration as stopped:
            answer: tuple[bool, str | None] = stopped.value
            return answer
        has_asked |= isinstance(command, tls.TlsStartClientHook)
        is_refused = has_asked and self.tls is None
        if is_refused and isinstance(command, commands.Log):
            log.info("refused a client: its server name is not one that is served")
            reply = None
            continue
        if is_refused and isinstance(command, commands.CloseConnection) and command.connection is self.conn:
            yield commands.SendData(self.conn, UNRECOGNIZED_NAME)
        reply = yield command
