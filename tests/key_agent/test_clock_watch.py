"""A wall clock that is set under a running agent: its own, and its proxies'."""

from pathlib import Path
from typing import override

import pytest

from envelope.keys import NetworkService
from key_agent import metrics
from key_agent.clock_watch import SET_S, ClockWatch
from key_agent.journal import Journal
from key_agent.presence import CLOCKS_DIFFER_S
from runtime.audit import AuditLog
from tests.fakes.clock import ManualClock
from tests.fakes.proxies import FakeProxy
from tests.key_agent.conftest import RHYTHM, Bench, until

S3 = NetworkService("acme", "s3")
JUMP_S = 600.0


async def test_a_clock_that_is_set_brings_a_push_forward_either_way(
    tmp_path: Path, clock: ManualClock
) -> None:
    pushes: list[float] = []
    journal = Journal(AuditLog.open(tmp_path / "audit.jsonl", clock))
    watch = ClockWatch(
        clock=clock, journal=journal, look_s=5.0, push_at_once=lambda: pushes.append(clock.boot_s())
    )
    clock.shift(86_400)
    watch.look()
    assert pushes == [], "time passes: nobody has set it"
    for by_s in (JUMP_S, -JUMP_S, SET_S, -SET_S):
        before = len(pushes)
        clock.set_wall(clock.wall_s() + by_s)
        watch.look()
        watch.look()
        assert len(pushes) == before + 1, by_s
    for _ in range(10):
        clock.set_wall(clock.wall_s() + SET_S / 5)
        watch.look()
    assert len(pushes) == 6, "small steps count together"
    await journal.close()
    events = [line for line in (tmp_path / "audit.jsonl").read_text().splitlines() if '"clock-set"' in line]
    assert len(events) == 6
    assert '"ahead_ms":-600000' in events[1]


class OwnClock(ManualClock):
    """Of a proxy: time passes as for the agent, and nobody sets it along with the agent's."""

    def __init__(self, agents: ManualClock) -> None:
        super().__init__()
        self._agents = agents
        self._from_boot_s = agents.wall_s() - agents.boot_s()

    @override
    def boot_s(self) -> float:
        return self._agents.boot_s()

    @override
    def wall_s(self) -> float:
        return self._agents.boot_s() + self._from_boot_s


@pytest.mark.parametrize("by_s", [JUMP_S, -JUMP_S])
async def test_an_agent_whose_clock_was_wrong_pushes_as_soon_as_it_is_right(
    bench: Bench, by_s: float
) -> None:
    proxy = FakeProxy(id="p1", clock=OwnClock(bench.clock), signers=bench.proxy("p0").signers)
    bench.proxies = {"p1": proxy}
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        before = len(proxy.accepted)
        bench.clock.set_wall(bench.clock.wall_s() + by_s)
        await bench.clock.advance(RHYTHM.watch_s)
        # Noticed at once, tried at once, and refused; then again after 1, 2, 4 ... s.
        schedule, due_s = agent.refresh.schedule, 0.0
        for failures in range(1, 8):
            await until(lambda: schedule.failures("p1") >= failures)  # noqa: B023 - awaited here
            due_s = schedule.next_due_s() or 0.0
            if failures < 7:
                await bench.clock.advance(due_s - bench.clock.boot_s())
        assert due_s > bench.clock.boot_s() + 30, "it would be long until the next"
        assert len(proxy.accepted) == before
        assert proxy.valid_keys(S3), "what it has goes on until its end"
        bench.clock.set_wall(bench.clock.wall_s() - by_s)
        await bench.clock.advance(RHYTHM.watch_s)
        await until(lambda: len(proxy.accepted) > before)


async def test_a_proxy_whose_clock_differs_is_told_of(bench: Bench) -> None:
    clock = OwnClock(bench.clock)
    proxy = FakeProxy(id="p1", clock=clock, signers=bench.proxy("p0").signers)
    bench.proxies = {"p1": proxy}

    def seen() -> float:
        return float(metrics.PROXY_CLOCK.labels("p1")._value.get())

    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        await bench.clock.advance(6)
        await until(lambda: agent.presence.sighting("p1") is not None)
        assert abs(seen()) < 1
        for by_s in (JUMP_S, 0.0, -JUMP_S):
            clock._from_boot_s += by_s - seen()
            await bench.clock.advance(6)
            await until(lambda: abs(seen() - by_s) < 1)  # noqa: B023 - awaited here
            assert ("p1" in agent.presence._differing) == (abs(by_s) > CLOCKS_DIFFER_S)
