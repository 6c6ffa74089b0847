"""Token issuers made at run time: good tokens, and every bad one that a test wants."""

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from envelope.base64url import b64u_encode
from proxy.encryption_service.outbound import OutboundError
from tests.pki import rsa_key


def part(value: object) -> str:
    """A header or claims as they stand in a token; text is taken as it is."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return b64u_encode(text.encode())


class Mint:
    """One issuer with one RSA key."""

    def __init__(self, issuer: str, audience: str, *, number: int = 1, kid: str = "key-1") -> None:
        """*number*: issuers with different numbers have different keys (tests/pki.py)."""
        self.issuer = issuer
        self.audience = audience
        self.kid = kid
        self.key: rsa.RSAPrivateKey = rsa_key(2048, number)

    def jwk(self) -> dict[str, Any]:
        numbers = self.key.public_key().public_numbers()
        return {
            "kty": "RSA",
            "use": "sig",
            "alg": "RS256",
            "kid": self.kid,
            "n": b64u_encode(numbers.n.to_bytes(256)),
            "e": b64u_encode(numbers.e.to_bytes(3)),
        }

    def key_set(self) -> bytes:
        return json.dumps({"keys": [self.jwk()]}).encode()

    def signed(self, header: object, claims: object) -> str:
        """RS256 over whatever stands there."""
        text = f"{part(header)}.{part(claims)}"
        signature = self.key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{text}.{b64u_encode(signature)}"

    def token(self, claims: Mapping[str, Any], *, now_s: float, **header: object) -> str:
        """A good token for an hour, but for what *claims* and *header* say; None takes a member away."""
        members = {
            "iss": self.issuer,
            "aud": self.audience,
            "iat": int(now_s),
            "exp": int(now_s) + 3600,
            **claims,
        }
        names = {"alg": "RS256", "kid": self.kid, "typ": "JWT", **header}
        return self.signed(_without_none(names), _without_none(members))

    def unsigned(self, claims: Mapping[str, Any], *, now_s: float) -> str:
        """`alg: none`, with an empty signature."""
        header, members, _signature = self.token(claims, now_s=now_s, alg="none").split(".")
        return f"{header}.{members}."

    def confused(self, claims: Mapping[str, Any], *, now_s: float) -> str:
        """HS256 with the public key as the secret: what a verifier accepts that obeys the header."""
        text = self.token(claims, now_s=now_s, alg="HS256").rpartition(".")[0]
        secret = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return f"{text}.{b64u_encode(hmac.digest(secret, text.encode(), hashlib.sha256))}"


def _without_none(members: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in members.items() if value is not None}


class Pages:
    """What is at which URL, and how often it was asked for."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.before: Callable[[], Awaitable[object]] | None = None

    async def get(self, url: str) -> bytes:
        """As `Outbound.get`."""
        self.asked.append(url)
        if self.before is not None:
            await self.before()
        if url not in self.bodies:
            raise OutboundError("answered 404")
        return self.bodies[url]
