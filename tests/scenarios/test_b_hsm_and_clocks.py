"""B-30, B-48, B-54: keys that end: a rescue is over, an HSM hangs, clocks jump."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.environments.administrators import approved
from tests.environments.site import SiteEnvironment, SiteProxy, until
from tests.scenarios.disturbances import WallClock, hanging
from tests.scenarios.healing_site import ALL, Call, Site, call, site_for_tests

pytestmark = pytest.mark.asyncio(loop_scope="module")


RESCUE_S = 30


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="site")
async def site_fixture(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    directory = tmp_path_factory.mktemp("hsm")
    clocks = {name: WallClock(directory, name) for name in ("b", "c")}
    async with site_for_tests(directory, interval_s=10, clocks=clocks) as made:
        yield made


async def test_b_30_48_54_a_rescue_ends_an_hsm_hangs_and_clocks_jump(site: Site) -> None:
    """Three ends of a validity, waited for at the same time; in a nobody is disturbed meanwhile."""
    balanced, a, b, c = site.balanced, site["a"], site["b"], site["c"]
    clocks = {name: WallClock(balanced.site.directory, name) for name in ("b", "c")}

    # B-30: what c sealed until now is refused; its key is another one.
    sealed, lost = await site.seal("c"), site.active("c")
    incident = await balanced.open_incident("c", "dek", keys=[lost])
    await balanced.rekey(incident)
    for name in ALL:
        await until(lambda: _is(site.opens(name, sealed), 423), timeout_s=60)  # noqa: B023 - awaited here
    await site.all_are_up()
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=RESCUE_S)
    payload: dict[str, object] = {"keys": [lost], "until_ms": int(ends.timestamp() * 1000)}
    words = ("--keys", lost, "--until", ends.isoformat(), "--approve-with")
    refused = await site.ask(a, "keys rescue", incident, *words, "a-none", exit_code=3)
    assert refused["code"].startswith("approval"), refused
    approval = await approved(site.ask, a, dict(site.files), "key-rescue", incident, payload)
    await site.ask(a, "keys rescue", incident, *words, approval)
    for name in ALL:
        await until(lambda: _is(site.opens(name, sealed), 200), timeout_s=RESCUE_S)  # noqa: B023 - awaited here

    async with balanced.calling(count=4) as callers:
        ended = await asyncio.gather(
            _until_refused(site, b, clocks["b"], ahead_s=-600, hangs=True),
            _until_refused(site, c, clocks["c"], ahead_s=600, hangs=False),
        )
        for end_s, calls in ended:
            late = [one for one in calls if one.status == 200 and one.began_s > end_s + 5]
            assert not late, (end_s, late[:3])
            assert calls[-1].status == 503
        # B-54: behind, it ends when it was to end, up to 5 s. Ahead, it may end at once, and never later: a
        # machine that went on from an image would see the same (docs/format.md, "End of validity").
        end_s, calls = ended[0]
        early = [one for one in calls if one.status != 200 and one.ended_s < end_s - 5]
        assert not early, (end_s, early[:3])
        assert calls[0].status == 200, "B-48: the keys that it has go on"
        over_s = time.monotonic()
        while_b_has_keys_s = over_s - (time.time() - end_s)
        # B-54: no clock is wrong any more. Nobody waits for the next refresh.
        await site.all_are_up()
    missed = [text for at_s, text in callers.errors if at_s < while_b_has_keys_s - 1]
    assert missed == [], "B-48: those whom the load balancer sends notice nothing"
    drained_s = _was_drained(site, b, since_s=calls[0].began_s)
    if drained_s < end_s - 1:  # on a machine as fast as that
        missed = [text for at_s, text in callers.errors if at_s < over_s]
        assert missed == [], "nor do they when b's keys have ended"
    for name in clocks:
        await until(lambda: _was_pushed_to_anew(site[name]), timeout_s=60)  # noqa: B023 - awaited here

    # B-30: the time that was approved is over.
    await site.all_are_up()
    for name in ALL:
        await until(lambda: _is(site.opens(name, sealed), 423), timeout_s=90)  # noqa: B023 - awaited here
    assert datetime.now(UTC) >= ends
    await balanced.manager.ask("incident_close", incident=incident)


async def _is(answer: Awaitable[int], status: int) -> bool:
    return await answer == status


async def _until_refused(
    site: Site, one: SiteEnvironment, clock: WallClock, *, ahead_s: int, hangs: bool
) -> tuple[float, list[Call]]:
    """The proxy's clock jumps, and it takes no new keys. When those that it has end, as its agent promised,
    and calls until then and beyond. *hangs*: its HSM does as well, and HAProxy is to send nobody there.
    """
    proxy = one.proxies[0]
    await _refreshed(site, one)
    with contextlib.ExitStack() as stack:
        clock.set_ahead(ahead_s)
        stack.callback(clock.set_ahead, 0)
        if hangs:
            stack.enter_context(hanging(one.hsm))
        end_s = _valid_until_s(site, one)
        calls: list[Call] = []
        while not calls or calls[-1].status == 200 or time.time() < end_s + 6:
            calls.append(await call(proxy))
            end_s = _valid_until_s(
                site, one
            )  # an acknowledgement may have been on its way when the clock jumped
            assert time.time() < end_s + 60, "the keys never end"
            await asyncio.sleep(0.05)
        if hangs:
            await until(lambda: _is_drained(site, proxy), timeout_s=120)
    return end_s, calls


async def _was_pushed_to_anew(one: SiteEnvironment) -> bool:
    """B-54: its proxy has seen its clock set there and back, and its agent came by itself after that."""
    times = [event.at_s for event in events(one.proxies[0].program.log, "the wall clock was set")]
    due = events(one.agent.log, "keys are due at once")
    return len(times) == 2 and any(event.at_s > times[1] for event in due)


def _was_drained(site: Site, one: SiteEnvironment, *, since_s: float) -> float:
    """B-48, by the logs: when callers were sent elsewhere, for the hang, and before it was an outage."""
    slow = events(one.agent.log, "the HSM is slow", since_s)
    drained = [
        event
        for event in events(site.balanced.lb_agent.log, "answers HAProxy", since_s)
        if event.fields["server"] == one.proxies[0].name and event.fields["answer"] == "drain"
    ]
    found = events(one.agent.log, "consent", since_s)
    outages = [event for event in found if event.fields["standing"] == "silent"]
    quick = events(one.agent.log, "the HSM is quick again", since_s)
    assert slow, "it was felt"
    assert drained, "callers were sent elsewhere"
    assert slow[0].at_s < drained[0].at_s
    assert all(drained[0].at_s < outage.at_s for outage in outages), "long before it was an outage"
    assert quick, "it is over, by itself"
    assert quick[-1].at_s > slow[-1].at_s
    return drained[0].at_s


@dataclass(frozen=True)
class Event:
    """A line of a program's log."""

    at_s: float
    fields: dict[str, Any]


def events(log: Path, name: str, since_s: float = 0.0) -> list[Event]:
    """The lines of this event since that moment, oldest first."""
    found = []
    for line in log.read_text().splitlines():
        if name in line and line.startswith("{"):
            fields = json.loads(line)
            if fields["event"] == name:
                found.append(Event(datetime.fromisoformat(fields["timestamp"]).timestamp(), fields))
    return [event for event in found if event.at_s >= since_s]


async def _is_drained(site: Site, proxy: SiteProxy) -> bool:
    return (await site.balanced.haproxy_says())[proxy.name][0] == "DRAIN"


async def _refreshed(site: Site, one: SiteEnvironment) -> None:
    """Return when its proxy has just acknowledged keys: the next are not due for some seconds."""
    before_s = _valid_until_s(site, one)

    async def newer() -> bool:
        return _valid_until_s(site, one) > before_s + 1

    await until(newer, timeout_s=90)


def _valid_until_s(site: Site, one: SiteEnvironment) -> float:
    """By the wall clock of its agent, as it has noted the proxy's acknowledgement."""
    [(found,)] = site.balanced.query(one, _VALID_UNTIL)
    return float(found) / 1000


_VALID_UNTIL = "SELECT max(valid_until_ms) FROM service_proxy"
