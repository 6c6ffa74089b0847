"""Key-material envelopes, JWE( JWS( claims ) ), from a key agent to one network service (docs/format.md 5).

1. What is accepted follows from our own certificate and our own settings, never from the token: one
   algorithm each, and exactly the header members of the format.
2. The checks of `open_envelope` stand in the order of docs/format.md. It returns everything or raises
   EnvelopeError with the code of the first rule that was broken; a caller never sees a part of the claims.
3. A document that holds key material exists in buffers with names, which are overwritten on every way out; so
   are the strings that the JSON parser makes of key material (envelope/memory.py).
4. Time, sequence, nonce and seen token ids are arguments; remembering them, per issuer, is the caller's duty.
"""

import contextlib
import functools
import hmac
import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key

from envelope.base64url import b64u_decode, b64u_encode, decode_secret, encode_secret
from envelope.certificates import CertificateError, Identity, Role, fingerprint, read_identity
from envelope.compact import (
    ECDH_ES_A256KW,
    RSA_OAEP_256,
    decrypt_by_ec,
    decrypt_by_rsa,
    encrypt_to_ec,
    encrypt_to_rsa,
    sign_es256,
    verify_es256,
)
from envelope.derive import key_check_value, signing_key_check_value
from envelope.errors import EnvelopeError, FormatError, MisuseError
from envelope.keys import (
    MAX_KEY_VERSION,
    KeyId,
    KeyMaterial,
    KeyState,
    KeyUse,
    NetworkService,
    check_name,
)
from envelope.memory import wipe_text
from envelope.strict_json import (
    MAX_ENVELOPE_BYTES,
    MAX_SEQUENCE,
    bytes_member,
    integer,
    json_object,
    secret_member,
    segments,
)

MAX_AHEAD_S: Final = 30
"""How far an agent's clock may be ahead of ours; `nbf` is this much before `iat` to let it be."""
NONCE_SIZE: Final = 16
TOKEN_ID_SIZE: Final = 16

_SIGNATURE: Final = "ES256"
_ENCRYPTION: Final = "A256GCM"
_OUTER_TYPE: Final = "sealgate-km+jwe"
_INNER_TYPE: Final = "sealgate-km+jws"
_CLAIMS: Final = frozenset({"iss", "aud", "sub", "iat", "nbf", "exp", "jti", "seq", "x5t#S256", "op", "keys"})
_ALGORITHM: Final = re.compile(r"[A-Za-z0-9+-]{1,32}")
_MAX_AUDIENCE: Final = 255
_COMPACT: Final = json.JSONEncoder(separators=(",", ":"))

_HOLE: Final = b'"km":""'

type RecipientKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


class Operation(StrEnum):
    SET = "set"
    """Replaces all keys of the network service; with no keys it withdraws them: the revoke message."""
    ADD = "add"
    """Answers a request for a key id; other keys stay."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Claims:
    """What an agent says to one network service.

    *audience*: id of the proxy or cluster. *issued_at_s*, *expires_at_s*: Unix seconds. *sequence*: strictly
    rising per issuer and owner, 1 to 2^53 - 1. *token_id*: 16 random bytes. *nonce*: the proxy's 16-byte
    challenge.
    """

    issuer: str
    audience: str
    owner: NetworkService
    issued_at_s: int
    expires_at_s: int
    sequence: int
    token_id: bytes
    nonce: bytes | None
    operation: Operation
    keys: tuple[KeyMaterial, ...]


@dataclass(frozen=True, slots=True)
class Signer:
    """An agent's signing certificate, already verified to the tenant's root with role signing."""

    certificate: x509.Certificate
    agent_id: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Expectation:
    """What a proxy knows when an envelope arrives; the envelope has to fit.

    *signers*: by SHA-256 of the certificate's DER form, of this tenant only. *validity_s*: the longest it may
    be good for. *nonce*: our challenge; None for an envelope that came without a session, by a broker, which
    is believed only above a sequence already accepted under a challenge. *last_sequence*: the highest
    accepted since this process started, 0 for none; by issuer, or one for all. *seen_token_ids*: those of
    envelopes still live.
    """

    owner: NetworkService
    audience: str
    recipient_certificate: x509.Certificate
    recipient_key: RecipientKey = field(repr=False)
    signers: Mapping[bytes, Signer]
    now_s: float
    validity_s: int
    nonce: bytes | None
    last_sequence: int | Mapping[str, int]
    seen_token_ids: Container[bytes]


@dataclass(frozen=True, slots=True, eq=False)
class _Recipient:
    """What a recipient's certificate fixes."""

    algorithm: str
    curve: str | None
    identity: Identity
    thumbprint: str
    public_key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey

    @property
    def header(self) -> str:
        """The outer header, but for `epk`. No member of it needs escaping."""
        return (
            f'{{"alg":"{self.algorithm}","enc":"{_ENCRYPTION}","typ":"{_OUTER_TYPE}","cty":"JWT",'
            f'"x5t#S256":"{self.thumbprint}"}}'
        )

    @property
    def members(self) -> frozenset[str]:
        """The members of the outer header, no more and no fewer."""
        listed = frozenset({"alg", "enc", "typ", "cty", "x5t#S256"})
        return listed if self.curve is None else listed | {"epk"}


@dataclass(frozen=True, slots=True, eq=False)
class _Signing:
    """What a signing certificate fixes."""

    identity: Identity
    thumbprint: str
    public_key: ec.EllipticCurvePublicKey

    @property
    def header(self) -> str:
        """The inner header. No member of it needs escaping."""
        return f'{{"alg":"{_SIGNATURE}","kid":"{self.thumbprint}","typ":"{_INNER_TYPE}"}}'


def recipient_thumbprint(token: str) -> bytes:
    """SHA-256 of the certificate that *token* says it is for: finds the network service, proves nothing.

    EnvelopeError "too-large", "malformed" or "header".
    """
    header = json_object(b64u_decode(segments(token, 5)[0]))
    return bytes_member(header, "x5t#S256", 32, "header")


def key_check(key: KeyMaterial) -> bytes:
    """The kcv of *key*, 16 bytes: `key_check_value` for data, of the public key for `sign`.

    MisuseError if the secret is not of its use, was wiped, or was destroyed.
    """
    match key.use:
        case KeyUse.DATA:
            return key_check_value(key.secret, key.owner, key.key_id)
        case KeyUse.SIGN:
            try:
                # Unvalidated: the check of an RSA key's numbers takes 0.1 s, and who could forge them here
                # has signed the envelope or wrapped the key.
                private = load_der_private_key(
                    bytes(key.secret), password=None, unsafe_skip_rsa_key_validation=True
                )
            except Exception as error:  # noqa: BLE001 - the parser's ValueError, TypeError, UnsupportedAlgorithm
                raise MisuseError(f"a signing key is PKCS#8 DER ({type(error).__name__})") from None
            public = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            return signing_key_check_value(public, key.owner, key.key_id)


def seal_envelope(
    claims: Claims,
    *,
    recipient: x509.Certificate,
    signing_key: ec.EllipticCurvePrivateKey,
    signing_certificate: x509.Certificate,
) -> str:
    """The compact JWE of *claims* for *recipient*, signed by *signing_key*.

    The caller has verified *recipient* (chain, validity, role). MisuseError if the claims break a rule of the
    format, or recipient, signer and claims do not belong together; CertificateError if the signing
    certificate states no role. EnvelopeError "too-large" beyond 64 KiB, "recipient" for a certificate that
    cannot receive.
    """
    to = _recipient(recipient)
    if to.identity != Identity(claims.owner.tenant, Role.SERVICE, claims.owner.service):
        raise MisuseError(f"keys of {claims.owner} are not for {to.identity}")
    by = _signing(signing_certificate)
    if by.identity != Identity(claims.owner.tenant, Role.AGENT_SIGNING, claims.issuer):
        raise MisuseError(f"{by.identity} does not sign for agent {claims.issuer} of {claims.owner.tenant}")
    if not _is_pair(signing_key, by):
        raise MisuseError("the signing key is not the signing certificate's")
    body = _with_secrets(_COMPACT.encode(_encode_claims(claims, to.thumbprint)), claims.keys)
    signed = bytearray()
    try:
        signed = sign_es256(by.header, body, signing_key)
        if isinstance(to.public_key, rsa.RSAPublicKey):
            token = encrypt_to_rsa(to.header, signed, to.public_key)
        else:
            token = encrypt_to_ec(to.header, signed, to.public_key, to.curve or "")
    finally:
        body[:] = bytes(len(body))
        signed[:] = bytes(len(signed))
    if len(token) > MAX_ENVELOPE_BYTES:
        raise EnvelopeError("too-large", f"{len(claims.keys)} keys do not fit an envelope")
    return token


def know_recipient(certificate: x509.Certificate) -> None:
    """Read *certificate* now, so that the next `seal_envelope` to it is faster. EnvelopeError as there."""
    _recipient(certificate)


def open_envelope(token: str, expected: Expectation) -> Claims:
    """The claims of *token*, once every rule holds; EnvelopeError with the rule's code otherwise.

    "too-large", "malformed", "algorithm", "header", "recipient", "decryption", "signer", "signature",
    "owner", "time", "audience", "nonce", "sequence", "replay", "key-check".
    """
    ours = _recipient(expected.recipient_certificate)
    if ours.identity != Identity(expected.owner.tenant, Role.SERVICE, expected.owner.service):
        raise EnvelopeError("recipient", "our own certificate is not this network service's")
    signed = _decrypt(token, ours, expected.recipient_key)
    try:
        signer, claims = _verify(signed, expected)
    finally:
        signed[:] = bytes(len(signed))
    try:
        if claims.keys() - {"nonce"} != _CLAIMS:
            raise EnvelopeError("malformed", "other claims than the format's")
        _check_parties(claims, ours, signer, expected)
        _check_freshness(claims, expected)
        return _decode_claims(claims, expected.owner)
    finally:
        _overwrite_secrets(claims)


# --- reading, in the order of docs/format.md 5 ---


def _decrypt(token: str, ours: _Recipient, key: RecipientKey) -> bytearray:
    """Rules 1 to 4, outside: the inner JWS."""
    parts = segments(token, 5)
    header = json_object(b64u_decode(parts[0]))
    if header.get("alg") != ours.algorithm or header.get("enc") != _ENCRYPTION:
        raise EnvelopeError("algorithm", f"only {ours.algorithm} with {_ENCRYPTION} is accepted here")
    if header.keys() != ours.members:
        raise EnvelopeError("header", "the outer header has other members than the format's")
    if header["typ"] != _OUTER_TYPE or header["cty"] != "JWT":
        raise EnvelopeError("header", "the outer header is of another type")
    if ours.curve is not None:
        _check_ephemeral_key(header["epk"], ours.curve)
    if header["x5t#S256"] != ours.thumbprint:
        raise EnvelopeError("recipient", "sealed to another certificate")
    opened = None
    # Whatever a broken token, or a key that is not our certificate's, makes of OpenSSL: one answer.
    with contextlib.suppress(Exception):
        if isinstance(key, rsa.RSAPrivateKey):
            opened = decrypt_by_rsa(parts, key)
        else:
            opened = decrypt_by_ec(parts, key, header["epk"])
    if opened is None:
        raise EnvelopeError("decryption", "does not open with the key of our certificate")
    return opened


def _verify(signed: bytearray, expected: Expectation) -> tuple[Signer, dict[str, Any]]:
    """Rules 1 to 4, inside: who signed, and the claims, not yet judged."""
    if len(signed) > MAX_ENVELOPE_BYTES:
        raise EnvelopeError("too-large", f"more than {MAX_ENVELOPE_BYTES} bytes")
    if signed.count(b".") != 2:
        raise EnvelopeError("malformed", "not a compact token of 3 parts")
    first, last = signed.index(b"."), signed.rindex(b".")
    payload = bytearray()
    try:
        with memoryview(signed) as view:
            header_bytes, signature = decode_secret(view[:first]), decode_secret(view[last + 1 :])
            payload = decode_secret(view[first + 1 : last])
            header = json_object(header_bytes)
            if header.get("alg") != _SIGNATURE:
                raise EnvelopeError("algorithm", f"only {_SIGNATURE} signatures are accepted")
            if header.keys() != {"alg", "kid", "typ"}:
                raise EnvelopeError("header", "the inner header has other members than the format's")
            if header["typ"] != _INNER_TYPE:
                raise EnvelopeError("header", "the inner header is of another type")
            signer = expected.signers.get(bytes_member(header, "kid", 32, "header"))
            if signer is None:
                raise EnvelopeError("signer", "signed by none of this tenant's agents")
            by = _check_signer(signer, expected)
            try:
                verify_es256(view[:last], bytes(signature), by.public_key)
            except (InvalidSignature, ValueError):
                raise EnvelopeError("signature", "the signature is not this signer's") from None
        return signer, json_object(payload)
    except FormatError:
        raise EnvelopeError("malformed", "a part is not base64url") from None
    finally:
        payload[:] = bytes(len(payload))


def _overwrite_secrets(claims: dict[str, Any]) -> None:
    """Nothing else holds the parser's strings: the keys that were made of them have copies of their own."""
    items = claims.get("keys")
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and isinstance(text := item.get("km"), str):
            wipe_text(text)


def _check_signer(signer: Signer, expected: Expectation) -> _Signing:
    """The caller verified the chain when it learned of the certificate; that may be long ago."""
    certificate = signer.certificate
    try:
        by = _signing(certificate)
    except (CertificateError, MisuseError):
        raise EnvelopeError("signer", "the signer's certificate is not for signing envelopes") from None
    if by.identity != Identity(expected.owner.tenant, Role.AGENT_SIGNING, signer.agent_id):
        raise EnvelopeError("signer", "the signer's certificate is not that of an agent of this tenant")
    begin_s = certificate.not_valid_before_utc.timestamp()
    if not begin_s <= expected.now_s <= certificate.not_valid_after_utc.timestamp():
        raise EnvelopeError("signer", "the signer's certificate is not valid now")
    return by


def _check_parties(claims: dict[str, Any], ours: _Recipient, signer: Signer, expected: Expectation) -> None:
    """Rule 4, the claims: to us, about us, by whom it says."""
    if claims["x5t#S256"] != ours.thumbprint:
        raise EnvelopeError("recipient", "signed for another certificate")
    if claims["sub"] != str(expected.owner):
        raise EnvelopeError("owner", "about another network service")
    if claims["iss"] != signer.agent_id:
        raise EnvelopeError("signer", "the issuer is not the agent that signed")


def _check_freshness(claims: dict[str, Any], expected: Expectation) -> None:
    """Rule 5. *now_s* is read once, by the caller."""
    now_s = expected.now_s
    issued_at_s, not_before_s, expires_at_s = (integer(claims, name) for name in ("iat", "nbf", "exp"))
    # To take keys back needs no clock that is right: the challenge, below, shows that it was not kept back.
    if not (expected.nonce is not None and claims["op"] == Operation.SET and claims["keys"] == []):
        if issued_at_s > now_s + MAX_AHEAD_S:
            raise EnvelopeError("time", f"issued {issued_at_s - now_s:.0f} s ahead of our clock")
        if not_before_s > now_s:
            raise EnvelopeError("time", "not valid yet")
        if now_s >= expires_at_s:
            raise EnvelopeError("time", f"expired {now_s - expires_at_s:.0f} s ago")
    if not 0 < expires_at_s - issued_at_s <= expected.validity_s:
        raise EnvelopeError(
            "time", f"good for {expires_at_s - issued_at_s} s, not 1 to {expected.validity_s}"
        )
    if claims["aud"] != expected.audience:
        raise EnvelopeError("audience", "meant for another proxy")
    sequence = integer(claims, "seq")
    last = expected.last_sequence
    last_sequence = last if isinstance(last, int) else last.get(claims["iss"], 0)
    nonce = bytes_member(claims, "nonce", NONCE_SIZE, "malformed") if "nonce" in claims else None
    if expected.nonce is None:
        if nonce is not None:
            raise EnvelopeError("nonce", "answers a challenge that is not open")
        if last_sequence <= 0:
            raise EnvelopeError(
                "nonce", "answers no challenge, and none was answered since this proxy started"
            )
    elif nonce is None or not hmac.compare_digest(nonce, expected.nonce):
        raise EnvelopeError("nonce", "does not answer our challenge")
    if not 0 < sequence <= MAX_SEQUENCE:
        raise EnvelopeError("malformed", "the sequence is out of range")
    if sequence <= last_sequence:
        raise EnvelopeError("sequence", f"sequence {sequence} is not above {last_sequence}")
    if bytes_member(claims, "jti", TOKEN_ID_SIZE, "malformed") in expected.seen_token_ids:
        raise EnvelopeError("replay", "seen before")


def _decode_claims(claims: dict[str, Any], owner: NetworkService) -> Claims:
    """Rule 6 and what is left: every key checked, then all of them returned."""
    try:
        operation = Operation(claims["op"])
    except ValueError:
        raise EnvelopeError("malformed", "an unknown operation") from None
    items = claims["keys"]
    if not isinstance(items, list):
        raise EnvelopeError("malformed", "keys are a list")
    keys: list[KeyMaterial] = []
    try:
        for item in items:
            keys.append(_decode_key(item, owner, taken={key.key_id for key in keys}))
    except EnvelopeError:
        for key in keys:
            key.wipe()
        raise
    return Claims(
        issuer=claims["iss"],
        audience=claims["aud"],
        owner=owner,
        issued_at_s=claims["iat"],
        expires_at_s=claims["exp"],
        sequence=claims["seq"],
        token_id=b64u_decode(claims["jti"]),
        nonce=b64u_decode(claims["nonce"]) if "nonce" in claims else None,
        operation=operation,
        keys=tuple(keys),
    )


def _decode_key(item: object, owner: NetworkService, *, taken: Container[KeyId]) -> KeyMaterial:
    if not isinstance(item, dict):
        raise EnvelopeError("malformed", "a key is an object")
    try:
        use, state = KeyUse(item["use"]), KeyState(item["st"])
    except (KeyError, ValueError):
        raise EnvelopeError("malformed", "a key of unknown use or state") from None
    required = {"kid", "use", "ver", "st"} | ({"alg"} if use is KeyUse.SIGN else set())
    if state is KeyState.DESTROYED:
        if not required <= item.keys() <= required | {"kcv"}:
            raise EnvelopeError("malformed", "a destroyed key has other members than the format's")
    elif item.keys() != required | {"km", "kcv"}:
        raise EnvelopeError("malformed", "a key has other members than the format's")
    algorithm = item.get("alg")
    if algorithm is not None and not (isinstance(algorithm, str) and _ALGORITHM.fullmatch(algorithm)):
        raise EnvelopeError("malformed", "a signing key's algorithm is not a name")
    version = integer(item, "ver")
    if not 0 < version <= MAX_KEY_VERSION:
        raise EnvelopeError("malformed", "a key's version is out of range")
    key_id = KeyId(bytes_member(item, "kid", 16, "malformed"))
    if key_id.is_anonymous:
        raise EnvelopeError("malformed", "the anonymous key id names no key")
    if key_id in taken:
        raise EnvelopeError("malformed", "a key id twice")
    key = KeyMaterial(
        owner=owner,
        key_id=key_id,
        state=state,
        use=use,
        algorithm=algorithm,
        version=version,
        secret=secret_member(item, "km") if "km" in item else bytearray(),
    )
    if state is not KeyState.DESTROYED:
        stated = bytes_member(item, "kcv", 16, "malformed")
        try:
            correct = hmac.compare_digest(key_check(key), stated)
        except MisuseError:
            correct = False
        if not correct:
            key.wipe()
            raise EnvelopeError("key-check", f"key {key_id} is not what its check value says")
    return key


def _check_ephemeral_key(epk: object, curve: str) -> None:
    if not isinstance(epk, dict) or epk.keys() != {"kty", "crv", "x", "y"}:
        raise EnvelopeError("header", "the ephemeral key has other members than the format's")
    if epk["kty"] != "EC" or epk["crv"] != curve:
        raise EnvelopeError("header", "the ephemeral key is on another curve than our certificate's")


# --- writing ---


def _encode_claims(claims: Claims, thumbprint: str) -> dict[str, Any]:
    check_name("agent", claims.issuer)
    if not 0 < len(claims.audience) <= _MAX_AUDIENCE:
        raise MisuseError("an audience is the id of a proxy or cluster")
    if not 0 < claims.sequence <= MAX_SEQUENCE:
        raise MisuseError(f"sequence {claims.sequence} is out of range")
    if claims.expires_at_s <= claims.issued_at_s:
        raise MisuseError("an envelope expires after it was issued")
    if len(claims.token_id) != TOKEN_ID_SIZE:
        raise MisuseError(f"a token id has {TOKEN_ID_SIZE} bytes")
    if claims.nonce is not None and len(claims.nonce) != NONCE_SIZE:
        raise MisuseError(f"a nonce has {NONCE_SIZE} bytes")
    if len({key.key_id for key in claims.keys}) != len(claims.keys):
        raise MisuseError("a key id twice in one envelope")
    encoded: dict[str, Any] = {
        "iss": claims.issuer,
        "aud": claims.audience,
        "sub": str(claims.owner),
        "iat": claims.issued_at_s,
        "nbf": claims.issued_at_s - MAX_AHEAD_S,
        "exp": claims.expires_at_s,
        "jti": b64u_encode(claims.token_id),
        "seq": claims.sequence,
        "x5t#S256": thumbprint,
        "op": claims.operation.value,
        "keys": [_encode_key(key, claims.owner) for key in claims.keys],
    }
    if claims.nonce is not None:
        encoded["nonce"] = b64u_encode(claims.nonce)
    return encoded


def _encode_key(key: KeyMaterial, owner: NetworkService) -> dict[str, str | int]:
    if key.owner != owner:
        raise MisuseError(f"a key of {key.owner} in an envelope for {owner}")
    if key.key_id.is_anonymous:
        raise MisuseError("the anonymous key id names no key")
    if not 0 < key.version <= MAX_KEY_VERSION:
        raise MisuseError(f"key version {key.version} is out of range")
    item: dict[str, str | int] = {
        "kid": b64u_encode(key.key_id.raw),
        "use": key.use.value,
        "ver": key.version,
        "st": key.state.value,
    }
    if key.use is KeyUse.SIGN:
        if key.algorithm is None or not _ALGORITHM.fullmatch(key.algorithm):
            raise MisuseError("a signing key names its algorithm")
        item["alg"] = key.algorithm
    elif key.algorithm is not None:
        raise MisuseError("only a signing key names an algorithm")
    if key.state is KeyState.DESTROYED:
        if key.secret:
            raise MisuseError("a destroyed key has no secret")
    else:
        item["kcv"] = b64u_encode(key.verified_kcv or key_check(key))
        item["km"] = ""  # until `_with_secrets`
    return item


def _with_secrets(document: str, keys: Sequence[KeyMaterial]) -> bytearray:
    """*document* with the secrets of *keys* where they belong: the JSON encoder never saw them.

    Inside a string of JSON every quotation mark has a backslash before it, so nothing else looks like _HOLE.
    """
    first, *others = document.encode().split(_HOLE)
    secrets = [encode_secret(key.secret) for key in keys if key.state is not KeyState.DESTROYED]
    parts: list[bytes | bytearray] = [first]
    for secret, other in zip(secrets, others, strict=True):
        parts += (_HOLE[:-1], secret, _HOLE[-1:], other)
    filled = bytearray(sum(map(len, parts)))
    at = 0
    for part in parts:
        filled[at : at + len(part)] = part
        at += len(part)
    for secret in secrets:
        secret[:] = bytes(len(secret))
    return filled


# --- what follows from certificates ---


@functools.lru_cache(maxsize=16384)
def _recipient(certificate: x509.Certificate) -> _Recipient:
    """Cached: an agent seals to the same certificates every few minutes. Holds public data only."""
    try:
        identity = read_identity(certificate)
    except CertificateError as error:
        raise EnvelopeError("recipient", f"not the certificate of a network service: {error}") from error
    thumbprint = b64u_encode(fingerprint(certificate))
    match certificate.public_key():
        case rsa.RSAPublicKey() as public if public.key_size >= 2048:
            return _Recipient(RSA_OAEP_256, None, identity, thumbprint, public)
        case ec.EllipticCurvePublicKey() as public if public.curve.name in _CURVES:
            curve = _CURVES[public.curve.name]
            return _Recipient(ECDH_ES_A256KW, curve, identity, thumbprint, public)
        case _:
            raise EnvelopeError("recipient", "the certificate's key cannot receive key material")


_CURVES: Final = {"secp256r1": "P-256", "secp384r1": "P-384"}


@functools.lru_cache(maxsize=1024)
def _signing(certificate: x509.Certificate) -> _Signing:
    """Cached, as `_recipient`. CertificateError if it states no role, MisuseError if it is not for ES256."""
    public = certificate.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise MisuseError("a signing certificate has a P-256 key")
    return _Signing(read_identity(certificate), b64u_encode(fingerprint(certificate)), public)


@functools.lru_cache(maxsize=4)
def _is_pair(key: ec.EllipticCurvePrivateKey, of: _Signing) -> bool:
    """Cached by identity: comparing two points takes as long as signing. It is one agent's key, or two."""
    return key.public_key() == of.public_key
