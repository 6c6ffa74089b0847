"""B-45, B-55: what was said before is said again, and two say that they are the manager."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import pytest
import pytest_asyncio

from key_agent.environments.healing import KEK_PATH
from key_agent.environments.peer_transport import PeerError
from key_agent.environments.peers import REGISTRY_PATH
from runtime.cli import CommandError
from tests.environments.site import SiteEnvironment, until
from tests.scenarios.balanced_site import KEY
from tests.scenarios.healing_site import ALL, Site, in_step, position, promote, site_for_tests

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="site")
async def site_fixture(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with site_for_tests(tmp_path_factory.mktemp("replays")) as made:
        yield made


# B-55.


async def test_b_55_two_managers_become_one_and_what_both_have_opened_one_incident(site: Site) -> None:
    """Both open the same incident, many times at once, while the network is split; then it is opened again.

    A thousand calls of one manager are in test_b_under_load. This is before any breach of kind runtime: whose
    agent was exposed leads no more.
    """
    balanced, a, b = site.balanced, site["a"], site["b"]
    before = [one["incident"] for one in (await a.ask("incident_list"))["incidents"]]
    term = (await a.ask("env_list"))["term"]
    key = f"one and the same, after term {term}"
    balanced.site.part("a")
    try:
        await promote(site, b)
        assert {name: (await site[name].ask("env_list"))["leads"] for name in "ab"} == {"a": True, "b": True}
        theirs, ours = await asyncio.gather(_open_often(a, key), _open_often(b, key))
        assert {is_durable for _, is_durable in theirs} == {False}, "the one that is cut off is told so"
        [incident] = {name for name, _ in ours}
        assert len({name for name, _ in theirs}) == 1
    finally:
        balanced.site.heal_network()
    await until(lambda: in_step(site), timeout_s=90)
    for one in (site[name] for name in ALL):
        listed = await one.ask("env_list")
        assert (listed["term"], listed["manager"], listed["leads"]) == (term + 1, "b", one is b)
        found = [row["incident"] for row in (await one.ask("incident_list"))["incidents"]]
        assert len(found) == len(before) + 1
        assert set(found) == {*before, incident}
    with pytest.raises(CommandError, match="not the manager"):
        await a.ask("rotate", service=KEY)
    await promote(site, a)
    await until(lambda: in_step(site), timeout_s=90)
    assert (await a.ask("env_list"))["leads"]
    assert {name for name, _ in await _open_often(a, key)} == {incident}, (
        "the new manager's word is the old one's"
    )
    await site.all_are_up()


async def _open_often(manager: SiteEnvironment, key: str) -> list[tuple[str, bool]]:
    """Which incident each of the calls has opened, and whether it is kept by somebody else as well."""

    async def once() -> tuple[str, bool]:
        answer = await manager.ask(
            "incident_open", environment="b", kind="db", reason="a copy was sold", by="test",
            idempotency_key=key,
        )  # fmt: skip
        return str(answer["incident"]), bool(answer["durable"])

    return await asyncio.gather(*(once() for _ in range(40)))


# B-45.


async def test_b_45_what_was_said_before_counts_for_nothing(site: Site) -> None:
    """Rows, the word that healing is over and an announced KEK, in the same incident and in the next."""
    balanced, a = site.balanced, site["a"]
    async with site.speaking_as("a") as as_a, site.speaking_as("c") as as_c:
        old_rows = await as_a("a", "GET", f"{REGISTRY_PATH}?after=0")
        first = await balanced.open_incident("c", "runtime")
        await balanced.rekey(first)
        made = await balanced.heal_complete("c")
        announced = await _announcement(as_c, made)
        joined = await balanced.rejoin("c")
        assert (joined["state"], joined["problems"]) == ("active", {})
        await site.all_are_up()

        rows = {name: await position(site[name]) for name in ALL}
        for name in ("b", "c"):
            with contextlib.suppress(PeerError):
                answer = json.loads(await as_a(name, "PUT", REGISTRY_PATH, old_rows))
                assert answer["applied"] is False, answer
        with pytest.raises(CommandError, match="does not heal"):
            await _heal_complete(a, made)
        for again in (announced, announced.replace(made["kek"].encode(), b"kek-of-before")):
            with contextlib.suppress(PeerError):
                await as_c("a", "POST", KEK_PATH, again)
        assert {name: await position(site[name]) for name in ALL} == rows, "nothing has moved"
        await balanced.manager.ask("incident_close", incident=first)

        second = await balanced.open_incident("c", "runtime")
        with pytest.raises(CommandError, match="not newer than the incident"):
            await _heal_complete(a, made)
        await as_c("a", "POST", KEK_PATH, announced)
        assert await balanced.state("c") == "healing"
        with pytest.raises(CommandError):
            await balanced.rejoin("c")
        assert await balanced.state("c") == "healing"
    await balanced.bring_back("c", second)
    await site.all_are_up()
    await balanced.manager.ask("incident_close", incident=second)


async def _heal_complete(manager: SiteEnvironment, made: Mapping[str, Any]) -> None:
    await manager.ask(
        "env_heal_complete", environment="c", attestation="CHG-88", new_certificates=True,
        kek=made["fingerprint"],
    )  # fmt: skip


async def _announcement(as_c: Callable[..., Awaitable[bytes]], made: Mapping[str, Any]) -> bytes:
    """What c's agent has told the manager of its new KEK."""
    rows = json.loads(await as_c("a", "GET", f"{REGISTRY_PATH}?after=0"))
    [body] = [row["body"] for row in rows["rows"] if row["kind"] == "kek" and row["id"] == made["kek"]]
    kek = json.loads(body) if isinstance(body, str) else body
    return json.dumps({"environment": "c", "kek_id": made["kek"], "kek": kek}).encode()
