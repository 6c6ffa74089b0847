"""Keys of several environments: made, brought, proven, active; and what happens when some of it fails."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from envelope.keys import KeyState, KeyUse, NetworkService
from key_agent.environments.shared.documents import EncryptPolicy
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
