"""Ciphertexts that name the key which has made them, or none: sealed objects (docs/format.md 2).

1. A ciphertext that names its key is opened by that key alone, whichever environment it belongs to.
2. One that names none is opened by the key that the caller names, else by one of the ring's that the caller
   names, else by any of the tenant's that the credential is for. Never a key of another tenant's, never one
   whose state forbids it, never more than the tenant's `max_try_all`.
3. Keys are compared with the ciphertext's commitment, all of them, in constant time; the one that matches
   opens the body. No tag is ever tried: AES-GCM does not commit to its key.
4. A trial is paid for and recorded by the number of keys tried, whatever came of it.
5. While a key that it may have been made by is not here at the moment, the answer is "later", not "no".
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn

from envelope.errors import FormatError, IntegrityError, KeyUnavailableError
from envelope.keys import ANONYMOUS, KeyId, KeyUse, NetworkService
from envelope.objects import Bind, Candidate, Header, Opener, Sealer
from proxy.encryption_service.access import Caller
from proxy.encryption_service.core import MAX_PLAINTEXT_BYTES, Core, Ticket
from proxy.encryption_service.dialects import native_bodies as bodies
from proxy.encryption_service.dialects.bearer import BearerCalls, Work
from proxy.encryption_service.dialects.native_errors import TOO_MANY_KEYS, RefusedError
from proxy.encryption_service.errors import (
    AccessDenied,
    DoesNotVerify,
    InputRefused,
    KeyNotFound,
    KeyRefused,
    Refusal,
    Revoked,
    ServiceError,
    Stale,
    TooLarge,
    UsageRefused,
    Withdrawn,
)
from proxy.encryption_service.model import NamedKey, Op
from proxy.keys.data_key import DataKey

MAX_AAD_BYTES: Final = 0xFFFF
KEYS_PER_UNIT: Final = 8
"""So many keys tried cost as much as a call (rule 4)."""


_NOBODY: Final = NetworkService("nobody", "nothing")


class _Tried(NamedTuple):
    ticket: Ticket
    key: DataKey


class NativeObjects:
    """`encrypt` and `decrypt` of a tenant, without a key in the path."""

    def __init__(self, calls: BearerCalls) -> None:
        self._calls = calls
        self._core: Core = calls.core

    def encrypt(
        self, work: Work, caller: Caller, asked: bodies.TenantEncryptRequest
    ) -> bodies.TenantEncrypted:
        """As `Core.object_key` for the active key. InputRefused, TooLarge."""
        bind = _bind(asked.aad)
        if len(asked.plaintext) > MAX_PLAINTEXT_BYTES:
            raise TooLarge(f"a plaintext has at most {MAX_PLAINTEXT_BYTES} bytes")
        ticket = self._calls.admit(work, caller, asked.key, Op.ENCRYPT)
        key = self._core.object_key(ticket)
        work.used(key.version, key.key_id)
        object_key = key.anonymous_object_key if asked.anonymous else key.object_key
        sealer = Sealer(
            object_key, key.owner, ANONYMOUS if asked.anonymous else key.key_id, bind=bind, name=asked.aad
        )
        sealed = sealer.update(asked.plaintext)
        sealed += sealer.finalize()
        self._calls.finish(work, ticket)
        return bodies.TenantEncrypted(
            key=ticket.key.name, version=key.version, key_id=str(key.key_id), ciphertext=bytes(sealed)
        )

    def decrypt(
        self, work: Work, caller: Caller, asked: bodies.TenantDecryptRequest, *, max_tried: int
    ) -> bodies.TenantDecrypted:
        """DoesNotVerify; KeyNotFound, KeyRefused, Revoked, Stale, AccessDenied, QuotaExceeded, InputRefused.

        RefusedError (TOO_MANY_KEYS) if none of *max_tried* keys fits and there are more.
        """
        bind = _bind(asked.aad)
        try:
            header = Header.parse(asked.ciphertext)
        except (FormatError, IntegrityError):
            raise DoesNotVerify from None
        rings = self._rings(work, caller, asked.ring)
        named = None if asked.key_id is None else KeyId.parse(asked.key_id)
        if not header.key_id.is_anonymous:
            if named is not None and named != header.key_id:
                raise DoesNotVerify
            named = header.key_id
        if named is None:
            return self._by_trial(work, caller, asked, rings, max_tried)
        ticket, key = self._named(work, caller, rings, named)
        try:
            candidate = Candidate(key.owner, key.anonymous_object_key)
            opener = Opener(
                key.owner, lambda _: key.object_key, bind=bind, name=asked.aad, candidates=lambda: [candidate]
            )
            plaintext = _opened(opener, asked.ciphertext)
        except KeyUnavailableError as error:  # between two looks; the second says it in the service's words
            self._core.confirm(ticket)
            raise DoesNotVerify from error
        self._calls.finish(work, ticket)
        return _decrypted(ticket, key, plaintext, tried=0)

    def _by_trial(
        self,
        work: Work,
        caller: Caller,
        asked: bodies.TenantDecryptRequest,
        rings: Sequence[NamedKey],
        max_tried: int,
    ) -> bodies.TenantDecrypted:
        found, unsure = self._candidates(caller, rings)
        chosen = found[:max_tried]
        work.detail["tried"] = str(len(chosen))
        self._calls.admit_more(caller, len(chosen) // KEYS_PER_UNIT)
        tried, candidates = [], []
        for one in chosen:
            try:
                candidates.append(Candidate(one.key.owner, one.key.anonymous_object_key))
                tried.append(one)
            except KeyUnavailableError:  # its time was over between the two looks
                unsure = unsure or Stale("no valid key is here at the moment")
        opener = Opener(
            rings[0].owner if rings else _NOBODY,
            _no_name,
            bind=_bind(asked.aad),
            name=asked.aad,
            candidates=lambda: candidates,
        )
        try:
            plaintext = _opened(opener, asked.ciphertext)
        except DoesNotVerify:
            if opener.matched is not None:
                self._matched(work, tried[opener.matched])
                raise
            if unsure is not None:
                raise unsure from None
            if len(found) > len(chosen):
                raise RefusedError(TOO_MANY_KEYS) from None
            raise
        if opener.matched is None:
            raise DoesNotVerify
        ticket, key = self._matched(work, tried[opener.matched])
        self._calls.finish(work, ticket)
        return _decrypted(ticket, key, plaintext, tried=len(tried))

    def _matched(self, work: Work, one: _Tried) -> _Tried:
        work.key, work.named_key = one.ticket.key.name, one.ticket.key
        work.used(one.key.version, one.key.key_id)
        self._core.opened_by(one.ticket, one.key)
        return one

    def _candidates(
        self, caller: Caller, rings: Sequence[NamedKey]
    ) -> tuple[list[_Tried], ServiceError | None]:
        """Rule 2, active keys first, then the newest; and why others could not be looked at (rule 5)."""
        found: list[_Tried] = []
        unsure: ServiceError | None = None
        revoked = 0
        for ring in rings:
            try:
                ticket = self._core.admit(caller, ring, Op.DECRYPT)
            except Withdrawn:
                raise
            except Stale as error:
                unsure = error
            except Revoked as error:
                revoked += 1
                if revoked == len(rings):
                    raise error from None
            except (AccessDenied, KeyNotFound, KeyRefused, UsageRefused) as error:
                if len(rings) == 1:  # the caller named it
                    raise error from None
            else:
                found += [_Tried(ticket, key) for key in self._core.candidates(ticket)]
        found.sort(key=lambda one: (not one.key.state.may_seal, -one.key.version))
        return found, unsure

    def _rings(self, work: Work, caller: Caller, ring: str | None) -> list[NamedKey]:
        """What the caller named, or all data keys that the credential is for. KeyNotFound, AccessDenied."""
        if ring is not None:
            return [self._calls.describable(work, caller, ring)]
        return [key for key in self._calls.reachable(caller) if key.use is KeyUse.DATA]

    def _named(self, work: Work, caller: Caller, rings: Sequence[NamedKey], key_id: KeyId) -> _Tried:
        work.key_id = key_id
        ring = self._core.states.holder_of(caller.tenant, rings, key_id)
        work.key, work.named_key = ring.name, ring
        try:
            ticket = self._core.admit(caller, ring, Op.DECRYPT)
        except KeyNotFound:  # it is there, so this says that none of its versions lives
            raise KeyRefused(Refusal.DESTROYED, "this key was destroyed") from None
        key = self._core.object_key(ticket, key_id)
        work.used(key.version, key.key_id)
        return _Tried(ticket, key)


def _opened(opener: Opener, ciphertext: bytes) -> bytes:
    try:
        plaintext = opener.update(ciphertext)
        plaintext += opener.finalize()
    except (FormatError, IntegrityError):
        raise DoesNotVerify from None
    return bytes(plaintext)


def _decrypted(ticket: Ticket, key: DataKey, plaintext: bytes, *, tried: int) -> bodies.TenantDecrypted:
    return bodies.TenantDecrypted(
        key=ticket.key.name,
        version=key.version,
        key_id=str(key.key_id),
        candidates=tried,
        plaintext=plaintext,
    )


def _bind(aad: bytes) -> Bind:
    if len(aad) > MAX_AAD_BYTES:
        raise InputRefused(f"an aad has at most {MAX_AAD_BYTES} bytes here")
    return Bind.CALLER if aad else Bind.NOTHING


def _no_name(header: Header) -> NoReturn:
    raise AssertionError(f"asked for {header}, which names no key")
