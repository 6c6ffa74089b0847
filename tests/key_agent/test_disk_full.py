"""A full disk, for real: what cannot be kept is refused with the cause and nothing acknowledged is lost. Keys
can be taken back all the same, and all goes on by itself when there is space again.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from envelope.audit import verify
from envelope.keys import NetworkService
from key_agent.consent import Standing
from key_agent.operations.operations import Operations
from key_agent.registry.database import RegistryError
from key_agent.registry.states import KekState
from runtime.audit import AuditUnavailableError
from tests.fakes.proxies import pem
from tests.key_agent.conftest import Bench, until
from tests.small_disk import SmallDisk, small_disk

S3, BOX = NetworkService("acme", "s3"), NetworkService("acme", "box")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", size_kib=4096) as made:
        yield made


async def _add_until_refused(bench: Bench, operations: Operations) -> tuple[list[str], Exception]:
    """Proxies that were acknowledged, and the refusal that came at last."""
    acknowledged: list[str] = []
    deadline_s = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline_s, "a full disk takes everything"
        name = f"x{len(acknowledged)}"
        try:
            await operations.proxy_add(
                proxy=name, url=f"https://{name}.example:8443", ca_pem=pem(bench.tenant.root.certificate)
            )
        except (RegistryError, AuditUnavailableError) as error:
            return acknowledged, error
        acknowledged.append(name)


async def test_of_the_registry(bench: Bench, disk: SmallDisk) -> None:
    url = f"sqlite:///{disk.path / 'registry.db'}"
    async with bench.agent(url=url) as (agent, operations):
        await bench.provision(operations)
        await bench.provision(operations, "box", "p2")
        keys = await agent.registry.data_keys()
        disk.fill()
        acknowledged, refusal = await _add_until_refused(bench, operations)
        assert isinstance(refusal, RegistryError)
        assert "disk is full" in str(refusal)
        with pytest.raises(RegistryError, match="disk is full"):
            await operations.rotate(service="s3")
        # No sequence can be spent, so no key leaves; before long the lease counts no more either.
        pushes = len(bench.proxy().accepted)
        await bench.clock.advance(300)
        await until(lambda: agent.refresh.schedule.failures("p1") >= 1)
        assert len(bench.proxy().accepted) == pushes
        await until(lambda: any("lease" in reason for reason in agent.reasons_not_ready()))

        # Space again: pushes, by themselves, with no time passing on the agent's clock.
        disk.clear()
        await until(lambda: len(bench.proxy().accepted) > pushes and len(bench.proxy("p2").held) > 0)
        await until(lambda: not agent.reasons_not_ready())
        assert bench.proxy().valid_keys(S3)
        assert await agent.registry.data_keys() == keys

        # Full once more, and the KEK is gone: the keys are taken back before anything is written.
        disk.fill()
        await _add_until_refused(bench, operations)
        kek = agent.consent.kek
        assert kek is not None
        bench.source.destroy(kek)
        await bench.clock.advance(5)
        await until(lambda: not bench.proxy().valid_keys(S3) and not bench.proxy("p2").valid_keys(BOX))
        assert bench.proxy().accepted[-1].keys == ()
        disk.clear()
        await _as_time_passes(bench, lambda: not _is_unstored(agent.reasons_not_ready()))
        assert [row.state for row in await agent.registry.keks()] == [KekState.REVOKED]

    async with bench.agent(url=url) as (agent, _):
        assert agent.consent.standing is Standing.REVOKED
        assert await agent.registry.data_keys() == keys
        assert {*acknowledged, "p1", "p2"} <= agent.targets.proxies.keys()


async def _as_time_passes(bench: Bench, condition: Callable[[], bool]) -> None:
    """For what is tried again after a while."""

    def look() -> bool:
        bench.clock.shift(1)
        return condition()

    await until(look)


def _is_unstored(reasons: list[str]) -> bool:
    return any("does not know" in reason for reason in reasons)


async def test_of_the_audit_log(bench: Bench, disk: SmallDisk) -> None:
    url = f"sqlite:///{bench.directory / 'registry.db'}"
    bench = replace(bench, directory=disk.path)
    async with bench.agent(url=url) as (agent, operations):
        await bench.provision(operations)
        keys = await agent.registry.data_keys()
        disk.fill()
        acknowledged, refusal = await _add_until_refused(bench, operations)
        assert isinstance(refusal, AuditUnavailableError)
        assert "No space left on device" in str(refusal)
        assert str(disk.path) in refusal.next_step
        assert not {f"x{len(acknowledged)}"} & agent.targets.proxies.keys(), "what was refused was not done"
        with pytest.raises(AuditUnavailableError):
            await operations.rotate(service="s3")
        assert await agent.registry.data_keys() == keys
        pushes = len(bench.proxy().accepted)
        await bench.clock.advance(300)
        await until(lambda: agent.refresh.schedule.failures("p1") >= 1)
        assert len(bench.proxy().accepted) == pushes
        assert any("No space left" in reason for reason in agent.reasons_not_ready())

        disk.clear()
        await _as_time_passes(bench, lambda: len(bench.proxy().accepted) > pushes)
        await until(lambda: not agent.reasons_not_ready())

        disk.fill()
        await _add_until_refused(bench, operations)
        await operations.kek_revoke()
        assert not bench.proxy().valid_keys(S3)
        assert [row.state for row in await agent.registry.keks()] == [KekState.DESTROYED]
        disk.clear()
        await agent.journal.record("space-again")
    with (disk.path / "audit.jsonl").open("rb") as lines:
        assert verify(lines).seq > 5
    assert '"action":"space-again"' in bench.audit()
