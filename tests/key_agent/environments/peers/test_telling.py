"""Every proxy acts on the environment's newest word, soon, and again after it forgot."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import override

import pytest

from key_agent.consent import Consent, EnvironmentStanding, Standing
from key_agent.environments.peers.standing import Verdict
from key_agent.environments.peers.telling import (
    AT_ONCE,
    MAX_RESTATEMENTS_PER_S,
    RESTATE_S,
    TIMEOUT_S,
    Telling,
    said,
)
from key_agent.environments.shared.registry_lease import Position
from key_agent.journal import Journal
from key_agent.push.targets import Targets
from key_agent.push.transport import EnvironmentInForce, EnvironmentWord
from key_agent.registry.model import Book, Proxy
from key_agent.sources.pace import Pace
from runtime.audit import AuditLog
from runtime.clock import Clock, SystemClock
from tests.fakes.clock import ManualClock
from tests.fakes.proxies import FakeProxies, FakeProxy
from tests.key_agent.conftest import until
from tests.lateness import lateness


class AheadClock(SystemClock):
    """The real one, that can be ahead."""

    ahead_s = 0.0

    @override
    def boot_s(self) -> float:
        return super().boot_s() + self.ahead_s


class Site:
    def __init__(
        self, proxies: list[FakeProxy], directory: Path, clock: Clock, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.proxies = proxies
        self.word: EnvironmentWord | None = None
        rows = {proxy.id: Proxy(id=proxy.id, url="https://unused", ca_pem="") for proxy in proxies}
        book = Book(kek=None, services=(), proxies=rows, links=(), sequences={})
        self.audit = directory / "audit.jsonl"
        self.telling = Telling(
            transport=FakeProxies(*proxies),
            targets=Targets(book),
            journal=Journal(AuditLog.open(self.audit, clock)),
            clock=clock,
            word=lambda: self.word,
            timeout_s=timeout_s,
        )

    def say(self, state: str, epoch: int) -> None:
        self.word = EnvironmentWord(environment="a", state=state, reason=None, term=1, epoch=epoch)
        self.telling.wake()

    def all_act_on(self, epoch: int) -> bool:
        return all(
            (told := self.telling.told.get(proxy.id)) is not None
            and told.error is None
            and told.word.epoch == epoch
            for proxy in self.proxies
        )


@asynccontextmanager
async def telling(
    tmp_path: Path,
    clock: Clock | None = None,
    *,
    kind: type[FakeProxy] = FakeProxy,
    count: int = 3,
    timeout_s: float = TIMEOUT_S,
) -> AsyncIterator[Site]:
    clock = clock or SystemClock()
    proxies = [kind(id=f"proxy-{number}", clock=clock, signers={}) for number in range(count)]
    site = Site(proxies, tmp_path, clock, timeout_s)
    task = asyncio.create_task(site.telling.run())
    try:
        yield site
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_change_is_told_at_once_and_an_unchanged_word_again(tmp_path: Path) -> None:
    clock = AheadClock()
    async with telling(tmp_path, clock) as site:
        await asyncio.sleep(0)
        assert site.telling.told == {}, "an environment by itself tells nobody"
        site.say("active", 1)
        await until(lambda: site.all_act_on(1))
        site.say("healing", 2)
        await until(lambda: site.all_act_on(2))
        assert [word.state for word in site.proxies[0].words] == ["active", "healing"]
        clock.ahead_s += RESTATE_S + 1
        site.telling.wake()
        await until(lambda: len(site.proxies[0].words) >= 3)
        assert site.proxies[0].words[-1].state == "healing"


async def test_many_are_told_at_once_and_again_less_often(tmp_path: Path) -> None:
    clock = AheadClock()
    count = 2 * int(MAX_RESTATEMENTS_PER_S * RESTATE_S)
    async with telling(tmp_path, clock, count=count) as site:
        site.say("active", 1)
        await until(lambda: site.all_act_on(1))
        clock.ahead_s += RESTATE_S + 1
        site.telling.wake()
        for _ in range(50):
            await asyncio.sleep(0)  # what would be said again is under way
        site.say("healing", 2)
        await until(lambda: site.all_act_on(2))
        assert {len(proxy.words) for proxy in site.proxies} == {2}, "a change is told to each, once"
        told_boot_s = max(told.at_boot_s for told in site.telling.told.values())
        clock.ahead_s += told_boot_s + 2 * RESTATE_S + 1 - clock.boot_s()
        site.telling.wake()
        await until(lambda: all(len(proxy.words) >= 3 for proxy in site.proxies))
        assert site.proxies[0].words[-1].state == "healing"


async def test_who_still_waits_when_the_word_changes_hears_the_new_one_alone(tmp_path: Path) -> None:
    clock = ManualClock()
    async with telling(tmp_path, clock, kind=Gated, count=AT_ONCE["quick"] + 2) as site:
        site.say("active", 1)
        await clock.settle()
        site.say("healing", 2)
        await clock.settle()
        for proxy in site.proxies:
            assert isinstance(proxy, Gated)
            proxy.gate.set()
        await clock.settle()
        assert site.all_act_on(2)
        heard = [[word.state for word in proxy.words] for proxy in site.proxies]
        assert heard[: AT_ONCE["quick"]] == [["active", "healing"]] * AT_ONCE["quick"]
        assert heard[AT_ONCE["quick"] :] == [["healing"]] * 2


async def test_who_still_waits_when_nothing_is_to_be_told_any_more_hears_nothing(tmp_path: Path) -> None:
    clock = ManualClock()
    async with telling(tmp_path, clock, kind=Gated, count=AT_ONCE["quick"] + 1) as site:
        site.say("active", 1)
        await clock.settle()
        site.word = None
        for proxy in site.proxies:
            assert isinstance(proxy, Gated)
            proxy.gate.set()
        await clock.settle()
        assert site.proxies[-1].words == []
        site.say("healing", 2)
        await clock.settle()
        assert site.all_act_on(2)


async def test_however_many_hang_the_others_are_told_before_those_are_given_up(tmp_path: Path) -> None:
    count = AT_ONCE["quick"] + 50
    async with telling(tmp_path, count=count, timeout_s=3600) as site:
        *dead, alive = site.proxies
        for proxy in dead:
            proxy.hanging = True
        site.say("healing", 1)
        await until(lambda: alive.words)
        assert not any(proxy.words for proxy in dead)


async def test_one_that_hangs_keeps_nobody_waiting(tmp_path: Path) -> None:
    async with telling(tmp_path) as site:
        slow, *others = site.proxies
        slow.hanging = True
        site.say("healing", 1)
        async with lateness() as late:
            began_s = time.monotonic()
            await until(lambda: all(proxy.words for proxy in others))
            assert time.monotonic() - began_s < TIMEOUT_S - 2 + late.allowance_s
        assert not slow.words
        slow.hanging = False


async def test_one_that_is_away_is_told_when_it_is_back(tmp_path: Path) -> None:
    async with telling(tmp_path) as site:
        away = site.proxies[0]
        away.down = True
        site.say("healing", 1)
        await until(
            lambda: (told := site.telling.told.get(away.id)) is not None and told.error is not None,
        )
        away.down = False
        await until(lambda: site.all_act_on(1))


@dataclass
class Gated(FakeProxy):
    """Acts on a word at once, and does not say so before its gate is open."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)

    @override
    async def told(self, word: EnvironmentWord) -> EnvironmentInForce:
        answer = await super().told(word)
        await self.gate.wait()
        return answer


async def test_a_word_that_comes_while_another_one_is_told_follows_at_once(tmp_path: Path) -> None:
    clock = ManualClock()
    async with telling(tmp_path, clock, kind=Gated, count=1) as site:
        (proxy,) = site.proxies
        assert isinstance(proxy, Gated)
        site.say("active", 1)
        await clock.settle()
        site.say("healing", 2)
        await clock.settle()
        assert [word.state for word in proxy.words] == ["active"], "one at a time"
        proxy.gate.set()
        await clock.settle()
        assert [word.state for word in proxy.words] == ["active", "healing"]


async def test_one_that_is_away_is_tried_again_a_quarter_of_a_second_later(tmp_path: Path) -> None:
    clock = ManualClock()
    async with telling(tmp_path, clock, count=1) as site:
        (away,) = site.proxies
        await clock.settle()  # it waits for a word, so nothing but the failure wakes it again
        away.down = True
        site.say("healing", 1)
        await clock.settle()
        away.down = False
        await clock.advance(0.3)
        assert [word.state for word in away.words] == ["healing"]


@pytest.mark.parametrize(
    ("state", "kek", "expected"),
    [
        ("active", Standing.CONSENTED, "active"),
        ("active", Standing.UNPROVEN, "active"),
        ("active", Standing.SILENT, "draining"),
        ("active", Standing.DENIED, "draining"),
        ("active", Standing.THROTTLED, "active"),
        ("active", Standing.LOGIN_REFUSED, "draining"),
        ("active", Standing.REVOKED, "draining"),
        ("active", Standing.SUSPENDED, "draining"),
        ("draining", Standing.SILENT, "draining"),
        ("healing", Standing.SILENT, "healing"),
        ("rejoining", Standing.REVOKED, "rejoining"),
    ],
)
def test_an_active_environment_whose_kek_cannot_be_used_drains(
    state: str, kek: Standing, expected: str
) -> None:
    verdict = Verdict(EnvironmentStanding.SERVES, state, "said before")
    told, reason = said(verdict, kek)
    assert told == expected
    assert reason == ("said before" if told == state else f"its KEK cannot be used now: {kek}")
    # A slow HSM is a reason to go elsewhere for callers of an active environment, and none to serve again.
    told, reason = said(verdict, kek, slow="no answer")
    assert told == ("draining" if state == "active" else expected)
    if state == "active" and expected == "active":
        assert reason == "slow: no answer"
    else:
        assert (told, reason) == said(verdict, kek)


class StandIn:
    """Of `Peering`, what `Telling.of` asks: an active environment among others."""

    is_united = True
    environment = "a"
    verdict = Verdict(EnvironmentStanding.SERVES, "active", None)
    position = Position(term=1, epoch=1)

    def listen(self, _listener: Callable[[object], None]) -> None:
        """Its rows do not change here."""


async def test_a_slow_hsm_is_told_at_once_and_so_is_its_end(tmp_path: Path) -> None:
    clock, pace = ManualClock(), Pace()
    consent = Consent(clock)
    consent.standing = Standing.CONSENTED
    proxy = FakeProxy(id="p1", clock=clock, signers={})
    rows = {proxy.id: Proxy(id=proxy.id, url="https://unused", ca_pem="")}
    made = Telling.of(
        StandIn(),  # type: ignore[arg-type]
        consent=consent,
        pace=pace,
        transport=FakeProxies(proxy),
        targets=Targets(Book(kek=None, services=(), proxies=rows, links=(), sequences={})),
        journal=Journal(AuditLog.open(tmp_path / "audit.jsonl", clock)),
        clock=clock,
    )
    task = asyncio.create_task(made.run())
    try:
        await clock.settle()
        pace.late(1.0)
        await clock.settle()
        pace.answered(0.0)
        await clock.settle()
        pace.answered(0.0)
        await clock.settle()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert [(word.state, word.reason) for word in proxy.words] == [
        ("active", None),
        ("draining", "slow: the HSM did not answer within 1 s"),
        ("active", None),
    ]
