"""The site of `make demo-environments`: three environments and a balancer before them, set up by commands.

Everything is done as operators do it, with the programs that are shipped. Acts 1 to 3 are these; what the later ones ask
of the site is here too.
"""

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp

from deploy.demo_environments_load import haproxy_statistics
from deploy.stage import BIN, DemoError, Programs, Stage, free_ports, is_listening, softhsm_module

TENANT: Final = "acme"
KEY: Final = "orders"
KINDS: Final = {"a": "aes-256", "b": "rsa-3072", "c": "ec-p256"}
PATIENCE_S: Final = 60.0
HAPROXY: Final = ("/usr/sbin/haproxy", "/usr/local/sbin/haproxy", "/usr/bin/haproxy")
DATABASE_QUESTION: Final = (
    "SELECT environment, status, count(*), min(substr(hex(encrypted_dek), 1, 24)) || '...' AS encrypted_dek,"
    " substr(kek_id, 1, 8) FROM patent_b_keys GROUP BY environment, status, kek_id ORDER BY environment, status"
)


@dataclass(kw_only=True)
class Environment:
    """Where its parts stand."""

    name: str
    kek_type: str
    home: Path
    peer_port: int
    admin_port: int
    push_port: int
    health_port: int
    service_port: int

    @property
    def agent(self) -> str:
        return f"agent-{self.name}"

    @property
    def agent_config(self) -> Path:
        return self.home / "key-agent.toml"

    @property
    def proxy_config(self) -> Path:
        return self.home / "proxy" / "sealgate.toml"

    @property
    def database(self) -> Path:
        return self.home / "state" / "registry.db"

    @property
    def softhsm(self) -> Mapping[str, str]:
        return {"SOFTHSM2_CONF": str(self.home / "softhsm2.conf")}


class EnvironmentsSite(Programs):
    def __init__(self, stage: Stage, home: Path) -> None:
        super().__init__(stage, home, {})
        ports = free_ports(5 * len(KINDS) + 2)
        self.environments = {
            name: Environment(
                name=name,
                kek_type=kind,
                home=home / name,
                peer_port=ports.pop(),
                admin_port=ports.pop(),
                push_port=ports.pop(),
                health_port=ports.pop(),
                service_port=ports.pop(),
            )
            for name, kind in KINDS.items()
        }
        self.front_port, self.lb_agent_port = ports
        self.root = home / "root"
        self.operator = home / "operator"
        self.statistics = home / "haproxy.sock"
        self.lb_config = home / "lb" / "lb-agent.toml"
        found = [path for path in HAPROXY if Path(path).exists()]
        if not found:
            raise DemoError("HAProxy was not found: apt-get install haproxy")
        self.haproxy = found[0]

    # Giving commands.

    def at(self, one: Environment, *words: object, show: bool = True) -> str:
        """`key-agent` at this environment; what it said."""
        agent = (BIN / "key-agent", "--config", one.agent_config)
        return self.run(*agent, *words, show=show, secret_environment=one.softhsm).stdout.decode()

    def ask(self, one: Environment, *words: object) -> Any:
        """The same for the demo's own eyes: the JSON document."""
        return json.loads(self.at(one, "--json", *words, show=False))

    def until(self, what: str, done: Callable[[], bool], *, limit_s: float = PATIENCE_S) -> float:
        return self.wait_for(what, done, limit_s=limit_s)

    @property
    def manager(self) -> Environment:
        return self.environments["a"]

    # Setting up.

    def build_hsms(self) -> None:
        self.stage.act(
            "1. One enterprise, three environments. Each has an HSM of its own (SoftHSM2 here) with a KEK that never leaves it"
        )
        pki = (BIN / "python", "-m", "certs.pki")
        self.run(*pki, "root", "--tenant", TENANT, "--out", self.root)
        for one in self.environments.values():
            one.home.mkdir(mode=0o700)
            tokens = one.home / "hsm-tokens"
            tokens.mkdir(mode=0o700)
            Path(one.softhsm["SOFTHSM2_CONF"]).write_text(
                f"directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\n"
            )
            self.make_token(one.name, one.home / "pin", environment=one.softhsm)
            self.run(
                *pki,
                "agent",
                "--root",
                self.root,
                "--agent",
                one.agent,
                "--host",
                "localhost",
                "--out",
                one.home,
            )
            (one.home / "root.pem").write_bytes((self.root / "root.pem").read_bytes())
            self.at(
                one, "init", "--tenant", TENANT, "--agent", one.agent, "--environment", one.name,
                "--module", softhsm_module(), "--token-label", one.name,
                "--state-dir", one.home / "state", "--files-dir", one.home,
            )  # fmt: skip
            text = one.agent_config.read_text().replace("port = 8320", f"port = {one.admin_port}")
            one.agent_config.write_text(
                f'{text}\n[environments]\nhost = "127.0.0.1"\nport = {one.peer_port}\nheartbeat_s = 1\n'
            )
            self.at(one, "kek", "create", "--type", one.kek_type)
            agent = (BIN / "key-agent", "--config", one.agent_config, "run")
            self.start(f"agent-{one.name}", *agent, environment=one.softhsm)
        for one in self.environments.values():
            self.until(f"agent {one.name}", partial(is_listening, one.peer_port))

    def unite(self) -> None:
        self.stage.act(
            "2. They become one: each administrator reads the other's fingerprint; nothing is trusted at first sight"
        )
        a = self.manager
        self.at(a, "env", "init", "--url", f"https://localhost:{a.peer_port}")
        fingerprint = self.ask(a, "env", "identity")["fingerprint"]
        for one in self.environments.values():
            if one is a:
                continue
            self.at(
                one, "env", "join", "--url", f"https://localhost:{one.peer_port}",
                "--manager-url", f"https://localhost:{a.peer_port}", "--manager-agent", a.agent,
                "--fingerprint", fingerprint,
            )  # fmt: skip
            theirs = self.ask(one, "env", "identity")["fingerprint"]
            self.at(a, "env", "add", one.name, "--fingerprint", theirs)
        self.until("all environments active", lambda: set(self.states().values()) == {"active"})
        self.stage.say(self.at(a, "env", "list"))

    def states(self) -> dict[str, str]:
        listed = self.ask(self.manager, "env", "list")["environments"]
        return {row["environment"]: row["state"] for row in listed}

    def build_proxies(self) -> None:
        self.stage.act(
            f"3. A proxy in each, with the encryption service; one named key, {KEY}: the manager makes one key per environment"
        )
        pki = (BIN / "python", "-m", "certs.pki")
        self.run(*pki, "server-ca", "--name", "demo operator", "--out", self.operator)
        names = ("--name", "localhost", "--name", "127.0.0.1")
        self.run(*pki, "server", "--ca", self.operator, *names, "--out", self.operator)
        for one in self.environments.values():
            self._provision_proxy(one)
            self.start(f"proxy-{one.name}", BIN / "sealgate", "--config", one.proxy_config, "run")
        for one in self.environments.values():
            self.until(f"proxy {one.name}", partial(is_listening, one.service_port))
            self.at(
                one, "proxy", "add", f"proxy-{one.name}", "--url", f"https://localhost:{one.push_port}",
                "--ca", self.operator / "ca.pem",
            )  # fmt: skip
            self.at(
                one, "service", "add", KEY, "--proxy", f"proxy-{one.name}",
                "--certificate", one.home / "proxy" / f"{KEY}.pem",
            )  # fmt: skip
        self.until("three active keys", lambda: len(self.owners(active=True)) == len(KINDS))
        self.stage.say(self.at(self.manager, "key", "list", KEY))
        for one in self.environments.values():
            self.until(f"the key at proxy {one.name}", partial(self.seals, one))
        self.show_databases()
        found = {one.name: self.database_of(one) for one in self.environments.values()}
        self.stage.verify(
            "each database has all three keys, active, each wrapped by that environment's own KEK alone",
            all(
                {(owner, status, count) for owner, status, count, _, _ in rows}
                == {(name, "active", 1) for name in KINDS}
                for rows in found.values()
            )
            and len({kek for rows in found.values() for *_, kek in rows}) == len(KINDS),
            seen=found,
        )
        wrapped = [wrap for rows in found.values() for _, _, _, wrap, _ in rows]
        self.stage.verify("nine wraps, no two alike", len(set(wrapped)) == len(KINDS) ** 2, seen=wrapped)

    def _provision_proxy(self, one: Environment) -> None:
        proxy = one.proxy_config.parent
        proxy.mkdir(mode=0o700)
        one.proxy_config.write_text(
            f"""\
[proxy]
id = "proxy-{one.name}"
state_dir = "{proxy}/state"

[environment]
name = "{one.name}"

[push]
host = "127.0.0.1"
port = {one.push_port}
certificate_file = "{self.operator}/server.pem"
key_file = "{self.operator}/server.key"

[health]
port = {one.health_port}

[[encryption_service.listen]]
host = "127.0.0.1"
port = {one.service_port}
certificate_file = "{self.operator}/server.pem"
key_file = "{self.operator}/server.key"
dialects = ["native"]
"""
        )
        sealgate = (BIN / "sealgate", "--config", one.proxy_config)
        csr, certificate = proxy / f"{KEY}.csr", proxy / f"{KEY}.pem"
        self.run(*sealgate, "tenant", "add", TENANT, "--root", self.root / "root.pem")
        self.run(*sealgate, "key", "add", f"{TENANT}/{KEY}", "--csr", csr)
        self.run(
            BIN / "python",
            "-m",
            "certs.pki",
            "sign-service",
            "--root",
            self.root,
            "--csr",
            csr,
            "--out",
            certificate,
        )
        self.run(*sealgate, "key", "import-cert", f"{TENANT}/{KEY}", certificate)
        self.run(*sealgate, "dialect", "enable", TENANT, "native")
        issue = (*sealgate, "credential", "issue", TENANT, "native", "--label", "callers", "--key", KEY)
        if one is self.manager:
            self.run(*issue, "--secret-file", self.home / "token.json")
        else:
            self.run(*issue, "--token-file", self.home / "token.json")

    def build_balancer(self) -> None:
        lb = self.lb_config.parent
        self.run(
            BIN / "python", "-m", "certs.pki", "balancer", "--root", self.root, "--id", "lb-1", "--out", lb
        )
        (lb / "root.pem").write_bytes((self.root / "root.pem").read_bytes())
        both = self.home / "front.pem"
        both.touch(mode=0o600)
        both.write_bytes(b"".join((self.operator / f"server.{kind}").read_bytes() for kind in ("pem", "key")))
        agents = servers = ""
        for one in self.environments.values():
            key = self.ask(one, "env", "identity")["registry_key"]
            agents += f'\n[[agents]]\nid = "{one.agent}"\nurl = "https://localhost:{one.peer_port}"\nregistry_key = "{key}"\n'
            servers += (
                f'\n[[servers]]\nname = "{one.name}"\nenvironment = "{one.name}"\n'
                f'address = "127.0.0.1:{one.service_port}"\nstatus_url = "http://127.0.0.1:{one.health_port}"\n'
            )
        self.lb_config.write_text(
            f"""\
[lb_agent]
id = "lb-1"
tenant = "{TENANT}"
root_certificate_file = "root.pem"
certificate_file = "tls.pem"
key_file = "tls.key"
state_file = "{lb}/lb-agent.rows"
port = {self.lb_agent_port}

[frontend]
bind = "127.0.0.1:{self.front_port}"
certificate_file = "{both}"
server_ca_file = "{self.operator}/ca.pem"
stats_socket = "{self.statistics}"
{agents}{servers}"""
        )
        key_agent = BIN / "key-agent"
        lb_words = ("--lb-config", self.lb_config)
        made = self.run(key_agent, "lb", "config", *lb_words, "--check", "--haproxy", self.haproxy)
        haproxy_config = self.home / "haproxy.cfg"
        haproxy_config.write_bytes(made.stdout)
        self.start("lb-agent", key_agent, "lb-agent", *lb_words)
        self.start("lb-watchdog", key_agent, "lb", "watchdog", *lb_words)
        self.start("haproxy", self.haproxy, "-db", "-f", haproxy_config)
        self.until("HAProxy", partial(is_listening, self.front_port))
        self.until("every server up", lambda: self.haproxy_says() == dict.fromkeys(KINDS, "UP"))

    # Asking.

    @property
    def token(self) -> str:
        return str(json.loads((self.home / "token.json").read_text())["token"])

    def owners(self, *, active: bool = False) -> dict[int, str]:
        """Whose each key version is, as the manager's database says."""
        wanted = "state = 'active'" if active else "true"
        question = f"SELECT version, owner_environment_id FROM dek WHERE {wanted}"
        return {int(version): owner for version, owner in self._query(self.manager, question)}

    def seals(self, one: Environment) -> bool:
        return self.call(one.service_port, "encrypt", {"plaintext": "aGVsbG8="})[0] == 200

    def call(self, port: int, operation: str, body: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
        """One call of the native API at *port*; status 0 if nobody is there."""

        async def once() -> tuple[int, dict[str, Any]]:
            async with (
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self.tls)) as session,
                session.post(
                    f"https://localhost:{port}/sealgate/v1/keys/{KEY}/{operation}",
                    json=body,
                    headers={"Authorization": f"Bearer {self.token}"},
                ) as answer,
            ):
                return answer.status, dict(await answer.json(content_type=None))

        try:
            return asyncio.run(once())
        except aiohttp.ClientError:
            return 0, {}

    @property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.operator / "ca.pem")

    def database_of(self, one: Environment) -> list[tuple[str, str, int, str, str]]:
        """Rows of owner, status, number, beginning of a wrapped key, KEK."""
        return [
            (owner, status, int(count), wrapped, kek)
            for owner, status, count, wrapped, kek in self._query(one, DATABASE_QUESTION)
        ]

    def _query(self, one: Environment, question: str) -> list[list[str]]:
        """What *question* finds in its database, read by another program than the agent."""
        out = self.run(BIN / "python", "-m", "sqlite3", one.database, question, show=False).stdout.decode()
        return [
            [part.strip().strip("'") for part in line.strip("()").split(",")] for line in out.splitlines()
        ]

    def show_databases(self) -> None:
        for one in self.environments.values():
            words = (BIN / "python", "-m", "sqlite3", one.database, DATABASE_QUESTION)
            self.stage.say(f"what the database of {one.name} says ({one.kek_type}):")
            self.stage.say(self.run(*words, show=one is self.manager).stdout.decode())

    def haproxy_says(self) -> dict[str, str]:
        with contextlib.suppress(OSError):
            return {name: state for name, (_, state) in haproxy_statistics(self.statistics).items()}
        return {}
