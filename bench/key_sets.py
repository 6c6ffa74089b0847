"""Row `breach_key_set`: how long a breached signing key stays in the key sets that verifiers fetch (B-40).

1. A site of real processes: three environments, a proxy each, one service that signs; no load.
2. The time counts from the moment at which `incident open` is asked for, of kind `dek` for the key of one
   environment, until neither of the other environments' key sets has it and no environment believes a token
   of it. Verifiers may keep a set for one second more (`max-age=1`).
3. The key is replaced between two rounds.
"""

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any, Final

import aiohttp
import uvloop

from bench.machine import BenchError, memory_directory
from bench.results import Row
from tests.environments.site import EnvironmentsSite, SiteEnvironment, environments_site, until

NAMES: Final = ("breach_key_set",)
SERVICE: Final = "signer"
ROUNDS: Final = 5
RHYTHM: Final = (30, 90, 0.3)
AT_MOST_S: Final = 1.0
"""Until no key set has a key that was disabled (tests/scenarios/README.md, B-40)."""


def run() -> list[Row]:
    with memory_directory() as directory:
        directory.chmod(0o700)
        found = uvloop.run(_site(directory))
    return [
        Row(
            name="breach_key_set",
            value=statistics.median(found["key_set_s"]),
            unit="s",
            extra={
                "at_most": AT_MOST_S, "worst_s": max(found["key_set_s"]), "rounds": ROUNDS,
                "tokens_refused_s": statistics.median(found["tokens_s"]),
                "tokens_refused_worst_s": max(found["tokens_s"]),
            },
        )
    ]  # fmt: skip


async def _site(directory: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"key_set_s": [], "tokens_s": []}
    async with (
        environments_site(directory, proxies_each=1, rhythm=RHYTHM, named=True) as site,
        site.agents(),
        site.proxies(),
    ):
        await site.unite()
        await site.add_service(SERVICE, use="sign", algorithm="ES256")
        async with aiohttp.ClientSession() as session:
            for _ in range(ROUNDS):
                await until(lambda: _all_have(site, session, 3), timeout_s=90)
                key_set_s, tokens_s = await _breach(site, session)
                found["key_set_s"].append(key_set_s)
                found["tokens_s"].append(tokens_s)
    return found


async def _breach(site: EnvironmentsSite, session: aiohttp.ClientSession) -> tuple[float, float]:
    a, b, c = site.environments.values()
    status, token = await b.proxies[0].call("token", {"key": SERVICE, "subject": "ann", "audience": "shop"})
    if status != 200:
        raise BenchError(f"b issues no token: {token}")

    async def gone() -> bool:
        sets = [await _key_ids(one, session) for one in (a, c)]
        return all(found and token["key_id"] not in found for found in sets)

    async def refused() -> bool:
        question = {"key": SERVICE, "token": token["token"], "audience": "shop"}
        answers = [await one.proxies[0].call("token/verify", question) for one in (a, b, c)]
        return {status for status, _ in answers} == {423}

    began_s = time.monotonic()
    opening = asyncio.create_task(
        a.ask(
            "incident_open", environment="b", kind="dek", keys=[token["key_id"]], reason="bench", by="bench"
        ),
        name="bench:open",
    )
    await until(gone)
    key_set_s = time.monotonic() - began_s
    await until(refused)
    tokens_s = time.monotonic() - began_s
    opened = await opening
    await a.ask("incident_rekey", incident=opened["incident"])

    async def rekeyed() -> bool:
        return bool((await a.ask("incident_status", incident=opened["incident"]))["state"] == "rekeyed")

    await until(rekeyed, timeout_s=90)
    await a.ask("incident_close", incident=opened["incident"])
    return key_set_s, tokens_s


async def _key_ids(at: SiteEnvironment, session: aiohttp.ClientSession) -> set[str]:
    proxy = at.proxies[0]
    url = f"http://127.0.0.1:{proxy.service_port}/.well-known/jwks.json"
    async with session.get(url, headers={"Authorization": f"Bearer {proxy.token}"}) as answer:
        document: dict[str, Any] = await answer.json(content_type=None)
    return {key["kid"] for key in document.get("keys", [])}


async def _all_have(site: EnvironmentsSite, session: aiohttp.ClientSession, count: int) -> bool:
    """Whether every environment shows so many keys, and seals with one."""
    try:
        sets = [await _key_ids(one, session) for one in site.environments.values()]
    except aiohttp.ClientConnectionError:  # its service does not listen yet
        return False
    return all(len(found) == count for found in sets)
