"""Rows `breach_databases_10000`, `rejoin_10000`: an environment with 10,000 keys is breached, and comes back
with a new KEK and all of them.

1. Two environments as real processes with SoftHSM2 tokens and SQLite: the manager's with an AES KEK, the
   other with an RSA-3072 KEK. 5,000 services, a key of each environment in each. No proxy hosts them: what
   proxies are told is measured by `breach_proxies_1000` and `push_1000`.
2. The environment is breached (kind `kek`: every wrap there is worthless) and gets a new KEK. The figure is
   the time of `env rejoin`: confirmation of the load balancer, 10,000 keys sealed by the HSM of the manager,
   opened by the new KEK, compared and stored, proven once more, active in one epoch.
3. Most of it is 10,000 RSA operations of SoftHSM2, one after the other, on what the machine gives to it:
   `rsa_3072_ms` is the time of one of them on this machine, by itself, beside it.
4. Meanwhile both agents are asked for their list of environments, again and again, as an operator would: the
   longest that either took stands beside the figure.
5. `join_s`: the same for the first time, with 5,000 keys made for the environment that joins.
6. `breach_databases_10000`: from `incident open` (kind `kek`: a row for each of the 10,000 keys) until the
   databases of both environments have it, and the agent of the breached one acts on it. Beside it until the
   command has answered, and the CPU time that each agent has used meanwhile: each row is signed by one and
   verified by the other.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import uvloop
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from bench.agent import write_services
from bench.machine import BenchError, memory_directory
from bench.results import Row
from envelope.keys import NetworkService
from key_agent import config
from key_agent.app import opened
from tests.environments.site import TENANT, EnvironmentsSite, SiteEnvironment, environments_site, until
from tests.scenarios.balanced_site import Balanced

NAMES: Final = ("breach_databases_10000", "rejoin_10000")
AT_MOST_S: Final = 60.0
"""Until an environment with that many keys is active again."""
TOLD_AT_MOST_S: Final = 1.0
"""From an incident until it stands in all databases."""
KEYS: Final = 10_000
_RHYTHM: Final = (300, 330, 2.0)
_PATIENCE_S: Final = 900.0
_ASK_S: Final = 0.1
_RSA_ROUNDS: Final = 200


def run() -> list[Row]:
    with memory_directory() as directory:
        directory.chmod(0o700)
        told, found = uvloop.run(measure(directory, KEYS))
    value = found.pop("rejoin_s")
    return [
        Row(
            name="breach_databases_10000",
            value=told.pop("databases_s"),
            unit="s",
            extra={"at_most": TOLD_AT_MOST_S, "keys": KEYS, "databases": 2, **told},
        ),
        Row(
            name="rejoin_10000",
            value=value,
            unit="s",
            extra={"at_most": AT_MOST_S, "keys": KEYS, "kek": "rsa-3072", **found},
        ),
    ]


async def measure(directory: Path, keys: int) -> tuple[dict[str, float], dict[str, float]]:
    """What the breach took, and the way back."""
    kinds = {"a": "aes-256", "b": "rsa-3072"}
    async with environments_site(directory, kinds=kinds, proxies_each=1, rhythm=_RHYTHM) as site:
        await _fill(site, keys // 2)
        balanced = Balanced(site)
        async with site.agents():
            began_s = time.monotonic()
            await _join(site)
            await until(lambda: _has(balanced, keys), timeout_s=_PATIENCE_S)
            join_s = time.monotonic() - began_s
            await balanced.write_configuration()
            try:
                await balanced.lb_agent.start()
                incident, told = await _breach(balanced, keys)
                await balanced.rekey(incident)
                await balanced.heal_complete("b")
                before = _cpu_s(site["a"]), _cpu_s(site["b"])
                async with _asking(site["a"]) as manager, _asking(site["b"]) as other:
                    began_s = time.monotonic()
                    joined = await balanced.rejoin("b")
                    rejoin_s = time.monotonic() - began_s
                after = _cpu_s(site["a"]), _cpu_s(site["b"])
            finally:
                await balanced.lb_agent.stop()
            if joined["state"] != "active" or not await _has(balanced, keys):
                raise BenchError(f"{incident}: b is {joined['state']}: {joined['problems']}")
    return told, {
        "rejoin_s": rejoin_s,
        "join_s": join_s,
        "rsa_3072_ms": await asyncio.to_thread(_rsa_ms),
        "manager_slowest_answer_s": max(manager),
        "slowest_answer_s": max(other),
        "manager_cpu_s": after[0] - before[0],
        "cpu_s": after[1] - before[1],
    }


async def _join(site: EnvironmentsSite) -> None:
    a, b = site["a"], site["b"]
    await a.ask("env_init", url=a.url)
    fingerprint = (await a.ask("env_identity"))["fingerprint"]
    asked = await b.ask(
        "env_join", url=b.url, manager_url=a.url, manager_agent=a.agent_id, fingerprint=fingerprint
    )
    await a.ask("env_add", environment="b", fingerprint=asked["fingerprint"])


async def _has(balanced: Balanced, keys: int) -> bool:
    """Whether b is active with so many active keys, all of them under its KEK of today."""
    status = await balanced.manager.ask("env_status", environment="b")
    if status["state"] != "active":
        await asyncio.sleep(0.5)  # each look costs the manager some of what is measured
        return False
    rows = balanced.query(
        balanced["b"],
        "SELECT count(*) FROM dek d JOIN dek_wrap w ON w.dek_id = d.id "
        f"WHERE d.state = 'active' AND w.state = 'verified' AND w.kek_id = '{status['kek']}'",
    )
    return rows == [(keys,)]


async def _breach(balanced: Balanced, keys: int) -> tuple[str, dict[str, float]]:
    """Rule 6: the incident, and how long it took."""
    a, b = balanced["a"], balanced["b"]
    before = _cpu_s(a), _cpu_s(b)
    began_s = time.monotonic()
    incident = await balanced.open_incident("b", "kek")
    command_s = time.monotonic() - began_s
    await until(lambda: _heals(b), timeout_s=_PATIENCE_S)
    agent_s = time.monotonic() - began_s
    await until(lambda: _has_rows(balanced, keys), timeout_s=_PATIENCE_S)
    databases_s = time.monotonic() - began_s
    after = _cpu_s(a), _cpu_s(b)
    return incident, {
        "databases_s": databases_s,
        "agent_s": agent_s,
        "command_s": command_s,
        "manager_cpu_s": after[0] - before[0],
        "cpu_s": after[1] - before[1],
    }


async def _has_rows(balanced: Balanced, keys: int) -> bool:
    """Whether every database has what the incident means for each key."""
    query = "SELECT count(*) FROM shared_row WHERE kind = 'incident-key'"
    return all(balanced.query(balanced[name], query) == [(keys,)] for name in "ab")


async def _heals(one: SiteEnvironment) -> bool:
    """Whether its own agent knows that it heals."""
    status = await one.ask("env_status", environment=one.name)
    return bool(status["state"] == "healing")


@asynccontextmanager
async def _asking(one: SiteEnvironment) -> AsyncIterator[list[float]]:
    """How long each question took, while the block runs."""
    took_s: list[float] = []

    async def ask() -> None:
        while True:
            began_s = time.monotonic()
            await one.ask("env_list")
            took_s.append(time.monotonic() - began_s)
            await asyncio.sleep(_ASK_S)

    asking = asyncio.create_task(ask(), name=f"bench:ask {one.name}")
    try:
        yield took_s
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        if not took_s or not asking.cancelled():
            raise BenchError(f"the agent of {one.name} did not answer: {asking}")


def _rsa_ms() -> float:
    """CPU of one private operation, without an HSM around it: what the machine can do at best."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=3072)
    scheme = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
    sealed = key.public_key().encrypt(bytes(32), scheme)
    began_s = time.thread_time()
    for _ in range(_RSA_ROUNDS):
        key.decrypt(sealed, scheme)
    return (time.thread_time() - began_s) * 1000 / _RSA_ROUNDS


def _cpu_s(one: SiteEnvironment) -> float:
    """Of its agent and the workers that talk to its HSM."""
    ticks = 0
    pids = [one.agent.pid]
    for pid in pids:
        pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))  # a worker that has ended is its agent's
    return ticks / os.sysconf("SC_CLK_TCK")


async def _fill(site: EnvironmentsSite, services: int) -> None:
    """Services with a key each in the first environment's database, before its agent runs; rule 1."""
    a = site["a"]
    proxy = a.proxies[0]
    proxy.host(site.tenant, "files")
    pem = proxy.certificate_files["files"].read_text()
    os.environ.update(a.hsm.environment)
    async with opened(config.load(a.config, os.environ)) as agent:
        places: list[Any] = [
            (NetworkService(TENANT, f"s{number:05}"), proxy.name, pem) for number in range(services)
        ]
        await write_services(agent, [], places)
        await agent.registry.remove_proxy(proxy.name, now_ms=agent.now_ms())
