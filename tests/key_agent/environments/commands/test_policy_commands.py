"""Which environment's key seals, by the administrator's command: real registries and peers, fake HSMs."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from envelope.keys import KeyState, KeyUse
from key_agent.agent import Agent
from key_agent.environments.commands.policy_commands import PolicyCommands
from key_agent.operations.commands import Json
from key_agent.registry.access import RefusedChangeError
from tests.environments.key_site import FILES, KeyMember, KeySite, key_site
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


def commands(member: KeyMember) -> PolicyCommands:
    member.environments.key_parts = member.site_parts
    return PolicyCommands(cast("Agent", member))


def sealing(shown: Json) -> dict[str, str]:
    """Whose key each environment seals with."""
    rings: Any = shown["rings"]
    [ring] = rings
    assert (ring["use"], ring["algorithm"]) == ("data", None)
    return {one["environment"]: one["owner"] for one in ring["keys"]}


async def test_each_policy_says_who_seals_with_what(site: KeySite) -> None:
    keys = await site.keys_active()
    for name in "abc":
        await site[name].host(FILES, f"proxy-{name}")
    a = commands(site["a"])
    shown = await a.env_policy(service="files")
    assert (shown["service"], shown["policy"], shown["pinned_key"]) == ("acme/files", "own", None)
    assert sealing(shown) == {"a": "a", "b": "b", "c": "c"}
    steps = [
        ({"policy": "origin"}, "aaa"),
        ({"policy": "origin", "home": "b"}, "bbb"),
        ({"policy": "pinned", "key": keys["c"]}, "ccc"),
        ({"policy": "own"}, "abc"),
    ]
    for asked, owners in steps:
        shown = await a.env_policy_set(service="acme/files", **asked)
        assert shown["spread"] == {"b": True, "c": True}
        assert sealing(shown) == dict(zip("abc", owners, strict=True)), asked
        assert sealing(await commands(site["c"]).env_policy(service="files")) == sealing(shown)
        for name, owner in zip("abc", owners, strict=True):
            # What the command says is what the proxies of that environment are given.
            await until(lambda n=name, o=owner: _seals(site, n) == [keys[o]])  # type: ignore[misc]


def _seals(site: KeySite, name: str) -> list[str]:
    pushed = site[name].proxies.pushed.get(FILES, {})
    return [key_id for key_id, state in pushed.items() if state is KeyState.ACTIVE]


async def test_what_is_refused(site: KeySite) -> None:
    keys = await site.keys_active()
    a, b = commands(site["a"]), commands(site["b"])
    with pytest.raises(RefusedChangeError, match="not the manager: it is agent-a of a"):
        await b.env_policy_set(service="files", policy="origin")
    for asked in (
        {"policy": "any"},
        {"policy": "pinned"},
        {"policy": "pinned", "key": "00" * 16},
        {"policy": "own", "key": keys["a"]},
        {"policy": "origin", "home": "d"},
        {"policy": "own", "home": "a"},
    ):
        with pytest.raises(RefusedChangeError):
            await a.env_policy_set(service="files", **asked)
    for command in (a.env_policy(service="mail"), a.env_policy_set(service="mail", policy="own")):
        with pytest.raises(RefusedChangeError, match="no network service acme/mail"):
            await command
    assert (await a.env_policy(service="files"))["policy"] == "own"
