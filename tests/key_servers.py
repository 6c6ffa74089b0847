"""Real key servers for tests: OpenBao's `bao` over TLS with storage on disk, and PyKMIP's server.

Each has the hand of its owner: what an administrator does there, past the agent.
"""

import contextlib
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, override

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from kmip.core import enums
from kmip.core.factories.attributes import AttributeFactory

from certs import pki
from certs.pki import Credential
from key_agent.sources.key_server import KmipSettings, OpenBaoSettings
from key_agent.sources.servers.kmip import Kmip
from tests.pki import VALID_FROM, VALIDITY
from tests.ports import free_port

START_S = 60.0
BAO = Path(sys.executable).with_name("bao")
PYKMIP_SERVER = Path(sys.executable).with_name("pykmip-server")


def _write(path: Path, data: bytes) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(data)
    return path


def _until(what: str, holds: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            if holds():
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come up: {log.read_text(errors='replace')[-2000:]}")


class _Server:
    """A process that can be stopped, killed and frozen."""

    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        # Its threads stop one by one: some would answer still.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


class BaoServer(_Server):
    """`bao server` with storage on disk, initialised, unsealed, a transit engine, and our agent's token."""

    POLICY = """
path "transit/encrypt/sealgate-*" { capabilities = ["update"] }
path "transit/decrypt/sealgate-*" { capabilities = ["update"] }
path "transit/keys/sealgate-*"    { capabilities = ["create", "update", "read", "delete"] }
path "transit/random/*"           { capabilities = ["update"] }
"""
    USE_ONLY = """
path "transit/encrypt/sealgate-*" { capabilities = ["update"] }
path "transit/decrypt/sealgate-*" { capabilities = ["update"] }
path "transit/keys/sealgate-*"    { capabilities = ["read"] }
"""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        (directory / "storage").mkdir()
        self.directory = directory
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        ca = pki.make_server_ca("bao", valid_from=VALID_FROM, validity=VALIDITY)
        server = pki.issue_server(ca, ["127.0.0.1"], valid_from=VALID_FROM, validity=VALIDITY)
        self.ca_file = _write(directory / "ca.pem", pki.certificate_pem(ca.certificate))
        certificate = _write(directory / "server.pem", pki.certificate_pem(server.certificate))
        key = _write(directory / "server.key", pki.key_pem(server.key))
        self._context = ssl.create_default_context(cafile=str(self.ca_file))
        (directory / "bao.hcl").write_text(
            f'storage "raft" {{\n  path = "{directory}/storage"\n  node_id = "one"\n'
            "  performance_multiplier = 1\n}\n"
            f'cluster_addr = "https://127.0.0.1:{free_port()}"\n'
            f'listener "tcp" {{\n  address = "127.0.0.1:{self.port}"\n'
            f'  tls_cert_file = "{certificate}"\n  tls_key_file = "{key}"\n}}\n'
            f'api_addr = "{self.url}"\n'
        )
        self._root, self._unseal_key = "", ""
        self.start()
        made = self.ask("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        self._root, self._unseal_key = made["root_token"], made["keys_base64"][0]
        self.unseal()
        self.ask("POST", "sys/mounts/transit", {"type": "transit"})
        self.ask("PUT", "sys/policies/acl/agent", {"policy": self.POLICY})
        self.ask("PUT", "sys/policies/acl/use-only", {"policy": self.USE_ONLY})
        self.token_file = directory / "token"
        self.new_token("agent")

    def start(self) -> None:
        log = self.directory / "log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [BAO, "server", f"-config={self.directory}/bao.hcl"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"HOME": str(self.directory), "PATH": os.environ["PATH"]},
            )
        _until("bao", lambda: self.call("GET", "sys/health")[0] in (200, 429, 501, 503), self.process, log)

    def unseal(self) -> None:
        self.ask("PUT", "sys/unseal", {"key": self._unseal_key})
        _until(
            "unsealed bao",
            lambda: self.call("GET", "sys/health")[0] == 200,
            self.process,
            self.directory / "log",
        )

    def new_token(self, policy: str, **options: Any) -> str:
        made = self.ask("POST", "auth/token/create", {"policies": [policy], "ttl": "1h"} | options)
        token: str = made["auth"]["client_token"]
        _write(self.token_file, token.encode() + b"\n")
        return token

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """As root; AssertionError unless it is done."""
        status, answer = self.call(method, path, body)
        assert status in (200, 204), (method, path, status, answer)
        return answer

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=10, context=self._context)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, f"/v1/{path}", content, {"X-Vault-Token": self._root})
            answer = connection.getresponse()
            data = answer.read()
            return answer.status, json.loads(data) if data else None
        finally:
            connection.close()

    # The owner's hand.

    def destroy(self, name: str) -> None:
        self.ask("POST", f"transit/keys/{name}/config", {"deletion_allowed": True})
        self.ask("DELETE", f"transit/keys/{name}")

    def disable(self, name: str) -> None:
        self.ask("DELETE", f"transit/keys/{name}/soft-delete")

    def make(self, name: str) -> None:
        self.ask("POST", f"transit/keys/{name}", {"type": "aes256-gcm96"})

    def replace(self, name: str) -> None:
        self.destroy(name)
        self.make(name)

    def clear(self) -> None:
        """No KEK of an earlier test; the canary key stays."""
        for name in self.names():
            if name != "sealgate-canary":
                status, _ = self.call("GET", f"transit/keys/{name}")
                assert status == 200
                self.call("POST", f"transit/keys/{name}/soft-delete-restore", {})
                self.destroy(name)

    def names(self) -> list[str]:
        status, answer = self.call("LIST", "transit/keys")
        return list(answer["data"]["keys"]) if status == 200 else []

    def throttle(self, *, rate: float | None, interval_s: int = 1) -> None:
        """So many requests about keys in so many seconds, from each address; None: as many as come."""
        self.ask("POST", "sys/quotas/config", {"enable_rate_limit_response_headers": True})
        if rate is None:
            self.call("DELETE", "sys/quotas/rate-limit/keys")
            return
        limit = {"path": "transit", "rate": rate, "interval": f"{interval_s}s"}
        self.ask("POST", "sys/quotas/rate-limit/keys", limit)

    def settings(self, **changes: Any) -> OpenBaoSettings:
        made = OpenBaoSettings(url=self.url, token_file=self.token_file, ca_file=self.ca_file)
        return msgspec.structs.replace(made, **changes)

    def outdate(self, name: str) -> None:
        """Rotate, and disallow what was before."""
        self.ask("POST", f"transit/keys/{name}/rotate", {})
        told = self.ask("GET", f"transit/keys/{name}")
        latest = {"min_decryption_version": told["data"]["latest_version"]}
        self.ask("POST", f"transit/keys/{name}/config", latest)


class KmipServer(_Server):
    """`pykmip-server`, its CA, the agent's client certificate and that of another user."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self.directory = directory
        self.port = free_port()
        self._ca = pki.make_server_ca("kmip", valid_from=VALID_FROM, validity=VALIDITY)
        server = pki.issue_server(self._ca, ["127.0.0.1"], valid_from=VALID_FROM, validity=VALIDITY)
        self.ca_file = _write(directory / "ca.pem", pki.certificate_pem(self._ca.certificate))
        certificate = _write(directory / "server.pem", pki.certificate_pem(server.certificate))
        key = _write(directory / "server.key", pki.key_pem(server.key))
        self.certificate_file, self.key_file = self.user("hq")
        (directory / "policy").mkdir()
        (directory / "kmip.conf").write_text(
            "[server]\n"
            f"hostname=127.0.0.1\nport={self.port}\ncertificate_path={certificate}\nkey_path={key}\n"
            f"ca_path={self.ca_file}\nauth_suite=TLS1.2\npolicy_path={directory}/policy\n"
            f"enable_tls_client_auth=True\ndatabase_path={directory}/database\n"
        )
        self.start()

    def user(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = pki.certify(
            key.public_key(),
            subject=pki.name(name),
            issuer=self._ca,
            valid_from=VALID_FROM,
            validity=VALIDITY,
            extensions=[(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)],
        )
        made = Credential(key, certificate)
        return (
            _write(self.directory / f"{name}.pem", pki.certificate_pem(made.certificate)),
            _write(self.directory / f"{name}.key", pki.key_pem(made.key)),
        )

    def start(self) -> None:
        log = self.directory / "log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [PYKMIP_SERVER, "-f", self.directory / "kmip.conf", "-l", self.directory / "server.log"],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _until(
            "pykmip-server", lambda: self._run(lambda client: client.locate()) is not None, self.process, log
        )

    @override
    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was killed before
            os.killpg(self.process.pid, signal.SIGKILL)  # its policies are watched by processes of their own
        self.process.wait()

    def _run(self, work: Callable[[Any], Any]) -> Any:
        return self._admin(lambda admin: work(admin._connected()))

    def _admin(self, work: Callable[[Kmip], Any]) -> Any:
        admin = Kmip(
            "127.0.0.1",
            self.port,
            canary_name="none",
            ca_file=self.ca_file,
            certificate_file=self.certificate_file,
            key_file=self.key_file,
            timeout_s=10,
        )
        try:
            return work(admin)
        finally:
            admin.close()

    # The owner's hand.

    def destroy(self, name: str) -> None:
        def work(client: Any) -> None:
            for uid in self.uids(client, name):
                client.revoke(enums.RevocationReasonCode.KEY_COMPROMISE, uid)
                client.destroy(uid)

        self._run(work)

    def disable(self, name: str) -> None:
        self._run(
            lambda client: [
                client.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, uid)
                for uid in self.uids(client, name)
            ]
        )

    def replace(self, name: str) -> None:
        self._destroy_all([name, f"{name}-mac"])
        self._admin(lambda admin: admin.create(name))

    def clear(self) -> None:
        """No KEK of an earlier test; the canary key stays."""
        self._destroy_all([f"sealgate-kek-{b'sealgate-kek'.hex()}0000000{n}" for n in (1, 2)])
        self._destroy_all([f"sealgate-kek-{b'sealgate-kek'.hex()}0000000{n}-mac" for n in (1, 2)])

    def _destroy_all(self, names: list[str]) -> None:
        def work(client: Any) -> None:
            for name in names:
                for uid in self.uids(client, name):
                    with contextlib.suppress(Exception):  # not active any more
                        client.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, uid)
                    client.destroy(uid)

        self._run(work)

    def settings(self, **changes: Any) -> KmipSettings:
        made = KmipSettings(
            host="127.0.0.1",
            port=self.port,
            ca_file=self.ca_file,
            certificate_file=self.certificate_file,
            key_file=self.key_file,
        )
        return msgspec.structs.replace(made, **changes)

    def uids(self, client: Any, name: str) -> list[str]:
        attribute = AttributeFactory().create_attribute(enums.AttributeType.NAME, name)
        return list(client.locate(attributes=[attribute]))


@contextlib.contextmanager
def running[T: (BaoServer, KmipServer)](server: T) -> Iterator[T]:
    try:
        yield server
    finally:
        server.thaw()
        server.kill()
