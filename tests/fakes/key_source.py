"""A key source in memory that behaves like an HSM: real wrapping, real envelopes, and faults on demand.

The faults are the token's states, set by the test (`destroy`, `disable`, `fail`, `hang`, `spoil`), not
scripted answers: what `diagnose` and `seal_envelopes` say follows from the state, as with the real one.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import override

from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from envelope.derive import ekm_binding
from envelope.errors import MisuseError, SealgateError
from envelope.keys import KeyId, KeyMaterial, KeyState, KeyUse, NetworkService, SigningAlgorithm
from envelope.material import Claims, Operation, key_check, seal_envelope
from key_agent.errors import KeySourceError, UnsupportedError, error_of
from key_agent.sources.envelopes import WrappedKeyError
from key_agent.sources.pace import Pace
from key_agent.sources.parcels import load_transport_key, open_peer_parcel, seal_parcel
from key_agent.sources.signing_keys import SEED_SIZE, is_key_for, make_signing_key
from key_agent.sources.source import (
    Arrival,
    Destination,
    Diagnosis,
    EnvelopeRequest,
    EnvelopeResult,
    Exported,
    Kek,
    KekReference,
    KekType,
    KeySource,
    NewKey,
    Parcel,
    Recipient,
    Rewrapped,
    Route,
    Verdict,
    WrapMethod,
    WrappedKey,
)
from runtime.clock import Clock, SystemClock

SERIAL = "fake-token-0001"


@dataclass
class _TokenKey:
    key: AESGCM
    enabled: bool = True


@dataclass
class FakeKeySource(KeySource):
    """`signing_key` and `signing_certificate` may be left out by tests that never seal."""

    agent_id: str = "agent-1"
    signing_key: ec.EllipticCurvePrivateKey | None = None
    signing_certificate: x509.Certificate | None = None
    clock: Clock = field(default_factory=SystemClock)

    keks: dict[tuple[str, bytes], _TokenKey] = field(default_factory=dict, repr=False)
    backup: dict[tuple[str, bytes], _TokenKey] = field(default_factory=dict, repr=False)
    """Every KEK ever made: what somebody may bring back."""
    calls: list[str] = field(default_factory=list)
    """Names of the methods called, in order."""
    closed: bool = False
    on_call: Callable[[str], None] | None = None
    """Hears of every call before it does anything."""
    indestructible: bool = False
    """The token does not let its keys be destroyed."""
    pace: Pace = field(default_factory=Pace)
    _failure: Diagnosis | None = None
    _hanging: asyncio.Event | None = None
    _spoiled: set[KeyId] = field(default_factory=set)

    # The hand of the enterprise, or of fate.

    def make_key(self, reference: KekReference) -> None:
        """As the HSM's administrator would: a key to be adopted."""
        key = _TokenKey(AESGCM(AESGCM.generate_key(256)))
        self.keks[_name(reference)] = self.backup[_name(reference)] = key

    def destroy(self, kek: Kek) -> None:
        """As another process would: the key is gone from the token."""
        del self.keks[_name(kek.reference)]

    def bring_back(self, kek: Kek) -> None:
        """A backup of the HSM is put in: the KEK is there again."""
        self.keks[_name(kek.reference)] = self.backup[_name(kek.reference)]

    def disable(self, kek: Kek, *, enabled: bool = False) -> None:
        self.keks[_name(kek.reference)].enabled = enabled

    def replace(self, kek: Kek) -> None:
        """Another key under the same name."""
        self.keks[_name(kek.reference)] = _TokenKey(AESGCM(AESGCM.generate_key(256)))

    def fail(self, verdict: Verdict = Verdict.UNREACHABLE, detail: str = "the fake was told to fail") -> None:
        """Every call fails so, until `recover`."""
        self._failure = Diagnosis(verdict, detail)

    def hang(self) -> None:
        """Every call hangs, until `recover`. (The real one would run into its time-out.)"""
        self._hanging = asyncio.Event()

    def recover(self) -> None:
        self._failure = None
        if self._hanging is not None:
            self._hanging.set()
            self._hanging = None

    def spoil(self, key_id: KeyId) -> None:
        """This one wrapped key does not open any more."""
        self._spoiled.add(key_id)

    def unspoil(self, key_id: KeyId) -> None:
        self._spoiled.discard(key_id)

    # The production interface.

    @override
    async def create_kek(
        self,
        reference: KekReference,
        *,
        kek_type: KekType | None = None,
        valid_until_s: int | None = None,
        replace_unfinished: bool = False,
    ) -> Kek:
        await self._enter("create_kek")
        if kek_type not in (None, KekType.AES_256):
            raise UnsupportedError(f"the fake has no KEKs of type {kek_type}")
        if _name(reference) in self.keks and not replace_unfinished:
            raise KeySourceError(f"a key named {reference.label!r} exists in the token")
        self.make_key(reference)
        return self._kek(reference, None, valid_until_s, is_adopted=False)

    @override
    async def adopt_kek(
        self,
        reference: KekReference,
        *,
        kek_type: KekType | None = None,
        valid_from_s: int | None = None,
        valid_until_s: int | None = None,
    ) -> Kek:
        await self._enter("adopt_kek")
        if kek_type not in (None, KekType.AES_256) or _name(reference) not in self.keks:
            raise UnsupportedError(f"no key {reference.label!r} of that type in the token")
        return self._kek(reference, valid_from_s, valid_until_s, is_adopted=True)

    def _kek(
        self,
        reference: KekReference,
        valid_from_s: int | None,
        valid_until_s: int | None,
        *,
        is_adopted: bool,
    ) -> Kek:
        key = self.keks[_name(reference)].key
        canary, iv = os.urandom(32), os.urandom(12)
        return Kek(
            reference=reference,
            method=WrapMethod.GCM,
            token_serial=SERIAL,
            canary_ciphertext=iv + key.encrypt(iv, canary, b"canary"),
            canary_sha256=sha256(canary).digest(),
            created_at_ms=int(self.clock.wall_s() * 1000),
            valid_from_s=valid_from_s,
            valid_until_s=valid_until_s,
            is_adopted=is_adopted,
        )

    @override
    async def destroy_kek(self, kek: Kek) -> None:
        await self._enter("destroy_kek")
        if self.indestructible:
            raise KeySourceError("the token does not let its keys be destroyed")
        self.keks.pop(_name(kek.reference), None)

    @override
    async def set_kek_enabled(self, kek: Kek, *, enabled: bool) -> None:
        await self._enter("set_kek_enabled")
        if _name(kek.reference) not in self.keks:
            raise error_of(self._state(kek))
        self.disable(kek, enabled=enabled)

    @override
    async def generate(self, kek: Kek, wanted: Sequence[NewKey]) -> list[WrappedKey]:
        await self._enter("generate")
        key = self._usable(kek)
        return [self._make(kek, key, new) for new in wanted]

    @override
    async def rewrap(self, old: Kek, new: Kek, keys: Sequence[WrappedKey]) -> Rewrapped:
        await self._enter("rewrap")
        opening, sealing = self._usable(old), self._usable(new)
        made: list[WrappedKey] = []
        failed: dict[KeyId, str] = {}
        for row in keys:
            material = self._unwrap(old, opening, row.owner, row)
            if material is None:
                failed[row.key_id] = "does not open"
            else:
                made.append(self._wrap(new, sealing, row, material))
        return Rewrapped(keys=tuple(made), failed_keys=failed)

    @override
    async def export_keys(
        self, kek: Kek, keys: Sequence[WrappedKey], destinations: Sequence[Destination]
    ) -> Exported:
        await self._enter("export_keys")
        opening = self._usable(kek)
        parcels: list[Parcel] = []
        failed: dict[KeyId, str] = {}
        for row in keys:
            material = self._unwrap(kek, opening, row.owner, row)
            if material is None:
                failed[row.key_id] = "does not open"
            else:
                parcels += [seal_parcel(material, row, to, os.urandom(32)) for to in destinations]
        return Exported(parcels=tuple(parcels), failed_keys=failed)

    @override
    async def import_keys(
        self, kek: Kek, arrivals: Sequence[Arrival], *, transport_key_file: Path
    ) -> Rewrapped:
        await self._enter("import_keys")
        sealing, transport_key = self._usable(kek), load_transport_key(transport_key_file)
        made: list[WrappedKey] = []
        failed: dict[KeyId, str] = {}
        for arrival in arrivals:
            try:
                made.append(self._take(kek, sealing, arrival, transport_key))
            except WrappedKeyError as error:
                failed[arrival.parcel.key_id] = str(error)
        return Rewrapped(keys=tuple(made), failed_keys=failed)

    def _take(
        self, kek: Kek, key: AESGCM, arrival: Arrival, transport_key: ec.EllipticCurvePrivateKey
    ) -> WrappedKey:
        parcel, place = arrival.parcel, kek.reference
        if (parcel.kek_id, parcel.environment_id) != (place.kek_id, place.environment_id):
            raise WrappedKeyError("is for another place")
        if parcel.route is not Route.PEER:
            raise WrappedKeyError("is sealed to a public key")
        material = open_peer_parcel(parcel, transport_key)
        row = WrappedKey(
            owner=parcel.owner,
            key_id=parcel.key_id,
            kek_id="",
            environment_id="",
            method=kek.method,
            wrapped=b"",
            kcv=arrival.kcv,
            token_serial=SERIAL,
            created_at_ms=0,
            use=arrival.use,
            algorithm=arrival.algorithm,
            version=arrival.version,
        )
        if key_check(_material(row, KeyState.ACTIVE, material)) != arrival.kcv:
            raise WrappedKeyError("the key check value differs")
        return self._wrap(kek, key, row, material)

    @override
    async def seal_envelopes(self, kek: Kek, requests: Sequence[EnvelopeRequest]) -> list[EnvelopeResult]:
        await self._enter("seal_envelopes")
        key = self._usable(kek)
        return [self._seal(kek, key, request) for request in requests]

    @override
    async def diagnose(self, kek: Kek) -> Diagnosis:
        try:
            await self._enter("diagnose")
        except KeySourceError as error:
            return error.diagnosis
        return self._state(kek)

    @override
    async def describe(self) -> dict[str, object]:
        await self._enter("describe")
        return {"module": "fake", "token": {"label": "fake", "serial": SERIAL}, "methods": {"gcm": "ok"}}

    @override
    async def close(self) -> None:
        self.closed = True

    async def _enter(self, name: str) -> None:
        self.calls.append(name)
        if self.on_call is not None:
            self.on_call(name)
        if self._hanging is not None:
            await self._hanging.wait()
        if self._failure is not None:
            raise error_of(self._failure)

    def _state(self, kek: Kek) -> Diagnosis:
        now_s = self.clock.wall_s()
        if kek.valid_until_s is not None and now_s >= kek.valid_until_s:
            return Diagnosis(Verdict.KEK_EXPIRED, "the KEK has ended")
        if kek.valid_from_s is not None and now_s < kek.valid_from_s:
            return Diagnosis(Verdict.KEK_EXPIRED, "the KEK has not begun")
        held = self.keks.get(_name(kek.reference))
        if held is None:
            return Diagnosis(Verdict.KEK_DESTROYED, "no KEK of that name, canary key visible")
        if not held.enabled:
            return Diagnosis(Verdict.KEK_DISABLED, "decryption is switched off")
        iv, body = kek.canary_ciphertext[:12], kek.canary_ciphertext[12:]
        try:
            held.key.decrypt(iv, body, b"canary")
        except InvalidTag:
            return Diagnosis(Verdict.KEK_REPLACED, "the canary does not open")
        return Diagnosis(Verdict.OK, "the canary opened")

    def _usable(self, kek: Kek) -> AESGCM:
        found = self._state(kek)
        if found.verdict is not Verdict.OK:
            raise error_of(found)
        return self.keks[_name(kek.reference)].key

    def _make(self, kek: Kek, key: AESGCM, new: NewKey) -> WrappedKey:
        material = os.urandom(32)
        if new.use is KeyUse.SIGN:
            material = make_signing_key(SigningAlgorithm(new.algorithm or ""), os.urandom(SEED_SIZE))
        row = WrappedKey(
            owner=new.owner,
            key_id=KeyId.random(),
            kek_id="",
            environment_id="",
            method=kek.method,
            wrapped=b"",
            kcv=b"",
            token_serial=SERIAL,
            created_at_ms=0,
            use=new.use,
            algorithm=new.algorithm,
        )
        row = replace(row, kcv=key_check(_material(row, KeyState.ACTIVE, material)))
        return self._wrap(kek, key, row, material)

    def _wrap(self, kek: Kek, key: AESGCM, row: WrappedKey, material: bytes) -> WrappedKey:
        iv = os.urandom(12)
        return replace(
            row,
            kek_id=kek.reference.kek_id,
            environment_id=kek.reference.environment_id,
            method=kek.method,
            wrapped=iv + key.encrypt(iv, material, _binding(row.owner, row.key_id, kek)),
            token_serial=SERIAL,
            created_at_ms=int(self.clock.wall_s() * 1000),
        )

    def _unwrap(self, kek: Kek, key: AESGCM, owner: NetworkService, row: WrappedKey) -> bytes | None:
        if row.key_id in self._spoiled or row.owner != owner or row.kek_id != kek.reference.kek_id:
            return None
        try:
            material = key.decrypt(row.wrapped[:12], row.wrapped[12:], _binding(owner, row.key_id, kek))
            if row.use is KeyUse.SIGN and not is_key_for(row.algorithm, material):
                return None
            return material if key_check(_material(row, KeyState.ACTIVE, material)) == row.kcv else None
        except (InvalidTag, MisuseError):
            return None

    def _seal(self, kek: Kek, key: AESGCM, request: EnvelopeRequest) -> EnvelopeResult:
        opened: list[KeyMaterial] = []
        failed_keys: dict[KeyId, str] = {}
        for row, state in request.keys:
            if state is KeyState.DESTROYED:
                opened.append(_material(row, state, b""))
                continue
            material = self._unwrap(kek, key, request.owner, row)
            if material is None:
                failed_keys[row.key_id] = "does not open"
                continue
            opened.append(_material(row, state, material))
        tokens: Mapping[str, str] = {}
        failed_recipients: dict[str, str] = {}
        if any(key.state is not KeyState.DESTROYED for key in opened) or (opened and not failed_keys):
            tokens = self._tokens(request, tuple(opened), failed_recipients)
        return EnvelopeResult(
            owner=request.owner, tokens=tokens, failed_keys=failed_keys, failed_recipients=failed_recipients
        )

    def _tokens(
        self, request: EnvelopeRequest, keys: tuple[KeyMaterial, ...], failed: dict[str, str]
    ) -> dict[str, str]:
        if not request.recipients:
            return {}
        assert self.signing_key is not None
        assert self.signing_certificate is not None
        tokens = {}
        for recipient in request.recipients:
            try:
                tokens[recipient.audience] = seal_envelope(
                    self._claims(request, recipient, keys),
                    recipient=x509.load_der_x509_certificate(recipient.certificate_der),
                    signing_key=self.signing_key,
                    signing_certificate=self.signing_certificate,
                )
            except (ValueError, SealgateError) as error:
                failed[recipient.audience] = f"certificate: {type(error).__name__}"
        return tokens

    def _claims(
        self, request: EnvelopeRequest, recipient: Recipient, keys: tuple[KeyMaterial, ...]
    ) -> Claims:
        return Claims(
            issuer=self.agent_id,
            audience=recipient.audience,
            owner=request.owner,
            issued_at_s=request.issued_at_s,
            expires_at_s=request.expires_at_s,
            sequence=recipient.sequence,
            token_id=os.urandom(16),
            nonce=recipient.nonce,
            operation=Operation.SET,
            keys=keys,
        )


def _name(reference: KekReference) -> tuple[str, bytes]:
    return reference.label, reference.object_id


def _material(row: WrappedKey, state: KeyState, secret: bytes) -> KeyMaterial:
    return KeyMaterial(
        owner=row.owner,
        key_id=row.key_id,
        state=state,
        use=row.use,
        algorithm=row.algorithm,
        version=row.version,
        secret=bytearray(secret),
    )


def _binding(owner: NetworkService, key_id: KeyId, kek: Kek) -> bytes:
    return ekm_binding(
        owner, key_id, kek_id=kek.reference.kek_id, environment_id=kek.reference.environment_id
    )
