"""A refused upload of 1 GB, by a client that does not stop by itself, costs less than 100 MiB in all."""

import contextlib
import select
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[3]
UPLOAD_BYTES: Final = 1_000_000_000
LIMIT_MIB: Final = 100
PATIENCE_S: Final = 60
PIECE: Final = b"0123456789abcdef" * 16_384


def _upload(connection: ssl.SSLSocket, *, expect: bool) -> tuple[bytes, int]:
    """Send all of it, or until the proxy cuts. Returns what came back and how much was sent.

    One thread, not blocking: an SSL object is not for two threads.
    """
    head = f"PUT /object HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {UPLOAD_BYTES}\r\n"
    piece = head.encode() + (b"Expect: 100-continue\r\n\r\n" if expect else b"\r\n")
    answer, sent, ends_s = bytearray(), 0, time.monotonic() + PATIENCE_S
    connection.setblocking(False)
    with contextlib.suppress(OSError):  # SSLError is one
        while time.monotonic() < ends_s:
            is_stuck = True
            with contextlib.suppress(ssl.SSLWantReadError):
                if not (data := connection.recv(65_536)):
                    break
                answer += data
                is_stuck = False
            if sent < UPLOAD_BYTES:
                with contextlib.suppress(ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    sent += connection.send(piece)
                    piece = PIECE
                    is_stuck = False
            if is_stuck:
                select.select([connection], [connection] if sent < UPLOAD_BYTES else [], [], 1)
    return bytes(answer), sent


@pytest.mark.parametrize("expect", [False, True], ids=["plain", "expect"])
@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ("refused", b"no-active-key"),
        ("refused-late", b"no-active-key"),
        ("forgotten", b"no-permit"),
        ("fails-in-mid-body", b"key-expired"),
    ],
)
def test_a_refused_upload_costs_no_memory(tmp_path: Path, policy: str, code: bytes, expect: bool) -> None:
    command = [sys.executable, "-m", "tests.proxy.gate.refusing_proxy", str(tmp_path), policy]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        port = int(child.stdout.readline())
        context = ssl.create_default_context(cafile=tmp_path / "confdir" / "mitmproxy-ca-cert.pem")
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            answer, sent = _upload(connection, expect=expect)
        child.stdin.close()
        peak_mib = float(child.stdout.readline())
    assert b"Sealgate-Error: " + code in answer
    assert sent > 50_000_000
    assert peak_mib < LIMIT_MIB, f"{peak_mib} MiB after {sent / 1e6:.0f} MB"
    if expect and policy != "fails-in-mid-body":
        assert b"100 Continue" not in answer
