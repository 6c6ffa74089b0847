"""Key material inside a worker, whatever it came from: checked, put into envelopes, wiped.

1. KM leaves these functions only encrypted to a recipient's certificate.
2. One bad wrapped key or recipient never spoils the others: such failures are values.
3. Of an error only its class is repeated: a text of a library that has held KM may hold some.
"""

import hmac
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from envelope.derive import ekm_binding, lp
from envelope.errors import MisuseError, SealgateError
from envelope.keys import KeyId, KeyMaterial, KeyState, KeyUse, NetworkService
from envelope.material import Claims, Operation, key_check, seal_envelope
from key_agent.errors import KeySourceError
from key_agent.sources.signing_keys import is_key_for
from key_agent.sources.source import EnvelopeRequest, Kek, KekReference, Recipient, WrappedKey
from key_agent.sources.wire import SealedEnvelopes

TOKEN_ID_SIZE: Final = 16


class WrappedKeyError(Exception):
    """This one wrapped key does not open although the KEK is sound. The text says why, for people."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Signer:
    """The agent's signing identity."""

    agent_id: str
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def load(cls, agent_id: str, key_file: Path, certificate_file: Path) -> "Signer":
        """KeySourceError if a file cannot be read, the key is no EC key, or the certificate is not its."""
        try:
            key = load_pem_private_key(key_file.read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        except (OSError, ValueError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            raise KeySourceError(
                f"signing key {key_file} or certificate {certificate_file}: {reason}"
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise KeySourceError(f"{certificate_file} is not the certificate of the EC key in {key_file}")
        return cls(agent_id=agent_id, key=key, certificate=certificate)


class Opener(Protocol):
    """What opens wrapped keys under one KEK."""

    def open(self, owner: NetworkService, row: WrappedKey, state: KeyState) -> KeyMaterial:
        """WrappedKeyError: this one is bad. KeySourceError: nothing can be opened."""


def seal_request(opener: Opener, signer: Signer, request: EnvelopeRequest) -> SealedEnvelopes:
    """One `EnvelopeRequest` answered. KeySourceError: nothing can be opened."""
    keys: list[KeyMaterial] = []
    failed_keys: list[tuple[KeyId, str]] = []
    tokens: list[tuple[str, str]] = []
    failed_recipients: list[tuple[str, str]] = []
    try:
        for row, state in request.keys:
            try:
                keys.append(opener.open(request.owner, row, state))
            except WrappedKeyError as error:
                failed_keys.append((row.key_id, str(error)))
        # No keys: an empty `set` would be the revoke message (docs/format.md 5). Tombstones alone would take
        # the others back as well: so they travel alone only where there is nothing else.
        has_any = any(key.state is not KeyState.DESTROYED for key in keys) or (keys and not failed_keys)
        for recipient in request.recipients if has_any else ():
            try:
                tokens.append((recipient.audience, _seal_one(signer, request, recipient, tuple(keys))))
            except (ValueError, TypeError, SealgateError) as error:
                # Of the error only its class: a text of a library that has held KM is not repeated.
                failed_recipients.append(
                    (recipient.audience, f"cannot seal to its certificate ({type(error).__name__})")
                )
    finally:
        for key in keys:
            key.wipe()
    return SealedEnvelopes(
        owner=request.owner,
        tokens=tuple(tokens),
        failed_keys=tuple(failed_keys),
        failed_recipients=tuple(failed_recipients),
    )


def _seal_one(
    signer: Signer, request: EnvelopeRequest, recipient: Recipient, keys: tuple[KeyMaterial, ...]
) -> str:
    claims = Claims(
        issuer=signer.agent_id,
        audience=recipient.audience,
        owner=request.owner,
        issued_at_s=request.issued_at_s,
        expires_at_s=request.expires_at_s,
        sequence=recipient.sequence,
        token_id=os.urandom(TOKEN_ID_SIZE),
        nonce=recipient.nonce,
        operation=Operation.SET,
        keys=keys,
    )
    return seal_envelope(
        claims,
        recipient=x509.load_der_x509_certificate(recipient.certificate_der),
        signing_key=signer.key,
        signing_certificate=signer.certificate,
    )


def material_of(row: WrappedKey, state: KeyState, secret: bytes, *, is_verified: bool = False) -> KeyMaterial:
    """*row* with a copy of its *secret*; both copies are the caller's to wipe.

    *is_verified*: `is_sound` has just said so.
    """
    return KeyMaterial(
        owner=row.owner,
        key_id=row.key_id,
        state=state,
        use=row.use,
        algorithm=row.algorithm,
        version=row.version,
        secret=bytearray(secret),
        verified_kcv=row.kcv if is_verified else None,
    )


def check_value(material: bytes, row: WrappedKey) -> bytes:
    """The kcv of *material* as *row*'s key, 16 bytes. MisuseError for zeros."""
    key = material_of(row, KeyState.ACTIVE, material)
    try:
        return key_check(key)
    finally:
        key.wipe()


def is_sound(material: bytes, row: WrappedKey) -> bool:
    """The kcv fits, and a signing key is of its algorithm's kind."""
    if row.use is KeyUse.SIGN and not is_key_for(row.algorithm, material):
        return False
    try:
        return hmac.compare_digest(check_value(material, row), row.kcv)
    except MisuseError:
        return False


def binding_under(owner: NetworkService, key_id: KeyId, kek: Kek) -> bytes:
    """To which an EKM is bound (docs/format.md 6.1)."""
    return ekm_binding(
        owner, key_id, kek_id=kek.reference.kek_id, environment_id=kek.reference.environment_id
    )


def canary_binding(reference: KekReference) -> bytes:
    """The canary is bound like a wrapped key, under a label that no wrapped key has."""
    return lp(b"sealgate/v1 canary") + lp(reference.kek_id.encode()) + lp(reference.environment_id.encode())
