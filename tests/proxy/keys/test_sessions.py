"""Who may push: sessions, and whose signature counts. Through the receiver; real cryptography."""

from dataclasses import replace

import pytest
from cryptography import x509

from envelope.errors import KeyUnavailableError
from proxy.keys.sessions import MAX_AGENTS_PER_TENANT, SessionRefusedError
from tests.pki import make_tenant
from tests.proxy.keys.hosting import HostedTenant, directory_of
from tests.proxy.keys.receiving import Proxy


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
            proxy.receiver.sessions.open(acme.name, acme.agent_id, signing_certificate=certificate)
        assert caught.value.code == "signer"
    with pytest.raises(SessionRefusedError) as caught:
        proxy.receiver.sessions.open("nobody", "hq")
    assert caught.value.code == "tenant"


async def test_without_a_signing_certificate_nothing_is_believed(proxy: Proxy, acme: HostedTenant) -> None:
    challenge = proxy.receiver.sessions.open(acme.name, acme.agent_id).challenge
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key())) == ["signer"]


async def test_an_agent_delivers_its_own_envelopes_only(proxy: Proxy, acme: HostedTenant) -> None:
    """Both agents are pinned; what one signs does not count on the other's connection."""
    branch = acme.pki.agent_signing("branch")
    pinned = acme.entry(signers=(acme.signing.certificate, branch.certificate))
    proxy.receiver.apply(replace(directory_of(acme, revision=2), tenants={acme.name: pinned}))
    challenge = proxy.receiver.sessions.open(acme.name, acme.agent_id).challenge
    theirs = replace(acme, agent_id="branch").seal(proxy.clock, challenge, acme.key(), signing=branch)
    assert await proxy.push(acme, theirs) == ["signer"]
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key())) == ["accepted"]


async def test_pinned_signers_are_the_only_ones(proxy: Proxy, acme: HostedTenant) -> None:
    other = acme.pki.agent_signing(acme.agent_id)
    directory = directory_of(acme, revision=2)
    pinned = acme.entry(signers=(acme.signing.certificate,))
    proxy.receiver.apply(replace(directory, tenants={acme.name: pinned}))
    challenge = proxy.receiver.sessions.open(acme.name, acme.agent_id).challenge
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key())) == ["accepted"]
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, acme.key(), signing=other)) == ["signer"]
    with pytest.raises(SessionRefusedError):
        proxy.receiver.sessions.open(acme.name, acme.agent_id, signing_certificate=other.certificate)


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


def test_agents_per_tenant_are_bounded(proxy: Proxy, acme: HostedTenant) -> None:
    for number in range(MAX_AGENTS_PER_TENANT * 2):
        proxy.receiver.sessions.open(acme.name, f"agent-{number}")
    assert len(proxy.receiver.sessions._agents[acme.name]) == MAX_AGENTS_PER_TENANT
