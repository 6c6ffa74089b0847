"""Envelopes become keys, or are refused; real cryptography, a clock that only the test moves."""

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import override

import pytest
from cryptography import x509

from certs import pki as dev_pki
from envelope import derive
from envelope.audit import Value
from envelope.errors import KeyUnavailableError, Unavailable
from envelope.keys import KeyMaterial, KeyState, KeyUse
from envelope.material import MAX_AHEAD_S, Operation
from envelope.strict_json import MAX_SEQUENCE
from proxy.encryption_service.model import NamedKey, ServiceDirectory
from proxy.keys.cache import KeyCache
from proxy.keys.receive import MAX_AGENTS_PER_TENANT, Receiver, SessionRefusedError
from proxy.tenants import certificates
from proxy.tenants.model import Directory
from runtime.audit import AuditLog, AuditUnavailableError
from runtime.clock import Clock
from tests import pki
from tests.fakes.clock import ManualClock
from tests.pki import ServiceCredential, make_tenant, write_credential
from tests.proxy.keys.hosting import PROXY_ID, VALIDITY_S, HostedTenant, directory_of, host_tenant


class FullDisk(AuditLog):
    """A real log, refused from the moment `is_full` is set."""

    is_full = False

    @override
    def append(self, action: str, *, outcome: str = "ok", durable: bool = True, **fields: Value) -> None:
        if self.is_full:
            raise AuditUnavailableError("cannot be written: No space left on device", "free the disk")
        super().append(action, outcome=outcome, durable=durable, **fields)


class Proxy:
    """The receiving side with all its parts."""

    def __init__(self, directory: Directory, path: Path) -> None:
        self.clock = ManualClock()
        self.cache = KeyCache(self.clock)
        self.audit = FullDisk.open(path / "audit.jsonl", self.clock)
        self.receiver = self._make(directory)

    def _make(self, directory: Directory) -> Receiver:
        return Receiver(
            proxy_id=PROXY_ID,
            cache=self.cache,
            audit=self.audit,
            clock=self.clock,
            validity_s=VALIDITY_S,
            directory=directory,
        )

    def restart(self) -> None:
        """Forget what a process forgets."""
        self.cache = KeyCache(self.clock)
        self.receiver = self._make(self.receiver.directory)

    def challenge(self, tenant: HostedTenant) -> bytes:
        certificate = tenant.signing.certificate
        return self.receiver.open_session(
            tenant.name, tenant.agent_id, signing_certificate=certificate
        ).challenge

    async def push(self, tenant: HostedTenant, *tokens: str) -> list[str]:
        """What became of each: `accepted` or the code."""
        receipts = await self.receiver.receive(tenant.name, tenant.agent_id, tokens)
        return [receipt.code or receipt.status for receipt in receipts]

    def events(self) -> str:
        return self.audit.path.read_text()


@pytest.fixture
def acme(tmp_path: Path) -> HostedTenant:
    return host_tenant(tmp_path)


@pytest.fixture
def rival(tmp_path: Path) -> HostedTenant:
    return host_tenant(tmp_path, "rival")


@pytest.fixture
def proxy(acme: HostedTenant, rival: HostedTenant, tmp_path: Path) -> Iterator[Proxy]:
    proxy = Proxy(directory_of(acme, rival), tmp_path)
    yield proxy
    proxy.audit.close()


@pytest.mark.parametrize("key_type", ["p256", "rsa-2048"])
async def test_an_envelope_becomes_keys(tmp_path: Path, key_type: str) -> None:
    tenant = host_tenant(tmp_path, key_type=key_type)
    proxy = Proxy(directory_of(tenant), tmp_path)
    secret = os.urandom(32)
    active, old = tenant.key(secret=secret), tenant.key(KeyState.DEACTIVATED)
    token = tenant.seal(proxy.clock, proxy.challenge(tenant), active, old, sequence=7)
    (receipt,) = await proxy.receiver.receive(tenant.name, tenant.agent_id, [token])
    assert receipt.as_json() == {
        "status": "accepted",
        "service": "acme/drive",
        "sequence": 7,
        "keys": 2,
        "valid_for_s": 330.0,
    }
    expected = derive.object_key(secret, tenant.owner(), active.key_id)
    assert proxy.cache.sealing_key(tenant.owner()).object_key == expected
    proxy.cache.opening_key(tenant.owner(), old.key_id)
    assert '"action":"keys-accepted"' in proxy.events()
    proxy.audit.close()


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


async def test_an_empty_set_withdraws_at_once(proxy: Proxy, acme: HostedTenant) -> None:
    challenge = proxy.challenge(acme)
    key = acme.key()
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, key)) == ["accepted"]
    held = proxy.cache.sealing_key(acme.owner())
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge)) == ["accepted"]
    with pytest.raises(KeyUnavailableError) as caught:
        held.check()
    assert caught.value.reason is Unavailable.WITHDRAWN
    assert '"action":"keys-withdrawn"' in proxy.events()


async def test_a_full_audit_log_refuses_keys_but_never_a_withdrawal(proxy: Proxy, acme: HostedTenant) -> None:
    challenge = proxy.challenge(acme)
    first, second = acme.key(), acme.key(service="mail")
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, first)) == ["accepted"]
    proxy.audit.is_full = True
    sealed = acme.seal(proxy.clock, challenge, second, service="mail")
    assert await proxy.push(acme, sealed) == ["audit-unavailable"]
    with pytest.raises(KeyUnavailableError):
        proxy.cache.sealing_key(acme.owner("mail"))
    proxy.cache.sealing_key(acme.owner())
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge)) == ["audit-unavailable"]
    with pytest.raises(KeyUnavailableError) as caught:
        proxy.cache.sealing_key(acme.owner())
    assert caught.value.reason is Unavailable.WITHDRAWN
    with pytest.raises(AuditUnavailableError):
        proxy.challenge(acme)
    proxy.audit.is_full = False
    assert await proxy.push(acme, sealed) == ["sequence"], "what was refused is used up"


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


async def test_a_push_that_a_withdrawal_overtook_is_refused(proxy: Proxy, acme: HostedTenant) -> None:
    challenge = proxy.challenge(acme)
    late = acme.seal(proxy.clock, challenge, acme.key(), sequence=10)
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, sequence=11), late) == [
        "accepted",
        "sequence",
    ]
    with pytest.raises(KeyUnavailableError):
        proxy.cache.sealing_key(acme.owner())


async def test_a_withdrawal_wins_though_the_push_is_being_recorded(proxy: Proxy, acme: HostedTenant) -> None:
    """Two connections: keys have verified and wait for the audit log when the withdrawal arrives."""
    challenge = proxy.challenge(acme)
    token, withdrawal = (
        acme.seal(proxy.clock, challenge, acme.key(), sequence=10),
        acme.seal(proxy.clock, challenge, sequence=11),
    )
    push = asyncio.create_task(proxy.push(acme, token))
    await asyncio.sleep(0)  # the push has opened its envelope and handed its event to a thread
    assert await proxy.push(acme, withdrawal) == ["accepted"]
    assert await push == ["sequence"]
    with pytest.raises(KeyUnavailableError) as caught:
        proxy.cache.sealing_key(acme.owner())
    assert caught.value.reason is Unavailable.WITHDRAWN


@pytest.mark.parametrize(("paused_s", "outcome"), [(VALIDITY_S - 30, "accepted"), (3600, "time")])
async def test_a_pause_while_the_push_is_being_recorded_counts(
    proxy: Proxy, acme: HostedTenant, paused_s: float, outcome: str
) -> None:
    """The machine is paused between the envelope's check and its installation; its boot clock stands still.

    The keys have no deadline in the cache yet that could be shortened when the wall clock is set right.
    """
    token = acme.seal(proxy.clock, proxy.challenge(acme), acme.key())
    push = asyncio.create_task(proxy.push(acme, token))
    await asyncio.sleep(0)  # the push has opened its envelope and handed its event to a thread
    proxy.clock.set_wall(proxy.clock.wall_s() + paused_s)
    proxy.cache.take_off_lost_time()  # by the sweeper, which may come first
    assert await push == [outcome]
    (status,) = proxy.cache.status([acme.owner()])
    assert status.valid_for_s == pytest.approx(max(0.0, VALIDITY_S - paused_s))


async def test_a_cancelled_push_leaves_no_material(proxy: Proxy, acme: HostedTenant) -> None:
    challenge = proxy.challenge(acme)
    tokens = [acme.seal(proxy.clock, challenge, acme.key()), acme.seal(proxy.clock, challenge, acme.key())]
    push = asyncio.create_task(proxy.push(acme, *tokens))
    await asyncio.sleep(0)
    push.cancel()
    await asyncio.gather(push, return_exceptions=True)
    with pytest.raises(KeyUnavailableError):
        proxy.cache.sealing_key(acme.owner())
    assert await proxy.push(acme, tokens[0]) == ["sequence"]


async def test_a_restarted_proxy_refuses_what_answers_an_old_challenge(
    proxy: Proxy, acme: HostedTenant
) -> None:
    token = acme.seal(proxy.clock, proxy.challenge(acme), acme.key())
    proxy.restart()
    assert await proxy.push(acme, token) == ["nonce"]
    proxy.challenge(acme)
    assert await proxy.push(acme, token) == ["nonce"]
    assert await proxy.push(acme, acme.seal(proxy.clock, proxy.challenge(acme), acme.key())) == ["accepted"]


async def test_a_new_session_voids_the_challenge_but_not_the_sequence(
    proxy: Proxy, acme: HostedTenant
) -> None:
    old = proxy.challenge(acme)
    assert await proxy.push(acme, acme.seal(proxy.clock, old, acme.key(), sequence=9)) == ["accepted"]
    new = proxy.challenge(acme)
    assert await proxy.push(acme, acme.seal(proxy.clock, old, acme.key(), sequence=10)) == ["nonce"]
    assert await proxy.push(acme, acme.seal(proxy.clock, new, acme.key(), sequence=9)) == ["sequence"]


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
    proxy.receiver.open_session(acme.name, "branch", signing_certificate=other_agent.certificate)
    with pytest.raises(KeyUnavailableError):
        proxy.cache.sealing_key(acme.owner())
    assert proxy.events().count('"action":"envelope-refused"') == len(cases)


async def test_one_bad_envelope_leaves_the_others_alone(proxy: Proxy, acme: HostedTenant) -> None:
    challenge = proxy.challenge(acme)
    good = acme.seal(proxy.clock, challenge, acme.key())
    mail = acme.seal(proxy.clock, challenge, acme.key(service="mail"), service="mail")
    assert await proxy.push(acme, good, good[:-4] + "AAAA", mail) == ["accepted", "decryption", "accepted"]


def test_sessions_need_a_signing_certificate_of_this_agent(
    proxy: Proxy, acme: HostedTenant, rival: HostedTenant
) -> None:
    wrong = [
        acme.tls.certificate,
        acme.services["drive"].certificate,
        acme.pki.agent_signing("branch").certificate,
        rival.signing.certificate,
        make_tenant("acme").agent_signing("hq").certificate,
        acme.pki.root.certificate,
    ]
    for certificate in wrong:
        with pytest.raises(SessionRefusedError) as caught:
            proxy.receiver.open_session(acme.name, acme.agent_id, signing_certificate=certificate)
        assert caught.value.code == "signer"
    with pytest.raises(SessionRefusedError) as caught:
        proxy.receiver.open_session("nobody", "hq")
    assert caught.value.code == "tenant"


async def test_without_a_signing_certificate_nothing_is_believed(proxy: Proxy, acme: HostedTenant) -> None:
    challenge = proxy.receiver.open_session(acme.name, acme.agent_id).challenge
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key())) == ["signer"]


async def test_pinned_signers_are_the_only_ones(proxy: Proxy, acme: HostedTenant) -> None:
    other = acme.pki.agent_signing(acme.agent_id)
    directory = directory_of(acme, revision=2)
    pinned = acme.entry(signers=(acme.signing.certificate,))
    proxy.receiver.apply(replace(directory, tenants={acme.name: pinned}))
    challenge = proxy.receiver.open_session(acme.name, acme.agent_id).challenge
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key())) == ["accepted"]
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key(), signing=other)) == ["signer"]
    with pytest.raises(SessionRefusedError):
        proxy.receiver.open_session(acme.name, acme.agent_id, signing_certificate=other.certificate)


async def test_one_more_pinned_signer_takes_nothing_away(proxy: Proxy, acme: HostedTenant) -> None:
    branch = acme.pki.agent_signing("branch")
    directory = directory_of(acme, revision=2)

    def pin(*signers: x509.Certificate) -> None:
        proxy.receiver.apply(replace(directory, tenants={acme.name: acme.entry(signers=signers)}))

    pin(acme.signing.certificate)
    challenge = proxy.challenge(acme)
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key())) == ["accepted"]
    held = proxy.cache.sealing_key(acme.owner())
    pin(acme.signing.certificate, branch.certificate)
    held.check()
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key())) == ["accepted"], (
        "the session goes on"
    )
    held = proxy.cache.sealing_key(acme.owner())
    pin(branch.certificate)
    with pytest.raises(KeyUnavailableError):
        held.check()
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key())) == ["nonce"]


@pytest.mark.parametrize("before", [True, False])
async def test_the_first_pin_and_the_last_one_to_go_take_the_keys(
    proxy: Proxy, acme: HostedTenant, *, before: bool
) -> None:
    """The first excludes all others that were certified; whoever removes the last one distrusts it."""
    directory = directory_of(acme, revision=2)
    pinned, free = (acme.entry(signers=(acme.signing.certificate,)), acme.entry())
    one, other = (pinned, free) if before else (free, pinned)
    proxy.receiver.apply(replace(directory, tenants={acme.name: one}))
    assert await proxy.push(acme, acme.seal(proxy.clock, proxy.challenge(acme), acme.key())) == ["accepted"]
    held = proxy.cache.sealing_key(acme.owner())
    proxy.receiver.apply(replace(directory, tenants={acme.name: other}))
    with pytest.raises(KeyUnavailableError):
        held.check()


async def test_what_the_directory_drops_loses_its_keys(
    proxy: Proxy, acme: HostedTenant, rival: HostedTenant
) -> None:
    challenge = proxy.challenge(acme)
    tokens = [
        acme.seal(proxy.clock, challenge, acme.key(service=service), service=service)
        for service in ("drive", "mail")
    ]
    assert await proxy.push(acme, *tokens) == ["accepted", "accepted"]
    drive, mail = (proxy.cache.sealing_key(acme.owner(service)) for service in ("drive", "mail"))
    directory = directory_of(acme, rival, revision=2)
    services = {owner: entry for owner, entry in directory.services.items() if owner != acme.owner("mail")}
    proxy.receiver.apply(replace(directory, services=services))
    drive.check()
    with pytest.raises(KeyUnavailableError):
        mail.check()
    assert await proxy.push(
        acme, acme.seal(proxy.clock, challenge, acme.key(service="mail"), service="mail")
    ) == ["recipient"]
    # A tenant under a new root: whoever pushed before may no longer be entitled to.
    renewed = replace(acme.entry(), root_certificate=make_tenant("acme").root.certificate)
    proxy.receiver.apply(replace(directory, tenants={**directory.tenants, acme.name: renewed}))
    with pytest.raises(KeyUnavailableError):
        drive.check()
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key())) == ["nonce"]


async def test_a_named_key_is_pushed_and_withdrawn_like_a_service(
    proxy: Proxy, acme: HostedTenant, rival: HostedTenant
) -> None:
    """ "mail" becomes a named key of the encryption service: no upstream, the same envelopes."""
    (mail,) = [entry for entry in acme.entries if entry.owner == acme.owner("mail")]
    named = NamedKey(owner=mail.owner, certificate=mail.certificate, key_file=mail.key_file)
    directory = directory_of(acme, rival, revision=2)
    services = {owner: entry for owner, entry in directory.services.items() if owner != mail.owner}
    hosting = replace(directory, services=services, encryption_service=ServiceDirectory.of([named]))
    proxy.receiver.apply(hosting)
    session = proxy.receiver.open_session(
        acme.name, acme.agent_id, signing_certificate=acme.signing.certificate
    )
    assert mail.owner in {service.owner for service in session.services}

    def seal(*keys: KeyMaterial) -> str:
        return acme.seal(proxy.clock, session.challenge, *keys, service="mail")

    one, two = acme.key(service="mail"), acme.key(service="mail")
    assert await proxy.push(acme, seal(one, replace(two, state=KeyState.DEACTIVATED))) == ["accepted"]
    for made in (one, two):
        found = proxy.cache.key_of_version(mail.owner, KeyUse.DATA, made.version)
        assert found.key_id == made.key_id
    impostor = replace(acme.key(service="mail"), version=one.version)
    assert await proxy.push(acme, seal(impostor)) == ["key-conflict"]
    assert not proxy.cache.word(mail.owner).withdrawn
    assert await proxy.push(acme, seal()) == ["accepted"]
    assert proxy.cache.word(mail.owner).withdrawn
    again = acme.key(service="mail")
    assert await proxy.push(acme, seal(again)) == ["accepted"]
    held = proxy.cache.sealing_key(mail.owner)
    proxy.receiver.apply(replace(hosting, encryption_service=ServiceDirectory.of()))
    with pytest.raises(KeyUnavailableError):
        held.check()


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


async def test_a_lost_private_key_refuses_by_name(proxy: Proxy, acme: HostedTenant) -> None:
    acme.entries[0].key_file.unlink()
    token = acme.seal(proxy.clock, proxy.challenge(acme), acme.key())
    (receipt,) = await proxy.receiver.receive(acme.name, acme.agent_id, [token])
    assert receipt.code == "recipient-key"
    assert str(acme.entries[0].key_file) not in receipt.detail


def test_agents_per_tenant_are_bounded(proxy: Proxy, acme: HostedTenant) -> None:
    for number in range(MAX_AGENTS_PER_TENANT * 2):
        proxy.receiver.open_session(acme.name, f"agent-{number}")
    assert len(proxy.receiver._agents[acme.name]) == MAX_AGENTS_PER_TENANT


async def test_add_and_set_of_one_key_keep_the_body_running(proxy: Proxy, acme: HostedTenant) -> None:
    challenge, secret = proxy.challenge(acme), os.urandom(32)
    key = acme.key(secret=secret)
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, key)) == ["accepted"]
    held = proxy.cache.sealing_key(acme.owner())
    for operation in (Operation.ADD, Operation.SET):
        proxy.clock.shift(300)
        held.check()
        again = acme.key(key_id=key.key_id, secret=secret)
        token = acme.seal(proxy.clock, challenge, again, operation=operation)
        assert await proxy.push(acme, token) == ["accepted"]
    assert proxy.cache.sealing_key(acme.owner()) is held


async def test_no_event_and_no_receipt_holds_a_secret(proxy: Proxy, acme: HostedTenant) -> None:
    challenge, secret = proxy.challenge(acme), os.urandom(32)
    tokens = [
        acme.seal(proxy.clock, challenge, acme.key(secret=secret)),
        acme.seal(proxy.clock, challenge, acme.key(secret=secret), sequence=1),
    ]
    receipts = await proxy.receiver.receive(acme.name, acme.agent_id, tokens)
    said = repr(receipts) + proxy.events() + repr(proxy.receiver.__dict__)
    assert secret.hex() not in said
    assert repr(secret)[2:-1] not in said


async def test_within_one_push_the_later_envelope_counts(proxy: Proxy, acme: HostedTenant) -> None:
    challenge = proxy.challenge(acme)
    older, newer = acme.key(), acme.key()
    tokens = [
        acme.seal(proxy.clock, challenge, older, sequence=10),
        acme.seal(proxy.clock, challenge, newer, sequence=11),
    ]
    assert await proxy.push(acme, *tokens) == ["sequence", "accepted"]
    assert proxy.cache.sealing_key(acme.owner()).key_id == newer.key_id


async def test_an_agent_delivers_its_own_envelopes_only(proxy: Proxy, acme: HostedTenant) -> None:
    """Both agents are pinned; what one signs does not count on the other's connection."""
    branch = acme.pki.agent_signing("branch")
    pinned = acme.entry(signers=(acme.signing.certificate, branch.certificate))
    proxy.receiver.apply(replace(directory_of(acme, revision=2), tenants={acme.name: pinned}))
    challenge = proxy.receiver.open_session(acme.name, acme.agent_id).challenge
    theirs = replace(acme, agent_id="branch").seal(proxy.clock, challenge, acme.key(), signing=branch)
    assert await proxy.push(acme, theirs) == ["signer"]
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key())) == ["accepted"]


@pytest.mark.parametrize("change", ["root", "signers", "removed and added"])
async def test_who_lost_the_tenant_while_the_push_was_being_recorded_installs_nothing(
    proxy: Proxy, acme: HostedTenant, rival: HostedTenant, change: str
) -> None:
    token = acme.seal(proxy.clock, proxy.challenge(acme), acme.key())
    push = asyncio.create_task(proxy.push(acme, token))
    await asyncio.sleep(0)  # the push has opened its envelope and handed its event to a thread
    directory = directory_of(acme, rival, revision=2)
    match change:
        case "root":
            entry = replace(acme.entry(), root_certificate=make_tenant("acme").root.certificate)
        case "signers":
            entry = acme.entry(signers=(acme.pki.agent_signing("other").certificate,))
        case _:
            entry = acme.entry()
            proxy.receiver.apply(directory_of(rival, revision=2))
    proxy.receiver.apply(replace(directory, tenants={**directory.tenants, acme.name: entry}))
    assert await push == ["nonce"]
    with pytest.raises(KeyUnavailableError):
        proxy.cache.sealing_key(acme.owner())


async def test_a_withdrawal_with_a_sequence_from_the_future_locks_out_no_other_agent(
    proxy: Proxy, acme: HostedTenant
) -> None:
    """By a rogue, or by an honest agent whose clock once was years ahead: its sequences stay there."""
    other_signing = acme.pki.agent_signing("branch")

    def branch_pushes(sequence: int) -> str:
        challenge = proxy.receiver.open_session(
            acme.name, "branch", signing_certificate=other_signing.certificate
        ).challenge
        return acme.seal(
            proxy.clock, challenge, acme.key(), sequence=sequence, signing=other_signing, issuer="branch"
        )

    now_ms = int(proxy.clock.wall_s() * 1000)
    withdrawal = acme.seal(proxy.clock, proxy.challenge(acme), sequence=MAX_SEQUENCE)
    late = branch_pushes(now_ms - 1)
    assert await proxy.push(acme, withdrawal) == ["accepted"]
    receipts = await proxy.receiver.receive(acme.name, "branch", [late])
    assert [receipt.code for receipt in receipts] == ["sequence"], "issued before it was withdrawn"
    proxy.clock.shift(2)
    again = branch_pushes(now_ms + 2000)
    (receipt,) = await proxy.receiver.receive(acme.name, "branch", [again])
    assert receipt.status == "accepted"
    proxy.cache.sealing_key(acme.owner())


async def test_a_push_with_a_sequence_from_the_future_loses_to_another_agents_later_withdrawal(
    proxy: Proxy, acme: HostedTenant
) -> None:
    now_ms = int(proxy.clock.wall_s() * 1000)
    far = acme.seal(proxy.clock, proxy.challenge(acme), acme.key(), sequence=MAX_SEQUENCE)
    proxy.clock.shift(5)
    other_signing = acme.pki.agent_signing("branch")
    challenge = proxy.receiver.open_session(
        acme.name, "branch", signing_certificate=other_signing.certificate
    ).challenge
    withdrawal = acme.seal(
        proxy.clock, challenge, sequence=now_ms + 5000, signing=other_signing, issuer="branch"
    )
    (receipt,) = await proxy.receiver.receive(acme.name, "branch", [withdrawal])
    assert receipt.status == "accepted"
    assert await proxy.push(acme, far) == ["sequence"]


@pytest.mark.parametrize("ahead_s", [-86_400, -600, 600, 86_400])
async def test_a_withdrawal_needs_no_clock_that_is_right(
    proxy: Proxy, acme: HostedTenant, ahead_s: int
) -> None:
    """The agent's clock is wrong, or ours, which is the same: keys are refused for it, a withdrawal is not.

    And who withdraws by such a clock, a rogue as well, locks out nobody for longer than another could.
    """
    other_signing = acme.pki.agent_signing("branch")

    async def branch_pushes(ago_s: int) -> str:
        challenge = proxy.receiver.open_session(
            acme.name, "branch", signing_certificate=other_signing.certificate
        ).challenge
        issued_at_s = int(proxy.clock.wall_s()) - ago_s
        token = acme.seal(
            proxy.clock, challenge, acme.key(), sequence=issued_at_s * 1000, issued_at_s=issued_at_s,
            signing=other_signing, issuer="branch",
        )  # fmt: skip
        (receipt,) = await proxy.receiver.receive(acme.name, "branch", [token])
        return receipt.code or receipt.status

    assert await proxy.push(acme, acme.seal(proxy.clock, proxy.challenge(acme), acme.key())) == ["accepted"]
    held = proxy.cache.sealing_key(acme.owner())
    theirs_s = int(proxy.clock.wall_s()) + ahead_s
    challenge = proxy.challenge(acme)
    keys = acme.seal(proxy.clock, challenge, acme.key(), issued_at_s=theirs_s)
    assert await proxy.push(acme, keys) == ["time"]
    unasked = acme.seal(proxy.clock, None, issued_at_s=theirs_s)
    receipts = await proxy.receiver.receive(acme.name, acme.agent_id, [unasked], is_challenged=False)
    assert [receipt.code for receipt in receipts] == ["time"], "it may have been kept back for years"
    held.check()
    withdrawal = acme.seal(proxy.clock, challenge, issued_at_s=theirs_s, sequence=MAX_SEQUENCE - 1)
    assert await proxy.push(acme, withdrawal) == ["accepted"]
    with pytest.raises(KeyUnavailableError):
        held.check()
    assert await proxy.push(acme, withdrawal) == ["sequence"], "once"
    assert await branch_pushes(ago_s=1) == "sequence", "issued before it was withdrawn"
    proxy.clock.shift(MAX_AHEAD_S + 2)
    assert await branch_pushes(ago_s=0) == "accepted"


class HungDisk(AuditLog):
    """Durable events hang from the moment `is_hung` is set, until `let` is."""

    is_hung = False

    def __init__(self, path: Path, clock: Clock, descriptor: int) -> None:
        super().__init__(path, clock, descriptor)
        self.let = threading.Event()

    @override
    def _sync(self) -> None:
        if self.is_hung:
            assert self.let.wait(30)
        super()._sync()


async def test_a_hung_audit_log_refuses_keys_in_time_and_holds_up_no_withdrawal(
    acme: HostedTenant, tmp_path: Path
) -> None:
    """The push API has a few places per tenant: pushes that wait for the disk must not keep them."""
    clock = ManualClock()
    audit, cache = HungDisk.open(tmp_path / "audit.jsonl", clock), KeyCache(clock)
    receiver = Receiver(
        proxy_id=PROXY_ID,
        cache=cache,
        audit=audit,
        clock=clock,
        validity_s=VALIDITY_S,
        directory=directory_of(acme),
        audit_patience_s=3.0,  # of a disk that is not hung, too
    )
    challenge = receiver.open_session(
        acme.name, acme.agent_id, signing_certificate=acme.signing.certificate
    ).challenge

    async def push(*keys: KeyMaterial) -> str:
        token = acme.seal(clock, challenge, *keys)
        (receipt,) = await receiver.receive(acme.name, acme.agent_id, [token])
        return receipt.code or receipt.status

    assert await push(acme.key()) == "accepted"
    held = cache.sealing_key(acme.owner())
    audit.is_hung = True
    hanging = [asyncio.create_task(push(acme.key())) for _ in range(12)]
    codes = await asyncio.wait_for(asyncio.gather(*hanging), 30)
    assert set(codes) == {"audit-unavailable"}
    held.check()
    withdrawing = asyncio.create_task(push())
    await asyncio.sleep(0)
    with pytest.raises(KeyUnavailableError):
        held.check()
    assert await withdrawing == "audit-unavailable", "withdrawn all the same, and the agent is told"
    audit.let.set()
    audit.is_hung = False
    assert await push(acme.key()) == "accepted"
    audit.close()


async def test_no_withdrawal_waits_for_the_event_of_the_one_before(
    acme: HostedTenant, tmp_path: Path
) -> None:
    clock = ManualClock()
    audit, cache = HungDisk.open(tmp_path / "audit.jsonl", clock), KeyCache(clock)
    receiver = Receiver(
        proxy_id=PROXY_ID,
        cache=cache,
        audit=audit,
        clock=clock,
        validity_s=VALIDITY_S,
        directory=directory_of(acme),
        audit_patience_s=30,
    )
    challenge = receiver.open_session(
        acme.name, acme.agent_id, signing_certificate=acme.signing.certificate
    ).challenge
    services = ("drive", "mail")
    keys = [acme.seal(clock, challenge, acme.key(service=name), service=name) for name in services]
    assert [r.status for r in await receiver.receive(acme.name, acme.agent_id, keys)] == ["accepted"] * 2
    audit.is_hung = True
    tokens = [acme.seal(clock, challenge, service=name) for name in services]
    push = asyncio.create_task(receiver.receive(acme.name, acme.agent_id, tokens))
    try:
        async with asyncio.timeout(30):
            while any(status.holds for status in cache.status(map(acme.owner, services))):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    finally:
        audit.let.set()
    assert [receipt.status for receipt in await push] == ["accepted"] * 2
    assert audit.path.read_text().count('"action":"keys-withdrawn"') == 2
    audit.close()


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
