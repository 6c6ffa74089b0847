"""Envelopes become keys, or are refused; real cryptography, a clock that only the test moves."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from envelope import derive
from envelope.errors import KeyUnavailableError, Unavailable
from envelope.keys import KeyMaterial, KeyState, KeyUse
from envelope.material import MAX_AHEAD_S, Operation
from envelope.strict_json import MAX_SEQUENCE
from proxy.encryption_service.model import NamedKey, ServiceDirectory
from tests.pki import make_tenant
from tests.proxy.keys.hosting import VALIDITY_S, HostedTenant, directory_of, host_tenant
from tests.proxy.keys.receiving import Proxy


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


async def test_one_bad_envelope_leaves_the_others_alone(proxy: Proxy, acme: HostedTenant) -> None:
    challenge = proxy.challenge(acme)
    good = acme.seal(proxy.clock, challenge, acme.key())
    mail = acme.seal(proxy.clock, challenge, acme.key(service="mail"), service="mail")
    assert await proxy.push(acme, good, good[:-4] + "AAAA", mail) == ["accepted", "decryption", "accepted"]


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
    session = proxy.receiver.sessions.open(
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
    receiver = proxy.receiver
    parts = (receiver, receiver.sessions, receiver._opener)
    said = repr(receipts) + proxy.events() + "".join(repr(vars(part)) for part in parts)
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
        challenge = proxy.receiver.sessions.open(
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
    challenge = proxy.receiver.sessions.open(
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
        challenge = proxy.receiver.sessions.open(
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
