"""From one KACLS to another: both real, over TLS; and what an attacker makes of a URL in a request."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from proxy.encryption_service.call import Answer
from proxy.encryption_service.dialects.kacls_blob import resource_key_hash
from proxy.encryption_service.outbound import OutboundError
from tests.proxy.encryption_service.dialects.kacls_rig import (
    ADMIN,
    GOOGLE,
    IDP,
    OTHER,
    OTHER_KACLS,
    RESOURCE,
    URL,
    KaclsRig,
    b64,
    new_key,
    ok,
    refused,
    unb64,
)
from tests.proxy.encryption_service.dialects.kacls_site import Site, Tls, issuers, set_up
from tests.proxy.encryption_service.token_mint import Mint

BLOB = b64(b"the other one's, opaque to us")


@pytest.fixture
async def kacls(tmp_path: Path) -> AsyncIterator[KaclsRig]:
    rig = KaclsRig(tmp_path)
    await rig.fetch_keys()
    yield rig
    await rig.issuer_keys.aclose()
    rig.close()


class Client:
    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def post(self, url: str, **members: object) -> tuple[int, dict[str, Any]]:
        async with self._session.post(url, json=members) as answer:
            return answer.status, await answer.json()


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    tls = ssl.create_default_context()
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_NONE  # the test's own client; the servers verify each other
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session:
        yield Client(session)


async def test_keys_move_from_one_kacls_to_another(tmp_path: Path, client: Client) -> None:
    for name in ("tls", "old", "new"):
        (tmp_path / name).mkdir()
    tls = Tls(tmp_path / "tls")
    old, new = Site(KaclsRig(tmp_path / "old"), tls), Site(KaclsRig(tmp_path / "new"), tls)
    try:
        async with issuers(tls, IDP, GOOGLE) as where:
            set_up(old, where, trusted_kacls=(new.url,))
            set_up(new, where, trusted_kacls=(old.url,))
            async with old.serving() as old_service, new.serving() as new_service:
                key = new_key()
                tokens = {
                    "authentication": old.rig.authentication(),
                    "authorization": old.rig.authorization("writer", kacls_url=old.url),
                }
                status, wrapped = await client.post(f"{old.url}/wrap", **tokens, key=b64(key), reason="x")
                assert status == 200
                migrator = new.rig.authorization("migrator", kacls_url=new.url)
                rewrap = {
                    "authorization": migrator,
                    "original_kacls_url": old.url + "/",
                    "reason": "migration",
                    "wrapped_key": wrapped["wrapped_key"],
                }
                status, moved = await client.post(f"{new.url}/rewrap", **rewrap)
                assert status == 200, moved
                assert unb64(moved["resource_key_hash"]) == resource_key_hash(key, RESOURCE, "")
                # The new one unwraps it, the old one does not; both have it in their logs.
                tokens = {
                    "authentication": new.rig.authentication(),
                    "authorization": new.rig.authorization("reader", kacls_url=new.url),
                }
                status, opened = await client.post(
                    f"{new.url}/unwrap", **tokens, wrapped_key=moved["wrapped_key"], reason="x"
                )
                assert (status, unb64(opened["key"])) == (200, key)
                given = old.service.records()[-1]
                assert (given["operation"], given["caller"], given["as"]) == (
                    "privilegedunwrap",
                    new.url,
                    "kacls",
                )
                taken = new.service.records()[0]
                assert (taken["operation"], taken["original_kacls"]) == ("rewrap", old.url)
                assert (given["reason"], taken["reason"]) == ("migration", "migration")

                # The enterprise withdraws the new one's identity: nothing moves any more.
                new.service.withdraw(new.rig.identity)
                assert await client.post(f"{new.url}/rewrap", **rewrap) == (
                    403,
                    {"code": 403, "message": "The key was revoked by its owner.", "details": "revoked"},
                )
                new.rig.push_identity()
                assert (await client.post(f"{new.url}/rewrap", **rewrap))[0] == 200

                # Either side takes the other off its list.
                set_up(old, where)
                old_service.apply(old.service.directory)
                status, answer = await client.post(f"{new.url}/rewrap", **rewrap)
                assert (status, answer["details"]) == (403, "original-kacls")
                assert new.service.records()[-1]["cause"] == "answered-401"
                set_up(new, where)
                new_service.apply(new.service.directory)
                before = len(old.service.records())
                status, answer = await client.post(f"{new.url}/rewrap", **rewrap)
                assert (status, answer["details"]) == (403, "original-kacls")
                assert len(old.service.records()) == before  # it was not even asked

                # And the old one down is an outage, to be tried again.
                set_up(new, where, trusted_kacls=(old.url,))
                new_service.apply(new.service.directory)
                await old_service.stop(grace_s=0)
                status, answer = await client.post(f"{new.url}/rewrap", **rewrap)
                assert (status, answer["details"]) == (503, "original-kacls")
    finally:
        for site in (old, new):
            site.rig.close()


def rewrap(
    kacls: KaclsRig, *, original: str = OTHER_KACLS, role: str = "migrator", **claims: Any
) -> dict[str, Any]:
    return {
        "authorization": kacls.authorization(role, **claims),
        "original_kacls_url": original,
        "reason": "migration",
        "wrapped_key": BLOB,
    }


async def test_what_is_asked_of_the_original(kacls: KaclsRig) -> None:
    key = new_key()
    kacls.answer_to_post = (200, msgspec.json.encode({"key": b64(key), "future": 1}))
    answer = ok(await kacls.wait("rewrap", **rewrap(kacls, perimeter_id="")))
    assert unb64(answer["resource_key_hash"]) == resource_key_hash(key, RESOURCE, "")
    ((url, sent),) = kacls.posted
    assert url == f"{OTHER_KACLS}/privilegedunwrap"
    token = sent.pop("authentication")
    assert sent == {"reason": "migration", "resource_name": RESOURCE, "wrapped_key": BLOB}
    # Our token, judged as the other side would, by what `/certs` publishes.
    from proxy.encryption_service.jwks import parse_key_set
    from proxy.encryption_service.tokens import Issuer, verify

    certs = kacls.dialect.handle(kacls.http("certs", method="GET"))
    assert isinstance(certs, Answer)
    published = parse_key_set(certs.body)

    class Keys:
        def find(self, _url: str, kid: str) -> Any:
            return published.get(kid)

    claims = verify(
        token,
        issuers={URL: Issuer(issuer=URL, audiences=frozenset({"kacls-migration"}), jwks_url="")},
        keys=Keys(),
        now_s=kacls.clock.wall_s(),
        max_lifetime_s=3600,
    )
    assert claims.members["kacls_url"] == OTHER_KACLS
    assert claims.members["resource_name"] == RESOURCE


@pytest.mark.parametrize(
    "original",
    [
        "https://evil.example/kacls/v1",
        "http://old.example.com/kacls/v1",
        "https://old.example.com/kacls/v1/../../admin",
        "https://old.example.com/kacls/v1?x=",
        "https://old.example.com/kacls/v1#",
        "https://old.example.com:444/kacls/v1",
        "https://old.example.com@evil.example/kacls/v1",
        "https://OLD.example.com/kacls/v1",
        "https://169.254.169.254/latest/meta-data",
        "https://localhost:8200/kacls/v1",
        "file:///etc/passwd",
        URL,
        "",
    ],
)
async def test_only_listed_kacls_are_called(kacls: KaclsRig, original: str) -> None:
    """SSRF: the URL in the request chooses from the list and is used for nothing else."""
    answer = await kacls.wait("rewrap", **rewrap(kacls, original=original))
    assert refused(answer) == (403, "original-kacls")
    assert kacls.posted == []
    assert kacls.pages.asked == []


async def test_rewrap_is_for_the_migrator(kacls: KaclsRig) -> None:
    for request, details in (
        (rewrap(kacls, role="writer"), "role"),
        (rewrap(kacls, kacls_url=OTHER_KACLS), "kacls-url"),
        (rewrap(kacls, kacls_owner_domain="evil.example"), "owner-domain"),
        (rewrap(kacls, perimeter_id="nowhere"), "unknown-perimeter"),
        (rewrap(kacls) | {"authorization": kacls.authentication(ADMIN)}, "issuer"),
    ):
        assert refused(await kacls.wait("rewrap", **request)) == (403, details)
    assert kacls.posted == []


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ((401, b"{}"), 403),
        ((403, b"{}"), 403),
        ((404, b"{}"), 403),
        ((302, b""), 503),
        ((408, b""), 503),
        ((429, b"{}"), 503),
        ((500, b"<html>"), 503),
        ((503, b""), 503),
        ((200, b""), 502),
        ((200, b"[" * 10_000), 502),
        ((200, b'{"key":5}'), 502),
        ((200, b'{"key":"!"}'), 502),
        ((200, b'{"key":""}'), 502),
        ((200, b'{"key":"' + b"A" * 176 + b'"}'), 502),
        (OutboundError("did not answer"), 503),
    ],
)
async def test_an_original_that_does_not_give_the_key(
    kacls: KaclsRig, answer: tuple[int, bytes] | Exception, status: int
) -> None:
    kacls.answer_to_post = answer
    assert refused(await kacls.wait("rewrap", **rewrap(kacls))) == (status, "original-kacls")
    assert len(kacls.posted) == 1
    (record,) = kacls.service.records()
    assert record["outcome"] == ("failed" if status >= 500 else "refused")


async def test_a_key_that_is_withdrawn_while_the_original_is_asked(kacls: KaclsRig) -> None:
    kacls.answer_to_post = (200, msgspec.json.encode({"key": b64(new_key())}))
    waiting = asyncio.ensure_future(kacls.wait("rewrap", **rewrap(kacls)))
    await kacls.asked.wait()
    kacls.service.withdraw(kacls.key)
    assert refused(await waiting) == (403, "revoked")


# The other direction: somebody migrates away from us.


def unwrap_for(kacls: KaclsRig, mint: Mint = OTHER, *, resource: str = RESOURCE, **claims: Any) -> Answer:
    members = {"kacls_url": URL, "resource_name": RESOURCE, **claims}
    return kacls.call(
        "privilegedunwrap",
        authentication=mint.token(members, now_s=kacls.clock.wall_s()),
        reason="KACLS migration",
        resource_name=resource,
        wrapped_key=kacls.wrapped(KEY),
    )


KEY = new_key()


def test_a_listed_kacls_unwraps_one_resource_at_a_time(kacls: KaclsRig) -> None:
    assert unb64(ok(unwrap_for(kacls))["key"]) == KEY
    now = int(kacls.clock.wall_s())
    for claims, expected in (
        ({"kacls_url": OTHER_KACLS}, (403, "kacls-url")),
        ({"kacls_url": None}, (401, "claim")),
        ({"resource_name": "other"}, (403, "resource-name")),
        ({"resource_name": None}, (401, "claim")),
        ({"aud": "cse-authorization"}, (401, "audience")),
        ({"exp": now + 3601}, (401, "lifetime")),
        ({"iat": now - 9000, "exp": now - 5400}, (401, "expired")),
        ({"iss": "https://evil.example"}, (401, "issuer")),
    ):
        assert refused(unwrap_for(kacls, **claims)) == expected
    forger = Mint(OTHER_KACLS, "kacls-migration", number=9)
    assert refused(unwrap_for(kacls, forger)) == (401, "signature")
    assert refused(unwrap_for(kacls, resource="other", resource_name="other")) == (403, "resource-name")
    kacls.set_endpoint(trusted_kacls=())
    assert refused(unwrap_for(kacls)) == (401, "issuer")


def test_a_listed_kacls_may_do_nothing_else(kacls: KaclsRig) -> None:
    token = OTHER.token(
        {"kacls_url": URL, "resource_name": RESOURCE, "email": ADMIN}, now_s=kacls.clock.wall_s()
    )
    for operation, members in (
        ("privilegedwrap", {"key": "AAAA", "resource_name": RESOURCE}),
        ("wrapprivatekey", {"private_key": "AAAA"}),
        ("wrap", {"key": "AAAA", "authorization": kacls.authorization("writer", ADMIN)}),
    ):
        assert refused(kacls.call(operation, authentication=token, **members)) == (401, "issuer")


async def test_a_kacls_that_is_trusted_no_more_when_it_answers_is_not_answered_for(kacls: KaclsRig) -> None:
    kacls.answer_to_post = (200, b'{"key":"AAAA"}')
    rewrap = kacls.dialect.handle(
        kacls.http(
            "rewrap",
            json.dumps(
                {
                    "authorization": kacls.authorization("migrator"),
                    "original_kacls_url": OTHER_KACLS,
                    "reason": "",
                    "wrapped_key": BLOB,
                }
            ).encode(),
        )
    )
    assert not isinstance(rewrap, Answer)
    waiting = asyncio.ensure_future(rewrap)
    await kacls.asked.wait()
    kacls.set_endpoint(trusted_kacls=())
    answer = await waiting
    assert isinstance(answer, Answer)
    assert answer.status == 403
    assert b"wrapped_key" not in answer.body
    assert kacls.service.records()[-1]["cause"] == "settings-changed"
