"""What an environment lacks is noticed, brought and proven, from wherever there is a wrap of it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from envelope.keys import KeyUse
from key_agent.environments.commands.cli import environments_text
from key_agent.environments.keys.bringing import LOOK_S
from key_agent.environments.keys.wrap_messages import Look
from key_agent.environments.peers.peers import WRAPS_PATH
from key_agent.environments.states import EnvironmentState
from tests.environments.key_site import FILES, KeySite, key_site
from tests.pki import Tenant


@pytest.fixture
async def site(tmp_path: Path, acme: Tenant) -> AsyncIterator[KeySite]:
    async with key_site(tmp_path, acme, "abc") as made:
        await made.unite()
        await made["a"].manager.ensure_service(FILES, KeyUse.DATA, None)
        await made.keys_active()
        await made.in_step()
        yield made


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
    manager.bringing.standings["a"].looked_boot_s = None
    await manager.bringing.serve("a")
    assert len(made) == 3
    assert set(made) <= manager.bringing.standings["a"].proven


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
                # On a loaded machine it may say first that b does not answer yet.
                while (found := await row()) is None or "missing" not in (found["lacks"] or ""):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        finally:
            joining.cancel()
            await asyncio.wait([joining])
        assert found["state"] == EnvironmentState.JOINING
        assert f"1 missing: {lost}: " in found["lacks"]
        page = environments_text(listed := await a.commands.env_list())
        assert f"its keys: 1 missing: {lost}" in page
        assert f"epoch {listed['epoch']} ({str(listed['digest'])[:16]}...)" in page  # people compare it
