"""The two ends of the push protocol together: the key agent's own client against the proxy's own listener."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from certs.pki import certificate_pem
from envelope.certificates import fingerprint
from envelope.errors import KeyUnavailableError
from key_agent.push.transport import EnvironmentWord, HttpsTransport, PushError
from key_agent.registry.model import Proxy
from tests.pki import write_certificate
from tests.proxy.api.test_push import PushEndpoint, serve
from tests.proxy.keys.hosting import PROXY_ID, HostedTenant, directory_of, host_tenant


@pytest.fixture
def acme(tmp_path: Path) -> HostedTenant:
    return host_tenant(tmp_path)


@pytest.fixture
async def endpoint(acme: HostedTenant, tmp_path: Path) -> AsyncIterator[PushEndpoint]:
    async with serve(tmp_path, directory_of(acme)) as endpoint:
        yield endpoint


@pytest.fixture
async def transport(acme: HostedTenant, tmp_path: Path) -> AsyncIterator[HttpsTransport]:
    certificate_file, key_file = acme.tls_files
    signing_file = write_certificate(acme.signing.certificate, tmp_path / "signing.pem")
    async with HttpsTransport(
        agent_id=acme.agent_id,
        certificate_file=certificate_file,
        key_file=key_file,
        signing_certificate_file=signing_file,
    ) as transport:
        yield transport


def address(endpoint: PushEndpoint, proxy_id: str = PROXY_ID) -> Proxy:
    return Proxy(
        id=proxy_id,
        url=f"https://localhost:{endpoint.port}",
        ca_pem=endpoint.ca_file.read_text(),
        removed=False,
    )


async def test_a_refresh_and_a_withdrawal(
    endpoint: PushEndpoint, transport: HttpsTransport, acme: HostedTenant
) -> None:
    proxy = address(endpoint)
    session = await transport.open_session(proxy)
    assert session.proxy_id == PROXY_ID
    hosted = {service.owner: service for service in session.services}
    expected = fingerprint(acme.services["drive"].certificate).hex()
    assert hosted[acme.owner()].certificate_sha256 == expected
    key = acme.key()
    tokens = [
        acme.seal(endpoint.clock, session.challenge, key),
        acme.seal(endpoint.clock, b"\0" * 16, acme.key(service="mail"), service="mail"),
    ]
    first, second = await transport.send(proxy, tokens)
    assert (first.accepted, first.owner, first.keys) == (True, acme.owner(), 1)
    assert (second.accepted, second.code) == (False, "nonce")
    session = await transport.open_session(proxy)
    assert [service.key_ids for service in session.services if service.owner == acme.owner()] == [
        (str(key.key_id),)
    ]
    (withdrawn,) = await transport.send(proxy, [acme.seal(endpoint.clock, session.challenge)])
    assert (withdrawn.accepted, withdrawn.keys) == (True, 0)
    session = await transport.open_session(proxy)
    assert all(service.key_ids == () for service in session.services)


async def test_a_word_on_the_environment(
    endpoint: PushEndpoint, transport: HttpsTransport, acme: HostedTenant
) -> None:
    def word(state: str, *, epoch: int, environment: str = "a") -> EnvironmentWord:
        return EnvironmentWord(environment=environment, state=state, reason=None, term=1, epoch=epoch)

    tenant, rival = acme.owner().tenant, "rival"
    assert endpoint.environments.refuses(tenant)
    found = await transport.tell_environment(address(endpoint), word("active", epoch=3))
    assert (found.state, found.epoch, found.instance) == ("active", 3, endpoint.receiver.instance)
    assert not endpoint.environments.refuses(tenant)
    assert endpoint.environments.refuses(rival), "an agent speaks for its own tenant"
    session = await transport.open_session(address(endpoint))
    await transport.send(address(endpoint), [acme.seal(endpoint.clock, session.challenge, acme.key())])
    assert (await transport.tell_environment(address(endpoint), word("healing", epoch=4))).state == "healing"
    with pytest.raises(KeyUnavailableError):
        endpoint.cache.sealing_key(acme.owner())
    stale = await transport.tell_environment(address(endpoint), word("active", epoch=3))
    assert (stale.state, stale.epoch) == ("healing", 4)
    with pytest.raises(PushError) as caught:
        await transport.tell_environment(address(endpoint), word("active", epoch=9, environment="b"))
    assert caught.value.code == "environment"


async def test_presence_and_session_name_the_same_start(
    endpoint: PushEndpoint, transport: HttpsTransport
) -> None:
    presence = await transport.presence(address(endpoint))
    session = await transport.open_session(address(endpoint))
    assert presence.proxy_id == PROXY_ID
    assert presence.instance == session.instance == endpoint.receiver.instance
    assert presence.time_ms == int(endpoint.clock.wall_s() * 1000)
    with pytest.raises(PushError) as caught:
        await transport.presence(address(endpoint, "proxy-2"))
    assert caught.value.code == "wrong-proxy"


async def test_a_service_that_waits_for_its_certificate_breaks_no_session(
    endpoint: PushEndpoint, transport: HttpsTransport, acme: HostedTenant
) -> None:
    drive, mail = acme.entries
    directory = directory_of(acme, revision=2)
    services = {drive.owner: drive, mail.owner: replace(mail, certificate=None)}
    endpoint.apply(replace(directory, services=services))
    session = await transport.open_session(address(endpoint))
    assert [service.owner for service in session.services] == [drive.owner]


async def test_a_full_batch_passes(
    endpoint: PushEndpoint, transport: HttpsTransport, acme: HostedTenant
) -> None:
    """More than a megabyte in one request, as an agent with many services sends it."""
    proxy = address(endpoint)
    session = await transport.open_session(proxy)
    keys = [acme.key() for _ in range(100)]
    tokens = [acme.seal(endpoint.clock, session.challenge, *keys) for _ in range(40)]
    assert sum(map(len, tokens)) > 1 << 20
    answers = await transport.send(proxy, tokens)
    assert answers[-1].accepted


async def test_refusals_are_push_errors(
    endpoint: PushEndpoint, transport: HttpsTransport, acme: HostedTenant
) -> None:
    with pytest.raises(PushError) as caught:
        await transport.open_session(address(endpoint, "proxy-2"))
    assert caught.value.code == "wrong-proxy"
    await transport.open_session(address(endpoint))
    endpoint.apply(directory_of(revision=3))
    with pytest.raises(PushError) as caught:
        await transport.open_session(address(endpoint))
    assert caught.value.code == "tenant"
    assert certificate_pem(acme.signing.certificate).decode() not in caught.value.detail
