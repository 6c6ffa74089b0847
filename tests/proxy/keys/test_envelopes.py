"""What one envelope is worth: whose, for whom, how old, sealed to which certificate. Through the receiver."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509

from certs import pki as dev_pki
from envelope.errors import KeyUnavailableError
from envelope.keys import KeyMaterial
from proxy.tenants import certificates
from proxy.tenants.model import Directory
from tests import pki
from tests.pki import ServiceCredential, make_tenant, write_credential
from tests.proxy.keys.hosting import VALIDITY_S, HostedTenant, directory_of
from tests.proxy.keys.receiving import Proxy


async def test_the_deadline_counts_from_receipt_and_ends_with_the_envelope(
    proxy: Proxy, acme: HostedTenant
) -> None:
    token = acme.seal(proxy.clock, proxy.challenge(acme), acme.key())
    proxy.clock.shift(100)
    assert await proxy.push(acme, token) == ["accepted"]
    key = proxy.cache.sealing_key(acme.owner())
    assert key.valid_for_s == pytest.approx(230)
    proxy.clock.shift(230)
    with pytest.raises(KeyUnavailableError):
        key.check()


async def test_a_wall_clock_behind_the_agents_never_adds_validity(proxy: Proxy, acme: HostedTenant) -> None:
    ahead = int(proxy.clock.wall_s()) + 29  # as far as an agent may be ahead
    token = acme.seal(proxy.clock, proxy.challenge(acme), acme.key(), issued_at_s=ahead)
    assert await proxy.push(acme, token) == ["accepted"]
    assert proxy.cache.sealing_key(acme.owner()).valid_for_s == pytest.approx(VALIDITY_S)


async def test_replay_and_old_sequences_are_refused(proxy: Proxy, acme: HostedTenant) -> None:
    challenge = proxy.challenge(acme)
    token = acme.seal(proxy.clock, challenge, acme.key(), sequence=50)
    assert await proxy.push(acme, token) == ["accepted"]
    assert await proxy.push(acme, token) == ["sequence"]
    lower = acme.seal(proxy.clock, challenge, acme.key(), sequence=49)
    assert await proxy.push(acme, lower) == ["sequence"]
    token_id = os.urandom(16)
    for sequence, outcome in [(51, "accepted"), (52, "replay")]:
        sealed = acme.seal(proxy.clock, challenge, sequence=sequence, token_id=token_id)
        assert await proxy.push(acme, sealed) == [outcome]
    other = acme.seal(proxy.clock, challenge, acme.key(service="mail"), service="mail", sequence=1)
    assert await proxy.push(acme, other) == ["accepted"], "each network service counts for itself"


async def test_nothing_crosses_tenants(proxy: Proxy, acme: HostedTenant, rival: HostedTenant) -> None:
    ours, theirs = proxy.challenge(acme), proxy.challenge(rival)
    genuine = rival.seal(proxy.clock, theirs, rival.key())
    (receipt,) = await proxy.receiver.receive(acme.name, acme.agent_id, [genuine])
    assert (receipt.code, receipt.service) == ("recipient", None), "as if it did not exist"
    forged = acme.seal(proxy.clock, theirs, acme.key(), signing=acme.pki.agent_signing("hq"))
    assert await proxy.push(rival, forged) == ["recipient"]
    assert await proxy.push(rival, genuine) == ["accepted"]
    with pytest.raises(KeyUnavailableError):
        proxy.cache.sealing_key(acme.owner())
    assert await proxy.push(acme, acme.seal(proxy.clock, ours, acme.key())) == ["accepted"]


async def test_forgeries_are_refused(proxy: Proxy, acme: HostedTenant, rival: HostedTenant) -> None:
    challenge = proxy.challenge(acme)
    impostor = make_tenant("acme").agent_signing("hq")  # same names, another root
    other_agent = acme.pki.agent_signing("branch")
    seal = acme.seal
    clock = proxy.clock
    cases = {
        "signer": seal(clock, challenge, acme.key(), signing=impostor),
        "audience": seal(clock, challenge, acme.key(), audience="proxy-2"),
        "nonce": seal(clock, os.urandom(16), acme.key()),
        "time": seal(clock, challenge, acme.key(), validity_s=VALIDITY_S + 1),
        "malformed": "a.b.c",
        "too-large": "x" * 70_000,
    }
    assert await proxy.push(acme, *cases.values()) == list(cases)
    proxy.receiver.sessions.open(acme.name, "branch", signing_certificate=other_agent.certificate)
    with pytest.raises(KeyUnavailableError):
        proxy.cache.sealing_key(acme.owner())
    assert proxy.events().count('"action":"envelope-refused"') == len(cases)


async def test_a_lost_private_key_refuses_by_name(proxy: Proxy, acme: HostedTenant) -> None:
    acme.entries[0].key_file.unlink()
    token = acme.seal(proxy.clock, proxy.challenge(acme), acme.key())
    (receipt,) = await proxy.receiver.receive(acme.name, acme.agent_id, [token])
    assert receipt.code == "recipient-key"
    assert str(acme.entries[0].key_file) not in receipt.detail


async def test_keys_that_come_as_a_withdrawal_are_refused(proxy: Proxy, acme: HostedTenant) -> None:
    challenge = proxy.challenge(acme)
    tokens = [
        acme.seal(proxy.clock, challenge, acme.key()),
        acme.seal(proxy.clock, challenge, service="mail"),
    ]
    receipts = await proxy.receiver.receive(acme.name, acme.agent_id, tokens, takes_keys=False)
    assert [receipt.code or receipt.status for receipt in receipts] == ["purpose", "accepted"]
    with pytest.raises(KeyUnavailableError):
        proxy.cache.sealing_key(acme.owner())


# By a broker: no session, no connection that proves who speaks.


async def test_without_a_challenge_only_what_follows_one_is_believed(
    proxy: Proxy, acme: HostedTenant
) -> None:
    async def by_broker(token: str) -> str:
        (receipt,) = await proxy.receiver.receive(acme.name, acme.agent_id, [token], is_challenged=False)
        return receipt.code or receipt.status

    assert await by_broker(acme.seal(proxy.clock, None, acme.key(), sequence=9)) == "nonce", "no session"
    challenge = proxy.challenge(acme)
    assert await by_broker(acme.seal(proxy.clock, None, acme.key(), sequence=9)) == "nonce", "none accepted"
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key(), sequence=10)) == ["accepted"]
    assert await by_broker(acme.seal(proxy.clock, None, acme.key(), sequence=10)) == "sequence"
    assert await by_broker(acme.seal(proxy.clock, None, acme.key(), sequence=11)) == "accepted"
    mail = acme.seal(proxy.clock, None, acme.key(service="mail"), service="mail", sequence=12)
    assert await by_broker(mail) == "nonce", "each network service counts for itself"
    assert await by_broker(acme.seal(proxy.clock, challenge, acme.key(), sequence=13)) == "nonce"
    assert await proxy.push(acme, acme.seal(proxy.clock, None, acme.key(), sequence=14)) == ["nonce"], (
        "over a connection the challenge is asked for"
    )
    stale = acme.seal(proxy.clock, None, acme.key(), sequence=15)
    proxy.clock.shift(VALIDITY_S)
    assert await by_broker(stale) == "time"
    assert await by_broker(acme.seal(proxy.clock, None, sequence=16)) == "accepted"
    proxy.restart()
    proxy.challenge(acme)
    assert await by_broker(acme.seal(proxy.clock, None, acme.key(), sequence=17)) == "nonce", "it restarted"


# Sealed to the certificate before.


@dataclass
class _Renewal:
    """The proxy has a service's new certificate, the agent not yet."""

    proxy: Proxy
    acme: HostedTenant
    old: x509.Certificate
    directory: Directory

    async def outcome(self, *keys: KeyMaterial) -> str:
        challenge = self.proxy.challenge(self.acme)
        (outcome,) = await self.proxy.push(
            self.acme, self.acme.seal(self.proxy.clock, challenge, *keys, recipient=self.old)
        )
        return outcome


@pytest.fixture(params=["new key", "same key"])
async def renewal(
    proxy: Proxy, acme: HostedTenant, tmp_path: Path, request: pytest.FixtureRequest
) -> _Renewal:
    """Keys were pushed before; then the directory has the new certificate, and the old key file is gone."""
    entry, mail = acme.entries
    assert await proxy.push(acme, acme.seal(proxy.clock, proxy.challenge(acme), acme.key())) == ["accepted"]
    old = acme.services["drive"]
    new = acme.pki.service("drive")
    if request.param == "same key":
        csr = certificates.make_service_csr(entry.owner, old.key)
        certificate = dev_pki.sign_service_csr(acme.pki.root, csr, pki.VALIDITY, valid_from=pki.VALID_FROM)
        new = ServiceCredential(old.key, certificate)
    _, key_file = write_credential(new, tmp_path, "renewed")
    entry.key_file.unlink()
    renewed = replace(entry, certificate=new.certificate, key_file=key_file)
    directory = replace(directory_of(acme, revision=2), services={renewed.owner: renewed, mail.owner: mail})
    proxy.receiver.apply(directory)
    acme.services["drive"] = new
    return _Renewal(proxy, acme, old.certificate, directory)


async def test_a_withdrawal_under_the_certificate_before_counts(renewal: _Renewal) -> None:
    held = renewal.proxy.cache.sealing_key(renewal.acme.owner())
    renewal.proxy.receiver.apply(replace(renewal.directory, revision=3))
    assert await renewal.outcome() == "accepted"
    with pytest.raises(KeyUnavailableError):
        held.check()


async def _switch(renewal: _Renewal) -> None:
    """The agent has heard of the new certificate."""
    challenge = renewal.proxy.challenge(renewal.acme)
    sealed = renewal.acme.seal(renewal.proxy.clock, challenge, renewal.acme.key())
    assert await renewal.proxy.push(renewal.acme, sealed) == ["accepted"]


async def test_a_renewal_interrupts_nothing(renewal: _Renewal) -> None:
    """Validity after validity, until the agent has heard of it."""
    for _ in range(3):
        renewal.proxy.clock.shift(VALIDITY_S - 1)
        assert await renewal.outcome(renewal.acme.key()) == "accepted"
        renewal.proxy.cache.sealing_key(renewal.acme.owner()).check()


async def test_once_the_agent_uses_the_new_certificate_the_one_before_takes_no_keys(
    renewal: _Renewal,
) -> None:
    assert await renewal.outcome(renewal.acme.key()) == "accepted"
    await _switch(renewal)
    held = renewal.proxy.cache.sealing_key(renewal.acme.owner())
    assert await renewal.outcome(renewal.acme.key()) == "recipient"
    assert renewal.proxy.cache.sealing_key(renewal.acme.owner()).key_id == held.key_id
    await _switch(renewal)


async def test_after_the_switch_the_certificate_before_ends_with_one_validity(renewal: _Renewal) -> None:
    await _switch(renewal)
    renewal.proxy.clock.shift(VALIDITY_S - 1)
    assert await renewal.outcome() == "accepted"
    renewal.proxy.clock.shift(1)
    assert await renewal.outcome() == "recipient"


@pytest.mark.parametrize("change", ["service removed", "root"])
async def test_the_certificate_before_ends_with_service_and_trust(renewal: _Renewal, change: str) -> None:
    receiver, acme, directory = renewal.proxy.receiver, renewal.acme, renewal.directory
    if change == "root":
        entry = replace(acme.entry(), root_certificate=make_tenant("acme").root.certificate)
        receiver.apply(replace(directory, tenants={acme.name: entry}))
    else:
        services = {owner: entry for owner, entry in directory.services.items() if owner != acme.owner()}
        receiver.apply(replace(directory, services=services))
    receiver.apply(replace(directory, revision=4))
    assert await renewal.outcome() == "recipient"


async def test_the_certificate_before_is_its_own_tenants(renewal: _Renewal, rival: HostedTenant) -> None:
    receiver = renewal.proxy.receiver
    both = replace(renewal.directory, tenants={**renewal.directory.tenants, rival.name: rival.entry()})
    receiver.apply(both)
    renewal.proxy.challenge(rival)
    challenge = renewal.proxy.challenge(renewal.acme)
    genuine = renewal.acme.seal(renewal.proxy.clock, challenge, recipient=renewal.old)
    assert await renewal.proxy.push(rival, genuine) == ["recipient"]
    renewal.proxy.cache.sealing_key(renewal.acme.owner())
    assert await renewal.proxy.push(renewal.acme, genuine) == ["accepted"]
