"""The manager ends at any point of a rotation (B-10): it goes on from the rows, to the same end each time.

It is stopped where a call to its HSM, to a peer or to the registry has just begun, or has just been done and
was not heard of any more.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, override

from envelope.keys import KeyState, KeyUse
from key_agent.environments.keys.wrapping import LOOK_PATH, WAITING_PATH
from key_agent.sources.source import KeySource
from tests.environments.key_site import FILES, KeyMember, KeySite, key_site
from tests.fakes.key_source import FakeKeySource
from tests.key_agent.conftest import until
from tests.key_agent.environments.keys.test_manager import one_active_in_every_epoch
from tests.pki import Tenant

MAX_POINTS = 60
# Questions that change nothing: whoever is killed there is killed before or after what changes something.
_ASKING = (LOOK_PATH, WAITING_PATH, "/v1/env/heartbeat", "/v1/env/registry", "/v1/env/identity")


class Points:
    """Calls are counted; at the chosen one the caller is never answered."""

    def __init__(self) -> None:
        self.left: int | None = None
        """Points to pass before the one where it hangs; None: it does not."""
        self.hangs = asyncio.Event()
        self.where = ""

    async def passed(self, where: str) -> None:
        if self.left is None:
            return
        if self.left == 0:
            self.where = where
            self.hangs.set()
            await asyncio.Event().wait()
        self.left -= 1


class CountedSource(FakeKeySource):
    points: Points

    @override
    async def _enter(self, name: str) -> None:
        if name in ("generate", "export_keys"):
            await self.points.passed(name)
        await super()._enter(name)


def counted(points: Points, where: str, work: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(*words: Any, **named: Any) -> Any:
        path = next((word for word in words if isinstance(word, str) and word.startswith("/v1/")), "")
        if path.startswith(_ASKING):
            return await work(*words, **named)
        await points.passed(f"before {where} {path}")
        found = await work(*words, **named)
        if where != "record":
            await points.passed(f"after {where} {path}")
        return found

    return call


def count(member: KeyMember, points: Points) -> None:
    """In each life of *member*: its writes and what it asks of peers are points."""
    shared = member.environments.shared
    for part, name in ((shared, "write"), (member.transport, "request"), (member.journal, "record")):
        setattr(part, name, counted(points, name, getattr(part, name)))


async def test_a_manager_that_is_killed_at_any_point_comes_to_the_same_end(
    tmp_path: Path, acme: Tenant
) -> None:
    points = Points()

    def source(name: str) -> KeySource:
        if name != "a":
            return FakeKeySource()
        made = CountedSource()
        made.points = points
        return made

    async with key_site(tmp_path, acme, "abc", make_source=source) as site:
        await site.unite()
        manager = site["a"]
        await manager.manager.ensure_service(FILES, KeyUse.DATA, None)
        keys = await site.keys_active()
        count(manager, points)
        seen = []
        for point in range(MAX_POINTS):
            keys = await rotated(site, points, point, before=keys)
            if not points.hangs.is_set():
                break
            seen.append(points.where)
        else:
            raise AssertionError(f"{MAX_POINTS} points do not suffice: {seen}")
        assert len(seen) >= 12, seen
        for member in site.members.values():
            assert isinstance(member, KeyMember)
            one_active_in_every_epoch(member)
            await member.environments.shared.verify()
            live = [key for key, body in member.deks.items() if body.state is not KeyState.DESTROYED]
            assert await member.opens(live)


async def rotated(site: KeySite, points: Points, point: int, *, before: dict[str, str]) -> dict[str, str]:
    """The keys after a rotation in which the manager was killed at that *point*, and started again."""
    manager = site["a"]
    points.hangs.clear()
    points.left = point
    rotating = asyncio.create_task(manager.manager.rotate({str(FILES)}, None))
    await until(lambda: points.hangs.is_set() or is_done(manager, before), timeout_s=60)
    points.left = None
    if points.hangs.is_set():
        rotating.cancel()
        await asyncio.gather(rotating, return_exceptions=True)
        await manager.stop()
        await manager.start()
        count(manager, points)
        await until(lambda: manager.peering.leads)
        known = {key for key, body in manager.deks.items() if body.state is not KeyState.DESTROYED}
        if not any(manager.deks[key].predecessor in before.values() for key in known):
            # Nothing was written before the end: the command is given again, as its caller would.
            await manager.manager.rotate({str(FILES)}, None)
        await until(lambda: is_done(manager, before), timeout_s=60)
    else:
        await rotating
    keys = await site.keys_active()
    await site.in_step()
    return keys


def is_done(member: KeyMember, before: dict[str, str]) -> bool:
    """Every environment has another active key than *before*, and none is on its way."""
    states = [body.state for body in member.deks.values()]
    active = {key for key, body in member.deks.items() if body.state is KeyState.ACTIVE}
    return KeyState.PRE_ACTIVE not in states and len(active) == 3 and not active & set(before.values())
