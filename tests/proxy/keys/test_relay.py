"""What one process of a proxy has opened every other one opens by itself, or it is not in force."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from envelope.errors import KeyUnavailableError
from proxy.keys.cache import KeyCache
from proxy.keys.receive import Receiver
from proxy.keys.relay import Relayed
from proxy.tenants.model import Directory
from runtime.audit import AuditLog
from tests.fakes.clock import ManualClock
from tests.proxy.keys.hosting import PROXY_ID, VALIDITY_S, HostedTenant, directory_of, host_tenant


class Worker:
    """A process that takes what is relayed: a receiver of its own."""

    def __init__(self, clock: ManualClock, directory: Directory, path: Path, name: str) -> None:
        self.cache = KeyCache(clock)
        self.audit = AuditLog.open(path / f"{name}.jsonl", clock)
        self.receiver = Receiver(
            proxy_id=PROXY_ID,
            cache=self.cache,
            audit=self.audit,
            clock=clock,
            validity_s=VALIDITY_S,
            directory=directory,
            is_durable=False,
        )


class Site:
    """A proxy and one worker; the relay is the `Relay` of the proxy's receiver."""

    def __init__(self, tenant: HostedTenant, path: Path) -> None:
        self.tenant = tenant
        self.clock = ManualClock()
        directory = directory_of(tenant)
        self.worker = Worker(self.clock, directory, path, "worker")
        self.cache = KeyCache(self.clock)
        self.audit = AuditLog.open(path / "proxy.jsonl", self.clock)
        self.taken: list[Relayed] = []
        self.on_the_way: Callable[[Relayed], Relayed] = lambda relayed: relayed
        self.receiver = Receiver(
            proxy_id=PROXY_ID,
            cache=self.cache,
            audit=self.audit,
            clock=self.clock,
            validity_s=VALIDITY_S,
            directory=directory,
            relay=self,
        )

    async def take(self, envelopes: Relayed) -> tuple[str, ...]:
        self.taken.append(envelopes)
        receipts = await self.worker.receiver.receive_relayed(self.on_the_way(envelopes))
        return tuple(receipt.code for receipt in receipts)

    def challenge(self) -> bytes:
        return self.receiver.sessions.open(
            self.tenant.name, self.tenant.agent_id, signing_certificate=self.tenant.signing.certificate
        ).challenge

    async def push(self, *tokens: str) -> list[str]:
        receipts = await self.receiver.receive(self.tenant.name, self.tenant.agent_id, tokens)
        return [receipt.code or receipt.status for receipt in receipts]

    def can_seal(self) -> tuple[bool, bool]:
        """The proxy's own cache, and the worker's."""
        found = []
        for cache in (self.cache, self.worker.cache):
            try:
                cache.sealing_key(self.tenant.owner())
                found.append(True)
            except KeyUnavailableError:
                found.append(False)
        return found[0], found[1]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(host_tenant(tmp_path), tmp_path)


async def test_keys_and_withdrawals_are_in_force_in_every_process(site: Site) -> None:
    tenant, challenge = site.tenant, site.challenge()
    assert await site.push(tenant.seal(site.clock, challenge, tenant.key())) == ["accepted"]
    assert site.can_seal() == (True, True)
    assert site.taken[0].services == (str(tenant.owner()),)
    assert site.taken[0].replaces == (True,)
    assert await site.push(tenant.seal(site.clock, challenge)) == ["accepted"]
    assert site.can_seal() == (False, False)
    assert "keys-withdrawn" in site.worker.audit.path.read_text()


async def test_only_what_holds_here_is_passed_on(site: Site) -> None:
    tenant, challenge = site.tenant, site.challenge()
    good = tenant.seal(site.clock, challenge, tenant.key())
    assert await site.push("nonsense", good) == ["malformed", "accepted"]
    assert [relayed.tokens for relayed in site.taken] == [(good,)]


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ({"challenge": b"x" * 32}, "nonce"),
        ({"signing_certificate_der": None}, "signer"),
        ({"signing_certificate_der": b"no certificate"}, "signer"),
        ({"agent": "other"}, "signer"),
        ({"tenant": "rival"}, "recipient"),
    ],
)
async def test_a_process_believes_no_envelope_because_another_one_does(
    site: Site, damage: dict[str, object], code: str
) -> None:
    site.on_the_way = lambda relayed: msgspec.structs.replace(relayed, **damage)
    tenant = site.tenant
    assert await site.push(tenant.seal(site.clock, site.challenge(), tenant.key())) == [code]
    assert site.can_seal() == (False, False)  # nobody has what one has refused


async def test_a_withdrawal_that_one_refused_is_not_acknowledged(site: Site) -> None:
    tenant, challenge = site.tenant, site.challenge()
    assert await site.push(tenant.seal(site.clock, challenge, tenant.key())) == ["accepted"]
    site.on_the_way = lambda relayed: msgspec.structs.replace(relayed, challenge=b"x" * 32)
    assert await site.push(tenant.seal(site.clock, challenge)) == ["nonce"]
    assert site.can_seal() == (False, True)  # here it holds all the same; the agent will ask again
    site.on_the_way = lambda relayed: relayed
    assert await site.push(tenant.seal(site.clock, challenge)) == ["accepted"]
    assert site.can_seal() == (False, False)


async def test_an_envelope_is_relayed_under_the_session_it_answered(site: Site) -> None:
    """Another session opened while it was on its way to the disk."""
    tenant, first = site.tenant, site.challenge()
    token = tenant.seal(site.clock, first, tenant.key())
    pushing = asyncio.create_task(site.push(token))
    await asyncio.sleep(0)
    second = site.challenge()
    assert await pushing == ["accepted"]
    assert (site.taken[0].challenge, second != first) == (first, True)
    assert site.can_seal() == (True, True)


async def test_a_challenge_that_was_only_relayed_opens_nothing_directly(site: Site) -> None:
    tenant, challenge = site.tenant, site.challenge()
    assert await site.push(tenant.seal(site.clock, challenge, tenant.key())) == ["accepted"]
    later = tenant.seal(site.clock, challenge, tenant.key())
    receipts = await site.worker.receiver.receive(tenant.name, tenant.agent_id, [later])
    assert [receipt.code for receipt in receipts] in (["signer"], ["nonce"])


def test_forgetting_the_past_is_another_instance(site: Site) -> None:
    before = site.receiver.instance
    site.receiver.forget_past()
    assert site.receiver.instance != before
