"""Several environments on real parts: `make demo-environments` (`KEEP=1` leaves it running).

One enterprise in three environments, each with a token and a KEK of its own kind (AES-256, RSA-3072, EC P-256), a key agent
with its own database, and a proxy; HAProxy before them. While callers seal and open without a pause, one environment is
breached by one command, re-keyed, healed and brought back. No caller may see an error. A picture of it is written.

The stage's rules are those of deploy/stage.py.
"""

import argparse
import asyncio
import contextlib
import csv
import json
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, override

import aiohttp

from deploy.demo_environments_callers import KEY_REFUSED, Callers
from deploy.demo_environments_chart import Chart, Moment, Shade
from deploy.stage import BIN, DemoError, Programs, Stage, free_ports, is_listening, play, softhsm_module

TENANT: Final = "acme"
KEY: Final = "orders"
KINDS: Final = {"a": "aes-256", "b": "rsa-3072", "c": "ec-p256"}
COLOURS: Final = {"a": "#1f6fb2", "b": "#b35c00", "c": "#2e7d32"}
BREACHED: Final = "b"
PATIENCE_S: Final = 60.0
REROUTE_LIMIT_S: Final = 1.0
"""From the answer of `incident open` until the load balancer's own state is DOWN."""
SAMPLE_S: Final = 0.25
SMOOTH_S: Final = 1.0
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


@dataclass
class Recording:
    """What HAProxy itself counts, by server, since the callers began; and what was done meanwhile."""

    began_s: float
    times_s: list[float] = field(default_factory=list)
    counts: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in KINDS})
    states: list[dict[str, str]] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)

    def now_s(self) -> float:
        return time.monotonic() - self.began_s


def haproxy_statistics(path: Path) -> dict[str, tuple[int, str]]:
    """By server: answers of 2xx so far, and HAProxy's state of it. OSError while it does not answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2)
        connection.connect(str(path))
        connection.sendall(b"show stat\n")
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    rows = csv.DictReader(text.removeprefix("# ").splitlines())
    return {
        row["svname"]: (int(row["hrsp_2xx"] or 0), row["status"])
        for row in rows
        if row["pxname"] == "any" and row["svname"] != "BACKEND"
    }


class LoadOfCallers:
    """The callers, and the recording of HAProxy's counters, in a thread of their own."""

    def __init__(self, callers: Callers, statistics: Path) -> None:
        self.callers = callers
        self.recording = Recording(time.monotonic())
        self._statistics = statistics
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="callers")
        self._failure: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """DemoError if the thread had ended before."""
        self._stop.set()
        self._thread.join(timeout=30)
        if self._failure is not None:
            raise DemoError(f"the callers ended: {self._failure!r}")

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - told by stop()
            self._failure = error

    async def _main(self) -> None:
        calling = asyncio.create_task(self.callers.run(), name="callers")
        while not self._stop.is_set() and not calling.done():
            self._sample()
            await asyncio.sleep(SAMPLE_S)
        self._sample()
        calling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await calling

    def _sample(self) -> None:
        found = haproxy_statistics(self._statistics)
        recording = self.recording
        recording.times_s.append(recording.now_s())
        recording.states.append({name: state for name, (_, state) in found.items()})
        for name in KINDS:
            recording.counts[name].append(found[name][0])


class EnvironmentsDemo(Programs):
    def __init__(self, stage: Stage, home: Path, *, picture: Path, seconds: float) -> None:
        """*picture*: where the SVG goes. *seconds*: of calm, before and after the breach."""
        super().__init__(stage, home, {})
        self.picture, self._calm_s = picture, seconds
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
        self.load: LoadOfCallers | None = None
        self._breached_s = self._back_s = self._up_s = 0.0
        """When `incident open` had answered, `env rejoin` was given, HAProxy said that the environment is up."""
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

    @property
    def breached(self) -> Environment:
        return self.environments[BREACHED]

    # The acts.

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
        self.until("all environments active", lambda: set(self._states().values()) == {"active"})
        self.stage.say(self.at(a, "env", "list"))

    def _states(self) -> dict[str, str]:
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
        self.until("three active keys", lambda: len(self._owners(active=True)) == len(KINDS))
        self.stage.say(self.at(self.manager, "key", "list", KEY))
        for one in self.environments.values():
            self.until(f"the key at proxy {one.name}", partial(self._seals, one))
        self._show_databases()
        found = {one.name: self._database(one) for one in self.environments.values()}
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

    @property
    def _token(self) -> str:
        return str(json.loads((self.home / "token.json").read_text())["token"])

    def _owners(self, *, active: bool = False) -> dict[int, str]:
        """Whose each key version is, as the manager's database says."""
        wanted = "state = 'active'" if active else "true"
        question = f"SELECT version, owner_environment_id FROM dek WHERE {wanted}"
        return {int(version): owner for version, owner in self._query(self.manager, question)}

    def _seals(self, one: Environment) -> bool:
        return self.call(one.service_port, "encrypt", {"plaintext": "aGVsbG8="})[0] == 200

    def call(self, port: int, operation: str, body: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
        """One call of the native API at *port*; status 0 if nobody is there."""

        async def once() -> tuple[int, dict[str, Any]]:
            async with (
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._tls)) as session,
                session.post(
                    f"https://localhost:{port}/sealgate/v1/keys/{KEY}/{operation}",
                    json=body,
                    headers={"Authorization": f"Bearer {self._token}"},
                ) as answer,
            ):
                return answer.status, dict(await answer.json(content_type=None))

        try:
            return asyncio.run(once())
        except aiohttp.ClientError:
            return 0, {}

    @property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.operator / "ca.pem")

    def _database(self, one: Environment) -> list[tuple[str, str, int, str, str]]:
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

    def _show_databases(self) -> None:
        for one in self.environments.values():
            words = (BIN / "python", "-m", "sqlite3", one.database, DATABASE_QUESTION)
            self.stage.say(f"what the database of {one.name} says ({one.kek_type}):")
            self.stage.say(self.run(*words, show=one is self.manager).stdout.decode())

    def balance(self) -> None:
        self.stage.act(
            "4. HAProxy before them, by a configuration that the agent writes; callers begin, without stickiness"
        )
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
        self.until("every server up", lambda: self._haproxy_says() == dict.fromkeys(KINDS, "UP"))
        callers = Callers(
            f"https://localhost:{self.front_port}", self._token, KEY, pause_s=0.025, tls=self._tls
        )
        self.load = LoadOfCallers(callers, self.statistics)
        self.load.start()
        self._calm()
        seen = self._sealed_by_owner(since_s=0)
        self.stage.say(f"{callers.answered} calls answered; sealed by {dict(sorted(seen.items()))}")
        self.stage.verify("all three environments serve", set(seen) == set(KINDS), seen=seen)
        self._no_errors("no caller has seen an error")

    def _haproxy_says(self) -> dict[str, str]:
        with contextlib.suppress(OSError):
            return {name: state for name, (_, state) in haproxy_statistics(self.statistics).items()}
        return {}

    def _calm(self) -> None:
        time.sleep(self._calm_s)  # the only thing that is not waited for: time in which nothing happens

    def _sealed_by_owner(self, *, since_s: float) -> Counter[str]:
        """Bodies sealed in calls that began after *since_s*, by whose key."""
        assert self.load is not None
        sealed = [one.version for one in list(self.load.callers.sealed) if one.began_s >= since_s]
        owners = self._owners()  # read later than those: every version that sealed is in it
        return Counter(owners[version] for version in sealed)

    def _no_errors(self, claim: str) -> None:
        assert self.load is not None
        errors = self.load.callers.errors
        self.stage.verify(claim, not errors, seen=errors[:5])

    def _mark(self, text: str) -> None:
        assert self.load is not None
        self.load.recording.moments.append(Moment(self.load.recording.now_s(), text))

    def breach(self) -> None:
        self.stage.act(f"5. Environment {BREACHED} is breached. One command, while everybody goes on calling")
        assert self.load is not None
        status, old = self.call(self.breached.service_port, "encrypt", {"plaintext": "b2xk"})
        self.stage.verify(f"before: {BREACHED} seals a body that somebody keeps", status == 200, seen=old)
        self._old = str(old["ciphertext"])
        self._mark("incident open")
        self.stage.say(
            self.at(
                self.manager,
                "incident",
                "open",
                "--env",
                BREACHED,
                "--kind",
                "runtime",
                "--reason",
                "IR-2214",
                "--idempotency-key",
                "demo",
            )
        )
        self._breached_s = time.monotonic()
        down_s = self.until("HAProxy sees it down", lambda: self._haproxy_says()[BREACHED].startswith("DOWN"))
        self.stage.verify(
            f"HAProxy has taken {BREACHED} out {down_s:.2f} s after the command's answer (limit {REROUTE_LIMIT_S:g} s)",
            down_s <= REROUTE_LIMIT_S,
        )
        self.until(
            "contained", lambda: bool(self.ask(self.manager, "incident", "status", "inc-1")["contained"])
        )
        self._mark("contained")
        self.stage.say(self.at(self.manager, "incident", "status", "inc-1"))
        self._calm()
        late = self._sealed_by_owner(since_s=self._breached_s)
        self.stage.verify(
            f"since that answer {sum(late.values())} bodies were sealed, none by {BREACHED}",
            BREACHED not in late and set(late) == set(KINDS) - {BREACHED},
            seen=late,
        )
        owners = self._owners()
        last_s = max(one.at_s for one in list(self.load.callers.sealed) if owners[one.version] == BREACHED)
        self.stage.say(
            f"the last answer that it gave was {(self._breached_s - last_s) * 1000:.0f} ms before the command's own"
        )
        refused = Counter(owners[one.version] for one in list(self.load.callers.refused))
        self.stage.verify(
            f"what {BREACHED}'s key had sealed is not opened any more, anywhere ({sum(refused.values())} of the callers' last bodies)",
            set(refused) <= {BREACHED} and self._is_refused_by("a", "c"),
            seen=refused,
        )
        self._show_databases()
        for one in self.environments.values():
            found = {(owner, status) for owner, status, *_ in self._database(one)}
            self.stage.verify(
                f"the database of {one.name}: exactly {BREACHED}'s key is disabled",
                found == {("a", "active"), ("b", "disabled"), ("c", "active")},
                seen=found,
            )
        self._no_errors(
            "no caller has seen an error: who was refused by the breached environment was served by another"
        )

    def _is_refused_by(self, *names: str) -> bool:
        """Whether what the breached key had sealed is refused at each of these, because of the key."""
        answers = [
            self.call(self.environments[name].service_port, "decrypt", {"ciphertext": self._old})
            for name in names
        ]
        return all(status in KEY_REFUSED and "compromised" in json.dumps(body) for status, body in answers)

    def rekey(self) -> None:
        self.stage.act(
            "6. A new key for it, made by a sound environment; a new KEK in its HSM; its operator's word"
        )
        self.stage.say(self.at(self.manager, "incident", "rekey", "inc-1"))
        self.until(
            "a successor", lambda: self.ask(self.manager, "incident", "status", "inc-1")["state"] == "rekeyed"
        )
        self._mark("re-keyed")
        before = self._database(self.breached)
        told = self.at(self.breached, "--json", "env", "new-kek", "--type", self.breached.kek_type)
        made = json.loads(told)
        self.stage.say(told)
        self.until(
            "the new KEK's announcement",
            lambda: self.ask(self.manager, "env", "status", BREACHED)["kek"] == made["kek"],
        )
        self.at(
            self.manager, "env", "heal-complete", BREACHED, "--attest", "CHG-88", "--new-certs",
            "--kek", made["fingerprint"],
        )  # fmt: skip
        self._mark("healed")
        self.stage.verify(
            "healed, and nothing was stored there yet: that waits for the load balancer's word",
            self._states()[BREACHED] == "healed" and self._database(self.breached) == before,
            seen=(self._states(), self._database(self.breached)),
        )

    def rejoin(self) -> None:
        self.stage.act(
            "7. Back: the load balancer confirms, every key is stored, opened and compared there; then it serves"
        )
        assert self.load is not None
        self._back_s = time.monotonic()
        self.stage.say(self.at(self.manager, "env", "rejoin", BREACHED))
        self._mark("rejoined")
        self.until("HAProxy sees it up", lambda: self._haproxy_says()[BREACHED] == "UP")
        self._up_s = time.monotonic()
        self.until(f"{BREACHED} seals again", lambda: BREACHED in self._sealed_by_owner(since_s=self._back_s))
        seals_s = time.monotonic()
        self._calm()
        seen = self._sealed_by_owner(since_s=seals_s)
        self.stage.verify(
            f"all three serve again: {dict(sorted(seen.items()))}", set(seen) == set(KINDS), seen=seen
        )
        self._show_databases()
        rows = self._database(self.breached)
        self.stage.verify(
            f"{BREACHED} has every live key under its new KEK, and a new one of its own",
            {("a", "active"), ("b", "active"), ("c", "active")}
            <= {(owner, status) for owner, status, *_ in rows},
            seen=rows,
        )
        self.stage.verify(
            "the compromised key stays disabled, in the environment that came back too",
            self._is_refused_by(*KINDS),
        )

    def conclude(self) -> None:
        self.stage.act("8. The count, the evidence, the picture")
        assert self.load is not None
        self.load.stop()
        callers, recording = self.load.callers, self.load.recording
        self._no_errors(f"{callers.answered} calls were answered, and no caller has seen an error")
        served = self._served_by_haproxy(self._breached_s + SAMPLE_S, self._back_s)
        self.stage.verify(
            f"HAProxy's own count: {served} requests answered by {BREACHED} between its breach and its return",
            served == 0,
        )
        self.at(self.manager, "incident", "close", "inc-1")
        evidence = self.home / "inc-1.zip"
        self.at(self.manager, "incident", "evidence", "inc-1", "-o", evidence)
        self.stage.say(
            self.at(self.manager, "incident", "verify", evidence, "--root", self.root / "root.pem")
        )
        self.picture.parent.mkdir(parents=True, exist_ok=True)
        self.picture.write_text(self._chart(recording).svg())
        self.stage.say(f"the picture of it: file://{self.picture.resolve()}")

    def _served_by_haproxy(self, begin_s: float, end_s: float) -> int:
        assert self.load is not None
        recording = self.load.recording
        inside = [
            count
            for at_s, count in zip(recording.times_s, recording.counts[BREACHED], strict=True)
            if begin_s <= at_s + recording.began_s < end_s
        ]
        return inside[-1] - inside[0] if inside else 0

    def _chart(self, recording: Recording) -> Chart:
        every = max(1, round(SMOOTH_S / SAMPLE_S))
        assert self.load is not None
        callers = self.load.callers
        return Chart(
            title="Requests per second that each environment answered (HAProxy's own count)",
            footer=(
                f"{callers.answered} calls answered, {len(callers.errors)} errors; {len(callers.refused)} refused because "
                f"the key that had sealed was compromised. {BREACHED} was breached, re-keyed and brought back meanwhile."
            ),
            times_s=recording.times_s[::every],
            counts={f"environment {name}": counts[::every] for name, counts in recording.counts.items()},
            colours={f"environment {name}": colour for name, colour in COLOURS.items()},
            moments=recording.moments,
            shades=[
                Shade(
                    name=f"environment {BREACHED}",
                    begin_s=self._breached_s - recording.began_s,
                    end_s=self._up_s - recording.began_s,
                    text="healing: answers nobody",
                )
            ],
        )

    # The demo as a whole.

    def play(self) -> None:
        self.build_hsms()
        self.unite()
        self.build_proxies()
        self.balance()
        self.breach()
        self.rekey()
        self.rejoin()
        self.conclude()

    @override
    def stop(self) -> None:
        try:
            if self.load is not None:
                with contextlib.suppress(DemoError):
                    self.load.stop()
        finally:
            super().stop()

    def addresses(self) -> str:
        return "\n".join(
            [
                (
                    f'callers          curl --cacert {self.operator}/ca.pem -H "Authorization: Bearer $(jq -r .token {self.home}/token.json)"'
                    f' https://localhost:{self.front_port}/sealgate/v1/keys/{KEY}/encrypt --json \'{{"plaintext": "aGVsbG8="}}\''
                ),
                *(
                    f"environment {one.name}    SOFTHSM2_CONF={one.home}/softhsm2.conf {BIN}/key-agent --config {one.agent_config} env list"
                    for one in self.environments.values()
                ),
                f"HAProxy          {self.home}/haproxy.cfg, its socket {self.statistics}",
                f"logs             {self.home}/*.log",
            ]
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make demo-environments", description="A breach, and callers who do not notice."
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave it running until Ctrl-C, and keep its files"
    )
    parser.add_argument(
        "--picture", type=Path, default=Path("build/demo-environments.svg"), help="where the SVG goes"
    )
    parser.add_argument(
        "--calm-s", type=float, default=6.0, help="seconds of calm before, during and after the breach"
    )
    chosen = parser.parse_args()
    if not 0.5 <= chosen.calm_s <= 600:
        parser.error("--calm-s is between 0.5 and 600")
    try:
        return play(
            partial(EnvironmentsDemo, picture=chosen.picture, seconds=chosen.calm_s), keep=chosen.keep
        )
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
