"""Session tokens: what is believed, and what is not; the key sets by which others verify."""

import base64
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import KeySet, OctKey

from envelope.base64url import b64u_decode, b64u_encode
from envelope.keys import KeyState, SigningAlgorithm
from proxy.encryption_service.model import DialectName, NativeSettings, Op
from tests.proxy.encryption_service.dialects.test_native import NativeRig

KEYS = "/.well-known/jwks.json"
A, D = KeyState.ACTIVE, KeyState.DEACTIVATED
ALGORITHMS = [
    SigningAlgorithm.ES256,
    SigningAlgorithm.PS256,
    SigningAlgorithm.RS256,
    SigningAlgorithm.EDDSA,
]


class TokenRig(NativeRig):
    def __init__(self, directory: Path, algorithm: SigningAlgorithm = SigningAlgorithm.ES256) -> None:
        super().__init__(directory)
        self.signer = self.rig.add_key("signer", algorithm=algorithm)
        self.rig.push(self.signer)

    def issue(self, **more: Any) -> str:
        body = {"key": "signer", "subject": "ann@example.com", "audience": "shop", **more}
        status, document = self.call("token", body)
        assert status == 200, document
        return str(document["token"])

    def verify(self, token: str, *, audience: str = "shop", **more: Any) -> tuple[int, Any]:
        """The status, and the subject or the error's code."""
        body = {"key": "signer", "token": token, "audience": audience, **more}
        status, document = self.call("token/verify", body)
        return status, document["subject"] if status == 200 else document["code"]

    def keys(self, path: str = KEYS, **more: Any) -> list[dict[str, str]]:
        answer = self.answer(path, method="GET", **more)
        assert (answer.status, answer.content_type) == (200, "application/jwk-set+json")
        assert dict(answer.headers)["cache-control"] == "max-age=1"
        found: list[dict[str, str]] = json.loads(answer.body)["keys"]
        return found

    def sign(self, header: object, claims: object, *, key: str = "signer", segment: str = "") -> str:
        """A token of the caller's making, signed by our key as if it were a document."""
        first = segment or b64u_encode(json.dumps(header).encode())
        signed = f"{first}.{b64u_encode(json.dumps(claims).encode())}"
        message = base64.b64encode(signed.encode()).decode()
        _, document = self.call(f"keys/{key}/sign", {"message": message, "marshaling": "jws"})
        return f"{signed}.{b64u_encode(base64.b64decode(document['signature']))}"


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[TokenRig]:
    rig = TokenRig(tmp_path)
    yield rig
    rig.rig.close()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_token_verifies_here_and_by_the_key_set(tmp_path: Path, algorithm: SigningAlgorithm) -> None:
    rig = TokenRig(tmp_path, algorithm)
    try:
        token = rig.issue(claims={"role": "buyer", "level": 3, "groups": ["a", "b"], "staff": True})
        body = {"key": "signer", "token": token, "audience": "shop"}
        status, document = rig.call("token/verify", body)
        key_id = str(rig.rig.key_id(rig.signer))
        now_s = int(rig.rig.clock.wall_s())
        assert (status, document) == (
            200,
            {
                "key": "signer",
                "version": 1,
                "key_id": key_id,
                "subject": "ann@example.com",
                "audience": "shop",
                "expires_at_s": now_s + 900,
                "claims": {"role": "buyer", "level": 3, "groups": ["a", "b"], "staff": True},
            },
        )
        published = rig.keys()
        key_set: Any = {"keys": published}
        assert [(key["kid"], key["alg"], key["use"]) for key in published] == [(key_id, algorithm, "sig")]
        assert not {"d", "p", "q", "dp", "dq", "qi", "k"} & published[0].keys(), "public halves only"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SecurityWarning)  # "EdDSA" has another name since RFC 9864
            decoded = jwt.decode(token, KeySet.import_key_set(key_set), algorithms=[algorithm])
        assert decoded.header == {"alg": algorithm, "kid": key_id, "typ": "JWT"}
        assert decoded.claims["iss"] == "urn:sealgate:acme:signer"
        assert decoded.claims["exp"] - decoded.claims["iat"] == 900
        record = rig.rig.records()[-2]
        assert (record["operation"], record["key_id"], record["outcome"]) == ("token-verify", key_id, "ok")
        assert token.rpartition(".")[2] not in rig.rig.audit_file.read_text()
    finally:
        rig.rig.close()


def test_no_two_tokens_are_alike(tokens: TokenRig) -> None:
    claims = [json.loads(b64u_decode(tokens.issue().split(".")[1])) for _ in range(3)]
    assert len({claim["jti"] for claim in claims}) == 3


def test_every_character_of_a_token_counts(tokens: TokenRig) -> None:
    token = tokens.issue()
    for at, character in enumerate(token):
        changed = f"{token[:at]}{'A' if character != 'A' else 'B'}{token[at + 1 :]}"
        assert tokens.verify(changed) in {(422, "token-refused"), (404, "key-version-unknown")}, at
        assert tokens.verify(token[:at] or ".") == (422, "token-refused"), at
    assert tokens.verify(token) == (200, "ann@example.com")


async def test_a_token_is_for_one_audience_and_ends(tokens: TokenRig) -> None:
    token = tokens.issue(lifetime_s=60)
    assert tokens.verify(token, audience="bank") == (422, "token-refused")
    await tokens.rig.clock.advance(59)
    assert tokens.verify(token)[0] == 200
    await tokens.rig.clock.advance(1)
    assert tokens.verify(token) == (422, "token-refused")
    assert tokens.rig.records()[-1]["error"] == "token-refused"


def test_what_the_key_signed_otherwise_is_no_token(tokens: TokenRig) -> None:
    """Whoever may sign documents can write tokens; then they have to be ones, alg and kid ours."""
    now_s = int(tokens.rig.clock.wall_s())
    key_id = str(tokens.rig.key_id(tokens.signer))
    header = {"alg": "ES256", "kid": key_id, "typ": "JWT"}
    claims = {
        "iss": "urn:sealgate:acme:signer",
        "sub": "bob",
        "aud": "shop",
        "iat": now_s,
        "exp": now_s + 100,
        "jti": "1",
    }
    assert tokens.verify(tokens.sign(header, claims)) == (200, "bob")
    assert tokens.verify(tokens.sign(header, {**claims, "iat": now_s + 50})) == (200, "bob"), "a clock ahead"
    refused = (422, "token-refused")
    for change in (
        {"exp": now_s},
        {"exp": now_s + 86_401},
        {"exp": now_s + 100.5},
        {"exp": True},
        {"exp": str(now_s + 100)},
        {"iat": now_s + 61, "exp": now_s + 120},
        {"iss": "urn:sealgate:globex:signer"},
        {"aud": ["bank"]},
        {"sub": 7},
        {"nbf": now_s + 3600},
    ):
        assert tokens.verify(tokens.sign(header, {**claims, **change})) == refused, change
    for name in claims:
        missing = {key: value for key, value in claims.items() if key != name}
        assert tokens.verify(tokens.sign(header, missing)) == refused, name
    for change in (
        {"alg": "none"},
        {"alg": "HS256"},
        {"alg": "RS256"},
        {"typ": "at+jwt"},
        {"kid": key_id.upper()},
        {"crit": ["exp"]},
        {"jku": "https://evil.example"},
    ):
        assert tokens.verify(tokens.sign({**header, **change}, claims)) == refused, change
    for name in header:
        missing = {key: value for key, value in header.items() if key != name}
        assert tokens.verify(tokens.sign(missing, claims)) == refused, name
    assert tokens.verify(tokens.sign(header, claims, segment="e30")) == refused
    twice = b64u_encode(json.dumps(header)[:-1].encode() + b',"alg":"ES256"}')
    assert tokens.verify(tokens.sign(header, claims, segment=twice)) == refused
    unknown = tokens.sign({**header, "kid": "00" * 16}, claims)
    assert tokens.verify(unknown) == (404, "key-version-unknown")
    public = json.dumps(tokens.keys()[0]).encode()
    forged = jwt.encode({**header, "alg": "HS256"}, claims, _oct(public), algorithms=["HS256"])
    assert tokens.verify(forged) == refused, "the public key as an HMAC secret"


def _oct(secret: bytes) -> OctKey:
    return OctKey.import_key(secret)


STATES = [
    ((D, A), 200, 2),
    ((A, KeyState.PRE_ACTIVE), 200, 2),
    ((KeyState.SUSPENDED, A), 423, 1),
    ((KeyState.COMPROMISED, A), 423, 1),
    ((KeyState.DESTROYED, A), 410, 1),
]


@pytest.mark.parametrize(("states", "status", "published"), STATES, ids=str)
def test_the_state_of_the_key_rules_over_its_tokens(
    tokens: TokenRig, states: tuple[KeyState, ...], status: int, published: int
) -> None:
    token = tokens.issue()
    tokens.rig.push(tokens.signer, *states)
    assert tokens.verify(token)[0] == status
    assert len(tokens.keys()) == published
    assert tokens.verify(tokens.issue())[0] == 200, "the new login works"


async def test_a_key_set_is_never_empty_by_accident(tokens: TokenRig) -> None:
    tokens.rig.withdraw(tokens.signer)
    assert tokens.keys() == [], "the enterprise has said so"
    tokens.rig.push(tokens.signer)
    assert len(tokens.keys()) == 1
    tokens.rig.add_key("signer", algorithm=SigningAlgorithm.ES256, blocked=True)
    assert tokens.keys() == []
    tokens.rig.add_key("signer", algorithm=SigningAlgorithm.ES256)
    await tokens.rig.clock.advance(331)
    assert tokens.code(KEYS, method="GET") == (503, "stale")
    assert tokens.code("token", {"key": "signer", "subject": "a", "audience": "b"}) == (503, "stale")


def test_who_may_fetch_which_keys(tokens: TokenRig) -> None:
    rig = tokens.rig
    rig.push(rig.add_key("other", algorithm=SigningAlgorithm.EDDSA))
    assert len(tokens.keys()) == 2
    narrow = rig.add_bearer(DialectName.NATIVE, keys=frozenset({"other"}))
    assert [key["alg"] for key in tokens.keys(token=narrow)] == ["EdDSA"]
    assert tokens.code(KEYS, method="GET", token=None) == (401, "not-authenticated")
    public = "jwks/acme"
    assert tokens.code(public, method="GET", token=None) == (404, "not-found")
    rig.add_dialect(DialectName.NATIVE, NativeSettings(published_keys=("signer", "orders", "gone")))
    assert [key["alg"] for key in tokens.keys("/sealgate/v1/jwks/acme", token=None)] == ["ES256"]
    for name in ("jwks/globex", "jwks/", "jwks/acme/signer", "jwks/ACME"):
        assert tokens.answer(name, method="GET", token=None).status in {401, 404}
    assert tokens.code(public, method="POST", token=None) == (405, "method-not-allowed")
    assert json.loads(tokens.answer(public, method="HEAD", token=None).body)["keys"]


def test_a_tenant_verifies_its_own_alone(tokens: TokenRig) -> None:
    """Even with the same key material: the issuer is the tenant's."""
    rig = tokens.rig
    token = tokens.issue()
    rig.add_dialect(DialectName.NATIVE, tenant="globex")
    theirs = rig.add_key("signer", tenant="globex", algorithm=SigningAlgorithm.ES256)
    rig._materials[theirs.owner] = dict(rig._materials[tokens.signer.owner])
    rig.push(theirs)
    other = rig.add_bearer(DialectName.NATIVE, tenant="globex")
    body = {"key": "signer", "token": token, "audience": "shop"}
    assert tokens.code("token/verify", body, token=other) == (422, "token-refused")
    assert tokens.code("token/verify", body)[0] == 200


def test_a_token_of_one_proxy_verifies_at_another(tokens: TokenRig, tmp_path: Path) -> None:
    """Two environments have one key between them, and nothing else."""
    (tmp_path / "other").mkdir()
    other = TokenRig(tmp_path / "other")
    try:
        other.rig._materials[other.signer.owner] = dict(tokens.rig._materials[tokens.signer.owner])
        other.rig.withdraw(other.signer)
        other.rig.push(other.signer, D)
        assert other.verify(tokens.issue()) == (200, "ann@example.com")
        assert other.keys() == tokens.keys()
    finally:
        other.rig.close()


def test_what_is_asked_is_checked(tokens: TokenRig) -> None:
    good = {"key": "signer", "subject": "ann", "audience": "shop"}
    for change in (
        {"claims": {"exp": 1}},
        {"claims": {"iss": "me"}},
        {"claims": {str(number): 1 for number in range(33)}},
        {"claims": {str(number): "x" * 500 for number in range(30)}},
        {"claims": {"nested": {"a": 1}}},
        {"lifetime_s": 0},
        {"lifetime_s": 86_401},
        {"subject": ""},
        {"audience": "x" * 257},
        {"alg": "none"},
    ):
        assert tokens.code("token", {**good, **change}) == (400, "malformed"), change
    assert tokens.code("token", {**good, "key": "orders"}) == (409, "usage-refused")
    assert tokens.code("token", {**good, "key": "nobody"}) == (404, "key-not-found")
    token = tokens.issue()
    verify = {"key": "signer", "token": token, "audience": "shop"}
    verifier = tokens.rig.add_bearer(DialectName.NATIVE, operations=frozenset({Op.VERIFY}))
    assert tokens.code("token", good, token=verifier) == (403, "access-denied")
    assert tokens.code("token/verify", verify, token=verifier)[0] == 200
    signer = tokens.rig.add_bearer(DialectName.NATIVE, operations=frozenset({Op.SIGN}))
    assert tokens.code("token/verify", verify, token=signer) == (403, "access-denied")
    assert tokens.code("token/verify", {**verify, "token": "x" * 16_385}) == (400, "malformed")
    assert tokens.code("token/verify", {**verify, "key": "orders"}) == (409, "usage-refused")
