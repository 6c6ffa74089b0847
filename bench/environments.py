"""Several environments (system B): rows `breach_rerouted`, `breach_databases`, `front_encrypt_1k`,
`breach_proxies_1000`.

1. A site of real processes: three environments with AES, RSA-3072 and EC P-256 KEKs in SoftHSM2 tokens, a
   SQLite database each, one proxy each, HAProxy by the product's configuration; callers as in the demo.
2. Times of a breach count from the moment at which `incident open` is asked for: `breach_rerouted` until the
   last answer that the breached environment gave to any caller, `breach_databases` until every database says
   that its key is disabled. No caller may see an error, or there is no row.
3. `front_encrypt_1k`: 1 KB encryptions per second at one data plane through HAProxy, beside the same without
   HAProxy, in turns; the others are drained meanwhile.
4. `breach_proxies_1000`: as bench/agent.py, rule 1, with all that an agent among others runs, and proxies
   that take its word. No push of keys is under way when it begins. From `incident open` until 99 % of 1,000
   proxies refuse by the environment's word *and* have acknowledged that their key is withdrawn, and until all
   have; each of the two beside it, and the CPU time of the agent (this process) and of the thousand proxies
   (the other one): on two free cores it cannot be less than either.
5. Everything shares the machine's cores; files are in memory.
"""

import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
import uvloop

from bench import agent as agents
from bench.machine import BenchError, memory_directory
from bench.results import Row, compare
from deploy.demo_environments_callers import Callers
from key_agent.config import EnvironmentsSettings
from key_agent.environments.assembly import Environments
from key_agent.environments.peers.telling import Telling, Told
from key_agent.environments.states import EnvironmentState
from runtime.observe import configure_logging
from tests.environments.site import until
from tests.scenarios.balanced_site import KEY, Balanced, balanced_site, more_calls

NAMES: Final = ("breach_rerouted", "breach_databases", "front_encrypt_1k")
ROUNDS: Final = 3
CONNECTIONS: Final = 30
CALLERS: Final = 12
SECONDS: Final = 2.0
BREACHED: Final = "b"
_NO_QUOTA: Final = """
[encryption_service.quota]
tenant_requests_per_s = 1e7
tenant_burst = 1e7
credential_requests_per_s = 1e7
credential_burst = 1e7
"""
AT_MOST_S: Final = 1.0
"""Until callers are sent elsewhere, and until an incident stands in all databases."""


def run() -> list[Row]:
    """Rules 2 and 3."""
    with memory_directory() as directory:
        directory.chmod(0o700)
        return uvloop.run(_site(directory))


async def _site(directory: Path) -> list[Row]:
    async with balanced_site(directory, proxy_settings=_NO_QUOTA) as balanced:
        rows = await _front(balanced, directory)
        breaches = [await _breach(balanced) for _ in range(ROUNDS)]
    found = {name: [one[name] for one in breaches] for name in breaches[0]}
    return [
        Row(
            name="breach_rerouted",
            value=statistics.median(found["rerouted_s"]),
            unit="s",
            extra={
                "at_most": AT_MOST_S, "worst_s": max(found["rerouted_s"]), "rounds": ROUNDS, "errors": 0,
                "haproxy_down_s": statistics.median(found["down_s"]),
                "calls": int(sum(found["calls"])),
            },
        ),
        Row(
            name="breach_databases",
            value=statistics.median(found["databases_s"]),
            unit="s",
            extra={
                "at_most": AT_MOST_S, "worst_s": max(found["databases_s"]), "rounds": ROUNDS, "databases": 3,
                "command_s": statistics.median(found["command_s"]),
            },
        ),
        *rows,
    ]  # fmt: skip


async def _breach(balanced: Balanced) -> dict[str, float]:
    """One breach under load, and the way back."""
    async with balanced.calling(count=CALLERS, pause_s=0.01) as callers:
        asked_s = time.monotonic()
        opening = asyncio.create_task(balanced.open_incident(BREACHED, "runtime"), name="bench:open")
        disabled = asyncio.create_task(_all_disabled(balanced), name="bench:databases")
        down = asyncio.create_task(until(lambda: balanced.is_up("a", "c")), name="bench:haproxy")
        incident = await opening
        command_s = time.monotonic() - asked_s
        await disabled
        databases_s = disabled.result() - asked_s
        await down
        down_s = down.result()
        await more_calls(callers, 300)
        _check(callers)
        owners = balanced.owners()
        last_s = max((one.at_s for one in callers.sealed if owners[one.version] == BREACHED), default=asked_s)
        await balanced.bring_back(BREACHED, incident)
        await until(lambda: balanced.is_up("a", "b", "c"))
        await until(lambda: balanced.serve("a", "b", "c"))
        _check(callers)
    await balanced.manager.ask("incident_close", incident=incident)
    return {
        "rerouted_s": max(0.0, last_s - asked_s),
        "databases_s": databases_s,
        "command_s": command_s,
        "down_s": down_s,
        "calls": callers.answered,
    }


def _check(callers: Callers) -> None:
    if callers.errors:
        raise BenchError(f"{len(callers.errors)} errors: {callers.errors[:3]}")


async def _all_disabled(balanced: Balanced) -> float:
    """When every database had said so."""

    async def done() -> bool:
        return all(
            (BREACHED, "active") not in balanced.keys(one) for one in balanced.site.environments.values()
        )

    await until(done)
    return time.monotonic()


async def _front(balanced: Balanced, directory: Path) -> list[Row]:
    for name in ("b", "c"):
        await balanced.manager.ask("env_drain", environment=name)
    await until(lambda: balanced.is_up("a"))
    front = int(balanced.front.rpartition(":")[2])
    straight = balanced["a"].proxies[0].service_port
    sides: dict[int, list[dict[str, float]]] = {front: [], straight: []}
    for turn in range(-1, ROUNDS):
        for port, figures in sides.items():
            found = await asyncio.to_thread(_load, balanced, directory, port)
            if turn >= 0:
                figures.append(found)
    for name in ("b", "c"):
        await balanced.manager.ask("env_undrain", environment=name)
    await until(lambda: balanced.is_up("a", "b", "c"))
    await until(lambda: balanced.serve("a", "b", "c"))
    through, beside = sides.values()
    added_ms = statistics.median(one["p99_ms"] for one in through) - statistics.median(
        one["p99_ms"] for one in beside
    )
    return [
        compare(
            "front_encrypt_1k",
            "requests/s",
            [one["per_s"] for one in through],
            [one["per_s"] for one in beside],
            at_least=2000.0,
            connections=CONNECTIONS,
            p50_ms=statistics.median(one["p50_ms"] for one in through),
            p99_ms=statistics.median(one["p99_ms"] for one in through),
            p99_added_ms=added_ms,
        )
    ]


def _load(balanced: Balanced, directory: Path, port: int) -> dict[str, float]:
    plain = base64.b64encode(os.urandom(1024)).decode()
    content = json.dumps({"plaintext": plain}).encode()
    head = (
        f"POST /sealgate/v1/keys/{KEY}/encrypt HTTP/1.1\r\nHost: localhost:{port}\r\n"
        f"Authorization: Bearer {balanced.token}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    file = directory / f"requests-{port}"
    file.write_bytes(msgspec.msgpack.encode([head.encode() + content]))
    argv = [sys.executable, "-m", "bench.service_load", "--port", str(port), "--requests", str(file)]
    argv += ["--connections", str(CONNECTIONS), "--seconds", str(SECONDS)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS + 90, check=False)
    if done.returncode:
        raise BenchError(f"load on port {port}: {done.stderr.strip()[-1000:]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


# A thousand proxies.

PROXIES_NAMES: Final = ("breach_proxies_1000",)
PROXIES_AT_MOST_S: Final = 2.0
ALL_PROXIES_AT_MOST_S: Final = 5.0


def proxies() -> list[Row]:
    """Rule 4."""
    configure_logging(json=True)
    with Path(os.devnull).open("w") as nowhere:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(nowhere))
        try:
            with memory_directory() as directory:
                directory.chmod(0o700)
                found = _with_proxies(directory, _breach_of_many)
        finally:
            structlog.reset_defaults()
    return [
        Row(
            name="breach_proxies_1000",
            value=found["p99_s"],
            unit="s",
            extra={"at_most": PROXIES_AT_MOST_S, "all_at_most": ALL_PROXIES_AT_MOST_S} | {
                name: value for name, value in found.items() if name != "p99_s"
            },
        )
    ]  # fmt: skip


def _with_proxies(
    directory: Path, measure: Callable[["agents.Running"], Coroutine[Any, Any, dict[str, float]]]
) -> dict[str, float]:
    site = agents.make_site(directory, agents.PROXIES, 1)
    environments = EnvironmentsSettings(host="127.0.0.1", port=0)
    site = replace(site, settings=msgspec.structs.replace(site.settings, environments=environments))
    with agents.receivers(directory) as ports, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(agents.run_site(site, ports, measure))


async def _rest(running: "agents.Running", telling: Telling) -> None:
    """Until nothing is under way: the new rows have had each proxy told, and its keys pushed once more."""
    agent = running.agent
    deadline_s = time.monotonic() + agents.PATIENCE_S
    schedule = agent.refresh.schedule

    def knows(told: Told) -> bool:
        return told.error is None and told.word == telling.word

    while (
        any(map(schedule.is_in_flight, agent.targets.proxies))
        or ((due_s := schedule.next_due_s()) is not None and due_s <= agent.clock.boot_s())
        or sum(map(knows, telling.told.values())) < agents.PROXIES
    ):
        if time.monotonic() > deadline_s:
            raise BenchError("pushes of keys do not come to rest, or not everybody is told")
        await asyncio.sleep(0.05)


async def _breach_of_many(running: "agents.Running") -> dict[str, float]:
    others = running.agent.environments
    if not isinstance(others, Environments):
        raise BenchError("the agent has no section [environments]")
    async with others.working():
        return await _timed_breach(running, others)


async def _timed_breach(running: "agents.Running", others: Environments) -> dict[str, float]:
    agent, operations, telling = running.agent, running.operations, others.telling
    if telling is None:
        raise BenchError("nobody tells the proxies")
    await operations.env_init(url="https://localhost:8330")
    await running.push()
    await _rest(running, telling)
    before = dict(agent.withdrawals_seen)
    began_s, agent_s, others_s = time.perf_counter(), time.process_time(), agents.children_cpu_s()
    opening = asyncio.create_task(
        operations.incident_open(environment=agent.environment_id, kind="runtime", reason="bench"),
        name="bench:open",
    )
    opened: list[float] = []
    opening.add_done_callback(lambda _: opened.append(time.perf_counter() - began_s))
    acknowledged: dict[str, float] = {}
    told: dict[str, float] = {}
    deadline_s = time.monotonic() + agents.PATIENCE_S
    while len(acknowledged) < agents.PROXIES or len(told) < agents.PROXIES:
        now_s = time.perf_counter() - began_s
        for name, delivery in agent.withdrawals_seen.items():
            if delivery.is_complete and delivery is not before.get(name):
                acknowledged.setdefault(name, now_s)
        for name, one in telling.told.items():
            if one.error is None and one.word.state == EnvironmentState.HEALING:
                told.setdefault(name, now_s)
        if time.monotonic() > deadline_s:
            raise BenchError(
                f"{agents.PROXIES - len(acknowledged)} proxies have not acknowledged, "
                f"{agents.PROXIES - len(told)} do not know"
            )
        await asyncio.sleep(0.005)
    await opening
    agent_s, others_s = time.process_time() - agent_s, agents.children_cpu_s() - others_s
    took_s = sorted(max(at_s, told[name]) for name, at_s in acknowledged.items())
    withdrawn_s, told_s = sorted(acknowledged.values()), sorted(told.values())
    place = int(agents.PROXIES * 0.99)
    pushed = sum(delivery.at_ms > 0 for delivery in agent.deliveries.values())
    if pushed != agents.PROXIES:
        raise BenchError("not every proxy had its key before")
    return {
        "agent_cpu_s": agent_s,
        "proxies_cpu_s": others_s,
        "command_s": opened[0],
        "p50_s": took_s[len(took_s) // 2],
        "p99_s": took_s[place],
        "withdrawn_p99_s": withdrawn_s[place],
        "told_p99_s": told_s[place],
        "all_s": took_s[-1],
    }
