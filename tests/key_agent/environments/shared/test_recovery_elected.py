"""Where etcd elects nobody is elected while none counts: who is appointed leads, until it can be elected."""

from collections.abc import Callable
from pathlib import Path

from key_agent.environments.peers.etcd import EtcdSettings
from key_agent.environments.peers.leadership import Appointed, ElectedOrAppointed
from key_agent.environments.shared.recovery import appointed
from key_agent.environments.states import EnvironmentState
from tests.environments.healing_site import healing_site
from tests.etcd_cluster import EtcdCluster
from tests.key_agent.conftest import until
from tests.pki import Tenant

WAIT_S = 60


def leader(leads: Callable[[str], bool]) -> str | None:
    return next((name for name in "abc" if leads(name)), None)


async def test_the_appointed_one_leads_until_it_is_elected(tmp_path: Path, acme: Tenant) -> None:
    async with EtcdCluster(tmp_path) as etcd, healing_site(tmp_path, acme, "abc") as site:
        settings = EtcdSettings(urls=etcd.urls, lease_s=12, keep_alive_s=0.5, request_timeout_s=0.5)
        for name in "abc":
            await site[name].stop()
        for name in "abc":
            await site[name].start(etcd=settings)

        def leads(name: str) -> bool:
            return bool(site[name].peering.leads)

        await until(lambda: leader(leads) is not None, timeout_s=WAIT_S)
        await site.keys.in_step()
        manager = str(leader(leads))
        first, other = (name for name in "abc" if name != manager)
        old = await site[first].kek()
        await site.breach(**{other: "kek", first: "kek", manager: "kek"})
        await until(lambda: leader(leads) is None, timeout_s=WAIT_S)

        held = site[first].fake.keks[old.reference.label, old.reference.object_id]
        await until(lambda: not held.enabled, timeout_s=60)
        held.enabled = True
        told = await site[first].commands.env_new_kek()
        recovery = await site.recover(first)
        assert recovery["new_kek"] == told["kek"]
        term = site[first].peering.view.term
        assert [name for name in "abc" if leads(name)] == [first]
        await site.complete(first, told["fingerprint"], at=first)
        assert (await site.rejoin(first, at=first))["state"] == "active"
        assert appointed(site[first].peering.view) is None
        await until(lambda: leads(first) and site[first].peering.view.term > term, timeout_s=WAIT_S)
        for name in (manager, other):
            fingerprint = await site.renew(name, at=first)
            await site.rekey(f"inc-{1 if name == other else 3}", at=first)
            await site.complete(name, fingerprint, at=first)
            assert (await site.rejoin(name, at=first))["state"] == "active"
        await site.keys.in_step()
        states = {body.state for body in site[other].peering.view.environments.values()}
        assert states == {EnvironmentState.ACTIVE}


def test_an_election_comes_first() -> None:
    elected: tuple[int, str] | None = None
    given: int | None = None
    leadership = ElectedOrAppointed(Appointed("a", lambda: elected), lambda: given)
    assert (leadership.term, leadership.proven_boot_s) == (None, None)
    given = 4
    assert leadership.term == 4
    elected = (9, "a")
    assert leadership.term == 9
