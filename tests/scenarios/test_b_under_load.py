"""B-05, 07, 12, 13, 23, 24, 31, 32, 36, 51, 52, 55, 60: environments behind HAProxy, with callers who count.

1. One site for all of them, in the order of this file; each leaves all environments active, but the last one.
2. Not a single error is allowed to any caller where the reference allows none. A refusal because of a key's
   state is none, if it was that key's turn.
3. What is fast in the reference (50 ms, 1 s) is measured in bench/environments.py: here it has to happen.
"""

import asyncio
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from deploy.demo_environments_callers import Callers
from tests.environments.site import until
from tests.scenarios.balanced_site import KEY, Balanced, balanced_site, body, more_calls

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALL = ("a", "b", "c")
WITH_A_FOURTH = {"a": "aes-256", "b": "rsa-3072", "c": "ec-p256", "d": "aes-256"}


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="balanced")
async def balanced_fixture(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Balanced]:
    directory = tmp_path_factory.mktemp("b")
    async with balanced_site(directory, kinds=WITH_A_FOURTH, united=ALL) as made:
        yield made


def no_errors(callers: Callers) -> None:
    assert callers.errors == []


def refused_keys(balanced: Balanced, callers: Callers) -> set[str]:
    owners = balanced.owners()
    return {owners[one.version] for one in callers.refused}


async def answers_of(balanced: Balanced, operation: str, content: dict[str, Any], count: int) -> list[Any]:
    """So many calls through HAProxy, one after the other: status, document, Retry-After."""
    found = []
    headers = {"Authorization": f"Bearer {balanced.token}", "Content-Type": "application/json"}
    sent = json.dumps(content).encode()
    async with aiohttp.ClientSession(headers=headers) as session:
        for _ in range(count):
            url = f"http://{balanced.front}/sealgate/v1/keys/{KEY}/{operation}"
            async with session.post(url, data=io.BytesIO(sent)) as answer:
                document = await answer.json(content_type=None)
                found.append((answer.status, document, answer.headers.get("Retry-After")))
    return found


async def test_b_12_13_sealed_in_one_and_opened_in_all_each_with_its_own_key(balanced: Balanced) -> None:
    owners = balanced.owners()
    for name in ALL:
        _, sealed = await balanced[name].proxies[0].call(f"keys/{KEY}/encrypt", {"plaintext": "aGVsbG8="})
        assert owners[sealed["version"]] == name, "B-13: the key's owner is the environment that serves"
        before = await balanced.haproxy_says()
        found = await answers_of(balanced, "decrypt", {"ciphertext": sealed["ciphertext"]}, 100)
        assert {(status, document.get("plaintext")) for status, document, _ in found} == {(200, "aGVsbG8=")}
        after = await balanced.haproxy_says()
        served = {server: after[server][1] - before[server][1] for server in ("a1", "b1", "c1")}
        assert sum(served.values()) == 100
        assert all(served.values()), f"B-12: not all three have opened it: {served}"


async def test_b_07_a_rotation_under_load_leaves_each_environment_one_active_key(balanced: Balanced) -> None:
    wrong: list[object] = []
    looks = 0

    async def watch() -> None:
        nonlocal looks
        while True:
            for one in (balanced[name] for name in ALL):
                active = [owner for owner, status in balanced.query(one, _ACTIVE) if status == "active"]
                if sorted(active) != list(ALL):
                    wrong.append((one.name, active))
            looks += 1
            await asyncio.sleep(0.01)

    before = balanced.owners()
    watching = asyncio.create_task(watch(), name="watch")
    async with balanced.calling() as callers:
        await balanced.manager.ask("rotate", service=KEY)
        await until(lambda: _active_versions_are_new(balanced, before), timeout_s=90)
        await until(lambda: _seal_with_new_keys(balanced, before), timeout_s=90)
        seals_s = time.monotonic()
        await more_calls(callers, 200)
        newest = balanced.by_owner(one for one in callers.sealed if one.began_s > seals_s)
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    assert looks > 10
    assert wrong == [], "never none, never two active keys of one environment"
    no_errors(callers)
    assert callers.refused == [], "what the older keys sealed still opens, everywhere"
    assert set(newest) == set(ALL)
    new = {one.version for one in callers.sealed} - before.keys()
    assert len(new) == len(ALL), "all three seal with their new keys"


_ACTIVE = "SELECT owner_environment_id, state FROM dek"


async def _active_versions_are_new(balanced: Balanced, before: dict[int, str]) -> bool:
    rows = balanced.query(balanced.manager, "SELECT version FROM dek WHERE state = 'active'")
    return len(rows) == len(ALL) and not {int(version) for (version,) in rows} & before.keys()


async def _seal_with_new_keys(balanced: Balanced, before: dict[int, str]) -> bool:
    """Every proxy has them by now: it gets them after the rows say that they are active."""
    for name in ALL:
        _, sealed = await balanced[name].proxies[0].call(f"keys/{KEY}/encrypt", {"plaintext": "aGVsbG8="})
        if sealed.get("version", 0) in {0, *before}:
            return False
    return True


async def test_b_05_a_fourth_environment_joins_under_load(balanced: Balanced) -> None:
    """It stands in HAProxy's configuration from the start, and its proxy has the key's name."""
    d = balanced["d"]
    d.proxies[0].host(balanced.site.tenant, KEY)
    await until(lambda: d.proxies[0].hosts(KEY))
    async with balanced.calling() as callers:
        assert await balanced.is_up(*ALL), "nothing is sent to one that stands in no row"
        await balanced.site.join("d", manager="a")
        wraps = balanced.query(d, "SELECT count(*) FROM dek_wrap WHERE state = 'verified'")
        live = balanced.query(balanced.manager, "SELECT count(*) FROM dek WHERE state <> 'destroyed'")
        assert wraps == live, "active, and every key is proven there"
        await d.add_service(KEY, d.proxies[0], balanced.site.tenant)
        await until(lambda: balanced.is_up(*ALL, "d"), timeout_s=60)
        back_s = time.monotonic()
        await until(lambda: _seals(balanced, callers, "d", since_s=back_s), timeout_s=60)
        # Out again, for what follows: it finishes what it has begun, and gets nothing new.
        await balanced.manager.ask("env_drain", environment="d")
        await until(lambda: balanced.is_up(*ALL), timeout_s=60)
        drained_s = time.monotonic()
        await more_calls(callers, 100)
    no_errors(callers)
    assert callers.refused == []
    late = balanced.by_owner(one for one in callers.sealed if one.began_s > drained_s)
    assert set(late) == set(ALL)


async def _seals(balanced: Balanced, callers: Callers, name: str, *, since_s: float) -> bool:
    sealed = [one for one in list(callers.sealed) if one.began_s > since_s]
    return name in balanced.by_owner(sealed)


async def test_b_23_31_32_breached_routed_around_failed_once_and_back(balanced: Balanced) -> None:
    b = balanced["b"]
    _, kept = await b.proxies[0].call(f"keys/{KEY}/encrypt", {"plaintext": "aGVsbG8="})
    keys_before = {one: balanced.keys(balanced[one]) for one in ALL}
    async with balanced.calling() as callers:
        incident = await balanced.open_incident("b", "runtime")
        await until(lambda: balanced.is_up("a", "c"), timeout_s=60)
        await until(lambda: _refuses(balanced, "b"))
        down_s = time.monotonic()
        await more_calls(callers, 200)
        no_errors(callers)
        late = balanced.by_owner(one for one in callers.sealed if one.began_s > down_s)
        assert set(late) == {"a", "c"}
        assert refused_keys(balanced, callers) <= {"b"}
        # Exactly the keys of b are disabled, in every database.
        for one in ALL:
            await until(lambda: _b_alone_is_disabled(balanced, one))  # noqa: B023 - awaited here
            now = balanced.keys(balanced[one])
            changed = {owner for owner, status in now ^ keys_before[one]}
            assert changed == {"b"}, (one, now)
        for name in ("a", "c"):
            await until(lambda: _opens_no_more(balanced, name, kept["ciphertext"]))  # noqa: B023 - awaited here

        # B-32: its new KEK is lost before anything was proven under it.
        await balanced.rekey(incident)
        made = await balanced.heal_complete("b")
        new_kek = f"SELECT count(*) FROM dek_wrap WHERE kek_id = '{made['kek']}'"
        assert balanced.query(b, new_kek) == [(0,)], "B-31: healing stores nothing by itself"
        await _destroy_kek(balanced, "b")
        failed = await _try_to_rejoin(balanced, "b")
        assert await balanced.state("b") == "healing", failed
        assert await balanced.is_up("a", "c"), "the balancer stays shut"
        assert balanced.query(b, new_kek) == [(0,)]

        # B-31: once more, with a KEK that lives.
        made = await balanced.heal_complete("b")
        back_s = time.monotonic()
        joined = await balanced.rejoin("b")
        assert (joined["state"], joined["problems"]) == ("active", {})
        under = f"SELECT DISTINCT kek_id FROM dek_wrap WHERE kek_id <> '{made['kek']}'"
        live = "SELECT count(*) FROM dek d JOIN dek_wrap w ON w.dek_id = d.id WHERE d.state = 'active'"
        assert balanced.query(b, f"{live} AND w.kek_id = '{made['kek']}'") >= [(3,)], balanced.query(b, under)
        await until(lambda: balanced.is_up(*ALL), timeout_s=60)
        await until(lambda: _seals(balanced, callers, "b", since_s=back_s), timeout_s=60)
    no_errors(callers)
    assert refused_keys(balanced, callers) <= {"b"}
    await balanced.manager.ask("incident_close", incident=incident)


async def _opens_no_more(balanced: Balanced, name: str, ciphertext: str) -> bool:
    """It says that this key may not be used; until its proxy was told, it opens."""
    status, _ = await balanced[name].proxies[0].call(f"keys/{KEY}/decrypt", {"ciphertext": ciphertext})
    assert status in {200, 409, 423}
    return status != 200


async def _b_alone_is_disabled(balanced: Balanced, name: str) -> bool:
    found = balanced.keys(balanced[name])
    return ("b", "disabled") in found and ("b", "active") not in found


async def _destroy_kek(balanced: Balanced, name: str) -> None:
    """Another hand on its HSM."""
    one = balanced[name]
    kek = (await one.ask("kek_status"))["kek"]
    named = {"label": kek["label"], "id": kek["object_id"], "class": "PRIVATE_KEY"}
    gone = await asyncio.to_thread(one.hsm.run, "destroy", arguments=named)
    assert gone == 1, kek


async def _try_to_rejoin(balanced: Balanced, name: str) -> str:
    try:
        return str(await balanced.rejoin(name))
    except Exception as error:  # noqa: BLE001 - a refusal or a list of problems: the state is what counts
        return str(error)


async def test_b_24_51_52_the_lb_agent_is_dead_and_haproxy_restarts(balanced: Balanced) -> None:
    """Nobody tells HAProxy anything: the environment refuses by itself, then the watchdog acts."""
    balanced.lb_agent.freeze()
    try:
        async with balanced.calling() as callers:
            incident = await balanced.open_incident("c", "runtime")
            await until(lambda: _refuses(balanced, "c"))
            alone_s = time.monotonic()
            states = await balanced.haproxy_says()
            assert states["c1"][0] == "UP", "HAProxy has not been told"
            await more_calls(callers, 200)
            no_errors(callers)
            assert set(balanced.by_owner(o for o in callers.sealed if o.began_s > alone_s)) == {"a", "b"}
            # B-24: within the buffer nobody notices; beyond it a caller is told to come again.
            small = await answers_of(balanced, "encrypt", {"plaintext": body(36_000)}, 24)
            assert {status for status, _, _ in small} == {200}
            large = {"plaintext": body(10 << 20)}
            told: list[Any] = []

            async def is_told() -> bool:
                told.extend(await answers_of(balanced, "encrypt", large, 1))
                return bool(told[-1][0] == 503)

            await until(is_told)  # HAProxy still sends to it, and chooses at random
            for status, document, retry_after in told:
                assert status == 200 or (status, document["code"], bool(retry_after)) == (
                    503,
                    "env-healing",
                    True,
                ), document
            for _ in range(3):
                assert await _retrying(balanced, large) == 200
            # B-52: the watchdog takes all out while the lb-agent is silent.
            no_errors(callers)
        await balanced.watchdog.start()
        await until(balanced.is_up, timeout_s=60)
        [(status, document, retry_after)] = await answers_of(balanced, "encrypt", {"plaintext": "AA=="}, 1)
        assert (status, document["code"], retry_after) == (503, "no_environment", "2")
    finally:
        balanced.lb_agent.thaw()
    await until(lambda: balanced.is_up("a", "b"), timeout_s=60)
    await balanced.watchdog.stop()
    # B-51: HAProxy starts anew while c heals.
    before = await balanced.haproxy_says()
    await balanced.haproxy.kill()
    await balanced.haproxy.start()
    async with contextlib.AsyncExitStack() as stack:
        await until(lambda: balanced.is_up("a", "b"), timeout_s=60)
        callers = await stack.enter_async_context(balanced.calling())
        await more_calls(callers, 100)
        says = await balanced.haproxy_says()
        assert says["c1"][1] == 0, (before, says)
        no_errors(callers)
    await balanced.bring_back("c", incident)
    await until(lambda: balanced.is_up(*ALL), timeout_s=60)
    await balanced.manager.ask("incident_close", incident=incident)


async def _refuses(balanced: Balanced, name: str) -> bool:
    status, _ = await balanced[name].proxies[0].call(f"keys/{KEY}/encrypt", {"plaintext": "aGVsbG8="})
    return status == 503


async def _retrying(balanced: Balanced, content: dict[str, Any]) -> int:
    """As a client that heeds Retry-After; the last status."""
    status: int = 0
    for _ in range(20):
        [(status, _, _)] = await answers_of(balanced, "encrypt", content, 1)
        if status != 503:
            return status
        await asyncio.sleep(0.1)
    return status


async def test_b_55_a_thousand_calls_open_one_incident(balanced: Balanced) -> None:
    before = len((await balanced.manager.ask("incident_list"))["incidents"])
    places = asyncio.Semaphore(50)

    async def once() -> str:
        async with places:
            return await balanced.open_incident("b", "db", idempotency_key="one and the same")

    opened = await asyncio.gather(*(once() for _ in range(1000)))
    assert len(set(opened)) == 1
    assert len((await balanced.manager.ask("incident_list"))["incidents"]) == before + 1
    assert [await _incidents(balanced, one) for one in ALL] == [before + 1] * len(ALL)
    assert await balanced.serve(*ALL), "a copied database stops nobody"


async def _incidents(balanced: Balanced, name: str) -> int:
    """In its database, when that has the newest rows."""
    newest = (await balanced.manager.ask("env_list"))["epoch"]

    async def has_them() -> bool:
        return bool((await balanced[name].ask("env_list"))["epoch"] >= newest)

    await until(has_them)
    [(count,)] = balanced.query(balanced[name], "SELECT count(*) FROM shared_row WHERE kind = 'incident'")
    return int(count)


async def test_b_36_all_heal_and_the_first_that_is_healed_serves(balanced: Balanced) -> None:
    first = await balanced.open_incident("b", "runtime")
    await balanced.rekey(first)
    second = await balanced.open_incident("c", "runtime")
    await balanced.rekey(second)
    await until(lambda: balanced.is_up("a"), timeout_s=60)
    for name in ("b", "c"):
        await until(lambda: _refuses(balanced, name))  # noqa: B023 - awaited here
    async with balanced.calling(count=4) as callers:
        await more_calls(callers, 40)
        no_errors(callers)
        alone_s = time.monotonic()
        await more_calls(callers, 40)
        assert set(balanced.by_owner(one for one in callers.sealed if one.began_s > alone_s)) == {"a"}
    await balanced.manager.ask("env_declare", reason="the last one as well")
    await until(balanced.is_up, timeout_s=60)
    found = await answers_of(balanced, "encrypt", {"plaintext": "AA=="}, 10)
    assert {(status, document["code"], retry) for status, document, retry in found} == {
        (503, "no_environment", "2")
    }
