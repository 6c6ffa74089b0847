"""Many proxies: together where that saves the HSM and the disk, apart where one could hold up another."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from key_agent import presence, refresh
from key_agent.agent import Agent
from key_agent.operations.operations import Operations
from key_agent.push import pusher, sealing
from key_agent.push.places import Places
from key_agent.push.transport import Purpose
from key_agent.registry.model import Receipt
from key_agent.sources.source import EnvelopeRequest, EnvelopeResult, Kek
from tests.fakes.proxies import pem
from tests.key_agent.conftest import RHYTHM, Bench, until

PROXIES = 12
SERVICES = 3
BATCH = 9


class _Sealed:
    """What the HSM was asked for, call by call."""

    def __init__(self, bench: Bench) -> None:
        self.calls: list[list[EnvelopeRequest]] = []
        self._seal = bench.source.seal_envelopes
        bench.source.seal_envelopes = self.seal  # type: ignore[method-assign]

    async def seal(self, kek: Kek, requests: Sequence[EnvelopeRequest]) -> list[EnvelopeResult]:
        self.calls.append(list(requests))
        return await self._seal(kek, requests)

    @property
    def envelopes(self) -> int:
        return sum(len(request.recipients) for call in self.calls for request in call)


@asynccontextmanager
async def _many(
    bench: Bench,
    *,
    proxies: int = PROXIES,
    services: int = SERVICES,
    batch: int = BATCH,
    request_timeout_s: float = RHYTHM.request_timeout_s,
) -> AsyncIterator[tuple[Agent, Operations]]:
    """An agent with *proxies*, each of which hosts *services* of its own, all of them served once."""
    names = [f"p{number:02}" for number in range(proxies)]
    rhythm = replace(RHYTHM, batch_size=batch, request_timeout_s=request_timeout_s)
    async with bench.agent(rhythm=rhythm, working=False) as (agent, operations):
        await operations.kek_create()
        root = pem(bench.tenant.root.certificate)
        for number, name in enumerate(names):
            await operations.proxy_add(proxy=name, url=f"https://{name}.example:8443", ca_pem=root)
            for index in range(services):
                service = f"s{number}-{index}"
                certificate = bench.host(service, name)
                await operations.service_add(service=service, proxy=name, certificate_pem=certificate)
        async with agent.working(refresh=True):
            await until(lambda: _delivered(agent, names, {}))
            await until(lambda: not any(map(agent.refresh.schedule.is_in_flight, names)))
            await agent.pusher.settle()
            yield agent, operations


def _delivered(agent: Agent, names: Sequence[str], before: dict[str, Any]) -> bool:
    found = agent.deliveries
    return all(name in found and found[name] is not before.get(name) for name in names)


async def _cycle(agent: Agent) -> None:
    before = dict(agent.deliveries)
    agent.refresh.at_once()
    await until(lambda: _delivered(agent, list(before), before))


async def test_the_services_of_a_proxy_travel_in_one_request(bench: Bench) -> None:
    async with _many(bench) as (agent, _):
        sealed = _Sealed(bench)
        posts = {name: proxy.posts for name, proxy in bench.proxies.items()}
        await _cycle(agent)
        assert {name: proxy.posts - posts[name] for name, proxy in bench.proxies.items()} == dict.fromkeys(
            posts, 1
        )
        assert sealed.envelopes == PROXIES * SERVICES
        assert max(len(call) for call in sealed.calls) <= BATCH
        assert len(sealed.calls) <= PROXIES * SERVICES // BATCH + 2, "proxies share the HSM's batches"


async def test_what_waits_to_be_sent_is_bounded_whatever_the_proxies_do(bench: Bench) -> None:
    async with _many(bench) as (agent, operations):
        agent.pusher._places[Purpose.KEYS] = Places(quick=3, slow=2, patience_s=0.01)
        sealed = _Sealed(bench)
        hanging = list(bench.proxies.values())
        for proxy in hanging:
            proxy.hanging = True
        agent.refresh.at_once()
        await until(lambda: sealed.envelopes == 5 * SERVICES)
        await asyncio.sleep(0.1)
        assert sealed.envelopes == 5 * SERVICES, "five proxies have places: no envelope is made for another"
        for proxy in hanging:
            proxy.hanging = False
        # Kept from nothing by refreshes that hang.
        await operations.kek_revoke()
        assert agent.withdrawals.is_done()


async def test_proxies_that_hang_hold_up_no_other(bench: Bench) -> None:
    async with _many(bench, request_timeout_s=60.0) as (agent, _):  # longer than `until` waits
        agent.pusher._places[Purpose.KEYS] = Places(quick=2, slow=6, patience_s=0.01)
        good = [name for number, name in enumerate(bench.proxies) if number >= 6]
        for name in bench.proxies.keys() - set(good):
            bench.proxies[name].hanging = True
        before = dict(agent.deliveries)
        agent.refresh.at_once()
        await until(lambda: _delivered(agent, good, before))
        assert all(agent.deliveries[name].is_complete for name in good)


async def test_receipts_that_come_together_are_stored_together(bench: Bench) -> None:
    async with _many(bench) as (agent, operations):
        stored: list[int] = []
        gate = asyncio.Event()
        record = agent.registry.record_receipts

        async def slow(receipts: Sequence[Receipt]) -> None:
            stored.append(len(receipts))
            await gate.wait()
            await record(receipts)

        agent.registry.record_receipts = slow  # type: ignore[method-assign]
        await _cycle(agent)
        gate.set()
        await agent.pusher.settle()
        assert sum(stored) == PROXIES * SERVICES
        assert len(stored) <= 3, "one while the others came, and then those"
        await agent.reload()
        status: Any = await operations.status()
        assert len(status["services"]) == PROXIES * SERVICES
        assert all(row["proxies"][0]["error"] is None for row in status["services"])


def _is_at_rest(agent: Agent) -> bool:
    """No push is under way, and none is due."""
    schedule = agent.refresh.schedule
    due_s = schedule.next_due_s()
    is_under_way = any(map(schedule.is_in_flight, agent.targets.proxies))
    return not is_under_way and due_s is not None and due_s > agent.clock.boot_s()


async def test_receipts_wait_for_those_that_are_under_way(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _many(bench, request_timeout_s=60.0) as (agent, _):
        await until(lambda: _is_at_rest(agent))
        await agent.pusher.settle()
        stored: list[int] = []
        record = agent.registry.record_receipts

        async def counted(receipts: Sequence[Receipt]) -> None:
            stored.append(len(receipts))
            await record(receipts)

        agent.registry.record_receipts = counted  # type: ignore[method-assign]
        monkeypatch.setattr(pusher, "_GATHER_S", 300.0)
        await _cycle(agent)
        await agent.pusher.settle()
        assert stored == [PROXIES * SERVICES]
        # ... but not for one that hangs.
        monkeypatch.setattr(pusher, "_GATHER_S", 0.01)
        bench.proxies["p00"].hanging = True
        agent.refresh.at_once()
        await until(lambda: sum(stored) == (2 * PROXIES - 1) * SERVICES)
        bench.proxies["p00"].hanging = False


async def test_what_a_withdrawal_needs_of_certificates_is_ready_before_it(bench: Bench) -> None:
    """After a push of keys no certificate is read for a withdrawal any more."""
    async with _many(bench, proxies=3) as (agent, operations):
        read = sealing._leaf.cache_info
        sealing._leaf.cache_clear()
        await _cycle(agent)
        await until(lambda: read().misses == 3 * SERVICES)
        await operations.kek_revoke()
        assert agent.withdrawals.is_done()
        assert read().misses == 3 * SERVICES
        assert read().hits >= 3 * SERVICES


async def test_a_later_receipt_is_stored_later(bench: Bench) -> None:
    """A refusal that follows an acceptance while the disk is slow is what the registry ends with."""
    async with _many(bench, proxies=1, services=1) as (agent, _):
        gate = asyncio.Event()
        record = agent.registry.record_receipts

        async def slow(receipts: Sequence[Receipt]) -> None:
            await gate.wait()
            await record(receipts)

        agent.registry.record_receipts = slow  # type: ignore[method-assign]
        proxy = bench.proxies["p00"]
        await _cycle(agent)  # in the writer's hands
        await _cycle(agent)
        [owner] = proxy.services
        proxy.refuse[owner] = "owner"
        await _cycle(agent)
        gate.set()
        await agent.pusher.settle()
        [link] = (await agent.registry.book()).links
        assert str(link.error).startswith("owner")


async def test_many_proxies_are_spread_and_stay_with_a_few_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "TOGETHER", 4)
    async with _many(bench, services=1) as (agent, _):
        jitters = iter([0.0, 0.5, 1.0])
        agent.refresh._jitter = lambda: next(jitters)
        await _cycle(agent)
        await until(lambda: not any(map(agent.refresh.schedule.is_in_flight, bench.proxies)))
        now_s = bench.clock.boot_s()
        due = [round(at_s - now_s) for at_s in agent.refresh.schedule._due_s.values()]
        assert sorted(due) == [270] * 4 + [285] * 4 + [300] * 4


async def test_more_proxies_are_asked_less_often(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "MAX_QUESTIONS_PER_S", 0.5)
    async with _many(bench, services=1) as (_, __):
        asked = [proxy.presences for proxy in bench.proxies.values()]
        await bench.clock.advance(24)  # a question to twelve of them every two seconds
        await bench.clock.advance(1)
        more = [proxy.presences - before for proxy, before in zip(bench.proxies.values(), asked, strict=True)]
        assert set(more) == {1}


async def test_a_revocation_overtakes_a_refresh_of_thousands_of_envelopes(bench: Bench) -> None:
    """The HSM is busy with a batch: withdrawals need it not."""
    async with _many(bench) as (agent, _):
        busy = asyncio.Event()
        released = asyncio.Event()
        seal = bench.source.seal_envelopes

        async def slow(kek: Kek, requests: Sequence[EnvelopeRequest]) -> list[EnvelopeResult]:
            busy.set()
            await released.wait()
            return await seal(kek, requests)

        bench.source.seal_envelopes = slow  # type: ignore[method-assign]
        agent.refresh.at_once()
        await busy.wait()
        agent.consent.revoke("by the test")
        await until(agent.withdrawals.is_done)
        for proxy in bench.proxies.values():
            assert not any(map(proxy.valid_keys, proxy.services))
        released.set()
        await bench.clock.advance(10)
        for proxy in bench.proxies.values():
            assert not any(map(proxy.valid_keys, proxy.services)), "what was late stays behind"
