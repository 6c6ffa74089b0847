"""A tenant's KACLS over the rig of the core, with an identity provider, Google's issuer, and their tokens."""

import asyncio
import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from envelope.keys import KeyId, SigningAlgorithm
from proxy.encryption_service.call import Answer, Call, Peer
from proxy.encryption_service.dialects.kacls import KaclsDialect
from proxy.encryption_service.jwks import KeySets
from proxy.encryption_service.limits import Limits
from proxy.encryption_service.model import DialectName, KaclsEndpoint, KaclsSettings, TokenIssuer
from tests.pki import rsa_key
from tests.proxy.encryption_service.service_rig import TENANT, ServiceRig
from tests.proxy.encryption_service.token_mint import Mint, Pages

URL = "https://kacls.example.com/kacls/acme/v1"
ORIGIN = "https://client-side-encryption.google.com"
USER = "alice@acme.example"
ADMIN = "admin@acme.example"
RESOURCE = "//googleapis.com/drive/files/1OJsaKJM5JES1yi79QCKx"
PERIMETERS = {"board": {"department": ("board", "legal"), "mfa": ("true",)}}
OTHER_KACLS = "https://old.example.com/kacls/v1"

IDP = Mint("https://idp.acme.example", "kacls-client")
GUEST_IDP = Mint("https://guests.acme.example", "kacls-guests", number=3)
GOOGLE = Mint("gsuitecse-tokenissuer-drive@system.gserviceaccount.com", "cse-authorization", number=2)
OTHER = Mint(OTHER_KACLS, "kacls-migration", number=4)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def unb64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def issuer_of(mint: Mint) -> TokenIssuer:
    return TokenIssuer(issuer=mint.issuer, jwks_url=jwks_url(mint), audience=mint.audience)


def jwks_url(mint: Mint) -> str:
    if mint is OTHER:
        return f"{OTHER_KACLS}/certs"
    host = mint.issuer.removeprefix("https://").partition("@")[0]
    return f"https://{host}/keys"


def endpoint(**changes: Any) -> KaclsEndpoint:
    """What the rig serves at URL, but for *changes*."""
    usual = KaclsEndpoint(
        url=URL,
        wrapping_key="workspace",
        signing_key="identity",
        authentication_issuers=(issuer_of(IDP),),
        authorization_issuers=(issuer_of(GOOGLE),),
        owner_domain="acme.example",
        admins={
            ADMIN: (
                "privilegedwrap",
                "privilegedunwrap",
                "privilegedprivatekeydecrypt",
                "wrapprivatekey",
            )
        },
        perimeters=PERIMETERS,
        trusted_kacls=(OTHER_KACLS,),
    )
    return msgspec.structs.replace(usual, **changes)


class KaclsRig:
    """`answer = rig.call("wrap", ...)`; the issuers' keys have been fetched."""

    def __init__(self, directory: Path, *, limits: Limits | None = None) -> None:
        self.service = ServiceRig(directory, limits=limits)
        rig = self.service
        self.clock = rig.clock
        self.key = rig.add_key("workspace")
        self.identity = rig.add_key("identity", algorithm=SigningAlgorithm.RS256)
        rig.push(self.key)
        self.push_identity()
        self.pages = Pages()
        for mint in (IDP, GOOGLE, GUEST_IDP, OTHER):
            self.pages.bodies[jwks_url(mint)] = mint.key_set()
        self.issuer_keys = KeySets(self.pages.get, self.clock)
        self.posted: list[tuple[str, dict[str, Any]]] = []
        self.asked = asyncio.Event()
        self.answer_to_post: tuple[int, bytes] | Exception = (404, b"")
        self.set_endpoint()
        self.dialect = KaclsDialect(
            core=rig.core,
            limiter=rig.limiter,
            directory=lambda: rig.directory,
            clock=rig.clock,
            issuer_keys=self.issuer_keys,
            post=self._post,
        )

    def push_identity(self) -> None:
        """RSA keys are slow to make: that of tests/pki.py will do, under a key id of this rig's own."""
        pkcs8 = rsa_key(2048, 8).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        known = self.service._materials.setdefault(self.identity.owner, {})
        known.setdefault(1, (KeyId.random(), pkcs8))
        self.service.push(self.identity)

    async def fetch_keys(self) -> None:
        for mint in (IDP, GOOGLE, GUEST_IDP, OTHER):
            await self.issuer_keys.refresh(jwks_url(mint), patient=True)
        self.pages.asked.clear()

    def close(self) -> None:
        self.service.close()

    def set_endpoint(self, *, tenant: str = TENANT, **changes: Any) -> None:
        settings = KaclsSettings(endpoints=(endpoint(**changes),))
        self.service.add_dialect(DialectName.KACLS, settings, tenant=tenant)

    def add_tenant(self, tenant: str, url: str) -> None:
        """Another tenant, believing the same issuers, with keys of its own of the same names."""
        for name, algorithm in (("workspace", None), ("identity", SigningAlgorithm.RS256)):
            self.service.push(self.service.add_key(name, tenant=tenant, algorithm=algorithm))
        self.set_endpoint(tenant=tenant, url=url)

    # Tokens.

    def authentication(
        self, email: str = USER, *, mint: Mint = IDP, person: Mapping[str, object] | None = None
    ) -> str:
        """*person*: more claims, or others."""
        return mint.token({"email": email, **(person or {})}, now_s=self.clock.wall_s())

    def authorization(
        self, role: str | None, email: str = USER, *, mint: Mint = GOOGLE, **claims: object
    ) -> str:
        members = {
            "email": email,
            "role": role,
            "kacls_url": URL,
            "resource_name": RESOURCE,
            "perimeter_id": "",
            **claims,
        }
        return mint.token(members, now_s=self.clock.wall_s())

    # Calls.

    def http(
        self,
        operation: str,
        body: bytes = b"",
        *,
        method: str = "POST",
        url: str = URL,
        origin: str | None = ORIGIN,
        headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),),
        query: str = "",
    ) -> Call:
        path = "/" + url.split("/", 3)[3]
        if origin is not None:
            headers = (*headers, ("origin", origin))
        return Call(
            method=method,
            path=f"{path}/{operation}",
            query=query,
            headers=headers,
            body=body,
            peer=Peer(address="127.0.0.1"),
        )

    def call(self, operation: str, *, url: str = URL, **members: object) -> Answer:
        """A POST whose answer comes at once."""
        served = self.dialect.handle(self.http(operation, json.dumps(members).encode(), url=url))
        assert isinstance(served, Answer)
        return served

    async def wait(self, operation: str, *, url: str = URL, **members: object) -> Answer:
        """A POST whose answer may have to be waited for."""
        served = self.dialect.handle(self.http(operation, json.dumps(members).encode(), url=url))
        answer = served if isinstance(served, Answer) else await served
        assert isinstance(answer, Answer)
        return answer

    def wrap(
        self,
        key: bytes,
        *,
        url: str = URL,
        person: Mapping[str, object] | None = None,
        user: str = USER,
        reason: str = "test",
        **claims: Any,
    ) -> Answer:
        """`/wrap`; *claims* are the authorization token's, *person* the authentication token's."""
        return self.call(
            "wrap",
            url=url,
            authentication=self.authentication(user, person=person),
            authorization=self.authorization(**{"role": "writer", "email": user, "kacls_url": url, **claims}),
            key=b64(key),
            reason=reason,
        )

    def unwrap(
        self,
        wrapped_key: str,
        *,
        url: str = URL,
        person: Mapping[str, object] | None = None,
        user: str = USER,
        **claims: Any,
    ) -> Answer:
        return self.call(
            "unwrap",
            url=url,
            authentication=self.authentication(user, person=person),
            authorization=self.authorization(**{"role": "reader", "email": user, "kacls_url": url, **claims}),
            wrapped_key=wrapped_key,
            reason="test",
        )

    def wrapped(self, key: bytes, **claims: Any) -> str:
        return str(ok(self.wrap(key, **claims))["wrapped_key"])

    async def _post(self, url: str, body: bytes) -> tuple[int, bytes]:
        self.posted.append((url, json.loads(body)))
        self.asked.set()
        await asyncio.sleep(0)
        if isinstance(self.answer_to_post, Exception):
            raise self.answer_to_post
        return self.answer_to_post


def document(answer: Answer) -> dict[str, Any]:
    assert answer.content_type == "application/json"
    assert b"\n" not in answer.body
    read = json.loads(answer.body)
    assert isinstance(read, dict)
    return read


def ok(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer.body
    return document(answer)


def refused(answer: Answer) -> tuple[int, str]:
    """Status and details of an error, whose shape is looked at."""
    read = document(answer)
    assert set(read) == {"code", "message", "details"}
    assert read["code"] == answer.status
    assert isinstance(read["message"], str)
    assert len(read["message"]) > 5
    headers = dict(answer.headers)
    assert headers["vary"] == "origin"
    assert headers["cache-control"] == "no-store"
    return answer.status, read["details"]


def new_key() -> bytes:
    return os.urandom(32)
