"""What somebody would try, or what goes wrong at the worst moment, so that keys survive the kill switch."""

import asyncio
import sqlite3
import ssl
import time
from dataclasses import replace
from typing import Any

import pytest

from envelope.keys import NetworkService
from key_agent.agent import Agent
from key_agent.consent import Standing
from key_agent.registry.database import RegistryError
from key_agent.registry.store import RefusedChangeError
from key_agent.sources.source import Kek, Verdict
from tests.key_agent.conftest import Bench, until

S3 = NetworkService("acme", "s3")


def _kek_of(agent: Agent) -> Kek:
    assert agent.consent.kek is not None
    return agent.consent.kek


async def test_kek_revoke_does_not_wait_for_a_command_that_hangs(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        bench.source.hang()
        adding = asyncio.create_task(
            operations.service_add(service="box", proxy="p1", certificate_pem=bench.host("box"))
        )
        await until(lambda: bench.source.calls[-1] == "generate")
        revoking = asyncio.create_task(operations.kek_revoke())
        await until(lambda: not bench.proxy().valid_keys(S3))
        assert not adding.done()
        bench.source.recover()
        result = await revoking
        assert result["destroyed"]
        assert agent.consent.standing is Standing.REVOKED
        adding.cancel()
        await asyncio.gather(adding, return_exceptions=True)
        assert not bench.proxy().valid_keys(NetworkService("acme", "box"))


async def test_kek_revoke_beats_the_reinstate_that_was_running(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        await operations.kek_revoke()
        bench.source.hang()
        reinstating = asyncio.create_task(operations.reinstate())
        await until(lambda: "diagnose" in bench.source.calls[-2:])
        revoking = asyncio.create_task(operations.kek_revoke())
        await bench.clock.settle()
        bench.source.recover()
        await asyncio.gather(reinstating, revoking)
        assert agent.consent.standing is Standing.REVOKED
        assert not bench.proxy().valid_keys(S3)
        assert not bench.source.keks


async def test_no_new_kek_while_the_old_one_works(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        [key] = bench.proxy().valid_keys(S3)
        kek = _kek_of(agent)
        bench.source.disable(kek)
        await bench.clock.advance(5)
        await until(lambda: not bench.proxy().valid_keys(S3))
        bench.source.disable(kek, enabled=True)
        await agent.wait_for_withdrawals(timeout_s=30)
        await until(lambda: agent.reasons_not_ready() and agent._to_persist is None)
        with pytest.raises(RefusedChangeError, match="is in the HSM and works"):
            await operations.reinstate()
        await operations.reinstate(restore=True)
        assert bench.proxy().valid_keys(S3) == [key]


async def test_a_wall_clock_that_jumps_ahead_does_not_make_the_agent_forget_what_is_out_there(
    bench: Bench,
) -> None:
    """After a pause of the virtual machines NTP sets all of them ahead; their boot clocks go on as before."""
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        assert bench.proxy().valid_keys(S3)
        bench.clock.set_wall(bench.clock.wall_s() + 3600)
        assert bench.proxy().valid_keys(S3)
        await operations.proxy_add(proxy="p9", url="https://p9.example", ca_pem=bench.host("box", "p9"))
        bench.source.destroy(_kek_of(agent))
        await bench.clock.advance(5)
        await until(lambda: not bench.proxy().valid_keys(S3))
        assert bench.proxy().accepted[-1].keys == ()


@pytest.mark.parametrize("back_s", [30, 3600, 400 * 86400])
async def test_a_wall_clock_set_back_still_withdraws(bench: Bench, back_s: int) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        bench.clock.set_wall(bench.clock.wall_s() - back_s)
        bench.source.destroy(_kek_of(agent))
        await bench.clock.advance(5)
        await until(lambda: not bench.proxy().valid_keys(S3))


async def test_the_state_of_many_services_does_not_hold_up_the_watch(bench: Bench) -> None:
    """`/v1/status` has no login: whoever can reach the port must not be able to stop the kill switch."""
    async with bench.agent(working=False) as (agent, operations):
        await bench.provision(operations)
        [kid] = await agent.registry.data_keys()
        [link] = agent.targets.links
        many = 4000
        names = [NetworkService("acme", f"s{number}") for number in range(many)]
        keys = [replace(kid, owner=name) for name in names]
        for name in names:
            agent.targets._links[name, "p1"] = replace(link, owner=name)

        class Registry:
            async def data_keys(self) -> list[Any]:
                return keys

            async def current_kek(self) -> Any:
                return await behind.current_kek()

            async def book(self) -> Any:
                book = await behind.book()
                return replace(book, services=tuple(names), links=tuple(agent.targets.links))

            def __getattr__(self, name: str) -> Any:
                return getattr(behind, name)

        behind = agent.registry
        agent.registry = Registry()  # type: ignore[assignment]
        for looks in (operations.status, operations.service_list):
            began_s = time.process_time()
            found: Any = await looks()
            took_s = time.process_time() - began_s
            assert len(found["services"]) >= many
            assert took_s < 2, f"{looks.__name__}: {took_s:.1f} s of a blocked event loop"


async def test_a_row_that_changes_while_it_is_written_ends_no_loop(bench: Bench) -> None:
    """The KEK is deactivated by `reinstate` between the two steps that write down its revocation."""
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        kek = _kek_of(agent)
        registry = agent.registry
        bench.source.fail(Verdict.TOKEN_CHANGED)
        await bench.clock.advance(5)
        await until(lambda: agent.consent.standing is Standing.SUSPENDED and agent._to_persist is None)
        bench.source.recover()

        class Slow:
            """Lets the KEK be replaced after it was looked at."""

            def __getattr__(self, name: str) -> Any:
                return getattr(registry, name)

            async def current_kek(self) -> Any:
                row = await registry.current_kek()
                agent.registry = registry
                await operations.reinstate()
                return row

        agent.registry = Slow()  # type: ignore[assignment]
        bench.source.destroy(kek)
        await bench.clock.advance(5)
        await until(lambda: agent.registry is registry and agent.consent.kek != kek)
        for _ in range(400):
            if agent._to_persist is None:
                break
            await bench.clock.advance(1)  # to the next try
            await asyncio.sleep(0.05)  # the registry's thread
        assert agent._to_persist is None
        assert agent.consent.standing is Standing.CONSENTED


@pytest.mark.parametrize(
    "damage",
    [
        "canary_ciphertext = zeroblob(60)",
        "canary_sha256 = zeroblob(32)",
        "label = 'another'",
        "object_id = zeroblob(16)",
        "token_serial = 'another'",
    ],
)
async def test_a_damaged_row_is_no_revocation(bench: Bench, damage: str) -> None:
    """Every one of these would look like a KEK destroyed or replaced: withdrawn for good, and no way back."""
    async with bench.agent() as (_, operations):
        await bench.provision(operations)
        [key] = bench.proxy().valid_keys(S3)
    file = bench.directory / "registry.db"
    sound = file.read_bytes()
    connection = sqlite3.connect(file)
    connection.execute(f"UPDATE kek SET {damage}")
    connection.commit()
    connection.close()
    with pytest.raises(RegistryError, match="damaged"):
        async with bench.agent():
            pass
    assert bench.proxy().valid_keys(S3) == [key]
    assert all(claims.keys for claims in bench.proxy().accepted)
    file.write_bytes(sound)
    async with bench.agent() as (agent, _):
        await until(lambda: agent.consent.standing is Standing.CONSENTED)


async def test_a_row_damaged_while_the_agent_runs_stops_pushes_and_no_withdrawal(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        accepted = len(bench.proxy().accepted)
        connection = sqlite3.connect(bench.directory / "registry.db")
        connection.execute("UPDATE kek SET canary_ciphertext = zeroblob(60)")
        connection.commit()
        connection.close()
        await bench.clock.advance(300)
        await until(lambda: agent.refresh.schedule.failures("p1"))
        assert len(bench.proxy().accepted) == accepted
        assert agent.consent.standing is Standing.CONSENTED
        bench.source.destroy(_kek_of(agent))
        await bench.clock.advance(5)
        await until(lambda: not bench.proxy().valid_keys(S3))
        assert bench.proxy().accepted[-1].keys == ()


async def test_a_certificate_that_nobody_can_read_holds_up_no_other_service(bench: Bench) -> None:
    """Whoever may write the database puts one there whose key is of no known kind."""
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        sound = bench.host("box")
        await operations.service_add(service="box", proxy="p1", certificate_pem=sound)
        der = ssl.PEM_cert_to_DER_cert(sound)
        known, unknown = bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06072a8648ce3d027f")
        assert der.count(known) == 1
        odd = ssl.DER_cert_to_PEM_cert(der.replace(known, unknown))
        connection = sqlite3.connect(bench.directory / "registry.db")
        connection.execute(
            "UPDATE service_proxy SET certificate_pem = ? WHERE certificate_pem = ?", (odd, sound)
        )
        assert connection.total_changes == 1
        connection.commit()
        connection.close()
        await agent.reload()
        accepted = len(bench.proxy().accepted)
        await bench.clock.advance(300)
        await until(lambda: len(bench.proxy().accepted) > accepted)
        await bench.clock.settle()
        assert agent.reasons_not_alive() == []
        bench.source.destroy(_kek_of(agent))
        await bench.clock.advance(5)
        await until(lambda: not bench.proxy().valid_keys(S3))
        await bench.clock.settle()
        assert agent.reasons_not_alive() == []
