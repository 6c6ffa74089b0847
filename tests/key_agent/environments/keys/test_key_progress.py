"""Keys on their way: waited for, given up, made again, followed when they are old."""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from envelope.keys import KeyState, KeyUse
from key_agent.environments.keys.bringing import LOOK_S
from key_agent.environments.shared.documents import Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.states import EnvironmentState
from key_agent.registry.store import RefusedChangeError
from tests.environments.key_site import FILES, MAIL, KeySite, key_site, states
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


async def test_a_command_that_waits_for_its_keys_is_not_waited_for(site: KeySite) -> None:
    """`service add` holds the commands' lock until a key seals; what makes it seal must not need it."""
    manager = site["a"].manager
    async with manager.progress._one_at_a_time:
        await manager.ensure_service(MAIL, KeyUse.DATA, None)
        await site.keys_active(MAIL)
    assert len(states(site["a"], MAIL)) == 3, "made once"


async def test_a_key_waits_for_an_environment_that_cannot_be_reached(site: KeySite) -> None:
    before = await site.keys_active()
    site["c"].cut_off()
    made = await site["a"].manager.rotate({str(FILES)}, None)
    manager = site["a"].manager
    await until(
        lambda: all(set(manager.progress.held.get(key_id, {})) == {"c"} for key_id in made), timeout_s=40
    )
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


async def test_keys_that_are_old_enough_are_followed(site: KeySite) -> None:
    before = await site.keys_active()
    await site["a"].manager.set_rotate_after(FILES, 1)
    site["a"].clock.skip(86_400 + 100)
    site["a"].manager.wake()
    await until(lambda: len(states(site["a"])) == 6, timeout_s=20)
    # The skip has ended the lease as well: once the others are heard again, all goes on.
    after = await site.keys_active()
    assert not set(after.values()) & set(before.values())
