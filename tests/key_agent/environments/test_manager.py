"""Keys of several environments: made, brought, proven, active; and what happens when some of it fails."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from envelope.keys import KeyState, KeyUse, NetworkService
from key_agent.environments.cli import environments_text
from key_agent.environments.documents import EncryptPolicy, Kind
from key_agent.environments.draft import Draft
from key_agent.environments.manager import LOOK_S
from key_agent.environments.peers import WRAPS_PATH
from key_agent.environments.states import EnvironmentState
from key_agent.environments.wrapping import Look
from key_agent.registry.model import Proxy
from key_agent.registry.store import RefusedChangeError
from key_agent.sources.source import NewKey
from tests.environments.key_site import FILES, MAIL, KeyMember, KeySite, key_site, states
from tests.key_agent.conftest import until
from tests.pki import Tenant


@pytest.fixture
async def site(tmp_path: Path, acme: Tenant) -> AsyncIterator[KeySite]:
    async with key_site(tmp_path, acme, "abc") as made:
        await made.unite()
        await made["a"].manager.ensure_service(FILES, KeyUse.DATA, None)
        await made.keys_active()
        await made.in_step()
        yield made


def one_active_in_every_epoch(member: KeyMember, owner: NetworkService = FILES) -> None:
    """From the first active key of a place on there is exactly one (B-07)."""
    begun: set[tuple[str, str]] = set()
    for view in member.views:
        active: dict[tuple[str, str], int] = {}
        for body in view.deks.values():
            if body.service == str(owner) and body.state is KeyState.ACTIVE:
                place = (body.ring, body.owner_environment)
                active[place] = active.get(place, 0) + 1
        begun |= active.keys()
        assert all(active.get(place) == 1 for place in begun), view.epoch


async def test_each_environment_owns_a_key_that_all_of_them_open(site: KeySite) -> None:
    keys = await site.keys_active()
    assert set(keys) == set("abc")
    wraps = set()
    for name in "abc":
        held = await site[name].wrapped()
        assert set(held) == set(keys.values())
        assert await site[name].opens(keys.values())
        wraps |= set(held.values())
    assert len(wraps) == 9  # B-02: no wrap is another one's
    assert {body.generator_environment for body in site["a"].deks.values()} == {"a"}


async def test_a_command_that_waits_for_its_keys_is_not_waited_for(site: KeySite) -> None:
    """`service add` holds the commands' lock until a key seals; what makes it seal must not need it."""
    manager = site["a"].manager
    async with manager._one_at_a_time:
        await manager.ensure_service(MAIL, KeyUse.DATA, None)
        await site.keys_active(MAIL)
    assert len(states(site["a"], MAIL)) == 3, "made once"


async def test_keys_that_are_made_while_the_own_environment_is_asked_what_it_has_are_not_lost(
    site: KeySite,
) -> None:
    """Else they would be given up as keys whose only wrap is gone, and made again."""
    manager, wraps = site["a"].manager, site["a"].wraps
    asked, made = wraps.ask_missing, list[str]()

    async def asked_slowly(environment: str, look: Look) -> dict[str, str]:
        missing = await asked(environment, look)
        if environment == "a" and not made:
            made.extend(await manager.rotate(None, None))
        return missing

    wraps.ask_missing = asked_slowly  # type: ignore[method-assign]
    manager.standings["a"].looked_boot_s = None
    await manager.serve("a")
    assert len(made) == 3
    assert set(made) <= manager.standings["a"].proven


async def test_the_six_fields_of_patent_b_are_in_each_database(site: KeySite) -> None:
    keys = await site.keys_active()
    for name in "abc":
        rows = await site[name].sql(
            'SELECT dek_id, encrypted_dek, status, environment, kek_id, "timestamp" FROM patent_b_keys'
        )
        held = await site[name].wrapped()
        assert {row[0]: bytes(row[1]) for row in rows} == held
        assert {row[0]: row[3] for row in rows} == {key_id: owner for owner, key_id in keys.items()}
        assert {row[2] for row in rows} == {"active"}
        assert {row[4] for row in rows} == {f"kek-{name}"}
        assert all(row[5] > 0 for row in rows)


async def test_a_proxy_seals_with_its_own_environments_key_and_opens_all(site: KeySite) -> None:
    keys = await site.keys_active()
    for name in "abc":
        await site[name].host(FILES, f"proxy-{name}")
        await until(lambda name=name: FILES in site[name].proxies.pushed)  # type: ignore[misc]
        pushed = site[name].proxies.pushed[FILES]
        assert set(pushed) == set(keys.values())
        assert [key_id for key_id, state in pushed.items() if state is KeyState.ACTIVE] == [keys[name]]
        assert sorted(set(pushed.values())) == [KeyState.ACTIVE, KeyState.DEACTIVATED]


async def test_a_pinned_key_seals_in_every_environment(
    site: KeySite,
) -> None:
    keys = await site.keys_active()
    await site["b"].host(FILES, "proxy-b")
    await site["a"].manager.set_policy(FILES, EncryptPolicy.PINNED, pinned_dek=keys["a"])
    await until(lambda: site["b"].proxies.pushed.get(FILES, {}).get(keys["a"]) is KeyState.ACTIVE)
    assert site["b"].proxies.pushed[FILES][keys["b"]] is KeyState.DEACTIVATED
    with pytest.raises(RefusedChangeError):
        await site["a"].manager.set_policy(FILES, EncryptPolicy.PINNED, pinned_dek="00" * 16)
    with pytest.raises(RefusedChangeError):
        await site["a"].manager.set_policy(MAIL, EncryptPolicy.ORIGIN)


async def test_a_rotation_is_one_epoch_with_never_none_or_two_active(site: KeySite) -> None:
    before = await site.keys_active()
    for name in "abc":
        await site[name].host(FILES, f"proxy-{name}")
    made = await site["a"].manager.rotate({str(FILES)}, None)
    assert len(made) == 3
    assert await site["a"].manager.settled(made, timeout_s=20) == {}
    after = await site.keys_active()
    assert set(after.values()) == set(made)
    await site.in_step()
    for name in "abc":
        assert states(site[name]) == dict.fromkeys(before.values(), KeyState.DEACTIVATED) | dict.fromkeys(
            made, KeyState.ACTIVE
        )
        one_active_in_every_epoch(site[name])
        for owner in "abc":
            assert site[name].deks[before[owner]].successor == after[owner]
            assert site[name].deks[after[owner]].predecessor == before[owner]
    with pytest.raises(RefusedChangeError):
        await site["b"].manager.rotate(None, None)


async def test_a_key_waits_for_an_environment_that_cannot_be_reached(site: KeySite) -> None:
    before = await site.keys_active()
    site["c"].cut_off()
    made = await site["a"].manager.rotate({str(FILES)}, None)
    manager = site["a"].manager
    await until(lambda: all(set(manager.held.get(key_id, {})) == {"c"} for key_id in made), timeout_s=40)
    assert set(await manager.settled(made, timeout_s=0.1)) == set(made)
    assert await site["b"].opens(made)  # where it can be, it is
    assert {key: state for key, state in states(site["a"]).items() if key in before.values()} == (
        dict.fromkeys(before.values(), KeyState.ACTIVE)
    )
    site["c"].reconnect()
    after = await site.keys_active()
    assert set(after.values()) == set(made)
    assert await site["c"].opens(made)


async def test_an_environment_that_heals_is_not_waited_for_and_gets_its_keys_before_it_returns(
    site: KeySite,
) -> None:
    await set_state(site, "c", EnvironmentState.HEALING)
    made = await site["a"].manager.rotate({str(FILES)}, None)
    assert len(made) == 2  # one that heals gets no new key by a rotation
    assert await site["a"].manager.settled(made, timeout_s=20) == {}
    assert not set(made) & set(await site["c"].wrapped())
    assert site["a"].deks[made[0]].state is KeyState.ACTIVE
    with pytest.raises(RefusedChangeError):
        await site["a"].manager.make_successors([], generator="c")
    await set_state(site, "c", EnvironmentState.REJOINING)
    await until(lambda: site.state_of("c") == "active", timeout_s=30)
    assert await site["c"].opens(made)


async def set_state(site: KeySite, name: str, state: EnvironmentState) -> None:
    def change(draft: Draft) -> None:
        body = draft.shared.environments[name]
        draft.put(Kind.ENVIRONMENT, name, msgspec.structs.replace(body, state=state))

    await site["a"].change(change)
    await site.in_step()


async def test_a_damaged_wrap_is_noticed_and_brought_again(site: KeySite) -> None:
    keys = await site.keys_active()
    before = await site["b"].wrapped()
    flipped = bytes([before[keys["c"]][0] ^ 1]) + before[keys["c"]][1:]
    await site["b"].sql(
        "UPDATE dek_wrap SET wrapped = :wrapped WHERE dek_id = :kid", wrapped=flipped, kid=keys["c"]
    )
    assert keys["c"] not in await site["b"].wrapped()
    site["a"].clock.skip(LOOK_S + 1)
    site["a"].manager.wake()
    for _ in range(600):
        if keys["c"] in await site["b"].wrapped():
            break
        await asyncio.sleep(0.05)
    assert await site["b"].opens(keys.values())
    assert (await site["b"].wrapped())[keys["c"]] not in (flipped, before[keys["c"]])


async def test_a_key_that_does_not_open_at_the_manager_comes_from_another_environment(site: KeySite) -> None:
    keys = await site.keys_active()
    await site["c"].sql("DELETE FROM dek_wrap WHERE dek_id = :kid", kid=keys["a"])
    await site["a"].sql("DELETE FROM dek_wrap WHERE dek_id = :kid", kid=keys["a"])
    problems = await site["a"].manager.prove("c")
    assert problems == {}
    assert await site["c"].opens(keys.values())
    site["a"].clock.skip(LOOK_S + 1)
    site["a"].manager.wake()
    for _ in range(600):
        if await site["a"].opens(keys.values()):
            break
        await asyncio.sleep(0.05)
    assert await site["a"].opens(keys.values())  # and the manager's own comes back too


async def test_a_new_key_whose_only_wrap_is_lost_is_given_up_and_made_again(site: KeySite) -> None:
    for name in "bc":
        site[name].transport.silent.clear()
    site["a"].cut_off()
    made = await site["a"].manager.rotate({str(FILES)}, None)
    await site["a"].sql("DELETE FROM dek_wrap WHERE dek_id = :kid", kid=made[0])
    site["a"].clock.skip(LOOK_S + 1)
    site["a"].reconnect()
    await until(lambda: states(site["a"]).get(made[0]) is KeyState.DESTROYED, timeout_s=30)
    after = await site.keys_active()
    assert made[0] not in after.values()
    assert set(made[1:]) <= set(after.values())


async def test_a_named_environment_makes_the_keys(site: KeySite) -> None:
    before = await site.keys_active()
    rings = {body.ring for body in site["a"].deks.values()}
    (ring,) = rings
    made = await site["a"].manager.make_successors([(ring, "a", before["a"])], generator="b")
    assert await site["a"].manager.make_successors([(ring, "a", before["a"])], generator="b") == []
    assert await site["a"].manager.settled(made, timeout_s=20) == {}
    assert site["a"].deks[made[0]].generator_environment == "b"
    assert site["a"].deks[made[0]].owner_environment == "a"
    await site.in_step()
    for name in "abc":
        assert await site[name].opens(made)


async def test_any_environment_may_ask_for_a_service_and_only_the_manager_writes(site: KeySite) -> None:
    await site["c"].manager.ensure_service(MAIL, KeyUse.SIGN, "ES256")
    assert str(MAIL) in site["c"].peering.view.services
    await site["c"].host(MAIL, "proxy-c")
    keys = await site.keys_active(MAIL)
    assert set(keys) == set("abc")
    assert {site["b"].deks[key].algorithm for key in keys.values()} == {"ES256"}
    await site["c"].manager.ensure_service(MAIL, KeyUse.SIGN, "ES256")  # again: nothing new
    assert await site.keys_active(MAIL) == keys
    for refused in (
        site["c"].manager.remove_service(MAIL),
        site["c"].manager.change_key(keys["c"], KeyState.SUSPENDED, None),
        site["c"].manager.make_successors([], generator=None),
    ):
        with pytest.raises(RefusedChangeError):
            await refused
    with pytest.raises(RefusedChangeError):
        await site["a"].manager.ensure_service(MAIL, KeyUse.SIGN, "EdDSA")


async def test_another_manager_goes_on_with_what_the_first_has_begun(site: KeySite) -> None:
    site["c"].cut_off()
    made = await site["a"].manager.rotate({str(FILES)}, None)
    await until(lambda: set(made) <= site["b"].deks.keys())
    await site["a"].manager.settled(made, timeout_s=0.5)
    site["c"].reconnect()
    site["a"].cut_off()
    await site.promote(site["b"])
    # It waits for a, which counts still; when a is back, all of it is done by b.
    await site["b"].manager.settled(made, timeout_s=0.5)
    assert states(site["b"])[made[0]] is KeyState.PRE_ACTIVE
    site["a"].reconnect()
    await until(lambda: not site["a"].peering.leads, timeout_s=20)
    await site.keys_active()
    assert set((await site.keys_active()).values()) == set(made)
    with pytest.raises(RefusedChangeError):
        await site["a"].manager.rotate(None, None)


async def test_a_suspended_key_opens_nothing_anywhere_until_it_is_resumed(site: KeySite) -> None:
    keys = await site.keys_active()
    manager = site["a"].manager
    await site["b"].host(FILES, "proxy-b")
    assert await manager.change_key(keys["b"], KeyState.SUSPENDED, "a test") is KeyState.ACTIVE
    await until(lambda: site["b"].proxies.pushed.get(FILES, {}).get(keys["b"]) is KeyState.SUSPENDED)
    # Rule 3 of presented.py: another environment's key seals meanwhile.
    assert site["b"].proxies.pushed[FILES][keys["a"]] is KeyState.ACTIVE
    assert await manager.resume_key(keys["b"]) is KeyState.ACTIVE
    await until(lambda: site["b"].proxies.pushed[FILES][keys["b"]] is KeyState.ACTIVE)
    with pytest.raises(RefusedChangeError):
        await manager.change_key(keys["b"], KeyState.DESTROYED, None)
    with pytest.raises(RefusedChangeError):
        await manager.resume_key(keys["b"])


async def test_a_removed_service_is_withdrawn_in_every_environment(site: KeySite) -> None:
    for name in "abc":
        await site[name].host(FILES, f"proxy-{name}")
    await site["a"].manager.remove_service(FILES)
    await site.in_step()
    for name in "abc":
        book = await site[name].registry.book()
        assert not book.services
        assert all(link.withdrawn for link in book.links)
        assert set(states(site[name]).values()) == {KeyState.DEACTIVATED}
        await site[name].environments.shared.verify()
    await site["b"].manager.ensure_service(FILES, KeyUse.DATA, None)
    assert set((await site["b"].registry.book()).services) == {FILES}


async def test_keys_that_are_old_enough_are_followed(site: KeySite) -> None:
    before = await site.keys_active()
    await site["a"].manager.set_rotate_after(FILES, 1)
    site["a"].clock.skip(86_400 + 100)
    site["a"].manager.wake()
    await until(lambda: len(states(site["a"])) == 6, timeout_s=20)
    # The skip has ended the lease as well: once the others are heard again, all goes on.
    after = await site.keys_active()
    assert not set(after.values()) & set(before.values())


async def test_a_fourth_environment_serves_only_with_every_key(tmp_path: Path, acme: Tenant) -> None:
    async with key_site(tmp_path, acme, "abcd") as site:
        *first, fourth = site.members.values()
        site.members = {member.name: member for member in first}
        await site.unite()
        await site["a"].manager.ensure_service(FILES, KeyUse.DATA, None)
        old = await site.keys_active()
        site.members["d"] = fourth
        await site.join(site["a"], fourth)
        # In rotation now: not a moment before it had everything.
        assert await site["d"].opens(old.values())
        keys = await site.keys_active()
        assert {name: keys[name] for name in "abc"} == old
        assert set(keys) == set("abcd")
        for view in site["a"].views:
            body = view.environments.get("d")
            if body is not None and body.state is EnvironmentState.ACTIVE:
                assert all(key in view.deks for key in keys.values())
        assert any(path == WRAPS_PATH for _, _, path in site["a"].transport.calls)


async def test_nobody_begins_a_set_with_keys_that_no_other_environment_could_have(
    tmp_path: Path, acme: Tenant
) -> None:
    async with key_site(tmp_path, acme, "a") as site:
        a = site["a"]
        (key,) = await a.source.generate(await a.kek(), [NewKey(owner=FILES, use=KeyUse.DATA)])
        await a.registry.add_proxy(Proxy(id="p", url="https://p:1", ca_pem="-"), now_ms=a.now_ms())
        await a.registry.add_service(FILES, proxy_id="p", certificate_pem="-", key=key, now_ms=a.now_ms())
        await a.sql("DELETE FROM dek_wrap")  # as good as under a KEK that was lost
        with pytest.raises(RefusedChangeError, match="no other environment could have them") as refused:
            await a.commands.env_init(url=a.url)
        assert f"key destroy files {key.key_id}" in str(refused.value.next_step)
        assert not a.peering.is_united
        await a.sql("UPDATE dek SET state = 'destroyed'")
        await a.commands.env_init(url=a.url)
        assert a.peering.is_united


async def test_the_list_says_what_keeps_an_environment_from_having_every_key(
    tmp_path: Path, acme: Tenant
) -> None:
    async with key_site(tmp_path, acme, "ab") as site:
        a, b = site["a"], site["b"]
        site.members.pop("b")
        a.environments.key_parts = a.site_parts
        await site.unite()
        await a.manager.ensure_service(FILES, KeyUse.DATA, None)
        lost = (await site.keys_active())["a"]
        site.members["b"] = b
        await a.sql("DELETE FROM dek_wrap")
        joining = asyncio.create_task(site.join(a, b))

        async def row() -> Any:
            listed: Any = await a.commands.env_list()
            return next((one for one in listed["environments"] if one["environment"] == "b"), None)

        try:
            async with asyncio.timeout(60):
                while (found := await row()) is None or found["lacks"] is None:  # noqa: ASYNC110 - as it polls
                    await asyncio.sleep(0.05)
        finally:
            joining.cancel()
            await asyncio.wait([joining])
        assert found["state"] == EnvironmentState.JOINING
        assert f"1 missing: {lost}: " in found["lacks"]
        page = environments_text(listed := await a.commands.env_list())
        assert f"its keys: 1 missing: {lost}" in page
        assert f"epoch {listed['epoch']} ({str(listed['digest'])[:16]}...)" in page  # people compare it
