"""An envelope on the wire is opened, or refused (docs/format.md, "Key-material envelope").

1. Which network service an envelope is for is looked up by the certificate it names, among the services of
   the tenant whose agent sent it. That is a guess until `open_envelope` has checked everything.
2. Only the connected agent's own envelopes are believed: issuer and TLS identity are one agent of one tenant.
3. Sequence and token ids are remembered per issuer and network service. They count from the moment an
   envelope has verified, before it is installed, so that two connections cannot install out of order.
4. An agent without a session is told to open one (code "nonce"). What came by a broker may answer no
   challenge: then it counts above a sequence that was accepted under one only.
5. Sealed to the certificate that a service had before its renewal, keys count until the agent uses the new
   one, and withdrawals for one validity longer (former.py).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
from cryptography import x509

from envelope.certificates import fingerprint
from envelope.errors import EnvelopeError
from envelope.keys import NetworkService
from envelope.material import Claims, Expectation, Operation, open_envelope, recipient_thumbprint
from proxy.keys.cache import KeyCache
from proxy.keys.former import FormerCertificates
from proxy.keys.sessions import Agent, Sessions, Track
from proxy.tenants.certificates import CredentialError, PrivateKey, read_private_key
from proxy.tenants.model import Directory, Recipient
from runtime.clock import Clock

_log: Final = structlog.get_logger("keys.envelopes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What came at once, and under which session."""

    tenant: str
    agent_id: str
    tokens: Sequence[str]
    session: Agent | None
    """As it was when they came; its tracks are the agent's."""
    is_challenged: bool
    takes_keys: bool


@dataclass(frozen=True, slots=True)
class Addressee:
    """Whom an envelope says it is for."""

    owner: NetworkService
    certificate: x509.Certificate
    find_key: Callable[[], PrivateKey]
    """EnvelopeError `recipient-key`."""
    is_former: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    claims: Claims
    deadline_boot_s: float
    lost_s: float
    """`KeyCache.lost_s` when the deadline was set: a machine may be paused until the keys are installed."""
    track: Track
    is_former: bool = False
    """Sealed to the certificate before the one of today."""

    def wipe(self) -> None:
        for key in self.claims.keys:
            key.wipe()


class EnvelopeOpener:
    """Judges envelopes by the directory, the sessions and the private keys of this proxy."""

    def __init__(
        self,
        *,
        proxy_id: str,
        sessions: Sessions,
        cache: KeyCache,
        clock: Clock,
        validity_s: int,
        directory: Directory,
    ) -> None:
        self._proxy_id = proxy_id
        self._sessions = sessions
        self._cache = cache
        self._clock = clock
        self._validity_s = validity_s
        self._directory = directory
        self._recipient_keys: dict[bytes, PrivateKey] = {}
        self._former = FormerCertificates(clock, validity_s=validity_s)

    def apply(self, directory: Directory, *, gone: frozenset[NetworkService]) -> None:
        """Take over a new picture of the directory: nothing counts for *gone*, rule 5 for the renewed."""
        before, self._directory = self._directory, directory
        for owner in before.recipients:
            if owner in gone:
                self._former.forget(owner)
            else:
                self._keep_former(before.recipients[owner], directory.recipients[owner])
        used = {
            fingerprint(entry.certificate) for entry in directory.recipients.values() if entry.certificate
        }
        self._recipient_keys = {name: key for name, key in self._recipient_keys.items() if name in used}

    def addressee(self, tenant: str, token: str) -> Addressee:
        """Rule 1. EnvelopeError "recipient", or that *token* is no envelope."""
        thumbprint = recipient_thumbprint(token)
        entry = self._directory.recipient_of_certificate(thumbprint)
        # Another tenant's service is answered as one that does not exist.
        if entry is not None and entry.owner.tenant == tenant and entry.certificate is not None:
            return Addressee(
                entry.owner,
                entry.certificate,
                functools.partial(self._recipient_key, entry, entry.certificate),
            )
        former = self._former.find(thumbprint)
        if former is not None and former.owner.tenant == tenant:
            return Addressee(former.owner, former.certificate, lambda: former.key, is_former=True)
        raise EnvelopeError(
            "recipient", "none of your network services here has the certificate it is sealed to"
        )

    def open(self, recipient: Addressee, token: str, batch: Batch) -> Opened:
        """EnvelopeError if *token* does not hold: by code, its session, its address or itself."""
        owner, agent = recipient.owner, batch.session
        if agent is None:
            raise EnvelopeError("nonce", "no session is open here: ask for a challenge first")
        track = agent.tracks.setdefault(owner, Track(self._clock))
        self._cache.take_off_lost_time()
        received_boot_s, now_s = self._clock.boot_s(), self._clock.wall_s()
        claims = open_envelope(
            token,
            Expectation(
                owner=owner,
                audience=self._proxy_id,
                recipient_certificate=recipient.certificate,
                recipient_key=recipient.find_key(),
                signers=self._sessions.signers(owner.tenant, batch.agent_id, agent),
                now_s=now_s,
                validity_s=self._validity_s,
                nonce=agent.challenge if batch.is_challenged else None,
                last_sequence=track.highest,
                seen_token_ids=track.live_tokens,
            ),
        )
        is_replaced = recipient.is_former and not self._former.takes_keys(fingerprint(recipient.certificate))
        if (is_replaced or not batch.takes_keys) and not withdraws(claims):
            for key in claims.keys:
                key.wipe()
            if is_replaced:
                raise EnvelopeError(
                    "recipient", "the certificate it is sealed to was replaced: withdrawals only"
                )
            raise EnvelopeError("purpose", "it came as a withdrawal and is none")
        # The wall clock may be set back: it never adds to the validity.
        valid_for_s = max(0.0, min(claims.expires_at_s - now_s, self._validity_s))
        track.highest = claims.sequence
        track.live_tokens[claims.token_id] = received_boot_s + valid_for_s
        return Opened(
            claims=claims,
            deadline_boot_s=received_boot_s + valid_for_s,
            lost_s=self._cache.lost_s,
            track=track,
            is_former=recipient.is_former,
        )

    def installed(self, opened: Opened) -> None:
        """Its keys are in force: the agent has heard of the certificate that it is sealed to."""
        if not opened.is_former:
            self._former.supersede(opened.claims.owner)

    def _recipient_key(self, entry: Recipient, certificate: x509.Certificate) -> PrivateKey:
        name = fingerprint(certificate)
        key = self._recipient_keys.get(name)
        if key is None:
            try:
                key = read_private_key(entry.key_file)
            except CredentialError as error:
                _log.exception("private key unusable", service=str(entry.owner), reason=str(error))
                raise EnvelopeError(
                    "recipient-key", "the proxy cannot use its private key for this service"
                ) from None
            if key.public_key() != certificate.public_key():
                raise EnvelopeError(
                    "recipient-key", "the proxy's private key is not the one of its certificate"
                )
            self._recipient_keys[name] = key
        return key

    def _keep_former(self, before: Recipient, now: Recipient) -> None:
        """Rule 5, if *before* was renewed and its private key is in memory, or still in its file."""
        if before.certificate is None or before.certificate == now.certificate:
            return
        try:
            key = self._recipient_key(before, before.certificate)
        except EnvelopeError:  # never used, and gone: then no keys were pushed under it either
            return
        self._former.keep(before.owner, before.certificate, key)


def withdraws(claims: Claims) -> bool:
    return claims.operation is Operation.SET and not claims.keys
