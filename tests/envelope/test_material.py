"""Key-material envelopes: what is carried, and every way in which one must not be believed (threats 10 and
11).

Forgeries are made with cryptography alone (`_Forge`), so that tokens exist which our sealer, or joserfc,
refuses to write. A forgery differs from a good envelope, which is accepted, in one thing only.
"""

import hashlib
import hmac
import json
import os
import secrets
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import certs.pki
from envelope.base64url import b64u_decode, b64u_encode
from envelope.certificates import fingerprint
from envelope.errors import EnvelopeError, MisuseError
from envelope.keys import ANONYMOUS, MAX_KEY_VERSION, KeyId, KeyMaterial, KeyState, KeyUse, NetworkService
from envelope.material import (
    Claims,
    Expectation,
    Operation,
    Signer,
    key_check,
    open_envelope,
    recipient_thumbprint,
    seal_envelope,
)
from envelope.strict_json import MAX_ENVELOPE_BYTES, MAX_SEQUENCE
from tests import pki

type Json = dict[str, Any]
type Edit = Callable[[Json], object]

OWNER: Final = NetworkService("acme", "s3")
NOW_S: Final = 1_800_000_000
VALIDITY_S: Final = 330
NONCE: Final = bytes(range(16))
AUDIENCE: Final = "proxy-1"

ACME: Final = pki.make_tenant("acme")
GLOBEX: Final = pki.make_tenant("globex")
AGENT: Final = ACME.agent_signing("hq")
SERVICES: Final = {
    key_type: ACME.service("s3", key_type=key_type) for key_type in ("p256", "p384", "rsa-2048")
}
SERVICE: Final = SERVICES["p256"]
RSA_SERVICE: Final = SERVICES["rsa-2048"]
OTHER_SERVICE: Final = ACME.service("drive")
SIGNERS: Final = {fingerprint(AGENT.certificate): Signer(AGENT.certificate, "hq")}


def _data_key(state: KeyState = KeyState.ACTIVE, *, owner: NetworkService = OWNER) -> KeyMaterial:
    return KeyMaterial(owner=owner, key_id=KeyId.random(), state=state, secret=bytearray(os.urandom(32)))


def _signing_key() -> KeyMaterial:
    private = ec.generate_private_key(ec.SECP256R1())
    der = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return KeyMaterial(
        owner=OWNER,
        key_id=KeyId.random(),
        state=KeyState.ACTIVE,
        use=KeyUse.SIGN,
        algorithm="ES256",
        version=MAX_KEY_VERSION,
        secret=bytearray(der),
    )


def _claims(*keys: KeyMaterial, sequence: int = 7, operation: Operation = Operation.SET) -> Claims:
    return Claims(
        issuer="hq",
        audience=AUDIENCE,
        owner=OWNER,
        issued_at_s=NOW_S,
        expires_at_s=NOW_S + VALIDITY_S,
        sequence=sequence,
        token_id=secrets.token_bytes(16),
        nonce=NONCE,
        operation=operation,
        keys=keys,
    )


def _seal(claims: Claims, recipient: x509.Certificate = SERVICE.certificate) -> str:
    return seal_envelope(
        claims, recipient=recipient, signing_key=AGENT.key, signing_certificate=AGENT.certificate
    )


def _expectation(service: pki.ServiceCredential = SERVICE, **changed: Any) -> Expectation:
    expected = Expectation(
        owner=OWNER,
        audience=AUDIENCE,
        recipient_certificate=service.certificate,
        recipient_key=service.key,
        signers=SIGNERS,
        now_s=NOW_S,
        validity_s=VALIDITY_S,
        nonce=NONCE,
        last_sequence=6,
        seen_token_ids=frozenset(),
    )
    return replace(expected, **changed)


def _refusal(token: str, expected: Expectation | None = None) -> EnvelopeError:
    with pytest.raises(EnvelopeError) as refusal:
        open_envelope(token, expected or _expectation())
    return refusal.value


def _code(token: str, expected: Expectation | None = None) -> str:
    return _refusal(token, expected).code


# --- what is carried ---


@pytest.mark.parametrize("key_type", SERVICES)
@pytest.mark.parametrize("operation", Operation)
def test_round_trip(key_type: str, operation: Operation) -> None:
    service = SERVICES[key_type]
    tombstone = KeyMaterial(owner=OWNER, key_id=KeyId.random(), state=KeyState.DESTROYED, secret=bytearray())
    living = [_data_key(state) for state in KeyState if state is not KeyState.DESTROYED]
    claims = _claims(*living, _signing_key(), tombstone, operation=operation)
    token = _seal(claims, service.certificate)
    assert recipient_thumbprint(token) == fingerprint(service.certificate)
    opened = open_envelope(token, _expectation(service))
    for name in (
        "issuer",
        "audience",
        "owner",
        "issued_at_s",
        "expires_at_s",
        "sequence",
        "token_id",
        "nonce",
    ):
        assert getattr(opened, name) == getattr(claims, name)
    assert opened.operation is operation
    for got, sent in zip(opened.keys, claims.keys, strict=True):
        assert (got.owner, got.key_id, got.state, got.use) == (sent.owner, sent.key_id, sent.state, sent.use)
        assert (got.algorithm, got.version, got.secret) == (sent.algorithm, sent.version, sent.secret)


def test_the_revoke_message_is_a_set_of_nothing() -> None:
    opened = open_envelope(_seal(_claims()), _expectation())
    assert (opened.operation, opened.keys) == (Operation.SET, ())


@pytest.mark.parametrize("key_type", SERVICES)
def test_headers_are_exactly_those_of_the_format(key_type: str) -> None:
    service = SERVICES[key_type]
    header = json.loads(b64u_decode(_seal(_claims(), service.certificate).split(".")[0]))
    epk = header.pop("epk", None)
    assert header == {
        "alg": "RSA-OAEP-256" if key_type.startswith("rsa") else "ECDH-ES+A256KW",
        "enc": "A256GCM",
        "typ": "sealgate-km+jwe",
        "cty": "JWT",
        "x5t#S256": b64u_encode(fingerprint(service.certificate)),
    }
    assert (epk is None) == key_type.startswith("rsa")
    if epk is not None:
        assert epk.keys() == {"kty", "crv", "x", "y"}


def test_nothing_of_the_key_stands_in_the_token_or_in_a_repr() -> None:
    key = _data_key()
    claims = _claims(key)
    token = _seal(claims)
    shown = token + repr(claims) + repr(_expectation()) + repr(open_envelope(token, _expectation()))
    assert isinstance(SERVICE.key, ec.EllipticCurvePrivateKey)
    for secret in (bytes(key.secret), SERVICE.key.private_numbers().private_value.to_bytes(32)):
        for spelling in (secret.hex(), b64u_encode(secret), repr(secret), repr(bytearray(secret))):
            assert spelling not in shown


# --- what is refused by the sealer ---


def test_the_sealer_refuses_what_does_not_belong_together() -> None:
    other_agent, tls = ACME.agent_signing("branch"), ACME.agent_tls("hq")
    foreign = GLOBEX.agent_signing("hq")

    def seal(claims: Claims, *, recipient: x509.Certificate = SERVICE.certificate, by: Any = AGENT) -> None:
        seal_envelope(claims, recipient=recipient, signing_key=by.key, signing_certificate=by.certificate)

    with pytest.raises(MisuseError):
        seal(_claims(), recipient=OTHER_SERVICE.certificate)
    with pytest.raises(MisuseError):
        seal(_claims(), recipient=GLOBEX.service("s3").certificate)
    for signer in (other_agent, tls, foreign):
        with pytest.raises(MisuseError):
            seal(_claims(), by=signer)
    with pytest.raises(MisuseError, match="not the signing certificate's"):
        seal_envelope(
            _claims(),
            recipient=SERVICE.certificate,
            signing_key=other_agent.key,
            signing_certificate=AGENT.certificate,
        )
    with pytest.raises(MisuseError):
        seal(_claims(), recipient=AGENT.certificate)
    with pytest.raises(EnvelopeError):
        seal(_claims(), recipient=pki.issue_server(pki.make_server_ca()).certificate)


@pytest.mark.parametrize(
    "changed",
    [
        {"issuer": "branch"},
        {"audience": ""},
        {"audience": "x" * 256},
        {"sequence": 0},
        {"sequence": MAX_SEQUENCE + 1},
        {"expires_at_s": NOW_S},
        {"token_id": bytes(15)},
        {"nonce": bytes(17)},
    ],
)
def test_the_sealer_refuses_claims_no_reader_would_take(changed: Json) -> None:
    with pytest.raises(MisuseError):
        _seal(replace(_claims(_data_key()), **changed))


def test_the_sealer_refuses_keys_no_reader_would_take() -> None:
    good, signing = _data_key(), _signing_key()
    for keys in (
        (_data_key(owner=NetworkService("acme", "drive")),),
        (replace(good, secret=bytearray(32)),),
        (replace(good, secret=bytearray(b"short")),),
        (replace(good, key_id=ANONYMOUS),),
        (replace(good, algorithm="ES256"),),
        (replace(good, version=0),),
        (replace(good, version=MAX_KEY_VERSION + 1),),
        (replace(signing, algorithm=None),),
        (replace(signing, algorithm="a b"),),
        (replace(signing, secret=bytearray(b"no key")),),
        (replace(good, state=KeyState.DESTROYED),),
        (good, replace(_data_key(), key_id=good.key_id)),
    ):
        with pytest.raises(MisuseError):
            _seal(_claims(*keys))


def test_the_sealer_says_when_keys_do_not_fit() -> None:
    fits = _seal(_claims(*(_data_key(KeyState.DEACTIVATED) for _ in range(150))))
    assert len(open_envelope(fits, _expectation()).keys) == 150
    for count in (300, 500):  # the encrypted token is too large; the signed one is already
        with pytest.raises(EnvelopeError) as refusal:
            _seal(_claims(*(_data_key(KeyState.DEACTIVATED) for _ in range(count))))
        assert refusal.value.code == "too-large"


@pytest.mark.parametrize(
    "public_key",
    [
        ec.generate_private_key(ec.SECP521R1()).public_key(),
        rsa.generate_private_key(65537, 1024).public_key(),
        ed25519.Ed25519PrivateKey.generate().public_key(),
    ],
)
def test_recipients_whose_key_cannot_receive(public_key: Any) -> None:
    uri = x509.UniformResourceIdentifier("urn:sealgate:acme:service:s3")
    certificate = certs.pki.certify(
        public_key,
        subject=certs.pki.name("s3"),
        extensions=[(x509.SubjectAlternativeName([uri]), False)],
        issuer=ACME.root,
        validity=timedelta(days=1),
    )
    for act in (
        lambda: _seal(_claims(), certificate),
        lambda: open_envelope(_seal(_claims()), _expectation(recipient_certificate=certificate)),
    ):
        with pytest.raises(EnvelopeError) as refusal:
            act()
        assert refusal.value.code == "recipient"


def test_an_envelope_for_a_broker_has_no_nonce() -> None:
    token = _seal(replace(_claims(_data_key()), nonce=None))
    assert open_envelope(token, _expectation(nonce=None)).nonce is None


# --- forgeries ---


@dataclass
class _Forge:
    """Writes envelopes by hand; every step can be edited."""

    service: pki.ServiceCredential = SERVICE
    signing_key: Any = AGENT.key
    signer: x509.Certificate = AGENT.certificate
    claims: Edit = lambda _: None
    inner: Edit = lambda _: None
    outer: Edit = lambda _: None
    sign: Callable[[bytes, Any], bytes] | None = None
    encrypt_key: Callable[[Json, bytes], bytes] | None = None
    payload: bytes | None = None
    signed: Callable[[str], str] = str
    token: Callable[[str], str] = str
    plain: KeyMaterial = field(default_factory=_data_key)
    compress: Callable[[bytes], bytes] = bytes

    def write(self) -> str:
        return self.token(self._encrypted(self.signed(self._signed())))

    def _claims(self) -> bytes:
        if self.payload is not None:
            return self.payload
        claims = {
            "iss": "hq",
            "aud": AUDIENCE,
            "sub": str(OWNER),
            "iat": NOW_S,
            "nbf": NOW_S - 30,
            "exp": NOW_S + VALIDITY_S,
            "jti": b64u_encode(bytes(range(16, 32))),
            "seq": 7,
            "nonce": b64u_encode(NONCE),
            "x5t#S256": b64u_encode(fingerprint(self.service.certificate)),
            "op": "set",
            "keys": [
                {
                    "kid": b64u_encode(self.plain.key_id.raw),
                    "use": "data",
                    "ver": 1,
                    "st": "active",
                    "km": b64u_encode(bytes(self.plain.secret)),
                    "kcv": b64u_encode(key_check(self.plain)),
                }
            ],
        }
        self.claims(claims)
        return json.dumps(claims).encode()

    def _signed(self) -> str:
        header = {"alg": "ES256", "kid": b64u_encode(fingerprint(self.signer)), "typ": "sealgate-km+jws"}
        self.inner(header)
        text = f"{b64u_encode(json.dumps(header).encode())}.{b64u_encode(self._claims())}"
        signature = (self.sign or _es256)(text.encode(), self.signing_key)
        return f"{text}.{b64u_encode(signature)}"

    def _encrypted(self, signed: str) -> str:
        header: Json = {
            "alg": "ECDH-ES+A256KW",
            "enc": "A256GCM",
            "typ": "sealgate-km+jwe",
            "cty": "JWT",
            "x5t#S256": b64u_encode(fingerprint(self.service.certificate)),
        }
        content_key = os.urandom(32)
        public = self.service.certificate.public_key()
        if isinstance(public, rsa.RSAPublicKey):
            header["alg"] = "RSA-OAEP-256"
            self.outer(header)
            encrypt = self.encrypt_key or (lambda _, key: public.encrypt(key, _oaep(hashes.SHA256())))
            encrypted = encrypt(header, content_key)
        else:
            assert isinstance(public, ec.EllipticCurvePublicKey)
            ephemeral = ec.generate_private_key(public.curve)
            header["epk"] = _jwk(ephemeral.public_key())
            self.outer(header)
            encrypt = self.encrypt_key or (lambda head, key: _wrap(head, key, ephemeral, public))
            encrypted = encrypt(header, content_key)
        protected = b64u_encode(json.dumps(header).encode())
        iv = os.urandom(12)
        sealed = AESGCM(content_key).encrypt(iv, self.compress(signed.encode()), protected.encode())
        return ".".join(
            [protected, *(b64u_encode(part) for part in (encrypted, iv, sealed[:-16], sealed[-16:]))]
        )


def _es256(text: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    r, s = utils.decode_dss_signature(key.sign(text, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


def _oaep(digest: hashes.HashAlgorithm) -> padding.OAEP:
    return padding.OAEP(padding.MGF1(digest), digest, None)


def _jwk(public: ec.EllipticCurvePublicKey) -> Json:
    numbers, size = public.public_numbers(), (public.curve.key_size + 7) // 8
    name = {"secp256r1": "P-256", "secp384r1": "P-384"}[public.curve.name]
    x, y = (b64u_encode(value.to_bytes(size)) for value in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": name, "x": x, "y": y}


def _agree(
    alg: bytes, size: int, ours: ec.EllipticCurvePrivateKey, theirs: ec.EllipticCurvePublicKey
) -> bytes:
    """RFC 7518, 4.6.2."""
    info = len(alg).to_bytes(4) + alg + bytes(8) + (8 * size).to_bytes(4)
    return ConcatKDFHash(hashes.SHA256(), size, info).derive(ours.exchange(ec.ECDH(), theirs))


def _wrap(
    header: Json, key: bytes, ephemeral: ec.EllipticCurvePrivateKey, public: ec.EllipticCurvePublicKey
) -> bytes:
    return aes_key_wrap(_agree(header["alg"].encode(), 32, ephemeral, public), key)


def _set(name: str, value: object) -> Edit:
    return lambda members: members.__setitem__(name, value)


def _drop(name: str) -> Edit:
    return lambda members: members.pop(name)


@pytest.mark.parametrize("key_type", SERVICES)
def test_an_unedited_forgery_is_accepted(key_type: str) -> None:
    """So that each refusal below is due to its one edit."""
    forge = _Forge(service=SERVICES[key_type])
    opened = open_envelope(forge.write(), _expectation(SERVICES[key_type]))
    assert opened.keys[0].secret == forge.plain.secret


# rule 1: shape


def test_too_large() -> None:
    token = _seal(_claims())
    assert _code(token + "A" * (MAX_ENVELOPE_BYTES - len(token) + 1)) == "too-large"
    with pytest.raises(EnvelopeError) as refusal:
        recipient_thumbprint("x" * (MAX_ENVELOPE_BYTES + 1))
    assert refusal.value.code == "too-large"


def test_json_serialisations() -> None:
    protected, encrypted, iv, text, tag = _seal(_claims()).split(".")
    flattened = {"protected": protected, "encrypted_key": encrypted, "iv": iv, "ciphertext": text, "tag": tag}
    general = {**flattened, "recipients": [{"encrypted_key": encrypted}]}
    for document in (flattened, general):
        assert _code(json.dumps(document)) == "malformed"
    header, payload, signature = _Forge()._signed().split(".")
    document = {"protected": header, "payload": payload, "signature": signature}
    assert _code(_Forge(signed=lambda _: json.dumps(document)).write()) == "malformed"


@pytest.mark.parametrize(
    "edit",
    [
        lambda token: "",
        lambda token: "....",
        lambda token: token.rsplit(".", 1)[0],
        lambda token: token + ".",
        lambda token: token + "\n",
        lambda token: token.replace(".", "=.", 1),
        lambda token: " " + token,
        lambda token: token.split(".", 1)[0] + "é." + token.split(".", 1)[1],
    ],
)
def test_tokens_that_are_none(edit: Callable[[str], str]) -> None:
    assert _code(edit(_seal(_claims()))) == "malformed"


def test_other_spellings_of_a_token() -> None:
    """The last character of a segment may carry spare bits: a second spelling of one token."""
    token = _Forge(service=RSA_SERVICE).write()
    encrypted = token.split(".")[1]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    spare = alphabet[alphabet.index(encrypted[-1]) | 1]
    assert spare != encrypted[-1]
    respelled = token.replace(encrypted, encrypted[:-1] + spare)
    assert _code(respelled, _expectation(RSA_SERVICE)) == "malformed"


@pytest.mark.parametrize(
    "header", [b"", b"[]", b'"x"', b"{", b"{}x", b"\xff", b'{"alg":1e3}', b'{"alg":NaN}', b"[" * 9000]
)
def test_outer_headers_that_are_no_json_object(header: bytes) -> None:
    assert _code(".".join([b64u_encode(header), *_seal(_claims()).split(".")[1:]])) == "malformed"


def test_an_inner_token_that_is_no_text() -> None:
    assert _code(_Forge(signed=lambda text: "é" + text).write()) == "malformed"


def test_a_member_given_twice() -> None:
    protected, rest = _seal(_claims()).split(".", 1)
    doubled = b64u_decode(protected)[:-1] + b',"alg":"ECDH-ES+A256KW"}'
    assert _code(f"{b64u_encode(doubled)}.{rest}") == "malformed"
    payload = _Forge()._claims()
    assert _code(_Forge(payload=payload[:-1] + b', "iss": "hq"}').write()) == "malformed"


# rule 2: algorithms


def _dir(header: Json, _: bytes) -> bytes:
    return b""


def test_rsa_algorithms_other_than_the_certificates() -> None:
    public = RSA_SERVICE.certificate.public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    expected = _expectation(RSA_SERVICE)
    schemes: dict[str, padding.AsymmetricPadding] = {
        "RSA1_5": padding.PKCS1v15(),
        "RSA-OAEP": _oaep(hashes.SHA1()),
        "RSA-OAEP-384": _oaep(hashes.SHA384()),
        "RSA-OAEP-512": _oaep(hashes.SHA512()),
    }
    for name, scheme in schemes.items():
        forge = _Forge(
            service=RSA_SERVICE,
            outer=_set("alg", name),
            encrypt_key=lambda _, key, scheme=scheme: public.encrypt(key, scheme),  # type: ignore[misc]
        )
        assert _code(forge.write(), expected) == "algorithm"
        # Nor under the right name.
        forge.outer = lambda _: None
        assert _code(forge.write(), expected) == "decryption"


@pytest.mark.parametrize(
    "name",
    [
        "dir",
        "none",
        "A256KW",
        "A256GCMKW",
        "ECDH-ES",
        "ECDH-ES+A128KW",
        "PBES2-HS512+A256KW",
        "ecdh-es+a256kw",
        "",
        None,
        1,
    ],
)
def test_key_management_other_than_the_certificates(name: object) -> None:
    for service in (SERVICE, RSA_SERVICE):
        forge = _Forge(service=service, outer=_set("alg", name), encrypt_key=_dir)
        assert _code(forge.write(), _expectation(service)) == "algorithm"


def test_the_algorithm_of_another_kind_of_certificate() -> None:
    forge = _Forge(service=RSA_SERVICE, outer=_set("alg", "ECDH-ES+A256KW"))
    assert _code(forge.write(), _expectation(RSA_SERVICE)) == "algorithm"
    forge = _Forge(outer=_set("alg", "RSA-OAEP-256"))
    assert _code(forge.write()) == "algorithm"


@pytest.mark.parametrize("name", ["A128GCM", "A192GCM", "A256CBC-HS512", "C20P", "a256gcm", "", None])
def test_content_encryption_other_than_a256gcm(name: object) -> None:
    assert _code(_Forge(outer=_set("enc", name)).write()) == "algorithm"


def test_unsigned_and_wrongly_signed() -> None:
    public = AGENT.certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    rsa_key, ed_key = pki.rsa_key(), ed25519.Ed25519PrivateKey.generate()

    def hs256(key: bytes) -> Callable[[bytes, Any], bytes]:
        return lambda text, _: hmac.new(key, text, hashlib.sha256).digest()

    attempts: dict[str, Callable[[bytes, Any], bytes]] = {
        "none": lambda text, key: b"",
        "HS256": hs256(public),
        "ES384": _es256,
        "es256": _es256,
        "RS256": lambda text, key: rsa_key.sign(text, padding.PKCS1v15(), hashes.SHA256()),
        "EdDSA": lambda text, key: ed_key.sign(text),
        "Ed25519": lambda text, key: ed_key.sign(text),
        "": _es256,
    }
    for name, sign in attempts.items():
        assert _code(_Forge(inner=_set("alg", name), sign=sign).write()) == "algorithm"
        if sign is not _es256:
            # Nor under the right name.
            assert _code(_Forge(sign=sign).write()) == "signature"
    assert _code(_Forge(inner=_drop("alg")).write()) == "algorithm"
    assert _code(_Forge(signed=lambda text: text.rsplit(".", 1)[0] + ".").write()) == "signature"
    # The claims, encrypted but not signed at all.
    assert _code(_Forge(signed=lambda text: b64u_decode(text.split(".")[1]).decode()).write()) == "malformed"


# rule 3: header members


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("zip", "DEF"),
        ("crit", ["exp"]),
        ("jku", "https://attacker.example/keys"),
        ("jwk", _jwk(ec.generate_private_key(ec.SECP256R1()).public_key())),
        ("x5u", "https://attacker.example/cert"),
        ("x5c", ["AAAA"]),
        ("x5t", "AAAA"),
        ("kid", "1"),
        ("apu", "AAAA"),
        ("apv", "AAAA"),
        ("p2c", 10**9),
        ("iv", "AAAA"),
        ("b64", False),
        ("exp", 0),
        ("", ""),
    ],
)
def test_header_members_that_are_not_listed(name: str, value: object) -> None:
    assert _code(_Forge(outer=_set(name, value)).write()) == "header"
    assert (
        _code(_Forge(service=RSA_SERVICE, outer=_set(name, value)).write(), _expectation(RSA_SERVICE))
        == "header"
    )
    if name != "kid":
        assert _code(_Forge(inner=_set(name, value)).write()) == "header"


def test_an_ephemeral_key_beside_rsa() -> None:
    epk = _jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
    forge = _Forge(service=RSA_SERVICE, outer=_set("epk", epk))
    assert _code(forge.write(), _expectation(RSA_SERVICE)) == "header"


@pytest.mark.parametrize("name", ["typ", "cty", "x5t#S256", "epk"])
def test_outer_members_that_are_missing(name: str) -> None:
    assert _code(_Forge(outer=_drop(name), encrypt_key=lambda _, key: key).write()) == "header"


@pytest.mark.parametrize("value", ["sealgate-km+jws", "JWT", "sealgate-km+JWE", "sealgate-km+hpke", "", None])
def test_wrong_types(value: object) -> None:
    assert _code(_Forge(outer=_set("typ", value)).write()) == "header"
    assert _code(_Forge(outer=_set("cty", value and f"{value}x")).write()) == "header"
    inner = "sealgate-km+jwe" if value == "sealgate-km+jws" else value
    assert _code(_Forge(inner=_set("typ", inner)).write()) == "header"
    assert _code(_Forge(inner=_drop("typ")).write()) == "header"


@pytest.mark.parametrize(
    "edit",
    [
        _set("d", "AAAA"),
        _set("kid", "1"),
        _drop("y"),
        _set("crv", "P-384"),
        _set("kty", "OKP"),
        lambda epk: epk.clear(),
    ],
)
def test_ephemeral_keys_with_other_members(edit: Edit) -> None:
    assert _code(_Forge(outer=lambda header: edit(header["epk"])).write()) == "header"


@pytest.mark.parametrize("value", ["AAAA", "", "A" * 43, 7, None, "=" * 43])
def test_ephemeral_keys_off_the_curve(value: object) -> None:
    assert _code(_Forge(outer=lambda header: header["epk"].__setitem__("x", value)).write()) == "decryption"


# rule 4: from whom, to whom, about whom


def test_sealed_to_another_certificate() -> None:
    again = ACME.service("s3")
    assert _code(_Forge(service=again).write()) == "recipient"
    assert _code(_seal(_claims(), again.certificate)) == "recipient"
    # Our thumbprint outside, another's key inside.
    thumbprint = b64u_encode(fingerprint(SERVICE.certificate))
    assert _code(_Forge(service=again, outer=_set("x5t#S256", thumbprint)).write()) == "decryption"


def test_encrypted_again_to_another_by_an_honest_recipient() -> None:
    """A service may encrypt the signed part again, to someone else: the signature names the recipient."""
    again = ACME.service("s3")
    signed = _Forge(service=again)._signed()
    assert _code(_Forge(signed=lambda _: signed).write()) == "recipient"


def test_our_own_certificate_of_another_service() -> None:
    token = _Forge(service=OTHER_SERVICE).write()
    assert _code(token, _expectation(OTHER_SERVICE)) == "recipient"


def test_about_another_network_service() -> None:
    for sub in ("acme/drive", "globex/s3", "acme/s3/", "ACME/s3", "acme", "", None, 7):
        assert _code(_Forge(claims=_set("sub", sub)).write()) == "owner"


def test_signed_by_keys_that_may_not() -> None:
    service, tls, foreign = ACME.service("s3"), ACME.agent_tls("hq"), GLOBEX.agent_signing("hq")
    other = ACME.agent_signing("branch")
    for credential in (service, tls, foreign, other, SERVICE):
        forge = _Forge(signing_key=credential.key, signer=credential.certificate)
        # Not among the tenant's agents,
        assert _code(forge.write()) == "signer"
        # under a certificate that is,
        assert _code(_Forge(signing_key=credential.key).write()) == "signature"
        # nor let in by a proxy that keeps a wrong list.
        listed = {fingerprint(credential.certificate): Signer(credential.certificate, "hq")}
        assert _code(forge.write(), _expectation(signers=listed)) == "signer"
    roleless = pki.issue_server(pki.make_server_ca())
    for certificate in (roleless.certificate, RSA_SERVICE.certificate):
        listed = {fingerprint(certificate): Signer(certificate, "hq")}
        assert _code(_Forge(signer=certificate).write(), _expectation(signers=listed)) == "signer"
    assert _code(_Forge(inner=_set("kid", "AAAA")).write()) == "header"
    assert _code(_Forge(inner=_set("kid", None)).write()) == "header"


def test_an_agent_speaks_for_itself_only() -> None:
    branch = ACME.agent_signing("branch")
    signers = SIGNERS | {fingerprint(branch.certificate): Signer(branch.certificate, "branch")}
    forge = _Forge(signing_key=branch.key, signer=branch.certificate)
    assert _code(forge.write(), _expectation(signers=signers)) == "signer"
    forge.claims = _set("iss", "branch")
    assert open_envelope(forge.write(), _expectation(signers=signers)).issuer == "branch"


def test_a_signer_outside_its_validity() -> None:
    begin_s = AGENT.certificate.not_valid_before_utc.timestamp()
    end_s = AGENT.certificate.not_valid_after_utc.timestamp()
    for now_s in (begin_s - 1, end_s + 1):
        times = {"iat": int(now_s), "nbf": int(now_s) - 30, "exp": int(now_s) + VALIDITY_S}
        token = _Forge(claims=lambda claims, times=times: claims.update(times)).write()  # type: ignore[misc]
        assert _code(token, _expectation(now_s=now_s)) == "signer"


def test_any_bit_of_the_token() -> None:
    token = _seal(_claims(_data_key()))
    for at in range(0, len(token), 7):
        if token[at] != ".":
            flipped = "B" if token[at] == "A" else "A"
            _refusal(token[:at] + flipped + token[at + 1 :])


# rule 5: when, for whom, in which order


@pytest.mark.parametrize(
    ("now_s", "fits"),
    [
        (NOW_S - 31, False),
        (NOW_S - 30, True),
        (NOW_S, True),
        (NOW_S + VALIDITY_S - 0.001, True),
        (NOW_S + VALIDITY_S, False),
        (NOW_S + 10**6, False),
    ],
)
def test_the_window(now_s: float, fits: bool) -> None:
    several = [_seal(_claims(_data_key())), _seal(_claims(operation=Operation.ADD))]
    for token in several:
        if fits:
            open_envelope(token, _expectation(now_s=now_s))
        else:
            assert _code(token, _expectation(now_s=now_s)) == "time"
    # To take all keys back needs no clock that is right; what proves that it is of now, it needs.
    withdrawal = _seal(_claims())
    assert open_envelope(withdrawal, _expectation(now_s=now_s)).keys == ()
    assert _code(withdrawal, _expectation(now_s=now_s, nonce=NONCE[::-1])) == "nonce"
    assert _code(withdrawal, _expectation(now_s=now_s, last_sequence=7)) == "sequence"
    unasked = _seal(replace(_claims(), nonce=None))
    expected = _expectation(now_s=now_s, nonce=None)
    if fits:
        open_envelope(unasked, expected)
    else:
        assert _code(unasked, expected) == "time"


@pytest.mark.parametrize(
    "times",
    [
        {"iat": NOW_S + 31},
        {"nbf": NOW_S + 1},
        {"exp": NOW_S},
        {"exp": NOW_S + VALIDITY_S + 1},
        {"iat": NOW_S - 1},
        {"iat": NOW_S + 20, "exp": NOW_S + 10},
        {"iat": -(10**12), "exp": 10**12},
    ],
)
def test_times_that_do_not_fit(times: dict[str, int]) -> None:
    assert _code(_Forge(claims=lambda claims: claims.update(times)).write()) == "time"


def test_another_audience() -> None:
    for audience in ("proxy-2", "", [AUDIENCE], None):
        assert _code(_Forge(claims=_set("aud", audience)).write()) == "audience"


def test_challenges() -> None:
    for nonce in (bytes(16), NONCE[::-1]):
        assert _code(_Forge(claims=_set("nonce", b64u_encode(nonce))).write()) == "nonce"
    assert _code(_Forge(claims=_drop("nonce")).write()) == "nonce"
    assert _code(_Forge().write(), _expectation(nonce=None)) == "nonce"
    for malformed in ("AAAA", 7, None):
        assert _code(_Forge(claims=_set("nonce", malformed)).write()) == "malformed"


def test_without_a_challenge_only_above_one_answered() -> None:
    token = _Forge(claims=_drop("nonce")).write()
    assert _code(token, _expectation(nonce=None, last_sequence=0)) == "nonce"
    assert _code(token, _expectation(nonce=None, last_sequence={"branch": 6})) == "nonce"
    assert open_envelope(token, _expectation(nonce=None, last_sequence=6)).nonce is None
    assert open_envelope(token, _expectation(nonce=None, last_sequence={"hq": 6})).sequence == 7


def test_sequences_rise() -> None:
    token = _seal(_claims(sequence=7))
    for last in (7, 8, MAX_SEQUENCE, {"hq": 7}):
        assert _code(token, _expectation(last_sequence=last)) == "sequence"
    for last in (0, 6, {"hq": 6}, {"branch": 9}):
        assert open_envelope(token, _expectation(last_sequence=last)).sequence == 7


def test_a_token_id_seen_before() -> None:
    claims = _claims()
    assert _code(_seal(claims), _expectation(seen_token_ids={claims.token_id})) == "replay"


@pytest.mark.parametrize("name", ["iat", "nbf", "exp", "seq"])
@pytest.mark.parametrize("value", [True, "7", None, 7.0, 2**53, 2**80, []])
def test_numbers_that_are_none(name: str, value: object) -> None:
    assert _code(_Forge(claims=_set(name, value)).write()) == "malformed"


@pytest.mark.parametrize("sequence", [0, -1])
def test_sequences_out_of_range(sequence: int) -> None:
    assert _code(_Forge(claims=_set("seq", sequence)).write(), _expectation(last_sequence=0)) == "malformed"


@pytest.mark.parametrize(
    "name", ["iss", "aud", "sub", "iat", "nbf", "exp", "jti", "seq", "x5t#S256", "op", "keys"]
)
def test_claims_that_are_missing(name: str) -> None:
    assert _code(_Forge(claims=_drop(name)).write()) == "malformed"


@pytest.mark.parametrize(
    "edit",
    [
        _set("extra", 1),
        _set("op", "replace"),
        _set("op", None),
        _set("op", []),
        _set("jti", "AAAA"),
        _set("jti", None),
        _set("keys", {}),
        _set("keys", None),
        _set("keys", [7]),
        _set("keys", [[]]),
    ],
)
def test_claims_that_are_not_the_formats(edit: Edit) -> None:
    assert _code(_Forge(claims=edit).write()) == "malformed"


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b"\xff", b"[" * 9000, b'{"iss":'])
def test_payloads_that_are_no_claims(payload: bytes) -> None:
    assert _code(_Forge(payload=payload).write()) == "malformed"


_JSON: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=3)
    | st.sampled_from(["data", "set", "AAAA"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_json_in_any_place_ends_in_good_order(data: st.DataObject) -> None:
    """From a signer who is believed: nothing but EnvelopeError comes out, whatever stands where."""

    def edit(claims: Json) -> None:
        members = data.draw(st.sampled_from([claims, claims["keys"][0]]))
        name = data.draw(st.sampled_from(sorted(members)))
        members[name] = data.draw(_JSON.filter(lambda value: value != members[name]))

    token = _Forge(claims=edit).write()
    try:
        open_envelope(token, _expectation())
    except EnvelopeError:
        return
    # What may differ without harm: the sequence above the last, times within the window, the key's state.


# rule 6: the keys


def _key_edit(edit: Edit) -> Edit:
    return lambda claims: edit(claims["keys"][0])


@pytest.mark.parametrize(
    "edit",
    [
        _drop("kid"),
        _drop("use"),
        _drop("ver"),
        _drop("st"),
        _drop("km"),
        _drop("kcv"),
        _set("alg", "ES256"),
        _set("extra", 1),
        _set("use", "encrypt"),
        _set("use", None),
        _set("use", []),
        _set("ver", 0),
        _set("ver", -1),
        _set("ver", 2**31),
        _set("ver", "1"),
        _set("ver", True),
        _set("ver", None),
        _set("st", "expired"),
        _set("st", {}),
        _set("kid", b64u_encode(bytes(16))),
        _set("kid", b64u_encode(bytes(15))),
        _set("km", "="),
        _set("km", 7),
        _set("kcv", b64u_encode(bytes(15))),
        _set("st", "destroyed"),
        lambda key: key.update(use="sign"),
        lambda key: key.update(use="sign", alg="a b"),
        lambda key: key.update(use="sign", alg=7),
    ],
)
def test_keys_that_are_not_the_formats(edit: Edit) -> None:
    assert _code(_Forge(claims=_key_edit(edit)).write()) == "malformed"


@pytest.mark.parametrize(
    "edit",
    [
        _set("kcv", b64u_encode(bytes(16))),
        _set("km", b64u_encode(os.urandom(32))),
        _set("km", b64u_encode(bytes(32))),
        _set("km", b64u_encode(b"k" * 31)),
        _set("km", ""),
        _set("kid", b64u_encode(b"another key id !")),
        lambda key: key.update(use="sign", alg="ES256"),
    ],
)
def test_keys_that_are_not_what_their_check_value_says(edit: Edit) -> None:
    assert _code(_Forge(claims=_key_edit(edit)).write()) == "key-check"


def test_a_destroyed_key_may_keep_its_check_value() -> None:
    def destroy(claims: Json) -> None:
        claims["keys"][0] |= {"st": "destroyed"}
        del claims["keys"][0]["km"]

    opened = open_envelope(_Forge(claims=destroy).write(), _expectation())
    assert (opened.keys[0].state, bytes(opened.keys[0].secret)) == (KeyState.DESTROYED, b"")


def test_a_key_id_twice() -> None:
    edit: Edit = lambda claims: claims["keys"].append(claims["keys"][0])  # noqa: E731 - like its neighbours
    assert _code(_Forge(claims=edit).write()) == "malformed"


def test_one_bad_key_spoils_all_of_them() -> None:
    """All or nothing: the good ones before it are wiped, not returned."""
    spoiled = {"kid": b64u_encode(os.urandom(16)), "use": "data", "ver": 1, "st": "active"}
    spoiled |= {"km": "", "kcv": ""}
    token = _Forge(claims=lambda claims: claims["keys"].append(spoiled)).write()
    assert _code(token) == "malformed"


def test_keys_of_another_service_under_our_name() -> None:
    """The check value covers tenant and service: an agent that mixed up its rows is found out."""
    other = _data_key(owner=NetworkService("acme", "drive"))
    assert _code(_Forge(plain=other).write()) == "key-check"


# errors


def test_refusals_show_no_secrets_and_no_causes() -> None:
    key = _data_key()
    edits = [
        _Forge(plain=key, claims=_key_edit(_set("kcv", b64u_encode(bytes(16))))),
        _Forge(plain=key, sign=lambda *_: b""),
    ]
    edits.append(_Forge(plain=key, payload=b'{"km": "' + b64u_encode(bytes(key.secret)).encode() + b'"'))
    for forge in edits:
        text = "".join(traceback.format_exception(_refusal(forge.write())))
        assert "direct cause" not in text
        assert "another exception occurred" not in text
        for spelling in (key.secret.hex(), b64u_encode(bytes(key.secret)), repr(bytes(key.secret))):
            assert spelling not in text


def test_a_decryption_failure_says_nothing_of_its_reason() -> None:
    """Padding, wrapping and tag look alike to whoever sent the token."""
    protected, encrypted, iv, text, tag = _Forge(service=RSA_SERVICE).write().split(".")

    def flip(part: str) -> str:
        return b64u_encode(bytes([b64u_decode(part)[0] ^ 1]) + b64u_decode(part)[1:])

    broken = [
        ".".join(parts)
        for parts in (
            (protected, flip(encrypted), iv, text, tag),
            (protected, encrypted, flip(iv), text, tag),
            (protected, encrypted, iv, flip(text), tag),
            (protected, encrypted, iv, text, flip(tag)),
            (protected, "", iv, text, tag),
            (protected, encrypted, "", text, tag),
            (protected, encrypted, iv, "", tag),
            (protected, encrypted, iv, text, ""),
        )
    ]
    answers = {
        (error.code, str(error)) for error in (_refusal(token, _expectation(RSA_SERVICE)) for token in broken)
    }
    assert answers == {("decryption", "does not open with the key of our certificate")}
