"""Who is there: what brings a push forward, what does not, and that asking is in nobody's way."""

import asyncio
import time
from dataclasses import replace
from typing import override

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.keys import NetworkService
from key_agent.command_line.status_cli import status_text
from key_agent.presence import CONCURRENT, GATHER_S, Patience
from key_agent.push.transport import Presence
from tests.fakes.proxies import FakeProxy
from tests.key_agent.conftest import RHYTHM, Bench, until
from tests.lateness import lateness

S3 = NetworkService("acme", "s3")
STEP_S = RHYTHM.presence_s + GATHER_S


# When.


def test_the_first_is_at_once_and_each_further_one_waits_twice_as_long() -> None:
    patience = Patience(first_gap_s=5, max_gap_s=60)
    allowed = [at_s for at_s in range(400) if patience.allows("a", at_s)]
    assert allowed == [0, 5, 15, 35, 75, 135, 195, 255, 315, 375]


def test_it_is_forgiven_and_each_proxy_has_its_own() -> None:
    patience = Patience(first_gap_s=5, max_gap_s=60)
    assert patience.allows("a", 0)
    assert patience.allows("b", 1)
    assert not patience.allows("a", 4.9)
    assert patience.allows("a", 10)
    assert patience.allows("a", 15), "after a quiet time it began anew"
    patience.keep(["b"])
    assert patience.allows("a", 16), "forgotten"
    assert not patience.allows("b", 5)


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=200))
def test_never_two_within_the_gap(steps: list[float]) -> None:
    patience = Patience(first_gap_s=5, max_gap_s=60)
    now_s, last_s = 0.0, float("-inf")
    for step_s in steps:
        now_s += step_s
        if patience.allows("a", now_s):
            assert now_s - last_s >= 5
            last_s = now_s


# What it brings about.


async def test_a_proxy_that_restarts_has_its_keys_within_seconds(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, proxy="p1")
        await bench.provision(operations, proxy="p2")
        one, two = bench.proxy("p1"), bench.proxy("p2")
        await until(lambda: one.valid_keys(S3) and two.valid_keys(S3))
        posts, other_posts = one.posts, two.posts
        one.restart()
        await bench.clock.advance(STEP_S)
        await until(lambda: one.valid_keys(S3))
        await until(lambda: not agent.refresh.schedule.is_in_flight("p1"))
        assert one.posts == posts + 1, "no envelope was wasted on the challenge that had gone"
        assert two.posts == other_posts
        await bench.clock.advance(60)
        assert one.posts == posts + 1, "once"


async def test_an_agent_that_began_with_nobody_to_ask_asks_whoever_is_added_later(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await operations.kek_create()
        await until(lambda: agent.consent.may_push)
        await bench.clock.advance(STEP_S)  # the round after the consent found nobody
        await bench.provision(operations)
        one = bench.proxy()
        await until(lambda: one.valid_keys(S3))
        await bench.clock.advance(STEP_S)
        assert one.presences > 0
        one.restart()
        await bench.clock.advance(STEP_S)
        await until(lambda: one.valid_keys(S3))


async def test_nothing_changes_without_a_restart(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations)
        one = bench.proxy()
        posts, sessions, asked = one.posts, one.sessions, one.presences
        await bench.clock.advance(250)
        assert (one.posts, one.sessions) == (posts, sessions)
        assert 40 <= one.presences - asked <= 50


async def test_many_that_restart_together_need_one_unwrapping(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        for name in ("p1", "p2", "p3"):
            await bench.provision(operations, proxy=name)
        fakes = [bench.proxy(name) for name in ("p1", "p2", "p3")]
        await bench.clock.advance(STEP_S)  # now all are asked in one round
        bench.source.calls.clear()
        for fake in fakes:
            fake.restart()
        await bench.clock.advance(STEP_S)
        await until(lambda: all(fake.valid_keys(S3) for fake in fakes))
        assert bench.source.calls.count("seal_envelopes") == 1


async def test_one_that_is_back_after_failed_pushes_does_not_wait_for_the_back_off(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        one = bench.proxy()
        one.down = True
        for failures, delay_s in enumerate((300, 1, 2, 4, 8, 16, 32), start=1):
            await bench.clock.advance(delay_s)
            await until(lambda: agent.refresh.schedule.failures("p1") == failures)  # noqa: B023 - awaited here
        assert not one.valid_keys(S3)
        one.down = False
        await bench.clock.advance(STEP_S)
        await until(lambda: one.valid_keys(S3))


async def test_one_that_was_away_and_kept_its_keys_is_left_alone(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        one = bench.proxy()
        await bench.clock.advance(STEP_S)
        posts = one.posts
        one.down = True
        await bench.clock.advance(STEP_S)
        sighting = agent.presence.sighting("p1")
        assert sighting is not None
        assert not sighting.answers
        one.down = False
        await bench.clock.advance(2 * STEP_S)
        sighting = agent.presence.sighting("p1")
        assert sighting is not None
        assert sighting.answers
        assert one.posts == posts


async def test_a_session_of_doctor_does_not_pass_for_a_push(bench: Bench) -> None:
    """It tells the agent of the new start, which has no keys yet."""
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        one = bench.proxy()
        one.restart()
        await agent.pusher.probe(agent.targets.proxies["p1"])
        assert not one.valid_keys(S3)
        await bench.clock.advance(STEP_S)
        await until(lambda: one.valid_keys(S3))


class _EverNew(FakeProxy):
    """Takes pushes and shows another instance each time it is asked."""

    @override
    async def presence(self) -> Presence:
        return replace(await super().presence(), instance=self.presences.to_bytes(16))


async def test_ever_new_instances_do_not_keep_the_hsm_busy(bench: Bench) -> None:
    liar = _EverNew(id="liar", clock=bench.clock, signers=bench.proxy("p1").signers)
    bench.proxies["liar"] = liar
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, proxy="liar")
        bench.source.calls.clear()
        for _ in range(59):
            await bench.clock.advance(5)
            await until(lambda: not agent.refresh.schedule.is_in_flight("liar"))
        assert 3 <= bench.source.calls.count("seal_envelopes") <= 7  # 0, 5, 15, 35, 75, 155 s


# What status shows.


async def test_not_answering_is_shown_and_logged_once(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        one = bench.proxy()
        await bench.clock.advance(STEP_S)
        assert "not answering" not in status_text(await operations.status())
        one.down = True
        await bench.clock.advance(STEP_S)
        since = agent.presence.sighting("p1")
        assert since is not None
        await bench.clock.advance(60)
        shown = status_text(await operations.status())
        assert "; not answering since 2027-01-15 " in shown
        assert "(unreachable: connection refused)" in shown
        assert agent.presence.sighting("p1") == since, "since the first time, not the last"
        one.down = False
        await bench.clock.advance(STEP_S)
        assert "not answering" not in status_text(await operations.status())
    written = capsys.readouterr().out
    assert written.count("a proxy does not answer") == 1
    assert written.count("a proxy answers again") == 1


async def test_a_proxy_that_is_removed_is_forgotten(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        await bench.clock.advance(STEP_S)
        assert agent.presence.sighting("p1") is not None
        await operations.proxy_remove(proxy="p1")
        await bench.clock.advance(STEP_S)
        asked = bench.proxy().presences
        await bench.clock.advance(STEP_S)
        assert bench.proxy().presences == asked
        assert agent.presence.sighting("p1") is None


# Without consent.


async def test_without_consent_nobody_is_asked_and_a_restart_brings_no_keys(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        one = bench.proxy()
        await operations.kek_revoke()
        await until(lambda: not one.valid_keys(S3))
        await bench.clock.advance(1)
        asked, posts, sessions = one.presences, one.posts, one.sessions
        one.restart()
        await bench.clock.advance(60)
        assert (one.presences, one.posts, one.sessions) == (asked, posts, sessions)
        assert agent.presence.sighting("p1") is None
        await operations.reinstate()
        await until(lambda: one.valid_keys(S3))
        await bench.clock.advance(STEP_S)
        assert one.presences > asked


class _Slow(FakeProxy):
    """Answers the question when it is told to."""

    gate: asyncio.Event | None = None

    @override
    async def presence(self) -> Presence:
        found = await super().presence()
        if self.gate is not None:
            await self.gate.wait()
        return found


async def test_an_answer_that_comes_after_consent_has_ended_counts_for_nothing(bench: Bench) -> None:
    slow = _Slow(id="slow", clock=bench.clock, signers=bench.proxy("p1").signers)
    bench.proxies["slow"] = slow
    async with bench.agent() as (_, operations):
        await bench.provision(operations, proxy="slow")
        await bench.clock.advance(STEP_S)
        slow.gate = asyncio.Event()
        slow.restart()
        await bench.clock.advance(STEP_S)
        await operations.kek_revoke()
        await bench.clock.advance(1)
        slow.gate.set()
        await bench.clock.advance(60)
        assert not slow.valid_keys(S3)
        assert not any(claims.keys for claims in slow.accepted[1:])


# In nobody's way.


async def test_proxies_that_hang_delay_no_refresh_no_withdrawal_and_no_other_question(bench: Bench) -> None:
    slow = [f"slow-{number:03}" for number in range(CONCURRENT + 6)]
    for name in slow:
        bench.proxies[name] = _Slow(id=name, clock=bench.clock, signers=bench.proxy("p1").signers)
    rhythm = replace(RHYTHM, request_timeout_s=2.0)
    async with bench.agent(rhythm=rhythm) as (agent, operations):
        await bench.provision(operations, proxy="p1")
        for name in slow:
            await bench.provision(operations, proxy=name)
        never = asyncio.Event()
        one = bench.proxy("p1")
        for name in slow:
            found = bench.proxies[name]
            assert isinstance(found, _Slow)
            found.gate = never
        await bench.clock.advance(STEP_S)  # the places for those that answered are all taken now
        accepted = len(one.accepted)
        await bench.clock.advance(300)
        await until(lambda: len(one.accepted) > accepted)
        assert all(not agent.refresh.schedule.failures(name) for name in slow)
        # Once their deadline has shown them for what they are (in real time), they wait among themselves.
        await until(lambda: (seen := agent.presence.sighting(slow[-1])) is not None and not seen.answers)
        one.restart()
        await bench.clock.advance(STEP_S)
        await bench.clock.advance(STEP_S)
        async with lateness() as late:
            began_s = time.monotonic()
            await until(lambda: one.valid_keys(S3))
            assert time.monotonic() - began_s < 3 + late.allowance_s, "behind the slow ones: 4 s"
        await operations.kek_revoke()
        await until(lambda: not any(bench.proxies[name].valid_keys(S3) for name in slow))


class _Surprising(FakeProxy):
    @override
    async def presence(self) -> Presence:
        self.presences += 1
        raise RuntimeError("Session is closed")


async def test_what_nobody_thought_of_stops_no_loop(bench: Bench) -> None:
    rogue = _Surprising(id="rogue", clock=bench.clock, signers=bench.proxy("p1").signers)
    bench.proxies["rogue"] = rogue
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, proxy="rogue")
        await bench.provision(operations, proxy="p1")
        asked = rogue.presences
        await bench.clock.advance(20)
        assert rogue.presences > asked
        seen = agent.presence.sighting("rogue")
        assert seen is not None
        assert seen.error == "internal: RuntimeError"
        bench.proxy("p1").restart()
        await bench.clock.advance(STEP_S)
        await until(lambda: bench.proxy("p1").valid_keys(S3))
