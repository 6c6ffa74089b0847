"""What an agent tells another one of where it stands, signed: the answer to one question, good for it alone.

1. A heartbeat answers a challenge. Only the answer to an own question counts, and from the moment the
   question was *sent*: it was made after that, however long it travelled. What comes unasked proves nothing.
2. It is signed with the registry key that the members pinned when its environment joined: a TLS certificate
   alone makes nobody an environment.
3. `proven_ago_s` says since when its sender has no proof of its own (registry_lease.py): nobody lends another
   more trust than it has.
"""

import os
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from envelope.errors import IntegrityError

CHALLENGE_SIZE: Final = 16
_DOMAIN: Final = b"sealgate/v1 heartbeat\x00"

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=63)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Hex = Annotated[str, msgspec.Meta(pattern="^(?:[0-9a-f]{2}){0,64}$")]


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where do you stand? And, as a hint that proves nothing: where the asker does."""

    environment: _Name
    challenge: _Hex
    """CHALLENGE_SIZE bytes."""
    term: _Number
    epoch: _Number


class Heartbeat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where an environment's agent stands."""

    tenant: _Name
    environment: _Name
    agent: _Name
    term: _Number
    epoch: _Number
    digest: _Hex
    """Of all shared rows as it has them."""
    head: _Hex = ""
    """The signature of the term's holder under term, epoch and digest: who has heard of that term can tell a
    claim from a lie.
    """
    state: _Name
    """Of its environment, as it acts on it: `healing` too when its lease is over."""
    proven_ago_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None
    """Rule 3; None: it has no proof at all."""
    challenge: _Hex
    signature: _Hex = "00"


def new_challenge() -> str:
    return os.urandom(CHALLENGE_SIZE).hex()


def sign_heartbeat(unsigned: Heartbeat, key: Ed25519PrivateKey) -> Heartbeat:
    return msgspec.structs.replace(unsigned, signature=key.sign(_signed_bytes(unsigned)).hex())


def check_heartbeat(
    found: Heartbeat, key: Ed25519PublicKey, *, tenant: str, environment: str, agent: str, challenge: str
) -> None:
    """IntegrityError unless *found* is *environment*'s answer to *challenge*, signed with its key."""
    try:
        key.verify(bytes.fromhex(found.signature), _signed_bytes(found))
    except (InvalidSignature, ValueError):
        raise IntegrityError(f"a heartbeat of {environment} is not signed with its registry key") from None
    if (found.tenant, found.environment, found.agent) != (tenant, environment, agent):
        raise IntegrityError(
            f"a heartbeat speaks for {found.environment} and agent {found.agent}, "
            f"not for {environment} and agent {agent}"
        )
    if found.challenge != challenge:
        raise IntegrityError(f"a heartbeat of {environment} answers another question")


def _signed_bytes(found: Heartbeat) -> bytes:
    return _DOMAIN + msgspec.json.encode(msgspec.structs.replace(found, signature="00"), order="sorted")
