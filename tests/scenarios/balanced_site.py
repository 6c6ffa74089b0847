"""Several environments behind a HAProxy, as an enterprise would run them: all processes real.

    async with balanced_site(directory) as balanced:    # agents, proxies, lb-agent, HAProxy; one key `files`
        async with balanced.calling() as callers:       # load, every answer counted
            ...
        await balanced.bring_back("b", "inc-1")         # by the runbook's steps

HAProxy's configuration is what `key-agent lb config --check` prints. Databases are read beside the agents.
"""

import asyncio
import base64
import contextlib
import csv
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from deploy.demo_environments_callers import Callers, Sealed
from tests import pki
from tests.environments.site import (
    KINDS,
    TENANT,
    EnvironmentsSite,
    Program,
    SiteEnvironment,
    environments_site,
    until,
)
from tests.ports import free_port

HAPROXY: Final = "/usr/sbin/haproxy"
KEY: Final = "files"
RHYTHM: Final = (30, 33, 0.3)


class Balanced:
    """A site that is united and serves, and what stands before it."""

    def __init__(self, site: EnvironmentsSite) -> None:
        self.site = site
        self.front = f"127.0.0.1:{free_port()}"
        self.lb_agent_port = free_port()
        self.statistics_socket = site.directory / "haproxy.sock"
        self.lb_config = site.directory / "lb" / "lb-agent.toml"
        self.lb_agent = self._program("lb-agent", "key-agent", "lb-agent", "--lb-config", str(self.lb_config))
        self.watchdog = self._program(
            "watchdog", "key-agent", "lb", "watchdog", "--lb-config", str(self.lb_config)
        )
        self.haproxy = self._program("haproxy", HAPROXY, "-db", "-f", str(site.directory / "haproxy.cfg"))
        self.haproxy.is_ready = self._listens

    def _program(self, name: str, *words: str) -> Program:
        async def begun() -> bool:
            return True

        return Program(words, {}, self.site.directory / f"{name}.log", begun)

    async def _listens(self) -> bool:
        host, _, port = self.front.rpartition(":")
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
            return True
        return False

    def __getitem__(self, name: str) -> SiteEnvironment:
        return self.site[name]

    @property
    def manager(self) -> SiteEnvironment:
        return self.site.first

    @property
    def token(self) -> str:
        return self.manager.proxies[0].token

    # The load balancer.

    async def write_configuration(self) -> None:
        """Of the lb-agent and, by its command, of HAProxy; with all environments of the site."""
        home = self.lb_config.parent
        if not home.exists():
            home.mkdir()
            pki.write_certificate(self.site.tenant.root.certificate, home / "root.pem")
            tenant = self.site.tenant
            identity = getattr(
                tenant, "balancer", tenant.agent_tls
            )  # an agent's, while it has no role of its own
            pki.write_credential(identity("lb-1"), home, "tls")
        agents = servers = ""
        for one in self.site.environments.values():
            key = (await one.ask("env_identity"))["registry_key"]
            agents += f'[[agents]]\nid = "{one.agent_id}"\nurl = "{one.url}"\nregistry_key = "{key}"\n'
            for proxy in one.proxies:
                servers += (
                    f'[[servers]]\nname = "{proxy.name}"\nenvironment = "{one.name}"\n'
                    f'address = "127.0.0.1:{proxy.service_port}"\n'
                    f'status_url = "http://127.0.0.1:{proxy.health_port}"\n'
                )
        self.lb_config.write_text(f"""
[lb_agent]
id = "lb-1"
tenant = "acme"
root_certificate_file = "root.pem"
certificate_file = "tls.pem"
key_file = "tls.key"
state_file = "{home}/lb-agent.rows"
port = {self.lb_agent_port}
[frontend]
bind = "{self.front}"
stats_socket = "{self.statistics_socket}"
{agents}{servers}""")
        words = ("lb", "config", "--lb-config", str(self.lb_config), "--check", "--haproxy", HAPROXY)
        program = self._program("lb-config", "key-agent", *words)
        program.log.unlink(missing_ok=True)
        await program.start(wait=False)
        assert program.process is not None
        async with asyncio.timeout(60):
            status = await program.process.wait()
        text = program.log.read_text()
        assert status == 0, text
        (self.site.directory / "haproxy.cfg").write_text(text)

    async def haproxy_says(self) -> dict[str, tuple[str, int]]:
        """By server: HAProxy's state of it, and how many requests it has answered by 2xx."""
        reader, writer = await asyncio.open_unix_connection(str(self.statistics_socket))
        writer.write(b"show stat\n")
        text = (await reader.read()).decode()
        writer.close()
        rows = csv.DictReader(text.removeprefix("# ").splitlines())
        return {
            row["svname"]: (row["status"].split()[0], int(row["hrsp_2xx"] or 0))
            for row in rows
            if row["pxname"] == "any" and row["svname"] != "BACKEND"
        }

    async def is_up(self, *names: str) -> bool:
        """Whether HAProxy sends to the proxies of exactly these environments."""
        with contextlib.suppress(OSError):
            says = await self.haproxy_says()
            wanted = {proxy.name for name in names for proxy in self[name].proxies}
            return {server for server, (state, _) in says.items() if state == "UP"} == wanted
        return False

    # Callers.

    @asynccontextmanager
    async def calling(self, *, count: int = 8, pause_s: float = 0.02) -> AsyncIterator[Callers]:
        """Callers through HAProxy while the block runs."""
        callers = Callers(f"http://{self.front}", self.token, KEY, count=count, pause_s=pause_s)
        running = asyncio.create_task(callers.run(), name="callers")
        try:
            await until(lambda: _is_over(callers, 4 * count))
            yield callers
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    def owners(self) -> dict[int, str]:
        """Whose key each version of KEY is."""
        rows = self.query(
            self.manager,
            "SELECT d.version, d.owner_environment_id FROM dek d JOIN key_ring r ON r.id = d.ring_id "
            f"WHERE r.network_service_id = '{TENANT}/{KEY}'",
        )
        return {int(version): str(owner) for version, owner in rows}

    def by_owner(self, sealed: Iterable[Sealed]) -> Counter[str]:
        versions = [one.version for one in sealed]
        owners = self.owners()
        return Counter(owners[version] for version in versions)

    # Keys and databases.

    def query(self, one: SiteEnvironment, question: str) -> list[tuple[Any, ...]]:
        """Of an environment's database, beside its agent."""
        address = f"file:{one.state_dir / 'registry.db'}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=20)) as connection:
            return connection.execute(question).fetchall()

    def keys(self, one: SiteEnvironment) -> set[tuple[str, str]]:
        """Owner and status of every key that this database holds a wrap of."""
        return {
            (str(owner), str(status))
            for owner, status in self.query(one, "SELECT environment, status FROM patent_b_keys")
        }

    async def state(self, name: str, *, seen_by: str | None = None) -> str:
        one = self.manager if seen_by is None else self[seen_by]
        return str((await one.ask("env_status", environment=name))["state"])

    async def serve(self, *names: str) -> bool:
        """Whether every proxy of these environments, or of all, seals."""
        chosen = names or tuple(self.site.environments)
        answers = await asyncio.gather(
            *(
                proxy.call(f"keys/{KEY}/encrypt", {"plaintext": "aGVsbG8="})
                for name in chosen
                for proxy in self[name].proxies
            )
        )
        return all(status == 200 for status, _ in answers)

    async def open_incident(self, name: str, kind: str, **more: object) -> str:
        """Its id."""
        opened = await self.manager.ask(
            "incident_open", environment=name, kind=kind, reason="a test", by="test", **more
        )
        return str(opened["incident"])

    async def bring_back(self, name: str, incident: str) -> Mapping[str, Any]:
        """Steps 4 to 7 of the runbook; what `env rejoin` answered."""
        await self.rekey(incident)
        await self.heal_complete(name)
        return await self.rejoin(name)

    async def rekey(self, incident: str) -> None:
        await self.manager.ask("incident_rekey", incident=incident)

        async def done() -> bool:
            return bool((await self.manager.ask("incident_status", incident=incident))["state"] == "rekeyed")

        await until(done, timeout_s=90)

    async def heal_complete(self, name: str) -> Mapping[str, Any]:
        """A new KEK, and its operator's word; what `env new-kek` answered."""
        made = await self[name].ask("env_new_kek", kek_type=self[name].kek_type)

        async def announced() -> bool:
            status = await self.manager.ask("env_status", environment=name)
            return bool(status["kek"] == made["kek"])

        await until(announced)
        await self.manager.ask(
            "env_heal_complete",
            environment=name,
            attestation="CHG-88",
            new_certificates=True,
            kek=made["fingerprint"],
        )
        return dict(made)

    async def rejoin(self, name: str) -> Mapping[str, Any]:
        return dict(await self.manager.ask("env_rejoin", environment=name, patience_s=60))


async def _is_over(callers: Callers, count: int) -> bool:
    return callers.answered >= count or bool(callers.errors)


async def more_calls(callers: Callers, count: int) -> None:
    """Return when *count* more were answered."""
    wanted = callers.answered + count
    await until(lambda: _is_over(callers, wanted))


def body(size_bytes: int) -> str:
    """Base64 of so many random bytes."""
    return base64.b64encode(random.randbytes(size_bytes)).decode()


@asynccontextmanager
async def balanced_site(
    directory: Path,
    *,
    kinds: Mapping[str, str] = KINDS,
    united: Iterable[str] = ("a", "b", "c"),
    proxies_each: int = 1,
    rhythm: tuple[float, float, float] = RHYTHM,
    proxy_settings: str = "",
    proxy_environments: Mapping[str, Mapping[str, str]] | None = None,
    key_servers: Mapping[str, str] | None = None,
) -> AsyncIterator[Balanced]:
    """*kinds*: environments that stand ready; *united*: those that are one from the start.

    *proxy_settings*: further tables of every proxy's settings. *proxy_environments*: further variables of the
    processes of an environment's proxies. *key_servers*: by environment, the table of its key server.
    """
    names = tuple(united)
    async with environments_site(
        directory,
        kinds=kinds,
        proxies_each=proxies_each,
        rhythm=rhythm,
        named=True,
        key_servers=key_servers,
    ) as site:
        balanced = Balanced(site)
        for one in site.environments.values():
            for proxy in one.proxies:
                proxy.config.write_text(proxy.config.read_text() + proxy_settings)
                proxy.program.environment.update((proxy_environments or {}).get(one.name, {}))
        async with site.agents(), site.proxies():
            await site.unite(*names)
            for name in names:
                for proxy in site[name].proxies:
                    await site[name].add_service(KEY, proxy, site.tenant)
            await balanced.write_configuration()
            programs = (balanced.lb_agent, balanced.haproxy)
            try:
                for program in programs:
                    await program.start()
                await until(lambda: balanced.is_up(*names), timeout_s=90)
                await until(lambda: balanced.serve(*names), timeout_s=90)
                yield balanced
            finally:
                await balanced.watchdog.stop()
                for program in programs:
                    await program.stop()
