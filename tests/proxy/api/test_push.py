"""The push path end to end: a real TLS server, real client certificates, real envelopes."""

import asyncio
import contextlib
import io
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from certs.pki import Credential, certificate_pem
from envelope.base64url import b64u_decode
from envelope.certificates import fingerprint
from envelope.errors import KeyUnavailableError
from proxy.api import push
from proxy.api.places import PLACES_PER_AGENT
from proxy.api.push import (
    BODY_TIMEOUT_S,
    ENVIRONMENT_PATH,
    MAX_BODY_BYTES,
    MAX_ENVELOPES,
    TokenBucket,
    make_push_application,
    openapi_document,
)
from proxy.environments import Environments, Word
from proxy.keys.cache import KeyCache
from proxy.keys.receive import Receiver
from proxy.tenants.model import Directory
from runtime.audit import AuditLog
from runtime.serve import serving
from runtime.tls import ServerTls, client_context
from tests.fakes.clock import ManualClock
from tests.pki import (
    ServiceCredential,
    issue_server,
    make_server_ca,
    make_tenant,
    of_unknown_version,
    write_certificate,
    write_credential,
)
from tests.proxy.keys.hosting import (
    PROXY_ID,
    VALIDITY_S,
    HostedTenant,
    agent_certified_by,
    directory_of,
    host_tenant,
)

SESSION = "/push/v1/session"
ENVELOPES = "/push/v1/envelopes"
PRESENCE = "/push/v1/presence"


@dataclass
class PushEndpoint:
    """A proxy's push listener, as `sealgate run` sets it up."""

    port: int
    ca_file: Path
    path: Path
    clock: ManualClock
    cache: KeyCache
    receiver: Receiver
    tls: ServerTls
    environments: Environments

    def apply(self, directory: Directory) -> None:
        roots = [tenant.root_certificate for tenant in directory.tenants.values()]
        self.tls.renew(client_roots=roots)
        self.receiver.apply(directory)

    @asynccontextmanager
    async def client(
        self,
        credential: Credential | ServiceCredential | None = None,
        *,
        files: tuple[Path, Path] | None = None,
    ) -> AsyncIterator["Client"]:
        if credential is not None:
            files = write_credential(credential, self.path, f"client-{id(credential)}")
        context = client_context(self.ca_file, *(files or (None, None)))
        connector = aiohttp.TCPConnector(ssl=context, limit=1)
        async with aiohttp.ClientSession(f"https://localhost:{self.port}", connector=connector) as session:
            yield Client(session, self.clock)


@dataclass
class Client:
    session: aiohttp.ClientSession
    clock: ManualClock

    async def post(self, path: str, body: object | bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"Content-Type": "application/json", **headers}
        async with self.session.post(path, data=io.BytesIO(data), headers=fields) as response:
            answer: dict[str, Any] = await response.json(content_type=None)
            if response.status != 200:
                assert response.content_type == "application/problem+json"
                assert {"code", "detail", "next_step", "status"} <= answer.keys()
            return response.status, answer

    async def say(self, state: str, *, epoch: int = 1) -> tuple[int, dict[str, Any]]:
        """What an agent says of its environment."""
        word = {"environment": "a", "state": state, "term": 1, "epoch": epoch}
        async with self.session.put(ENVIRONMENT_PATH, json=word) as response:
            answer: dict[str, Any] = await response.json(content_type=None)
            return response.status, answer

    async def presence(self) -> tuple[int, dict[str, Any]]:
        async with self.session.get(PRESENCE) as response:
            answer: dict[str, Any] = await response.json(content_type=None)
            return response.status, answer

    async def challenge(self, tenant: HostedTenant) -> bytes:
        pem = certificate_pem(tenant.signing.certificate).decode()
        status, answer = await self.post(SESSION, {"agent": tenant.agent_id, "signing_certificate": pem})
        assert status == 200, answer
        assert answer["proxy"] == PROXY_ID
        return b64u_decode(answer["challenge"])

    async def push(self, *tokens: str) -> list[str]:
        status, answer = await self.post(ENVELOPES, {"envelopes": list(tokens)})
        assert status == 200, answer
        return [receipt.get("code") or receipt["status"] for receipt in answer["receipts"]]


@pytest.fixture
def acme(tmp_path: Path) -> HostedTenant:
    return host_tenant(tmp_path)


@pytest.fixture
def rival(tmp_path: Path) -> HostedTenant:
    return host_tenant(tmp_path, "rival")


@asynccontextmanager
async def serve(
    path: Path, directory: Directory, *, requests_per_s: float = 1000
) -> AsyncIterator[PushEndpoint]:
    ca = make_server_ca()
    certificate_file, key_file = write_credential(issue_server(ca), path, "push")
    ca_file = write_certificate(ca.certificate, path / "push-ca.pem")
    clock = ManualClock()
    cache = KeyCache(clock)
    audit = AuditLog.open(path / "audit.jsonl", clock)
    receiver = Receiver(
        proxy_id=PROXY_ID, cache=cache, audit=audit, clock=clock, validity_s=VALIDITY_S, directory=directory
    )
    roots = [tenant.root_certificate for tenant in directory.tenants.values()]
    tls = ServerTls(certificate_file, key_file, client_roots=roots)
    environments = Environments("a", on_refused=cache.withdraw_tenant)

    async def told(tenant: str, agent: str, word: Word) -> Word:
        return environments.take(tenant, word, agent=agent, now_boot_s=clock.boot_s())

    application = make_push_application(
        receiver,
        clock=clock,
        requests_per_s=requests_per_s,
        told=told,
        entitled=environments.check_entitled,
    )
    try:
        # Not 0: aiohttp takes that for no limit at all.
        server = serving(application, host="localhost", port=0, ssl_context=tls.context, grace_s=0.1)
        async with server as port:
            yield PushEndpoint(port, ca_file, path, clock, cache, receiver, tls, environments)
    finally:
        audit.close()


@pytest.fixture
async def endpoint(acme: HostedTenant, rival: HostedTenant, tmp_path: Path) -> AsyncIterator[PushEndpoint]:
    async with serve(tmp_path, directory_of(acme, rival)) as endpoint:
        yield endpoint


async def test_keys_arrive_are_refreshed_and_withdrawn(endpoint: PushEndpoint, acme: HostedTenant) -> None:
    async with endpoint.client(files=acme.tls_files) as agent:
        challenge = await agent.challenge(acme)
        key, mail = acme.key(secret=bytes(range(32))), acme.key(service="mail")
        status, answer = await agent.post(
            ENVELOPES,
            {
                "envelopes": [
                    acme.seal(endpoint.clock, challenge, key, sequence=5),
                    acme.seal(endpoint.clock, challenge, mail, service="mail", sequence=5),
                ]
            },
        )
        assert (status, answer["receipts"][0]) == (
            200,
            {"status": "accepted", "service": "acme/drive", "sequence": 5, "keys": 1, "valid_for_s": 330.0},
        )
        assert answer["receipts"][1]["service"] == "acme/mail"
        held = endpoint.cache.sealing_key(acme.owner())
        endpoint.clock.shift(300)
        again = acme.key(key_id=key.key_id, secret=bytes(range(32)))
        assert await agent.push(acme.seal(endpoint.clock, challenge, again)) == ["accepted"]
        endpoint.clock.shift(300)
        held.check()
        assert await agent.push(acme.seal(endpoint.clock, challenge)) == ["accepted"]
        with pytest.raises(KeyUnavailableError):
            held.check()


async def test_the_session_tells_what_is_here_of_this_tenant_only(
    endpoint: PushEndpoint, acme: HostedTenant, rival: HostedTenant
) -> None:
    async with (
        endpoint.client(files=acme.tls_files) as agent,
        endpoint.client(files=rival.tls_files) as other,
    ):
        key = acme.key()
        await agent.push(acme.seal(endpoint.clock, await agent.challenge(acme), key))
        endpoint.clock.shift(30)
        _, answer = await agent.post(SESSION, {"agent": "hq"})
        assert answer["time_ms"] == int(endpoint.clock.wall_s() * 1000)
        drive, mail = answer["services"]
        assert drive["service"] == "acme/drive"
        assert drive["holds"] == [{"kid": str(key.key_id), "state": "active", "valid_for_s": 300.0}]
        assert drive["certificate_sha256"] == fingerprint(acme.services["drive"].certificate).hex()
        assert (mail["service"], mail["holds"]) == ("acme/mail", [])
        _, answer = await other.post(SESSION, {"agent": "hq"})
        assert {service["service"] for service in answer["services"]} == {"rival/drive", "rival/mail"}


@pytest.mark.parametrize("who", ["nobody", "stranger", "self-made"])
async def test_strangers_do_not_get_through_tls(endpoint: PushEndpoint, tmp_path: Path, who: str) -> None:
    stranger = {
        "nobody": None,
        "stranger": make_tenant("stranger").agent_tls(),
        "self-made": make_tenant("acme").agent_tls("hq"),  # the same names under a root of one's own
    }[who]
    async with endpoint.client(stranger) as client:
        with pytest.raises((aiohttp.ClientError, ConnectionError, ssl.SSLError)):
            await client.post(SESSION, {"agent": "hq"})


async def test_only_an_agents_tls_certificate_speaks(endpoint: PushEndpoint, acme: HostedTenant) -> None:
    """Everything below hangs on acme's root, so OpenSSL lets most of it in; the role decides."""
    for credential in (acme.services["drive"], acme.signing):
        async with endpoint.client(credential) as client:
            try:
                status, answer = await client.post(SESSION, {"agent": "hq"})
            except (aiohttp.ClientError, ConnectionError, ssl.SSLError):
                continue  # refused by OpenSSL already: no client purpose
            assert (status, answer["code"]) == (403, "certificate-role")
    async with endpoint.client(files=acme.tls_files) as client:
        status, answer = await client.post(SESSION, {"agent": "branch"})
        assert (status, answer["code"]) == (403, "agent")


async def test_a_root_that_certifies_for_another_tenant_proves_nothing(
    endpoint: PushEndpoint, acme: HostedTenant, rival: HostedTenant
) -> None:
    """The rival's root is trusted by OpenSSL here; it must not speak for acme."""
    forged = agent_certified_by(rival, "acme")
    async with endpoint.client(forged) as client:
        for path, body in ((SESSION, {"agent": "hq"}), (ENVELOPES, {"envelopes": []})):
            status, answer = await client.post(path, body)
            assert (status, answer["code"]) == (403, "certificate-chain")


async def test_an_envelope_for_another_tenants_service_does_not_exist_here(
    endpoint: PushEndpoint, acme: HostedTenant, rival: HostedTenant
) -> None:
    async with (
        endpoint.client(files=acme.tls_files) as ours,
        endpoint.client(files=rival.tls_files) as theirs,
    ):
        await ours.challenge(acme)
        genuine = rival.seal(endpoint.clock, await theirs.challenge(rival), rival.key())
        status, answer = await ours.post(ENVELOPES, {"envelopes": [genuine]})
        assert status == 200
        assert answer["receipts"][0]["code"] == "recipient"
        assert answer["receipts"][0]["service"] is None
        with pytest.raises(KeyUnavailableError):
            endpoint.cache.sealing_key(rival.owner())
        assert await theirs.push(genuine) == ["accepted"]


async def test_replays_old_sequences_and_stale_challenges(endpoint: PushEndpoint, acme: HostedTenant) -> None:
    clock = endpoint.clock
    async with endpoint.client(files=acme.tls_files) as agent:
        challenge = await agent.challenge(acme)
        token = acme.seal(clock, challenge, acme.key(), sequence=50)
        assert await agent.push(token, token) == ["accepted", "sequence"]
        assert await agent.push(acme.seal(clock, challenge, acme.key(), sequence=49)) == ["sequence"]
        fresh = await agent.challenge(acme)
        assert await agent.push(acme.seal(clock, challenge, acme.key())) == ["nonce"]
        assert await agent.push(acme.seal(clock, fresh, acme.key())) == ["accepted"]


async def test_presence_names_the_proxy_and_its_start(
    endpoint: PushEndpoint, acme: HostedTenant, rival: HostedTenant
) -> None:
    async with (
        endpoint.client(files=acme.tls_files) as agent,
        endpoint.client(files=rival.tls_files) as other,
    ):
        status, answer = await agent.presence()
        assert status == 200
        assert answer.keys() == {"proxy", "instance", "time_ms"}
        assert answer["proxy"] == PROXY_ID
        assert answer["time_ms"] == int(endpoint.clock.wall_s() * 1000)
        assert len(b64u_decode(answer["instance"])) == 16
        _, session = await agent.post(SESSION, {"agent": "hq"})
        assert session["instance"] == answer["instance"]
        assert (await other.presence())[1] == answer, "one process"


async def test_asking_who_is_there_voids_no_challenge_and_leaves_no_trace(
    endpoint: PushEndpoint, acme: HostedTenant
) -> None:
    async with endpoint.client(files=acme.tls_files) as agent:
        challenge = await agent.challenge(acme)
        before = (endpoint.path / "audit.jsonl").read_bytes()
        assert (await agent.presence())[0] == 200
        assert (endpoint.path / "audit.jsonl").read_bytes() == before
        assert await agent.push(acme.seal(endpoint.clock, challenge, acme.key())) == ["accepted"]


async def test_another_start_is_another_instance(acme: HostedTenant, tmp_path: Path) -> None:
    instances = set()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        async with (
            serve(tmp_path / name, directory_of(acme)) as endpoint,
            endpoint.client(files=acme.tls_files) as agent,
        ):
            instances.add((await agent.presence())[1]["instance"])
            endpoint.apply(directory_of(acme, revision=2))
            instances.add((await agent.presence())[1]["instance"])
    assert len(instances) == 2


async def test_who_may_not_push_may_not_ask(
    endpoint: PushEndpoint, acme: HostedTenant, rival: HostedTenant
) -> None:
    async with endpoint.client(agent_certified_by(rival, "acme")) as client:
        status, answer = await client.presence()
        assert (status, answer["code"]) == (403, "certificate-chain")
    async with endpoint.client() as client:
        with pytest.raises((aiohttp.ClientError, ConnectionError, ssl.SSLError)):
            await client.presence()


async def test_asking_has_a_rate_of_its_own(acme: HostedTenant, tmp_path: Path) -> None:
    async with (
        serve(tmp_path, directory_of(acme), requests_per_s=1) as endpoint,
        endpoint.client(files=acme.tls_files) as agent,
    ):
        for _ in range(push.BURST_FACTOR):
            assert (await agent.presence())[0] == 200
        status, answer = await agent.presence()
        assert (status, answer["code"]) == (429, "rate-limited")
        challenge = await agent.challenge(acme)
        assert await agent.push(acme.seal(endpoint.clock, challenge)) == ["accepted"], "a withdrawal"


async def test_asking_waits_for_no_slow_push(endpoint: PushEndpoint, acme: HostedTenant) -> None:
    """All places of the tenant are taken by bodies that do not end."""
    released = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await released.wait()

    async with contextlib.AsyncExitStack() as stack:
        slow = []
        for _ in range(PLACES_PER_AGENT):
            client = await stack.enter_async_context(endpoint.client(files=acme.tls_files))
            headers = {"Content-Type": "application/json"}
            slow.append(asyncio.create_task(client.session.post(ENVELOPES, data=endless(), headers=headers)))
        agent = await stack.enter_async_context(endpoint.client(files=acme.tls_files))
        late = await stack.enter_async_context(endpoint.client(files=acme.tls_files))
        assert (await agent.presence())[0] == 200
        waiting = asyncio.create_task(late.post(SESSION, {"agent": "hq"}))
        assert (await agent.presence())[0] == 200
        released.set()
        for response in await asyncio.gather(*slow):
            assert response.status == 400
            response.close()
        assert (await waiting)[0] == 200


async def test_a_restart_forgets_the_challenge(acme: HostedTenant, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    directory = directory_of(acme)
    async with (
        serve(tmp_path / "first", directory) as endpoint,
        endpoint.client(files=acme.tls_files) as agent,
    ):
        token = acme.seal(endpoint.clock, await agent.challenge(acme), acme.key())
    async with (
        serve(tmp_path / "second", directory) as endpoint,
        endpoint.client(files=acme.tls_files) as agent,
    ):
        assert await agent.push(token) == ["nonce"]
        challenge = await agent.challenge(acme)
        assert await agent.push(token) == ["nonce"]
        assert await agent.push(acme.seal(endpoint.clock, challenge, acme.key())) == ["accepted"]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (SESSION, b"{", 400, "malformed"),
        (SESSION, b"\xff\xfe", 400, "malformed"),
        (SESSION, b"[" * 50_000, 400, "malformed"),
        (SESSION, {}, 400, "malformed"),
        (SESSION, {"agent": 1}, 400, "malformed"),
        (SESSION, {"agent": "hq", "tenant": "rival"}, 400, "malformed"),
        (SESSION, {"agent": "hq", "signing_certificate": "no"}, 400, "malformed"),
        (SESSION, b" " * 70_000, 413, "too-large"),
        (ENVELOPES, {"envelopes": "x"}, 400, "malformed"),
        (ENVELOPES, {"envelopes": [None]}, 400, "malformed"),
        (ENVELOPES, {"envelopes": ["x"] * (MAX_ENVELOPES + 1)}, 400, "malformed"),
        (ENVELOPES, b" " * (MAX_BODY_BYTES + 1), 413, "too-large"),
        ("/push/v2/session", {}, 404, "not-found"),
    ],
)
async def test_bad_requests_are_problems(
    endpoint: PushEndpoint, acme: HostedTenant, *, path: str, body: object, status: int, code: str
) -> None:
    async with endpoint.client(files=acme.tls_files) as agent:
        got, answer = await agent.post(path, body)
        assert (got, answer["code"]) == (status, code)


async def test_a_signing_certificate_of_an_unknown_version_is_none(
    endpoint: PushEndpoint, acme: HostedTenant
) -> None:
    pem = ssl.DER_cert_to_PEM_cert(of_unknown_version(acme.signing.certificate, acme.pki.root))
    async with endpoint.client(files=acme.tls_files) as agent:
        status, answer = await agent.post(SESSION, {"agent": "hq", "signing_certificate": pem})
        assert (status, answer["code"]) == (400, "malformed")


async def test_a_body_without_a_declared_length_is_bounded_too(
    endpoint: PushEndpoint, acme: HostedTenant
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(2 * MAX_BODY_BYTES // 65_536):
            yield b" " * 65_536

    async with endpoint.client(files=acme.tls_files) as agent:
        headers = {"Content-Type": "application/json"}
        async with agent.session.post(ENVELOPES, data=endless(), headers=headers) as response:
            assert response.status == 413


async def test_other_content_types_and_methods(endpoint: PushEndpoint, acme: HostedTenant) -> None:
    async with endpoint.client(files=acme.tls_files) as agent:
        status, answer = await agent.post(SESSION, {"agent": "hq"}, **{"Content-Type": "text/plain"})
        assert (status, answer["code"]) == (415, "unsupported-media-type")
        async with agent.session.get(SESSION) as response:
            assert response.status == 405


async def test_malformed_envelopes_get_receipts(endpoint: PushEndpoint, acme: HostedTenant) -> None:
    async with endpoint.client(files=acme.tls_files) as agent:
        challenge = await agent.challenge(acme)
        good = acme.seal(endpoint.clock, challenge, acme.key())
        header, _, rest = good.partition(".")
        outcomes = await agent.push("", "a.b.c.d.e", "x" * 70_000, f"{header}.{rest}x", good)
        assert outcomes == ["malformed", "malformed", "too-large", "malformed", "accepted"]


async def test_rates_are_limited_per_tenant(acme: HostedTenant, rival: HostedTenant, tmp_path: Path) -> None:
    async with (
        serve(tmp_path, directory_of(acme, rival), requests_per_s=1) as endpoint,
        endpoint.client(files=acme.tls_files) as agent,
        endpoint.client(files=rival.tls_files) as other,
    ):
        for _ in range(push.BURST_FACTOR):
            assert (await agent.post(SESSION, {"agent": "hq"}))[0] == 200
        async with agent.session.post(SESSION, json={"agent": "hq"}) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "1"
            assert (await response.json(content_type=None))["code"] == "rate-limited"
        assert (await other.post(SESSION, {"agent": "hq"}))[0] == 200
        endpoint.clock.shift(1)
        assert (await agent.post(SESSION, {"agent": "hq"}))[0] == 200


async def test_no_agent_uses_up_what_others_of_its_tenant_need_nor_do_all_together_more(
    acme: HostedTenant, rival: HostedTenant, tmp_path: Path
) -> None:
    async with serve(tmp_path, directory_of(acme, rival), requests_per_s=1) as endpoint:
        agents = [acme.pki.agent_tls(f"agent-{number}") for number in range(push.AGENTS_TOGETHER + 1)]
        for number, agent in enumerate(agents):
            async with endpoint.client(agent) as client:
                statuses = [(await client.presence())[0] for _ in range(push.BURST_FACTOR + 1)]
            allowed = 0 if number == push.AGENTS_TOGETHER else push.BURST_FACTOR
            assert statuses == [200] * allowed + [429] * (push.BURST_FACTOR + 1 - allowed)
        async with endpoint.client(files=rival.tls_files) as other:
            assert (await other.presence())[0] == 200


async def test_no_refresh_uses_up_what_a_withdrawal_needs(acme: HostedTenant, tmp_path: Path) -> None:
    """Its rate is spent and all its places are taken by bodies that do not end: a withdrawal gets through."""
    released = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await released.wait()

    async with contextlib.AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(serve(tmp_path, directory_of(acme), requests_per_s=2))
        agent = await stack.enter_async_context(endpoint.client(files=acme.tls_files))
        token = acme.seal(endpoint.clock, await agent.challenge(acme), acme.key())
        assert await agent.push(token) == ["accepted"]
        # One more than the rate allows: exactly that one is answered, the others take places or queue.
        slow = []
        for _ in range(2 * push.BURST_FACTOR - 1):
            client = await stack.enter_async_context(endpoint.client(files=acme.tls_files))
            headers = {"Content-Type": "application/json"}
            slow.append(asyncio.create_task(client.session.post(ENVELOPES, data=endless(), headers=headers)))
        async with asyncio.timeout(30):
            [refused], waiting = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
        assert refused.result().status == 429
        pem = certificate_pem(acme.signing.certificate).decode()
        session = {"agent": "hq", "signing_certificate": pem}
        status, opened = await agent.post(f"{SESSION}?purpose=withdrawal", session)
        assert status == 200
        withdrawal = acme.seal(endpoint.clock, b64u_decode(opened["challenge"]))
        status, answer = await agent.post(f"{ENVELOPES}?purpose=withdrawal", {"envelopes": [withdrawal]})
        assert (status, answer["receipts"][0]["status"]) == (200, "accepted")
        with pytest.raises(KeyUnavailableError):
            endpoint.cache.sealing_key(acme.owner())
        assert not any(task.done() for task in waiting)
        released.set()
        for response in await asyncio.gather(*slow):
            response.close()


async def test_no_number_of_agents_that_hold_places_delays_anothers_withdrawal(
    endpoint: PushEndpoint, acme: HostedTenant
) -> None:
    """Two breached agents send as many withdrawals as they may, and end none of them."""
    released = asyncio.Event()
    seen: asyncio.Queue[None] = asyncio.Queue()

    async def endless() -> AsyncIterator[bytes]:
        seen.put_nowait(None)
        yield b"{"
        await released.wait()

    async with contextlib.AsyncExitStack() as stack:
        agent = await stack.enter_async_context(endpoint.client(files=acme.tls_files))
        token = acme.seal(endpoint.clock, await agent.challenge(acme), acme.key())
        assert await agent.push(token) == ["accepted"]
        slow = []
        for name in ("breached-1", "breached-2"):
            files = write_credential(acme.pki.agent_tls(name), endpoint.path, name)
            for _ in range(PLACES_PER_AGENT + 1):
                client = await stack.enter_async_context(endpoint.client(files=files))
                post = client.session.post(
                    f"{ENVELOPES}?purpose=withdrawal",
                    data=endless(),
                    headers={"Content-Type": "application/json"},
                )
                slow.append(asyncio.create_task(post))
                await seen.get()
                # Asked on the same loop after it: what was begun before has its place, or its turn.
                assert (await agent.presence())[0] == 200
        pem = certificate_pem(acme.signing.certificate).decode()
        async with asyncio.timeout(20):
            status, opened = await agent.post(
                f"{SESSION}?purpose=withdrawal", {"agent": "hq", "signing_certificate": pem}
            )
            assert status == 200
            withdrawal = acme.seal(endpoint.clock, b64u_decode(opened["challenge"]))
            status, answer = await agent.post(f"{ENVELOPES}?purpose=withdrawal", {"envelopes": [withdrawal]})
        assert (status, answer["receipts"][0]["status"]) == (200, "accepted")
        assert not any(task.done() for task in slow)
        released.set()
        for response in await asyncio.gather(*slow):
            assert response.status == 400
            response.close()


async def test_a_withdrawals_budget_carries_no_keys(endpoint: PushEndpoint, acme: HostedTenant) -> None:
    async with endpoint.client(files=acme.tls_files) as agent:
        token = acme.seal(endpoint.clock, await agent.challenge(acme), acme.key())
        status, answer = await agent.post(f"{ENVELOPES}?purpose=withdrawal", {"envelopes": [token]})
        assert (status, answer["receipts"][0]["code"]) == (200, "purpose")
        with pytest.raises(KeyUnavailableError):
            endpoint.cache.sealing_key(acme.owner())
        for path in (SESSION, ENVELOPES):
            assert (await agent.post(f"{path}?purpose=presence", {}))[0] == 400


async def test_the_directory_changes_while_serving(
    endpoint: PushEndpoint, acme: HostedTenant, rival: HostedTenant, tmp_path: Path
) -> None:
    newcomer = host_tenant(tmp_path, "newcomer")
    async with endpoint.client(files=rival.tls_files) as old_connection:
        await old_connection.challenge(rival)
        endpoint.apply(directory_of(acme, newcomer, revision=2))
        async with endpoint.client(files=newcomer.tls_files) as agent:
            challenge = await agent.challenge(newcomer)
            assert await agent.push(newcomer.seal(endpoint.clock, challenge, newcomer.key())) == ["accepted"]
        status, answer = await old_connection.post(SESSION, {"agent": "hq"})
        assert (status, answer["code"]) == (403, "tenant"), (
            "a kept connection has no more rights than a new one"
        )
    async with endpoint.client(files=rival.tls_files) as removed:
        with pytest.raises((aiohttp.ClientError, ConnectionError, ssl.SSLError)):
            await removed.post(SESSION, {"agent": "hq"})


async def test_a_large_push_lets_others_through(
    endpoint: PushEndpoint, acme: HostedTenant, rival: HostedTenant
) -> None:
    async with (
        endpoint.client(files=acme.tls_files) as agent,
        endpoint.client(files=rival.tls_files) as other,
    ):
        challenge = await agent.challenge(acme)
        tokens = [acme.seal(endpoint.clock, challenge, acme.key()) for _ in range(60)]
        large = asyncio.create_task(agent.push(*tokens))
        await asyncio.sleep(0)
        assert (await other.post(SESSION, {"agent": "hq"}))[0] == 200
        outcomes = await large
        assert set(outcomes[:-1]) == {"sequence"}, "each later envelope overtook the one before"
        assert outcomes[-1] == "accepted"


async def test_openapi_describes_what_is_served(endpoint: PushEndpoint, acme: HostedTenant) -> None:
    application = make_push_application(
        endpoint.receiver,
        clock=endpoint.clock,
        requests_per_s=1,
        entitled=endpoint.environments.check_entitled,
    )
    served = {
        (route.method.lower(), route.resource.canonical)
        for route in application.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    document = openapi_document()
    paths = document["paths"]
    assert isinstance(paths, dict)
    assert served == {(method, path) for path, methods in paths.items() for method in methods}
    async with endpoint.client(files=acme.tls_files) as agent, agent.session.get("/openapi.json") as response:
        assert await response.json() == document


def test_the_token_bucket_refills() -> None:
    clock = ManualClock()
    bucket = TokenBucket(clock, rate_per_s=2, burst=2)
    assert [bucket.take(), bucket.take()] == [0, 0]
    assert bucket.take() == pytest.approx(0.5)
    clock.shift(0.5)
    assert bucket.take() == 0
    clock.shift(3600)
    assert [bucket.take(), bucket.take()] == [0, 0]
    assert bucket.take() > 0


async def test_one_agent_of_the_tenant_speaks_for_the_environment(
    endpoint: PushEndpoint, acme: HostedTenant
) -> None:
    """Neither another environment's agent nor a load balancer's companion takes a proxy out of service."""
    async with endpoint.client(files=acme.tls_files) as client:
        assert (await client.say("active"))[0] == 200
    for credential, code in (
        (acme.pki.agent_tls("agent-x"), "agent"),
        (acme.pki.balancer("lb-1"), "certificate-role"),
    ):
        async with endpoint.client(credential) as client:
            for state in ("healing", "active"):
                status, answer = await client.say(state, epoch=2**53)
                assert (status, answer["code"]) == (403, code)
    assert not endpoint.environments.refuses(acme.name)
    async with endpoint.client(files=acme.tls_files) as client:
        assert (await client.say("healing"))[1]["state"] == "healing"
    assert endpoint.environments.refuses(acme.name)


async def test_another_environments_agent_brings_no_keys_and_takes_none_back(
    endpoint: PushEndpoint, acme: HostedTenant
) -> None:
    """Its certificates are good, and it may have had a session before anybody spoke for the environment."""
    signing = acme.pki.agent_signing("agent-x")
    introduction = {
        "agent": "agent-x",
        "signing_certificate": certificate_pem(signing.certificate).decode(),
    }
    async with (
        endpoint.client(files=acme.tls_files) as agent,
        endpoint.client(acme.pki.agent_tls("agent-x")) as other,
    ):
        status, opened = await other.post(SESSION, introduction)
        assert status == 200, "nobody has spoken yet"
        challenge = b64u_decode(opened["challenge"])
        assert (await agent.say("active"))[0] == 200
        ours = acme.key()
        assert await agent.push(acme.seal(endpoint.clock, await agent.challenge(acme), ours)) == ["accepted"]
        for keys in ([acme.key()], []):
            token = acme.seal(endpoint.clock, challenge, *keys, signing=signing, issuer="agent-x")
            for query in ("", "?purpose=withdrawal"):
                status, answer = await other.post(ENVELOPES + query, {"envelopes": [token]})
                assert (status, answer["code"]) == (403, "agent")
                status, answer = await other.post(SESSION + query, introduction)
                assert (status, answer["code"]) == (403, "agent")
        assert endpoint.cache.sealing_key(acme.owner()).key_id == ours.key_id


async def test_no_body_of_another_environments_agent_is_waited_for(
    endpoint: PushEndpoint, acme: HostedTenant
) -> None:
    """It would hold a place, and up to 8 MiB, for half a minute."""
    released = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await released.wait()

    async with (
        endpoint.client(files=acme.tls_files) as agent,
        endpoint.client(acme.pki.agent_tls("agent-x")) as other,
    ):
        assert (await agent.say("active"))[0] == 200
        for path in (ENVELOPES, SESSION):
            asked = other.session.post(path, data=endless(), headers={"Content-Type": "application/json"})
            async with asyncio.timeout(BODY_TIMEOUT_S - 5), asked as response:
                assert (response.status, (await response.json(content_type=None))["code"]) == (403, "agent")
        released.set()


async def test_who_may_push_is_asked_when_the_body_has_come(
    endpoint: PushEndpoint, acme: HostedTenant
) -> None:
    """It may take half a minute, and the environment's agent may have spoken meanwhile."""
    begun, released = asyncio.Event(), asyncio.Event()
    signing = acme.pki.agent_signing("agent-x")
    introduction = {
        "agent": "agent-x",
        "signing_certificate": certificate_pem(signing.certificate).decode(),
    }

    async def slow(content: bytes) -> AsyncIterator[bytes]:
        yield content[:1]
        begun.set()
        await released.wait()
        yield content[1:]

    async with (
        endpoint.client(files=acme.tls_files) as agent,
        endpoint.client(acme.pki.agent_tls("agent-x")) as other,
    ):
        _, opened = await other.post(SESSION, introduction)
        challenge = b64u_decode(opened["challenge"])
        token = acme.seal(endpoint.clock, challenge, acme.key(), signing=signing, issuer="agent-x")
        headers = {"Content-Type": "application/json"}
        for path, asked in ((ENVELOPES, {"envelopes": [token]}), (SESSION, introduction)):
            endpoint.environments.keep([])  # nobody has spoken
            begun.clear()
            released.clear()
            body = slow(json.dumps(asked).encode())
            pushing = asyncio.create_task(other.session.post(path, data=body, headers=headers))
            await begun.wait()
            assert (await agent.presence())[0] == 200  # asked on the same loop after it: it has its place
            assert (await agent.say("active"))[0] == 200
            released.set()
            async with await pushing as response:
                assert (response.status, (await response.json(content_type=None))["code"]) == (403, "agent")
    with pytest.raises(KeyUnavailableError):
        endpoint.cache.sealing_key(acme.owner())
