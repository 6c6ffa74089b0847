"""When a worker is started again, and what it is given. All else real processes show: test_workers.py."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from proxy.config import ProxySettings, PushSettings, Settings
from proxy.environments import Environments, Word
from proxy.keys.relay import Relayed
from proxy.tenants.model import Directory
from proxy.workers import wire
from proxy.workers.fleet import LONGEST_PAUSE_S, Fleet, pause_s
from proxy.workers.latest import MAX_ADDED
from tests.fakes.clock import ManualClock

SETTINGS = Settings(
    proxy=ProxySettings(id="proxy-1", workers=2),
    push=PushSettings(certificate_file=Path("a.pem"), key_file=Path("a.key")),
)


class Worker:
    """A link to a worker that refuses the tokens it is told to."""

    number = 0

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.taken: list[str] = []

    async def ask(self, request: wire.Request, *, timeout_s: float) -> wire.Answer:
        assert isinstance(request, wire.Take)
        await asyncio.sleep(0)
        self.taken += request.envelopes.tokens
        return wire.Taken(
            tuple("time" if token in self.refused else "" for token in request.envelopes.tokens)
        )


def relayed(token: str, service: str, *, replaces: bool = True) -> Relayed:
    return Relayed(
        tenant="acme",
        agent="hq",
        challenge=b"c",
        signing_certificate_der=None,
        tokens=(token,),
        services=(service,),
        replaces=(replaces,),
        is_challenged=True,
        takes_keys=True,
    )


class Site:
    """A fleet without processes: what is taken, nobody else has to take."""

    def __init__(self) -> None:
        self.blind = 0
        self.fleet = Fleet(SETTINGS, clock=ManualClock(), registry=CollectorRegistry(), on_blind=self.count)

    def count(self) -> None:
        self.blind += 1

    async def fill(self, worker: Worker) -> None:
        await self.fleet._fill(worker)  # type: ignore[arg-type]


@pytest.fixture
def site() -> Site:
    return Site()


async def test_a_new_worker_gets_what_the_others_hold_additions_after_what_they_add_to(site: Site) -> None:
    for number in range(200):
        await site.fleet.take(relayed(f"{number}", f"acme/{number}"))
        await site.fleet.take(relayed(f"{number}+", f"acme/{number}", replaces=False))
    worker = Worker()
    await site.fill(worker)
    assert sorted(worker.taken) == sorted([f"{n}{plus}" for n in range(200) for plus in ("", "+")])
    assert all(worker.taken.index(f"{n}") < worker.taken.index(f"{n}+") for n in range(200))
    assert site.blind == 0


async def test_agents_are_asked_to_push_if_a_new_worker_cannot_have_all(site: Site) -> None:
    await site.fill(Worker())
    assert site.blind == 0  # nothing was ever pushed: nothing is missing
    await site.fleet.take(relayed("late", "acme/a"))
    await site.fill(Worker("late"))  # its time is over
    assert site.blind == 1
    for number in range(MAX_ADDED + 1):
        await site.fleet.take(relayed(f"{number}", "acme/b", replaces=False))
    await site.fleet.take(relayed("one too many", "acme/b", replaces=False))
    await site.fill(Worker())
    assert site.blind == 2


class Starting:
    """A link to a worker that has just started: it acts in order, and answers later."""

    number, pid, lives = 0, 1, True
    problems: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.environments = Environments("b")
        self.told = asyncio.Event()

    async def ask(self, request: wire.Request, *, timeout_s: float) -> wire.Answer:
        if isinstance(request, wire.Tell):
            self.environments.put(request.tenant, request.word)
            self.told.set()
        await asyncio.sleep(0.01)
        return wire.Done(())

    async def close(self, *, patience_s: float = 0) -> None:
        pass


def word(state: str, epoch: int) -> Word:
    return Word(environment="b", state=state, term=1, epoch=epoch)


async def test_a_worker_that_is_starting_undoes_no_withdrawal(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Starting()

    async def start(_number: int) -> Starting:
        return link

    monkeypatch.setattr("proxy.workers.fleet.WorkerLink.start", start)
    for tenant in ("one", "two"):
        await site.fleet.tell(tenant, word("active", 5))
    launching = asyncio.create_task(site.fleet._launch(site.fleet._slots[0]))
    await link.told.wait()  # of the first; the second is next
    await site.fleet.tell("two", word("healing", 6))
    await launching
    assert not link.environments.refuses("one")
    assert link.environments.refuses("two")


async def test_what_was_said_of_a_removed_tenant_is_forgotten(site: Site) -> None:
    await site.fleet.tell("one", word("active", 5))
    await site.fleet.apply(Directory.of(1, [], []))
    assert not site.fleet._words


def test_nobody_serving_is_a_reason_against_readiness_at_once(site: Site) -> None:
    assert site.fleet.problems == [f"worker {number} is not serving: it was not started" for number in (0, 1)]


def test_the_first_replacement_is_immediate_and_pauses_are_bounded() -> None:
    assert [pause_s(failures) for failures in range(5)] == [0, 0, 1, 2, 4]
    assert pause_s(1000) == LONGEST_PAUSE_S
