"""Session tokens: issued in one environment, verified in each (docs/environments.md).

1. A token is a JWT signed by the tenant's signing key that the caller names; `kid` is the key's id. Who
   verifies takes the algorithm from the key, never from the token, and looks for no other key.
2. It is for one audience and ends within a day: `iss`, `sub`, `aud`, `iat`, `exp`, `jti` are ours to write
   and must be there. An end is an end: the leeway is for an environment whose clock is ahead.
3. A key's state rules over what it has signed: once it is compromised, suspended or destroyed, its tokens
   are refused everywhere and its public half stands in no key set.
4. A key set says what may be verified with at this moment. It is kept by nobody for more than a second.
"""

import json
import uuid
from collections.abc import Iterable
from typing import Any, Final, override

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from joserfc import jwk, jwt
from joserfc.errors import (
    ExpiredTokenError,
    InvalidClaimError,
    JoseError,
    MissingClaimError,
    UnsupportedAlgorithmError,
)
from joserfc.jws import JWSRegistry

from envelope.base64url import b64u_decode, b64u_encode
from envelope.errors import FormatError
from envelope.keys import KeyId
from proxy.encryption_service.access import Caller
from proxy.encryption_service.call import Answer
from proxy.encryption_service.core import Marshaling, PublicKey, SignatureScheme
from proxy.encryption_service.dialects import native_bodies as bodies
from proxy.encryption_service.dialects.bearer import BearerCalls, Work
from proxy.encryption_service.dialects.native_errors import MALFORMED, TOKEN_REFUSED, RefusedError
from proxy.encryption_service.model import NamedKey, Op
from proxy.encryption_service.tokens import json_object

KEY_SET_TYPE: Final = "application/jwk-set+json"
LEEWAY_S: Final = 60
_MAX_CLAIMS_BYTES: Final = 8 * 1024
_REGISTERED: Final = frozenset({"iss", "sub", "aud", "exp", "nbf", "iat", "jti"})
_HEADER: Final = frozenset({"alg", "kid", "typ"})
_TYPE: Final = "JWT"


class _Pinned(JWSRegistry):
    """One algorithm, the key's. (joserfc warns of `EdDSA`, which RFC 9864 spells anew: ours is Ed25519.)"""

    def __init__(self, algorithm: str) -> None:
        super().__init__(algorithms=[algorithm])
        self.max_payload_length = bodies.MAX_TOKEN_CHARS
        self._algorithm = algorithm

    @override
    def get_alg(self, name: str) -> Any:
        if name != self._algorithm:
            raise UnsupportedAlgorithmError(f"{name} is not the key's algorithm")
        return self.algorithms[name]


class NativeTokens:
    def __init__(self, calls: BearerCalls) -> None:
        self._calls = calls

    def issue(self, work: Work, caller: Caller, asked: bodies.TokenRequest) -> bodies.Token:
        """As `Core.sign`. RefusedError (MALFORMED) for claims that are ours to write, or too many."""
        taken = _REGISTERED & asked.claims.keys()
        if taken:
            raise RefusedError(MALFORMED, f"These claims are not the caller's: {', '.join(sorted(taken))}.")
        ticket = self._calls.admit(work, caller, asked.key, Op.SIGN)
        work.resource = f"sub {asked.subject}"
        now_s = int(self._calls.clock.wall_s())
        claims = {
            **asked.claims,
            "iss": issuer_of(ticket.key),
            "sub": asked.subject,
            "aud": asked.audience,
            "iat": now_s,
            "exp": now_s + asked.lifetime_s,
            "jti": str(uuid.uuid4()),
        }
        payload = _segment(claims)
        if len(payload) > _MAX_CLAIMS_BYTES:
            raise RefusedError(MALFORMED, f"The claims have more than {_MAX_CLAIMS_BYTES} bytes.")
        signing_input = ""

        def written(key_id: KeyId) -> bytes:
            nonlocal signing_input
            header = {"alg": str(ticket.key.algorithm), "kid": str(key_id), "typ": _TYPE}
            signing_input = f"{_segment(header)}.{payload}"
            return signing_input.encode("ascii")

        made = self._calls.core.sign(ticket, written, _scheme(ticket.key))
        work.used(made.version, made.key_id)
        self._calls.finish(work, ticket)
        return bodies.Token(
            key=ticket.key.name,
            version=made.version,
            key_id=str(made.key_id),
            token=f"{signing_input}.{b64u_encode(made.signature)}",
            expires_at_s=now_s + asked.lifetime_s,
        )

    def verify(self, work: Work, caller: Caller, asked: bodies.TokenVerifyRequest) -> bodies.TokenVerified:
        """RefusedError (TOKEN_REFUSED); KeyRefused for the state of the key it names; as `Core.verify`."""
        ticket = self._calls.admit(work, caller, asked.key, Op.VERIFY)
        algorithm = str(ticket.key.algorithm)
        key_id = _key_id(asked.token, algorithm)
        work.key_id = key_id
        version, public = self._calls.core.verification_key(ticket, key_id)
        work.used(version, key_id)
        now_s = int(self._calls.clock.wall_s())
        claims = _verified(
            asked.token, public, algorithm, issuer=issuer_of(ticket.key), audience=asked.audience, now_s=now_s
        )
        self._calls.finish(work, ticket)
        return bodies.TokenVerified(
            key=ticket.key.name,
            version=version,
            key_id=str(key_id),
            subject=claims["sub"],
            audience=asked.audience,
            expires_at_s=claims["exp"],
            claims={name: value for name, value in claims.items() if name not in _REGISTERED},
        )

    def key_set(self, tenant: str, keys: Iterable[NamedKey]) -> bytes:
        """The JWK set (RFC 7517 5) of *keys*, all environments'. Withdrawn, Stale."""
        found = self._calls.core.states.public_keys(tenant, keys)
        documents = [
            public_jwk(version.public_key, version.key_id, str(key.algorithm))
            for key, version in found
            if version.public_key is not None
        ]
        return json.dumps({"keys": documents}, separators=(",", ":")).encode() + b"\n"


def issuer_of(key: NamedKey) -> str:
    """`iss` of the tokens that this key signs: the same in every environment."""
    return f"urn:sealgate:{key.tenant}:{key.name}"


def public_jwk(public: PublicKey, key_id: KeyId, algorithm: str) -> dict[str, Any]:
    """The public half as RFC 7517 writes it, with `kid`, `alg` and `use`."""
    document = dict(_imported(public).as_dict(private=False))
    return document | {"kid": str(key_id), "alg": algorithm, "use": "sig"}


def key_set_answer(document: bytes) -> Answer:
    """Rule 4."""
    headers = (("cache-control", "max-age=1"),)
    return Answer(status=200, body=document, content_type=KEY_SET_TYPE, headers=headers)


def _scheme(key: NamedKey) -> SignatureScheme:
    return SignatureScheme(marshaling=Marshaling.JWS if key.algorithm == "ES256" else None)


def _imported(public: PublicKey) -> jwk.Key:
    match public:
        case ec.EllipticCurvePublicKey():
            return jwk.ECKey.import_key(public)
        case rsa.RSAPublicKey():
            return jwk.RSAKey.import_key(public)
        case ed25519.Ed25519PublicKey():
            return jwk.OKPKey.import_key(public)


def _key_id(token: str, algorithm: str) -> KeyId:
    """Which key the token names. RefusedError: it is no token of this algorithm's."""
    try:
        head, _payload, signature = token.split(".")
        header = json_object(b64u_decode(head))
        b64u_decode(signature)  # one spelling only
        is_ours = header.keys() == _HEADER and (header["alg"], header["typ"]) == (algorithm, _TYPE)
        key_id = KeyId.parse(header["kid"]) if is_ours else None
        if key_id is not None and str(key_id) != header["kid"]:  # one spelling here, too
            key_id = None
    except (FormatError, ValueError, TypeError, RecursionError):
        key_id = None
    if key_id is None:
        raise RefusedError(TOKEN_REFUSED, "It is no token of this key's.")
    return key_id


def _verified(
    token: str, public: PublicKey, algorithm: str, *, issuer: str, audience: str, now_s: int
) -> dict[str, Any]:
    expected = jwt.JWTClaimsRegistry(
        now=now_s,
        leeway=LEEWAY_S,
        iss={"essential": True, "value": issuer},
        sub={"essential": True},
        aud={"essential": True, "value": audience},
        iat={"essential": True},
        exp={"essential": True},
        jti={"essential": True},
    )
    try:
        claims = jwt.decode(token, _imported(public), registry=_Pinned(algorithm)).claims
        expected.validate(claims)
        _check_end(_whole(claims, "iat"), _whole(claims, "exp"), now_s)
    except ExpiredTokenError:
        raise RefusedError(TOKEN_REFUSED, "It has expired.") from None
    except (InvalidClaimError, MissingClaimError) as error:
        raise RefusedError(TOKEN_REFUSED, f"Its claim {error.claim} is not as it has to be.") from None
    except (JoseError, ValueError, TypeError, KeyError):
        raise RefusedError(TOKEN_REFUSED, "Its signature does not verify.") from None
    return claims


def _check_end(begin_s: int, end_s: int, now_s: int) -> None:
    """Rule 2: without the leeway."""
    if now_s >= end_s:
        raise ExpiredTokenError("exp")
    if not begin_s <= end_s <= begin_s + bodies.MAX_TOKEN_LIFETIME_S:
        raise InvalidClaimError("exp")


def _whole(claims: dict[str, Any], name: str) -> int:
    value = claims[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidClaimError(name)
    return value


def _segment(document: dict[str, Any]) -> str:
    return b64u_encode(json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode())
