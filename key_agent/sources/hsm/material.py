"""Key material inside the worker: generated, wrapped, opened, put into envelopes, wiped.

1. KM leaves these functions only wrapped by the KEK or encrypted to a recipient's certificate.
2. The KEK is searched once per call and never kept. After an error the session is thrown away.
3. The first wrapped key that fails costs one look at the KEK; only if the KEK is sound is the wrapped key
   to blame.
4. A call stops when its budget is used up and answers for what is done: the KEK watch shares this worker.
"""

import hmac
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from pkcs11 import PKCS11Error

from envelope.keys import (
    KEY_MATERIAL_SIZE,
    KeyId,
    KeyMaterial,
    KeyState,
    KeyUse,
    NetworkService,
    SigningAlgorithm,
)
from envelope.memory import wipe
from key_agent.errors import KeySourceError, UnsupportedError, error_of
from key_agent.sources.envelopes import (
    Signer,
    WrappedKeyError,
    binding_under,
    check_value,
    is_sound,
    material_of,
    seal_request,
)
from key_agent.sources.hsm.diagnosis import diagnose, usable_kek
from key_agent.sources.hsm.hybrid_wrapping import HybridWrapping
from key_agent.sources.hsm.methods import wrapping_of
from key_agent.sources.hsm.session import Token
from key_agent.sources.hsm.wrapping import KekObjects, Wrapping, WrongBindingError, random_bytes
from key_agent.sources.hybrid import CONTENT_KEY_SIZE
from key_agent.sources.parcels import open_peer_parcel, parcel_binding, seal_parcel
from key_agent.sources.signing_keys import SEED_SIZE, der_size, make_signing_key
from key_agent.sources.source import (
    Arrival,
    Destination,
    EnvelopeRequest,
    Kek,
    NewKey,
    Parcel,
    Route,
    WrappedKey,
)
from key_agent.sources.verdict import Verdict
from key_agent.sources.wire import SealedEnvelopes

TOKEN_ID_SIZE: Final = 16


def generate(
    token: Token, kek: Kek, wanted: Sequence[NewKey], *, now_ms: int, budget_s: float
) -> tuple[WrappedKey, ...]:
    """The first keys of *wanted*, as many as fit the budget, at least one."""
    key = usable_kek(token, kek, now_s=now_ms / 1000)
    deadline = time.monotonic() + budget_s
    made: list[WrappedKey] = []
    for new in wanted:
        made.append(_generate_one(token, kek, key, new, now_ms))
        if time.monotonic() >= deadline:
            break
    return tuple(made)


def _generate_one(token: Token, kek: Kek, key: KekObjects, new: NewKey, now_ms: int) -> WrappedKey:
    material = _new_material(token.session(serial=kek.token_serial), new)
    row = WrappedKey(
        owner=new.owner,
        key_id=KeyId.random(),
        kek_id=kek.reference.kek_id,
        environment_id=kek.reference.environment_id,
        method=kek.method,
        wrapped=b"",
        kcv=b"",
        token_serial=kek.token_serial,
        created_at_ms=now_ms,
        use=new.use,
        algorithm=new.algorithm,
    )
    try:
        # A dead generator's zeros are refused here (envelope/derive.py, rule 3).
        row = replace(row, kcv=check_value(material, row))
        return _wrap(token, kek, key, material, row, now_ms=now_ms)
    except PKCS11Error as error:
        if len(material) == KEY_MATERIAL_SIZE:
            raise
        # The KEK has just opened its canary. Some tokens wrap no long keys (NSS: 256 bytes).
        raise UnsupportedError(
            f"the token does not wrap {len(material)} bytes by {kek.method} ({type(error).__name__}): "
            "choose an algorithm with shorter keys, such as ES256, or a KEK of another method"
        ) from None
    finally:
        wipe(material)


def _new_material(session: Any, new: NewKey) -> bytes:
    if new.use is KeyUse.DATA:
        return random_bytes(session, KEY_MATERIAL_SIZE)
    seed = random_bytes(session, SEED_SIZE)
    try:
        return make_signing_key(SigningAlgorithm(new.algorithm or ""), seed)
    finally:
        wipe(seed)


def _wrap(
    token: Token, kek: Kek, key: KekObjects, material: bytes, row: WrappedKey, *, now_ms: int
) -> WrappedKey:
    """*row* with *material* under *kek*: sealed, opened again, compared. The caller wipes *material*."""
    session = token.session(serial=kek.token_serial)
    wrapping = wrapping_of(kek.method, token.quirks.mechanisms)
    binding = binding_under(row.owner, row.key_id, kek)
    wrapped = wrapping.seal(session, key, material, binding)
    sizes = wrapping.sealed_sizes(len(material))
    if len(wrapped) not in sizes:
        raise KeySourceError(f"the token wrapped to {len(wrapped)} bytes, not {sizes}")
    try:
        opened = _without_padding(wrapping.open(session, key, wrapped, binding), wrapping, row.use)
    except WrappedKeyError:
        same = False
    else:
        try:
            same = hmac.compare_digest(opened, material) and is_sound(opened, row)
        finally:
            wipe(opened)
    if not same:
        raise KeySourceError("a key did not come back from its wrapping as it went in")
    return replace(
        row,
        kek_id=kek.reference.kek_id,
        environment_id=kek.reference.environment_id,
        method=kek.method,
        wrapped=wrapped,
        token_serial=kek.token_serial,
        created_at_ms=now_ms,
    )


def rewrap(
    token: Token, old: Kek, new: Kek, keys: Sequence[WrappedKey], *, now_ms: int, budget_s: float
) -> tuple[tuple[WrappedKey, ...], tuple[tuple[KeyId, str], ...]]:
    """The first *keys*, as many as fit the budget, at least one: those under *new*, and those that failed.

    First all are opened, then all sealed: the KEKs may be in two tokens, and a session is in one.
    """
    now_s = now_ms / 1000
    opened: list[tuple[WrappedKey, bytes]] = []
    failed: list[tuple[KeyId, str]] = []
    try:
        opener = _Opener(token, old, now_s=now_s)
        deadline = time.monotonic() + budget_s / 2
        for row in keys:
            try:
                opened.append((row, opener.reveal(row.owner, row)))
            except WrappedKeyError as error:
                failed.append((row.key_id, str(error)))
            if time.monotonic() >= deadline:
                break
        key = usable_kek(token, new, now_s=now_s)
        made = tuple(_wrap(token, new, key, material, row, now_ms=now_ms) for row, material in opened)
    finally:
        for _, material in opened:
            wipe(material)
    return made, tuple(failed)


def export_keys(
    token: Token,
    kek: Kek,
    keys: Sequence[WrappedKey],
    destinations: Sequence[Destination],
    *,
    now_s: float,
    budget_s: float,
) -> tuple[tuple[Parcel, ...], tuple[tuple[KeyId, str], ...]]:
    """The first *keys*, as many as fit the budget, at least one: parcels for all destinations, or failed."""
    opener = _Opener(token, kek, now_s=now_s)
    deadline = time.monotonic() + budget_s
    parcels: list[Parcel] = []
    failed: list[tuple[KeyId, str]] = []
    for row in keys:
        try:
            material = opener.reveal(row.owner, row)
        except WrappedKeyError as error:
            failed.append((row.key_id, str(error)))
        else:
            try:
                parcels += [_parcel(token, kek, material, row, to) for to in destinations]
            finally:
                wipe(material)
        if time.monotonic() >= deadline:
            break
    return tuple(parcels), tuple(failed)


def _parcel(token: Token, kek: Kek, material: bytes, row: WrappedKey, to: Destination) -> Parcel:
    content_key = random_bytes(token.session(serial=kek.token_serial), CONTENT_KEY_SIZE)
    try:
        return seal_parcel(material, row, to, content_key)
    finally:
        wipe(content_key)


def import_keys(
    token: Token,
    kek: Kek,
    arrivals: Sequence[Arrival],
    transport_key: ec.EllipticCurvePrivateKey,
    *,
    now_ms: int,
    budget_s: float,
) -> tuple[tuple[WrappedKey, ...], tuple[tuple[KeyId, str], ...]]:
    """The first *arrivals*, as many as fit the budget, at least one: under *kek*, or failed."""
    importer = _Importer(token, kek, transport_key, now_ms=now_ms)
    deadline = time.monotonic() + budget_s
    made: list[WrappedKey] = []
    failed: list[tuple[KeyId, str]] = []
    for arrival in arrivals:
        try:
            made.append(importer.take(arrival))
        except WrappedKeyError as error:
            failed.append((arrival.parcel.key_id, str(error)))
        if time.monotonic() >= deadline:
            break
    return tuple(made), tuple(failed)


class _Importer:
    """Takes parcels in under one KEK, for the length of one call."""

    def __init__(
        self, token: Token, kek: Kek, transport_key: ec.EllipticCurvePrivateKey, *, now_ms: int
    ) -> None:
        self._token = token
        self._kek = kek
        self._transport_key = transport_key
        self._now_ms = now_ms
        self._wrapping = wrapping_of(kek.method, token.quirks.mechanisms)
        self._key = usable_kek(token, kek, now_s=now_ms / 1000)

    def take(self, arrival: Arrival) -> WrappedKey:
        """WrappedKeyError: this parcel is bad. KeySourceError: KEK or token is."""
        parcel, place = arrival.parcel, self._kek.reference
        if (parcel.kek_id, parcel.environment_id) != (place.kek_id, place.environment_id):
            raise WrappedKeyError(f"is for KEK {parcel.kek_id} of environment {parcel.environment_id}")
        row = WrappedKey(
            owner=parcel.owner,
            key_id=parcel.key_id,
            kek_id=place.kek_id,
            environment_id=place.environment_id,
            method=self._kek.method,
            wrapped=b"",
            kcv=arrival.kcv,
            token_serial=self._kek.token_serial,
            created_at_ms=self._now_ms,
            use=arrival.use,
            algorithm=arrival.algorithm,
            version=arrival.version,
        )
        try:
            return self._take(row, parcel)
        except WrongBindingError as error:
            raise WrappedKeyError(f"belongs to another place or was changed: it {error}") from None
        except PKCS11Error as error:
            found = diagnose(self._token, self._kek, now_s=self._now_ms / 1000)
            if found.verdict is not Verdict.OK:
                raise error_of(found) from None
            # The KEK is sound, so it is the parcel; the session goes.
            self._token.renew(serial=self._kek.token_serial)
            self._key = usable_kek(self._token, self._kek, now_s=self._now_ms / 1000)
            raise WrappedKeyError(f"does not open, or is not wrapped ({type(error).__name__})") from None

    def _take(self, row: WrappedKey, parcel: Parcel) -> WrappedKey:
        if parcel.route is Route.PUBLIC:
            return self._admit(row, parcel)
        material = open_peer_parcel(parcel, self._transport_key)
        try:
            self._check(material, row)
            return _wrap(self._token, self._kek, self._key, material, row, now_ms=self._now_ms)
        finally:
            wipe(material)

    def _admit(self, row: WrappedKey, parcel: Parcel) -> WrappedKey:
        """A parcel that is a wrap already, but for our HMAC: the KEK opens it, once (`vouch` says why)."""
        if not isinstance(self._wrapping, HybridWrapping):
            raise WrappedKeyError(f"is sealed to a public key, which a KEK of method {row.method} has not")
        session = self._token.session(serial=self._kek.token_serial)
        binding = parcel_binding(
            row.owner, row.key_id, Route.PUBLIC, kek_id=row.kek_id, environment_id=row.environment_id
        )
        material = self._wrapping.reveal(session, self._key, parcel.sealed, binding)
        try:
            self._check(material, row)
        finally:
            wipe(material)
        return replace(row, wrapped=self._wrapping.vouch(self._key, parcel.sealed, binding))

    def _check(self, material: bytes, row: WrappedKey) -> None:
        if row.use is KeyUse.DATA and len(material) != KEY_MATERIAL_SIZE:
            raise WrappedKeyError(f"holds {len(material)} bytes that are no key")
        if not is_sound(material, row):
            raise WrappedKeyError("the key check value differs")


def seal_envelopes(
    token: Token, signer: Signer, kek: Kek, requests: Sequence[EnvelopeRequest], *, budget_s: float
) -> tuple[SealedEnvelopes, ...]:
    """The results of the first *requests*, as many as fit the budget, at least one."""
    opener = _Opener(token, kek, now_s=requests[0].issued_at_s)
    deadline = time.monotonic() + budget_s
    results = []
    for request in requests:
        results.append(seal_request(opener, signer, request))
        if time.monotonic() >= deadline:
            break
    return tuple(results)


class _Opener:
    """Opens wrapped keys under one KEK, for the length of one call."""

    def __init__(self, token: Token, kek: Kek, *, now_s: float) -> None:
        self._token = token
        self._kek = kek
        self._now_s = now_s
        self._wrapping = wrapping_of(kek.method, token.quirks.mechanisms)
        self._key = usable_kek(token, kek, now_s=now_s)

    def open(self, owner: NetworkService, row: WrappedKey, state: KeyState) -> KeyMaterial:
        """The key in the clear. Raises as `reveal` does."""
        if state is KeyState.DESTROYED:
            return material_of(row, state, b"")
        material = self.reveal(owner, row)
        try:
            return material_of(row, state, material, is_verified=True)
        finally:
            wipe(material)

    def reveal(self, owner: NetworkService, row: WrappedKey) -> bytes:
        """KM, for the caller to wipe. WrappedKeyError: this one is bad. KeySourceError: KEK or token is."""
        self._check_place(owner, row)
        # Bound to *our* owner, key id, KEK and environment, not to what the row claims.
        binding = binding_under(owner, row.key_id, self._kek)
        material = _without_padding(self._unwrap(row.wrapped, binding), self._wrapping, row.use)
        if not is_sound(material, row):
            wipe(material)
            raise WrappedKeyError("the key check value differs")
        return material

    def _check_place(self, owner: NetworkService, row: WrappedKey) -> None:
        if row.owner != owner:
            raise WrappedKeyError(f"belongs to {row.owner}")
        if row.kek_id != self._kek.reference.kek_id:
            raise WrappedKeyError(f"is wrapped by KEK {row.kek_id}")
        if row.method is not self._kek.method:
            raise WrappedKeyError(f"is wrapped by method {row.method}, the KEK's is {self._kek.method}")
        if row.use is KeyUse.DATA:
            sizes = self._wrapping.sealed_sizes(KEY_MATERIAL_SIZE)
            if len(row.wrapped) not in sizes:
                raise WrappedKeyError(f"has {len(row.wrapped)} bytes, not {sizes}")

    def _unwrap(self, wrapped: bytes, binding: bytes) -> bytes:
        try:
            return self._open(wrapped, binding)
        except WrongBindingError as error:
            raise WrappedKeyError(f"belongs to another place or was changed: it {error}") from None
        except PKCS11Error:
            pass
        found = diagnose(self._token, self._kek, now_s=self._now_s)
        if found.verdict is not Verdict.OK:
            raise error_of(found)
        # The KEK is sound: once more, on a session without a past, then it is the wrapped key.
        self._renew()
        try:
            return self._open(wrapped, binding)
        except PKCS11Error as error:
            self._renew()
            raise WrappedKeyError(f"does not open ({type(error).__name__})") from None

    def _open(self, wrapped: bytes, binding: bytes) -> bytes:
        session = self._token.session(serial=self._kek.token_serial)
        return self._wrapping.open(session, self._key, wrapped, binding)

    def _renew(self) -> None:
        self._token.renew(serial=self._kek.token_serial)
        self._key = usable_kek(self._token, self._kek, now_s=self._now_s)


def _without_padding(opened: bytes, wrapping: Wrapping, use: KeyUse) -> bytes:
    """The material that was sealed. WrappedKeyError, and *opened* wiped, if it cannot have been.

    A data key has its size. A signing key ends where its DER ends; only padding follows, and only zeros.
    """
    if use is KeyUse.DATA:
        if len(opened) == KEY_MATERIAL_SIZE:
            return opened
    else:
        size = der_size(opened)
        if size and len(opened) == size:
            return opened
        rest = opened[size:]
        if size and len(rest) < wrapping.padded_to and rest == bytes(len(rest)):
            material = opened[:size]
            wipe(opened)
            return material
    count = len(opened)
    wipe(opened)
    raise WrappedKeyError(f"opened to {count} bytes that are no key")
