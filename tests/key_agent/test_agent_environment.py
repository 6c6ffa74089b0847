"""The agent of an environment that must not serve: nothing leaves, what is out there is taken back."""

from envelope.keys import NetworkService
from key_agent.consent import EnvironmentStanding, Standing
from tests.key_agent.conftest import Bench, until

S3 = NetworkService("acme", "s3")


async def test_a_withdrawn_environment_takes_its_keys_back_and_gives_them_again(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        proxy = bench.proxy()
        assert proxy.valid_keys(S3)
        agent.consent.set_environment(EnvironmentStanding.WITHDRAWN, "healing: INC-7")
        await until(lambda: not proxy.valid_keys(S3))
        assert any("healing: INC-7" in reason for reason in agent.reasons_not_ready())
        status = await operations.status()
        assert status["standing"] == Standing.CONSENTED  # the KEK is as good as it was
        await until(agent.withdrawals.is_done)
        # Neither a refresh nor a KEK that works brings them back.
        accepted = len(proxy.accepted)
        await bench.clock.advance(700)
        assert len(proxy.accepted) == accepted
        agent.consent.set_environment(EnvironmentStanding.SERVES, None)
        await until(lambda: proxy.valid_keys(S3))
        assert not any("does not serve" in reason for reason in agent.reasons_not_ready())


async def test_an_environment_that_nobody_has_proven_yet_waits_and_takes_nothing_back(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        proxy = bench.proxy()
        agent.consent.set_environment(EnvironmentStanding.UNPROVEN, "nobody was heard yet")
        accepted = len(proxy.accepted)
        await bench.clock.advance(310)
        assert len(proxy.accepted) == accepted
        assert proxy.valid_keys(S3)  # they end by themselves
        await bench.clock.advance(30)
        assert not proxy.valid_keys(S3)
        agent.consent.set_environment(EnvironmentStanding.SERVES, None)
        await until(lambda: proxy.valid_keys(S3))


async def test_no_key_outlives_the_registry_lease_under_which_it_was_pushed(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        proxy, left = bench.proxy(), {"s": 0.0}
        agent._may_hold_s = lambda: left["s"]  # type: ignore[method-assign]
        for left_s, valid_s in ((40.0, 40), (500.0, 330)):
            left["s"] = left_s
            accepted = len(proxy.accepted)
            agent.refresh.at_once()
            await until(lambda: len(proxy.accepted) > accepted)  # noqa: B023 - awaited here
            claims = proxy.accepted[-1]
            assert claims.expires_at_s - claims.issued_at_s == valid_s
        left["s"], accepted = 0.4, len(proxy.accepted)
        agent.refresh.at_once()
        await until(lambda: (agent.deliveries["p1"].error or "").find("lease is over") >= 0)
        assert len(proxy.accepted) == accepted
