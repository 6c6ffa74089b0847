"""A real nats-server with JetStream and mutual TLS, for tests; it can be killed and started again.

with NatsServer(tmp_path) as broker:
    broker.settings("agent")         # BrokerSettings of a client with that name
    broker.kill(); broker.start()
"""

import shutil
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime.broker import BrokerSettings
from tests.pki import issue_server, make_server_ca, make_tenant, write_certificate, write_credential
from tests.ports import free_port

START_S = 60.0


def find_server() -> str:
    """Missing is a failure, never a skip: these tests are the point."""
    found = shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin:/usr/local/bin")
    if found is None:
        raise FileNotFoundError("nats-server is not installed: apt-get install nats-server")
    return found


class NatsServer:
    def __init__(self, directory: Path) -> None:
        self.directory = directory / "nats"
        self.directory.mkdir()
        self.store = self.directory / "store"
        self.port = free_port()
        authority = make_server_ca("broker")
        self._ca_file = write_certificate(authority.certificate, self.directory / "ca.pem")
        # Who may connect: certificates below a root of the broker's own.
        self._clients = make_tenant("broker")
        self._roots_file = roots = write_certificate(
            self._clients.root.certificate, self.directory / "clients.pem"
        )
        self._server_files = write_credential(issue_server(authority), self.directory, "server")
        certificate, key = self._server_files
        self._configuration = self.directory / "nats.conf"
        self._configuration.write_text(
            f"host: 127.0.0.1\nport: {self.port}\n"
            f'jetstream {{ store_dir: "{self.store}" }}\n'
            f'tls {{ cert_file: "{certificate}", key_file: "{key}", ca_file: "{roots}", verify: true }}\n'
        )
        self._process: subprocess.Popen[bytes] | None = None

    def settings(self, name: str, **changes: Any) -> BrokerSettings:
        """For a client with a certificate of its own; *changes* replace fields."""
        files = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        if not files[0].exists():
            write_credential(self._clients.agent_tls(name), self.directory, name)
        fields: dict[str, Any] = {
            "urls": [f"tls://localhost:{self.port}"],
            "ca_file": self._ca_file,
            "certificate_file": files[0],
            "key_file": files[1],
        }
        return BrokerSettings(**(fields | changes))

    def server_context(self) -> ssl.SSLContext:
        """For who takes the server's place: its certificate, and only those let in that it lets in."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self._roots_file))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(*self._server_files)
        return context

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [find_server(), "-c", str(self._configuration)], stdout=log, stderr=log
            )
        deadline_s = time.monotonic() + START_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError((self.directory / "log").read_text())
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
