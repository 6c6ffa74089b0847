"""A KMIP server that lies about its answers: behind a certificate that is in order."""

import contextlib
import socket
import ssl
import threading
from pathlib import Path

import pytest

from key_agent.sources.servers.kmip import ANSWER_LIMIT, Kmip
from key_agent.sources.servers.server import ServerUnavailableError
from tests import pki

FLOOD_BYTES = 64 * ANSWER_LIMIT
BUFFERS_BYTES = 16 * ANSWER_LIMIT
"""More than the kernel keeps for both ends of a connection over loopback."""


class _Flood:
    """Answers the first request by a header that announces 4 GiB, and as much of that as is taken."""

    def __init__(self, directory: Path) -> None:
        ca = pki.make_server_ca()
        server = pki.issue_server(ca)
        self.ca_file = pki.write_certificate(ca.certificate, directory / "ca.pem")
        self.client = pki.write_credential(pki.make_tenant().agent_tls(), directory, "client")
        certificate, key = pki.write_credential(server, directory, "server")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.sent = 0
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        with self._listener, contextlib.suppress(OSError):
            plain, _ = self._listener.accept()
            with self._context.wrap_socket(plain, server_side=True) as connection:
                connection.recv(65536)
                connection.sendall(bytes.fromhex("42007b01ffffffff"))
                while self.sent < FLOOD_BYTES:
                    connection.sendall(bytes(65536))
                    self.sent += 65536


def test_an_answer_without_end_is_not_read(tmp_path: Path) -> None:
    flood = _Flood(tmp_path)
    certificate, key = flood.client
    server = Kmip(
        "localhost",
        flood.port,
        canary_name="canary",
        ca_file=flood.ca_file,
        certificate_file=certificate,
        key_file=key,
        timeout_s=10.0,
    )
    with contextlib.closing(server), pytest.raises(ServerUnavailableError, match="no answer"):
        server.find("key")
    flood.thread.join(30)
    assert not flood.thread.is_alive()
    assert flood.sent < BUFFERS_BYTES
