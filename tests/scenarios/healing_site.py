"""The site of those scenarios in which environments heal: three of them, and two who approve.

    async with site_for_tests(directory) as site:       # HAProxy asks the lb-agent through a gate
        await site.ask(site["a"], "env status", "b")    # a command, as an administrator would give it
        async with site.speaking_as("c") as as_c:       # ... whoever has the TLS identity of c's agent
            await as_c("a", "GET", "/...")

1. Each test leaves all environments active, unless it is the last of its file and says so.
2. What has to come true is waited for. No test says how fast: a bound is a number of checks, or a moment
   that the keys themselves name, and calls are judged by when they began and ended.
3. Administrators sign by the commands, as in the runbook.
"""

import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from envelope.keys import NetworkService
from key_agent.environments.peers.peer_transport import PeerAddress, PeerTransport
from key_agent.environments.peers.peer_trust import PeerTrust
from runtime.clock import SystemClock
from tests.environments.administrators import Commands, administrators
from tests.environments.site import TENANT, SiteEnvironment, SiteProxy, until
from tests.scenarios.balanced_site import KEY, Balanced, balanced_site
from tests.scenarios.disturbances import Gate, WallClock

ALL = ("a", "b", "c")
OWNER: Final = NetworkService(TENANT, KEY)
PLAIN = base64.b64encode(b"held by many").decode()


@dataclass
class Site:
    balanced: Balanced
    gate: Gate
    ask: Commands
    files: Mapping[str, Path]
    """The administrators' private keys."""

    def __getitem__(self, name: str) -> SiteEnvironment:
        return self.balanced[name]

    async def seal(self, name: str) -> str:
        """A ciphertext of that environment's own key."""
        status, document = await self[name].proxies[0].call(f"keys/{KEY}/encrypt", {"plaintext": PLAIN})
        assert status == 200, document
        return str(document["ciphertext"])

    async def opens(self, name: str, ciphertext: str) -> int:
        """The status with which that environment's proxy answers."""
        status, document = await self[name].proxies[0].call(f"keys/{KEY}/decrypt", {"ciphertext": ciphertext})
        assert status != 200 or document["plaintext"] == PLAIN
        return status

    def active(self, name: str, *, seen_by: str = "a") -> str:
        """The key that an environment seals with."""
        [(found,)] = self.balanced.query(
            self[seen_by],
            f"SELECT id FROM dek WHERE state = 'active' AND owner_environment_id = '{name}'",
        )
        return str(found)

    def states(self, seen_by: str) -> dict[str, str]:
        """By key: its state in that environment's database."""
        return dict(self.balanced.query(self[seen_by], "SELECT id, state FROM dek"))

    async def everywhere(self, key_id: str, state: str) -> None:
        async def done() -> bool:
            return {self.states(name).get(key_id) for name in ALL} == {state}

        await until(done, timeout_s=90)

    async def all_are_up(self) -> None:
        await until(lambda: self.balanced.is_up(*ALL), timeout_s=120)
        await until(lambda: self.balanced.serve(*ALL), timeout_s=120)

    @asynccontextmanager
    async def speaking_as(self, name: str) -> AsyncIterator[Callable[..., Awaitable[bytes]]]:
        """Whoever has the TLS identity of that environment's agent: request(to, method, path, body)."""
        one, tenant = self[name], self.balanced.site.tenant
        trust = PeerTrust(tenant=TENANT, root=tenant.root.certificate, revocations=None, clock=SystemClock())
        files = one.directory / "tls.pem", one.directory / "tls.key"
        transport = PeerTransport(trust=trust, certificate_file=files[0], key_file=files[1])

        async def request(to: str, method: str, path: str, body: bytes | None = None) -> bytes:
            peer = PeerAddress(self[to].url, self[to].agent_id)
            return await transport.request(peer, method, path, body, timeout_s=30)

        try:
            yield request
        finally:
            await transport.close()


@asynccontextmanager
async def site_for_tests(
    directory: Path, *, interval_s: float = 15, clocks: Mapping[str, WallClock] | None = None
) -> AsyncIterator[Site]:
    """HAProxy asks the lb-agent through a gate; two administrators are known.

    A key is valid for two *interval_s*. *clocks*: of the proxies of some environments.
    """
    rhythm = (interval_s, 2 * interval_s, 0.3)
    async with (
        balanced_site(
            directory,
            rhythm=rhythm,
            proxy_environments={name: clock.environment for name, clock in (clocks or {}).items()},
        ) as balanced,
        Gate(balanced.lb_agent_port) as gate,
    ):
        configuration = directory / "haproxy.cfg"
        before = configuration.read_text()
        after = before.replace(f"agent-port {balanced.lb_agent_port}", f"agent-port {gate.port}")
        assert after != before
        configuration.write_text(after)
        await balanced.haproxy.kill()
        await balanced.haproxy.start()
        files = administrators(directory)
        site = Site(balanced, gate, Commands(set()), files)
        for name in files:
            await site.ask(
                balanced.manager, "admin add", name, "--public-key", str(directory / f"{name}.pub")
            )
        await site.all_are_up()
        yield site


@dataclass(frozen=True)
class Call:
    """One call at a proxy: when, by the right wall clock, and what came of it."""

    began_s: float
    ended_s: float
    status: int
    code: str | None


async def call(proxy: SiteProxy) -> Call:
    began_s = time.time()
    status, document = await proxy.call(f"keys/{KEY}/encrypt", {"plaintext": PLAIN})
    return Call(began_s, time.time(), status, document.get("code"))


async def promote(site: Site, one: SiteEnvironment) -> None:
    """By a file that both administrators sign, as `env promotion`, `env sign` and `env promote` do."""
    file = site.balanced.site.directory / "promotion.json"
    file.unlink(missing_ok=True)
    await site.ask(one, "env promotion", str(file))
    for name, key in site.files.items():
        await site.ask(one, "env sign", str(file), "--admin", name, "--key", str(key))
    await site.ask(one, "env promote", str(file))


async def in_step(site: Site) -> bool:
    return len({await position(site[name]) for name in ALL}) == 1


async def position(one: SiteEnvironment) -> tuple[int, int, str]:
    listed = await one.ask("env_list")
    return int(listed["term"]), int(listed["epoch"]), str(listed["digest"])
