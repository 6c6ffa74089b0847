"""B-45, B-55: what was said before is said again, and two say that they are the manager."""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import pytest_asyncio

from key_agent.environments.incidents.healing import KEK_PATH
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.peers.peers import REGISTRY_PATH, WRAPS_PATH
from key_agent.state_dir import AUDIT_NAME
from runtime.cli import CommandError
from runtime.tls import client_context
from tests.environments.site import SiteEnvironment, SiteProxy, until
from tests.scenarios.balanced_site import KEY
from tests.scenarios.healing_site import ALL, PLAIN, Site, call, in_step, position, promote, site_for_tests
from tests.scenarios.recorder import Recorded, recorded

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENVELOPES_PATH: Final = "/push/v1/envelopes"


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

        await _is_settled(site, first)
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


# B-45: what carries keys.


async def test_b_45_a_delivery_of_wraps_brings_nothing_when_it_is_played_again(site: Site) -> None:
    """By a member that serves, by the former manager, by one that heals; in this incident and in the next."""
    balanced, a, b = site.balanced, site["a"], site["b"]
    async with (
        _deliveries(site, "b") as to_b,
        _deliveries(site, "c") as to_c,
        site.speaking_as("a") as as_a,
        site.speaking_as("b") as as_b,
        site.speaking_as("c") as as_c,
    ):
        await _rotated(site)
        first_b, first_c = to_b[0], to_c[0]
        assert (first_b.agent_id, first_c.agent_id) == ("agent-a", "agent-a")
        new = {site.active(name) for name in ALL}
        assert _kids(first_b) == _kids(first_c) == new
        await until(lambda: in_step(site), timeout_s=90)

        # What is there already, by another member; for another environment, or said to be for this one.
        for body in (first_b.body, first_c.body, _readdressed(first_c, first_b), _exchanged(first_b)):
            await _in_vain(site, as_c, "b", body)
        await _told(site, "b", ("agent-c", "held"), ("agent-c", "destination"))
        # One key's wrap under the id of another, which is lacked.
        lost = site.active("b")
        _lose_wrap(b, lost)
        answer = json.loads(await as_c("b", "PUT", WRAPS_PATH, _exchanged(first_b)))
        assert answer["verified"] == []
        # By the former manager. The new one has brought what was lost.
        await promote(site, b)
        await until(lambda: in_step(site), timeout_s=90)
        await until(lambda: _has_wrap(site, "b", lost), timeout_s=90)
        await _in_vain(site, as_a, "c", first_c.body)
        await _told(site, "c", ("agent-a", "held"))
        await promote(site, a)
        await until(lambda: in_step(site), timeout_s=90)

        # A rotation that is given up destroys its keys; a breach compromises one.
        given_up = await _given_up(site, to_b)
        await _in_vain(site, as_c, "b", to_b[-1].body)
        dek = await balanced.open_incident("b", "dek", keys=[lost])
        await balanced.rekey(dek)
        await site.everywhere(lost, "compromised")
        await _is_settled(site, dek)
        await _in_vain(site, as_c, "b", first_b.body)
        await _told(site, "b", ("agent-c", "key-state"))

        # c heals: it brings nothing, and takes nothing, while it returns either.
        runtime = await balanced.open_incident("c", "runtime")
        await balanced.rekey(runtime)
        await _is_settled(site, runtime)
        await _in_vain(site, as_c, "b", first_b.body, refused="not_believed")
        await _in_vain(site, as_b, "c", first_c.body, refused="stores no keys")
        await _told(site, "b", ("agent-c", "sender"))
        await _told(site, "c", ("agent-b", "state"))
        await balanced.heal_complete("c")
        del to_c[:]
        playing = asyncio.create_task(_play_on(as_b, "c", first_c.body), name="play")
        try:
            joined = await balanced.rejoin("c")
        finally:
            playing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await playing
        assert (joined["state"], joined["problems"]) == ("active", {})
        await site.all_are_up()
        # Its KEK is another one; and what came under the new one is there.
        again = [one for one in to_c if one.agent_id == "agent-a"]
        assert _kids(*again) == {kid for kid, state in site.states("c").items() if state != "destroyed"}
        assert not _kids(*again) & given_up
        for one in (first_c, *again):
            await _in_vain(site, as_b, "c", one.body)
        await _told(site, "c", ("agent-b", "destination"), ("agent-b", "held"))

        # The next incident.
        second = await balanced.open_incident("c", "runtime")
        await balanced.rekey(second)
        await _is_settled(site, second)
        for one in (first_c, *again):
            await _in_vain(site, as_b, "c", one.body, refused="stores no keys")
        await balanced.bring_back("c", second)
        await site.all_are_up()
        for one in (first_c, *again):
            await _in_vain(site, as_b, "c", one.body)
    assert {site.states(name)[lost] for name in ALL} == {"compromised"}
    for incident in (dek, runtime, second):
        await balanced.manager.ask("incident_close", incident=incident)


async def _is_settled(site: Site, incident: str) -> None:
    """Return when everybody has acknowledged it, and knows that everybody has: no row moves by itself."""

    async def contained() -> bool:
        return bool((await site["a"].ask("incident_status", incident=incident))["contained"])

    await until(contained, timeout_s=90)
    await until(lambda: in_step(site), timeout_s=90)


async def _rotated(site: Site) -> None:
    """Each environment has a new key, and its proxy seals with it. (The command waits for a while only.)"""
    before = site.balanced.owners()
    await site["a"].ask("rotate", service=KEY)

    async def all_seal_with_the_new() -> bool:
        for name in ALL:
            _, sealed = await site[name].proxies[0].call(f"keys/{KEY}/encrypt", {"plaintext": PLAIN})
            if sealed.get("version", 0) in {0, *before}:
                return False
        return True

    await until(all_seal_with_the_new, timeout_s=90)


def _deliveries(site: Site, name: str) -> AbstractAsyncContextManager[list[Recorded]]:
    """Deliveries of wraps to that environment's agent."""
    lb = site.balanced.lb_config.parent
    return recorded(
        site[name].network,
        path=WRAPS_PATH,
        server=_tls(site[name].directory),
        roots=[site.balanced.site.tenant.root.certificate],
        clients={site[other].agent_id: _tls(site[other].directory) for other in ALL} | {"lb-1": _tls(lb)},
    )


def _tls(directory: Path) -> tuple[Path, Path]:
    return directory / "tls.pem", directory / "tls.key"


def _kids(*deliveries: Recorded) -> set[str]:
    return {key["key_id"] for one in deliveries for key in json.loads(one.body)["keys"]}


def _readdressed(one: Recorded, other: Recorded) -> bytes:
    """*one* for the environment and KEK of *other*."""
    to = json.loads(other.body)
    return json.dumps(
        json.loads(one.body) | {"environment": to["environment"], "kek_id": to["kek_id"]}
    ).encode()


def _exchanged(one: Recorded) -> bytes:
    """Each key's wrap under the id of the next."""
    document = json.loads(one.body)
    keys = document["keys"]
    sealed = [key["sealed"] for key in keys]
    document["keys"] = [
        key | {"sealed": other} for key, other in zip(keys, sealed[1:] + sealed[:1], strict=True)
    ]
    return json.dumps(document).encode()


async def _in_vain(
    site: Site, speaks: Callable[..., Awaitable[bytes]], to: str, body: bytes, *, refused: str | None = None
) -> None:
    """Nothing in any database moves; *refused*: in words that the answer has."""
    before = await _everything(site)
    if refused is None:
        answer = json.loads(await speaks(to, "PUT", WRAPS_PATH, body))
        assert answer["verified"] == []
        assert answer["failed"].keys() == {key["key_id"] for key in json.loads(body)["keys"]}
    else:
        with pytest.raises(PeerError, match=refused):
            await speaks(to, "PUT", WRAPS_PATH, body)
    assert await _everything(site) == before


async def _everything(site: Site) -> dict[str, object]:
    wraps = "SELECT dek_id, kek_id, state, wrapped, made_at_ms FROM dek_wrap ORDER BY dek_id, kek_id"
    return {
        name: (site.states(name), site.balanced.query(site[name], wraps), await position(site[name]))
        for name in ALL
    }


async def _told(site: Site, at: str, *refusals: tuple[str, str]) -> None:
    """The audit log there names these agents, each with the reason."""

    async def written() -> bool:
        lines = (site[at].state_dir / AUDIT_NAME).read_text().splitlines()
        events = [json.loads(line) for line in lines]
        found = {(one["agent"], one["reason"]) for one in events if one["action"] == "wraps-refused"}
        return found >= set(refusals)

    await until(written, timeout_s=30)


def _lose_wrap(one: SiteEnvironment, kid: str) -> None:
    """By a hand in its database."""
    with contextlib.closing(sqlite3.connect(one.state_dir / "registry.db", timeout=20)) as connection:
        connection.execute("DELETE FROM dek_wrap WHERE dek_id = ?", (kid,))
        connection.commit()


async def _has_wrap(site: Site, name: str, kid: str) -> bool:
    found = site.balanced.query(site[name], "SELECT dek_id FROM dek_wrap WHERE state = 'verified'")
    return (kid,) in found


async def _given_up(site: Site, to_b: list[Recorded]) -> set[str]:
    """The keys of a rotation that b has got, and c never; destroyed in all environments."""
    before = len(to_b)
    site["c"].agent.freeze()
    try:
        rotating = asyncio.create_task(site["a"].ask("rotate", service=KEY), name="rotate")

        async def at_b() -> bool:
            return len(to_b) > before

        await until(at_b, timeout_s=60)
        await site["a"].ask("rotate_cancel", service=KEY)
    finally:
        site["c"].agent.thaw()
    await rotating
    kids = _kids(*to_b[before:])
    for kid in kids:
        await site.everywhere(kid, "destroyed")
    await until(lambda: in_step(site), timeout_s=90)
    return kids


async def _play_on(speaks: Callable[..., Awaitable[bytes]], to: str, body: bytes) -> None:
    while True:
        with contextlib.suppress(PeerError):
            assert json.loads(await speaks(to, "PUT", WRAPS_PATH, body))["verified"] == []
        await asyncio.sleep(0)


async def test_b_45_an_old_envelope_gives_a_proxy_nothing(site: Site) -> None:
    """Keys for b's proxy, as its agent has pushed them; played again by that agent and by another."""
    balanced, b = site.balanced, site["b"]
    [proxy] = b.proxies
    root, directory = balanced.site.tenant.root.certificate, balanced.site.directory
    async with recorded(
        proxy.push,
        path=ENVELOPES_PATH,
        server=(directory / "server.pem", directory / "server.key"),
        roots=[root],
        clients={b.agent_id: _tls(b.directory)},
    ) as pushed:
        before = site.active("b")
        await _rotated(site)
        assert site.active("b") != before
        old = [one.body for one in pushed]
        assert old

    async def played_in_vain() -> None:
        assert "accepted" not in await _play_envelopes(site, old, by="b")
        assert await _play_envelopes(site, old, by="c") == {"agent"}, "it speaks for another environment"

    await played_in_vain()
    assert (await call(proxy)).status == 200, "those that it has are not disturbed"

    incident = await balanced.open_incident("b", "runtime")
    await until(lambda: _refuses(proxy), timeout_s=60)
    await played_in_vain()
    assert (await call(proxy)).status == 503
    await balanced.bring_back("b", incident)
    await site.all_are_up()
    await played_in_vain()
    status, document = await proxy.call(f"keys/{KEY}/encrypt", {"plaintext": PLAIN})
    assert status == 200, document
    assert site.states("b")[before] != "active"
    await balanced.manager.ask("incident_close", incident=incident)
    lines = (proxy.config.parent / "state" / "audit.jsonl").read_text().splitlines()
    refused = [one for one in map(json.loads, lines) if one["action"] == "envelope-refused"]
    assert {one["agent"] for one in refused} == {"agent-b"}


async def _refuses(proxy: SiteProxy) -> bool:
    return (await call(proxy)).status == 503


async def _play_envelopes(site: Site, bodies: list[bytes], *, by: str) -> set[str]:
    """What that agent's identity is told of each envelope: `accepted`, or why not."""
    [proxy] = site["b"].proxies
    files = _tls(site[by].directory)
    context = client_context(site.balanced.site.ca_file, *files)
    told: set[str] = set()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        for body in bodies:
            url = f"https://localhost:{proxy.push.port}{ENVELOPES_PATH}"
            headers = {"Content-Type": "application/json"}
            async with session.post(url, data=body, headers=headers) as answer:
                document = await answer.json(content_type=None)
                told |= {one.get("code") or one["status"] for one in document.get("receipts", [])}
                if answer.status != 200:
                    told.add(document["code"])
    return told
