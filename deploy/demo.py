"""The main job on real parts: `make demo` (`make demo KEEP=1` leaves it running).

Two enterprises, acme and globex, each with an HSM token (SoftHSM2), a KEK and a key agent; one proxy; one third-party
storage server (WsgiDAV) that only ever sees ciphertext; curl as the client; pkcs11-tool (OpenSC) as the hand of the
HSM's administrator, who knows nothing of Sealgate.

1. Each step is verified on the real thing: the client's answer, the store's files, the HSM's objects.
2. What is printed behind `$` is what is run, so that it can be typed by hand.
3. Exit status 0 only if every step was verified. Everything lives in one directory and ends with the demo.
"""

import argparse
import hashlib
import json
import os
import secrets
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, override

import certifi

from deploy.stage import BIN, DemoError, Programs, Stage, free_ports, is_listening, play, softhsm_module
from envelope.audit import BrokenChainError, verify

WINDOW_BYTES: Final = 16
"""No run of this many plaintext bytes may lie in the store."""
KILL_SWITCH_LIMIT_S: Final = 6.0
"""design.md, promise 3: a revoked KEK is detected within 5 s, and each reachable proxy refuses within 1 s of that."""


def windows(data: bytes) -> set[bytes]:
    return {data[i : i + WINDOW_BYTES] for i in range(len(data) - WINDOW_BYTES + 1)}


@dataclass(kw_only=True)
class Answer:
    """What curl saw."""

    exit_status: int
    http_status: int
    headers: dict[str, str]
    body: bytes

    @property
    def refusal(self) -> str:
        """Sealgate's code, or empty."""
        return self.headers.get("sealgate-error", "")

    @override
    def __str__(self) -> str:
        return f"curl exit {self.exit_status}, HTTP {self.http_status} {self.refusal}".rstrip()


@dataclass(kw_only=True)
class Enterprise:
    """A tenant, with what stands on its premises."""

    name: str
    service: str
    home: Path
    forward_port: int
    reverse_port: int
    admin_port: int

    @property
    def config(self) -> Path:
        return self.home / "key-agent.toml"

    @property
    def interception_ca(self) -> Path:
        return self.home / "interception-ca.pem"


class Demo(Programs):
    def __init__(self, stage: Stage, home: Path) -> None:
        proxy_config = home / "proxy" / "sealgate.toml"
        super().__init__(
            stage,
            home,
            {"SOFTHSM2_CONF": str(home / "softhsm2.conf"), "SEALGATE_CONFIG": str(proxy_config)},
        )
        self.store = home / "cloud" / "store"
        self.saas_port, self.push_port, self.health_port, *ports = free_ports(9)
        self.acme, self.globex = (
            Enterprise(
                name=name,
                service="drive",
                home=home / name,
                forward_port=ports.pop(),
                reverse_port=ports.pop(),
                admin_port=ports.pop(),
            )
            for name in ("acme", "globex")
        )
        self.proxy_config = proxy_config
        self.server_ca = home / "operator" / "ca.pem"
        self.module = softhsm_module()

    def curl(self, *words: object, show: bool = True) -> Answer:
        """Run curl with *words*; read status and headers of the last answer."""
        if show:
            self.stage.command(["curl", *words])
        head, body = self.home / "curl.head", self.home / "curl.body"
        head.unlink(missing_ok=True)
        body.unlink(missing_ok=True)
        # -q: no configuration of this machine's user. --noproxy '': localhost is to go through the proxy too.
        result = self.attempt(
            "curl", "-q", "-sS", "--noproxy", "", "--max-time", "30", "-D", head, "-o", body,
            "--suppress-connect-headers", "-w", "%{http_code}", *words,
        )  # fmt: skip
        blocks = head.read_text(errors="replace").replace("\r\n", "\n").split("\n\n") if head.exists() else []
        last = next((block for block in reversed(blocks) if block.strip()), "")
        fields = (line.split(":", 1) for line in last.splitlines()[1:] if ":" in line)
        return Answer(
            exit_status=result.returncode,
            http_status=int(result.stdout or b"0"),
            headers={name.strip().lower(): value.strip() for name, value in fields},
            body=body.read_bytes() if body.exists() else b"",
        )

    def through(self, enterprise: Enterprise) -> tuple[object, ...]:
        """curl's options for a user of *enterprise* behind the forward proxy."""
        return (
            "--proxy", f"http://127.0.0.1:{enterprise.forward_port}", "--cacert", enterprise.interception_ca,
        )  # fmt: skip

    @property
    def cloud(self) -> str:
        return f"https://localhost:{self.saas_port}"

    # The acts.

    def build_hsm(self) -> None:
        self.stage.act(
            "1. Two enterprises, each with a token in its HSM (SoftHSM2 here) and a root certificate"
        )
        tokens = self.home / "hsm-tokens"
        tokens.mkdir(mode=0o700)
        (self.home / "softhsm2.conf").write_text(
            f"directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\n"
        )
        for enterprise in (self.acme, self.globex):
            enterprise.home.mkdir(mode=0o700)
            self.make_token(enterprise.name, enterprise.home / "pin")
            root = enterprise.home / "root"
            pki = (BIN / "python", "-m", "certs.pki")
            self.run(*pki, "root", "--tenant", enterprise.name, "--out", root)
            self.run(*pki, "agent", "--root", root, "--agent", "hq", "--out", enterprise.home)
            shutil.copy(root / "root.pem", enterprise.home)
        pins = [enterprise.home / "pin" for enterprise in (self.acme, self.globex)]
        self.stage.verify(
            "each token's PIN lies in a file of mode 0600 and in no command line",
            all(pin.stat().st_mode & 0o777 == 0o600 and pin.read_text() not in self.typed for pin in pins),
        )

    def build_cloud(self) -> None:
        self.stage.act(
            "2. The cloud service: WsgiDAV, a third-party WebDAV server, over TLS. It knows nothing of Sealgate"
        )
        operator = self.home / "operator"
        pki = (BIN / "python", "-m", "certs.pki")
        self.run(*pki, "server-ca", "--name", "demo operator", "--out", operator)
        self.run(
            *pki, "server", "--ca", operator, "--name", "localhost", "--name", "127.0.0.1", "--out", operator
        )
        self.store.mkdir(parents=True)
        config = self.home / "cloud" / "wsgidav.json"
        config.write_text(
            json.dumps(
                {
                    "host": "127.0.0.1",
                    "port": self.saas_port,
                    "server": "cheroot",
                    "ssl_certificate": str(operator / "server.pem"),
                    "ssl_private_key": str(operator / "server.key"),
                    "provider_mapping": {"/": str(self.store)},
                    "simple_dc": {"user_mapping": {"*": True}},
                    "verbose": 1,
                }
            )
        )
        self.start("cloud", BIN / "wsgidav", "--config", config)
        self.wait_for("the cloud service", lambda: is_listening(self.saas_port))
        direct = self.curl("--cacert", self.server_ca, f"{self.cloud}/")
        self.stage.verify("the cloud service answers directly", direct.http_status == 200, seen=direct)

    def build_proxy(self) -> None:
        self.stage.act("3. The proxy: one instance, two tenants, each with a forward and a reverse listener")
        proxy = self.home / "proxy"
        proxy.mkdir(mode=0o700)
        operator = self.home / "operator"
        # Both the demo's own CA and the usual ones: what a proxy of a real service has is the latter.
        trust = proxy / "upstream-roots.pem"
        trust.write_text(self.server_ca.read_text() + Path(certifi.where()).read_text())
        self.proxy_config.write_text(
            f"""\
[proxy]
id = "proxy-1"
state_dir = "{proxy}/state"

[push]
host = "127.0.0.1"
port = {self.push_port}
certificate_file = "{operator}/server.pem"
key_file = "{operator}/server.key"

[engine]
upstream_ca_file = "{trust}"

[health]
port = {self.health_port}
"""
        )
        self.stage.say(f"{self.proxy_config}:\n{self.proxy_config.read_text()}")
        sealgate = BIN / "sealgate"
        for enterprise in (self.acme, self.globex):
            service = f"{enterprise.name}/{enterprise.service}"
            csr, certificate = enterprise.home / "drive.csr", enterprise.home / "drive.pem"
            self.run(
                sealgate, "tenant", "add", enterprise.name, "--root", enterprise.home / "root" / "root.pem",
                "--forward-listen", f"127.0.0.1:{enterprise.forward_port}",
            )  # fmt: skip
            self.run(
                sealgate, "service", "add", service, "--upstream", self.cloud, "--csr", csr,
                "--reverse-listen", f"127.0.0.1:{enterprise.reverse_port}",
            )  # fmt: skip
            self.stage.say(f"{enterprise.name} signs the proxy's request; the private key never travels:")
            self.run(
                BIN / "python", "-m", "certs.pki", "sign-service", "--root", enterprise.home / "root",
                "--csr", csr, "--out", certificate,
            )  # fmt: skip
            self.run(sealgate, "service", "import-cert", service, certificate)
            ca = self.run(sealgate, "tenant", "ca", enterprise.name).stdout
            enterprise.interception_ca.write_bytes(ca)
        self.start("proxy", sealgate, "run")
        self.wait_for("the proxy's listeners", lambda: all(map(is_listening, self._proxy_ports())))
        before = self.put(self.acme, "/too-early.txt", self.acme_file)
        self.stage.verify(
            "without a key nothing is uploaded: 503, and the store is empty",
            before.http_status == 503 and not self.stored_files(),
            seen=f"{before}, store: {self.stored_files()}",
        )

    def _proxy_ports(self) -> list[int]:
        both = (self.acme, self.globex)
        return [self.push_port, *(e.forward_port for e in both), *(e.reverse_port for e in both)]

    def build_agents(self) -> None:
        self.stage.act(
            "4. On each enterprise's premises: a KEK in the HSM, a key for the service, the key agent"
        )
        for enterprise in (self.acme, self.globex):
            agent = self.agent(enterprise)
            self.run(
                *agent, "init", "--tenant", enterprise.name, "--agent", "hq", "--environment", "main",
                "--module", self.module, "--token-label", enterprise.name,
                "--state-dir", enterprise.home / "state", "--files-dir", enterprise.home,
            )  # fmt: skip
            self._set_admin_port(enterprise)
            self.run(*agent, "kek", "create")
            self.run(
                *agent, "proxy", "add", "proxy-1", "--url", f"https://localhost:{self.push_port}",
                "--ca", self.server_ca,
            )  # fmt: skip
            self.run(
                *agent, "service", "add", enterprise.service, "--proxy", "proxy-1",
                "--certificate", enterprise.home / "drive.pem",
            )  # fmt: skip
            self.start(f"agent-{enterprise.name}", *agent, "run")
        for enterprise in (self.acme, self.globex):
            self.wait_for(f"{enterprise.name}'s keys at the proxy", partial(self._acknowledged, enterprise))
        self.stage.say(self.run(*self.agent(self.acme), "status").stdout.decode())
        objects = self._hsm_objects(self.acme)
        self.stage.verify(
            "the KEK is in the HSM, sensitive and never extractable",
            "never extractable" in objects and "AES length 32" in objects,
            seen=objects,
        )
        self.stage.verify(
            "both agents' keys are acknowledged by the proxy",
            all(self._acknowledged(enterprise) for enterprise in (self.acme, self.globex)),
        )

    def _set_admin_port(self, enterprise: Enterprise) -> None:
        """Two agents on one machine cannot both have the default port."""
        text = enterprise.config.read_text()
        changed = text.replace("port = 8320", f"port = {enterprise.admin_port}")
        if changed == text:
            raise DemoError(f"{enterprise.config} has no line for the admin port")
        enterprise.config.write_text(changed)

    def agent(self, enterprise: Enterprise) -> tuple[object, ...]:
        return (BIN / "key-agent", "--config", enterprise.config)

    def _acknowledged(self, enterprise: Enterprise) -> bool:
        result = self.attempt(*self.agent(enterprise), "--json", "status")
        if result.returncode:
            return False
        status: dict[str, Any] = json.loads(result.stdout)
        return all(
            proxy["state"] == "valid" for service in status["services"] for proxy in service["proxies"]
        ) and bool(status["services"])

    def _hsm_objects(self, enterprise: Enterprise) -> str:
        return self.run(
            "pkcs11-tool", "--module", self.module, "--token-label", enterprise.name, "--login", "--pin", "env:PIN",
            "--list-objects", "--type", "secrkey", secret_environment={"PIN": (enterprise.home / "pin").read_text()},
        ).stdout.decode()  # fmt: skip

    # The main job.

    @property
    def acme_file(self) -> Path:
        return self.home / "report.txt"

    def write_file(self) -> None:
        lines = [f"acme, confidential, line {number}: {secrets.token_hex(24)}\n" for number in range(12_000)]
        self.acme_file.write_text("".join(lines))

    def put(self, enterprise: Enterprise, path: str, file: Path, *more: object) -> Answer:
        return self.curl(*self.through(enterprise), *more, "--upload-file", file, f"{self.cloud}{path}")

    def get(self, enterprise: Enterprise, path: str, *more: object, show: bool = True) -> Answer:
        return self.curl(*self.through(enterprise), *more, f"{self.cloud}{path}", show=show)

    def stored_files(self) -> list[str]:
        return sorted(str(path.relative_to(self.store)) for path in self.store.rglob("*") if path.is_file())

    def upload_and_look(self) -> None:
        self.stage.act(
            "5. A user at acme uploads a file through the forward proxy. What does the cloud service hold?"
        )
        plain = self.acme_file.read_bytes()
        answer = self.put(self.acme, "/report.txt", self.acme_file)
        self.stage.verify("the upload succeeds", answer.http_status in (200, 201, 204), seen=answer)
        stored = (self.store / "report.txt").read_bytes()
        self.stage.command(["head", "-c", "96", self.store / "report.txt"], end=" | xxd -c 32")
        self.stage.say("\n".join(f"{stored[i : i + 32].hex(' ', 2)}" for i in range(0, 96, 32)))
        self.stage.verify(
            f"the store holds no {WINDOW_BYTES} bytes of the file in a row",
            not windows(plain) & windows(stored),
        )
        inspected = self.run(BIN / "sealgate", "inspect", self.store / "report.txt")
        self.stage.say(inspected.stdout.decode())

        self.stage.act(
            "6. The user downloads it again: the same bytes, the same size, any range; forward and reverse, HTTP/1.1 and 2"
        )
        answer = self.get(self.acme, "/report.txt")
        self.stage.verify(
            f"downloaded identically, SHA-256 {hashlib.sha256(plain).hexdigest()[:16]}…",
            answer.body == plain,
            seen=answer,
        )
        answer = self.curl(*self.through(self.acme), "--head", f"{self.cloud}/report.txt")
        self.stage.verify(
            "HEAD states the size of the plaintext",
            answer.headers.get("content-length") == str(len(plain)),
            seen=answer,
        )
        answer = self.get(self.acme, "/report.txt", "--range", "500000-500099")
        self.stage.verify(
            "a range in the middle comes alone, and right",
            answer.http_status == 206 and answer.body == plain[500_000:500_100],
            seen=answer,
        )
        answer = self.get(self.acme, "/report.txt", "--http1.1")
        self.stage.verify("the same over HTTP/1.1", answer.body == plain, seen=answer)
        reverse = ("--cacert", self.acme.interception_ca)
        base = f"https://localhost:{self.acme.reverse_port}"
        answer = self.curl(*reverse, f"{base}/report.txt")
        self.stage.verify("the same through the reverse proxy", answer.body == plain, seen=answer)
        answer = self.curl(*reverse, "--upload-file", self.acme_file, f"{base}/second.txt")
        self.stage.verify(
            "an upload through the reverse proxy", answer.http_status in (200, 201, 204), seen=answer
        )
        stored = (self.store / "second.txt").read_bytes()
        self.stage.verify("is ciphertext in the store too", not windows(plain) & windows(stored))
        answer = self.get(self.acme, "/second.txt")
        self.stage.verify("and comes back through the forward proxy", answer.body == plain, seen=answer)

        self.stage.act("7. Everybody else fails")
        answer = self.curl("--cacert", self.server_ca, f"{self.cloud}/report.txt")
        self.stage.verify(
            "who asks the cloud service directly gets ciphertext",
            answer.http_status == 200 and answer.body == (self.store / "report.txt").read_bytes(),
            seen=answer,
        )
        answer = self.get(self.globex, "/report.txt")
        self.stage.verify(
            "another enterprise, through its own proxy and with its own valid key, is refused",
            answer.http_status >= 400 and bool(answer.refusal) and not windows(plain) & windows(answer.body),
            seen=answer,
        )
        self.stage.say(f"{answer}: {answer.body.decode().strip()}")
        answer = self.curl(*self.through(self.acme), "https://example.com/")
        self.stage.verify(
            "a host that is not managed is not reached",
            answer.exit_status != 0 or answer.http_status == 403,
            seen=answer,
        )
        damaged = self.store / "damaged.txt"
        data = bytearray((self.store / "report.txt").read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
        answer = self.get(self.acme, "/damaged.txt")
        self.stage.verify(
            "one flipped bit in the store: the client sees a broken transfer, never a damaged file",
            answer.exit_status != 0 or answer.http_status == 502,
            seen=answer,
        )
        damaged.unlink()

    def revoke(self) -> None:
        self.stage.act("8. The kill switch: acme's HSM administrator destroys the KEK, with a stock HSM tool")
        labels = [
            line.split(":", 1)[1].strip()
            for line in self._hsm_objects(self.acme).splitlines()
            if line.strip().startswith("label:")
        ]
        kek = next(label for label in labels if "canary" not in label)
        pin = {"PIN": (self.acme.home / "pin").read_text()}
        self.run(
            "pkcs11-tool", "--module", self.module, "--token-label", "acme", "--login", "--pin", "env:PIN",
            "--delete-object", "--type", "secrkey", "--label", kek, secret_environment=pin,
        )  # fmt: skip
        took_s = self.wait_for(
            "the proxy refuses",
            lambda: self.get(self.acme, "/report.txt", show=False).refusal == "key-withdrawn",
        )
        self.stage.verify(
            f"the proxy refuses {took_s:.1f} s later (promised: {KILL_SWITCH_LIMIT_S:g})",
            took_s <= KILL_SWITCH_LIMIT_S,
            seen=f"a load of {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores",
        )
        answer = self.get(self.acme, "/report.txt")
        self.stage.say(f"{answer}: {answer.body.decode().strip()}")
        before = self.stored_files()
        answer = self.put(self.acme, "/after.txt", self.acme_file)
        self.stage.verify(
            "uploads are refused too, and nothing reached the store",
            answer.http_status == 503 and self.stored_files() == before,
            seen=answer,
        )
        answer = self.put(self.globex, "/globex.txt", self.acme_file)
        self.stage.verify(
            "the other enterprise goes on as before", answer.http_status in (200, 201, 204), seen=answer
        )
        self.stage.say(self.run(*self.agent(self.acme), "status").stdout.decode())

    def reinstate(self) -> None:
        self.stage.act("9. Reinstated: a new KEK and new keys. What the old KEK protected stays unreadable")
        self.run(*self.agent(self.acme), "reinstate", "--yes")
        self.wait_for("acme's new keys at the proxy", partial(self._acknowledged, self.acme))
        plain = self.acme_file.read_bytes()
        answer = self.put(self.acme, "/new.txt", self.acme_file)
        self.stage.verify("new uploads succeed", answer.http_status in (200, 201, 204), seen=answer)
        answer = self.get(self.acme, "/new.txt")
        self.stage.verify("and come back identically", answer.body == plain, seen=answer)
        answer = self.get(self.acme, "/report.txt")
        self.stage.verify(
            "the old file is gone for good: its KEK was destroyed",
            answer.http_status >= 400 and bool(answer.refusal) and not windows(plain) & windows(answer.body),
            seen=answer,
        )
        self.stage.say(f"{answer}: {answer.body.decode().strip()}")

    def audit(self) -> None:
        self.stage.act("10. What is left on record: a hash-chained audit log at the proxy and at each agent")
        logs = sorted(self.home.rglob("audit.jsonl"))
        self.stage.verify("there are three audit logs", len(logs) == 3, seen=logs)
        for log in logs:
            lines = log.read_bytes().splitlines(keepends=True)
            head = verify(lines)
            self.stage.say(f"{log.relative_to(self.home)}: {head.seq} events, chain intact")
            self.stage.verify("a changed line breaks its chain", self._shows_a_change(lines))

    def _shows_a_change(self, lines: list[bytes]) -> bool:
        middle = len(lines) // 2
        changed = lines[middle].replace(b'"outcome":"', b'"outcome":"not-')
        try:
            verify([*lines[:middle], changed, *lines[middle + 1 :]])
        except BrokenChainError:
            return True
        return False

    def play(self) -> None:
        self.write_file()
        self.build_hsm()
        self.build_cloud()
        self.build_proxy()
        self.build_agents()
        self.upload_and_look()
        self.revoke()
        self.reinstate()
        self.audit()

    def addresses(self) -> str:
        return "\n".join(
            [
                f"cloud service    {self.cloud}/  (its files: {self.store})",
                f"proxy health     http://127.0.0.1:{self.health_port}/readyz, /metrics",
                *(
                    f"{e.name:<16} curl --proxy http://127.0.0.1:{e.forward_port} --noproxy '' --cacert {e.interception_ca}"
                    f" -T FILE {self.cloud}/FILE\n"
                    f"{'':<16} curl --cacert {e.interception_ca} https://localhost:{e.reverse_port}/FILE\n"
                    f"{'':<16} SOFTHSM2_CONF={self.home}/softhsm2.conf {BIN}/key-agent --config {e.config} status"
                    for e in (self.acme, self.globex)
                ),
                f"logs             {self.home}/*.log",
            ]
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description="The main job on real parts.")
    parser.add_argument(
        "--keep", action="store_true", help="leave it running until Ctrl-C, and keep its files"
    )
    return play(Demo, keep=parser.parse_args().keep)


if __name__ == "__main__":
    sys.exit(main())
