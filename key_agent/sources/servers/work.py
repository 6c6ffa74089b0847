"""KEKs and key material at a key server, inside the worker: the same promises as with an HSM (hsm/).

1. A KEK is the server's key `<label>-<id in hex>` beside the canary key `sealgate-canary`. Not finding the
   KEK proves a revocation only while the canary key is there: a moved mount, another tenant's login or an
   emptied server look the same.
2. A ciphertext that does not open is looked at together with the canary ciphertext: if that opens, the one
   ciphertext is bad; if it does not, and fresh bytes come back, the key was replaced.
3. Nothing is ever decided by encrypting: OpenBao makes a missing key then, if our token may.
4. Items travel in batches; a call stops when its budget is used up and answers for what is done.
"""

import hmac
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

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
    canary_binding,
    check_value,
    is_sound,
    material_of,
    seal_request,
)
from key_agent.sources.hybrid import CONTENT_KEY_SIZE
from key_agent.sources.parcels import open_peer_parcel, seal_parcel
from key_agent.sources.servers.server import (
    MAX_BATCH,
    Item,
    KeyGoneError,
    KeyServer,
    ServerUnavailableError,
    Standing,
    Unopened,
    Unsupported,
)
from key_agent.sources.signing_keys import SEED_SIZE, make_signing_key
from key_agent.sources.source import (
    Arrival,
    Destination,
    EnvelopeRequest,
    Kek,
    KekReference,
    KekType,
    NewKey,
    Parcel,
    Route,
    WrappedKey,
)
from key_agent.sources.verdict import Diagnosis, Verdict
from key_agent.sources.wire import SealedEnvelopes

CANARY_NAME: Final = "sealgate-canary"
PROBE_NAME: Final = "sealgate-probe"


def name_of(reference: KekReference) -> str:
    """The name of its key at the server. An adopted key may have an empty id: then it is the label alone."""
    suffix = reference.object_id.hex()
    return f"{reference.label}-{suffix}" if suffix else reference.label


# KEKs.


def create_kek(
    server: KeyServer,
    reference: KekReference,
    kek_type: KekType | None,
    valid_until_s: int | None,
    *,
    replace_unfinished: bool,
    now_ms: int,
) -> Kek:
    """See `KeySource.create_kek`."""
    if kek_type not in (None, KekType.AES_256):
        raise UnsupportedError(f"a key server makes KEKs of type {KekType.AES_256}, not {kek_type}")
    name = name_of(reference)
    if server.find(name).standing is not Standing.ABSENT:
        if not replace_unfinished:
            raise KeySourceError(f"a key named {name!r} exists at the server")
        server.destroy(name)
    if server.find(CANARY_NAME).standing is Standing.ABSENT:
        server.create(CANARY_NAME)
    server.create(name)
    try:
        return _proven(server, reference, now_ms=now_ms, valid_until_s=valid_until_s)
    except BaseException as error:
        try:
            server.destroy(name)
        except (ServerUnavailableError, KeyGoneError, Unsupported) as stuck:
            error.add_note(f"and the key could not be destroyed again ({stuck})")
        raise


def adopt_kek(
    server: KeyServer,
    reference: KekReference,
    kek_type: KekType | None,
    valid_from_s: int | None,
    valid_until_s: int | None,
    *,
    now_ms: int,
) -> Kek:
    """See `KeySource.adopt_kek`. The canary key has to be there too: its owner makes it once."""
    if kek_type not in (None, KekType.AES_256):
        raise UnsupportedError(f"a key server's KEK is of type {KekType.AES_256}, not {kek_type}")
    if server.find(CANARY_NAME).standing is Standing.ABSENT:
        try:
            server.create(CANARY_NAME)
        except Unsupported as error:
            raise UnsupportedError(f"the key {CANARY_NAME!r} is missing at the server, and {error}") from None
    kek = _proven(server, reference, now_ms=now_ms, valid_until_s=valid_until_s)
    return replace(kek, valid_from_s=valid_from_s, is_adopted=True)


def destroy_kek(server: KeyServer, kek: Kek) -> None:
    """See `KeySource.destroy_kek`."""
    _check_identity(server, kek)
    name = name_of(kek.reference)
    server.destroy(name)
    server.close()
    if server.find(name).standing is not Standing.ABSENT:
        raise KeySourceError(f"the server still shows a key named {name!r}")
    if server.find(CANARY_NAME).standing is not Standing.USABLE:
        raise KeySourceError("no KEK found, but the canary key is not visible either: nothing is proven")


def set_kek_enabled(server: KeyServer, kek: Kek, *, enabled: bool) -> None:
    """See `KeySource.set_kek_enabled`."""
    _check_identity(server, kek)
    name = name_of(kek.reference)
    if server.find(name).standing is Standing.ABSENT:
        raise KeySourceError(f"the server has no key named {name!r}")
    server.set_enabled(name, enabled=enabled)
    server.close()
    found = server.find(name)
    if found.standing is not (Standing.USABLE if enabled else Standing.DISABLED):
        raise UnsupportedError(f"the key is {found.standing} afterwards ({found.detail})")


def try_method(server: KeyServer) -> str:
    """ "ok", or why the server's method is refused, tried with a throw-away key."""
    name = f"{PROBE_NAME}-{os.urandom(8).hex()}"
    try:
        server.create(name)
        try:
            _prove(server, name)
        finally:
            server.destroy(name)
    except (ServerUnavailableError, KeyGoneError, Unsupported, UnsupportedError) as error:
        return f"not tried to the end: {error}"
    return "ok"


def _proven(server: KeyServer, reference: KekReference, *, now_ms: int, valid_until_s: int | None) -> Kek:
    name = name_of(reference)
    found = server.find(name)
    if found.standing is not Standing.USABLE:
        raise UnsupportedError(f"the key {name!r} is {found.standing}: {found.detail}")
    _prove(server, name)
    canary = server.random(KEY_MATERIAL_SIZE)
    binding = canary_binding(reference)
    [ciphertext] = server.seal(name, [Item(canary, binding)])
    if server.open(name, [Item(ciphertext, binding)]) != [canary]:
        raise UnsupportedError("the canary does not come back")
    return Kek(
        reference=reference,
        method=server.method,
        token_serial=server.identity(),
        canary_ciphertext=ciphertext,
        canary_sha256=sha256(canary).digest(),
        created_at_ms=now_ms,
        valid_until_s=valid_until_s,
    )


def _prove(server: KeyServer, name: str) -> None:
    """Negotiated by doing: UnsupportedError unless all that must be refused is refused."""
    material = server.random(KEY_MATERIAL_SIZE)
    binding, other = b"sealgate proof", b"sealgate prooF"
    sealed, again = server.seal(name, [Item(material, binding)] * 2)
    if sealed == again:
        raise UnsupportedError("two seals are equal: the IV repeats")
    if material in sealed:
        raise UnsupportedError("the sealed bytes hold the plaintext")
    if server.open(name, [Item(sealed, binding)]) != [material]:
        raise UnsupportedError("opened bytes differ from the sealed ones")
    tampered = {
        "a wrong binding": Item(sealed, other),
        "a changed last byte": Item(_changed(sealed, len(sealed) - 4), binding),
        "a changed middle byte": Item(_changed(sealed, len(sealed) // 2), binding),
        "a cut": Item(sealed[:-8], binding),
        "nothing": Item(b"", binding),
    }
    for what, item in tampered.items():
        server.close()  # a connection without a past
        [opened] = server.open(name, [item])
        if not isinstance(opened, Unopened):
            raise UnsupportedError(f"the server accepts {what}")
    if server.open(name, [Item(sealed, binding)]) != [material]:
        raise UnsupportedError("the KEK stopped working during its proof")


def _changed(data: bytes, index: int) -> bytes:
    """Another byte there, of the same alphabet: base64 must not hide the change in its unused bits."""
    was = data[index : index + 1]
    return data[:index] + (b"B" if was == b"A" else b"A") + data[index + 1 :]


# The proof.


def diagnose(server: KeyServer, kek: Kek, *, now_s: float) -> Diagnosis:
    """One pass, over a connection of its own."""
    server.close()
    try:
        return _diagnose(server, kek, now_s)
    except ServerUnavailableError as error:
        return Diagnosis(error.verdict, str(error), error.retry_after_s)
    except KeyGoneError as error:
        # Gone between two questions: the next look finds it so.
        return Diagnosis(Verdict.UNREACHABLE, f"the key changed meanwhile: {error}")
    except Unsupported as error:
        return Diagnosis(Verdict.UNSUPPORTED, str(error))


def _diagnose(server: KeyServer, kek: Kek, now_s: float) -> Diagnosis:
    if (told := _by_date(kek, now_s)) is not None:
        return told
    name = name_of(kek.reference)
    identity = server.identity()
    found = server.find(name)
    match found.standing:
        case Standing.USABLE:
            pass
        case Standing.ABSENT:
            if identity != kek.token_serial or server.find(CANARY_NAME).standing is Standing.ABSENT:
                return Diagnosis(Verdict.TOKEN_CHANGED, "neither the KEK nor its canary key is at the server")
            return Diagnosis(Verdict.KEK_DESTROYED, f"{found.detail}, and the canary key is visible")
        case Standing.DISABLED:
            return Diagnosis(Verdict.KEK_DISABLED, found.detail)
        case Standing.AMBIGUOUS:
            return Diagnosis(Verdict.KEK_AMBIGUOUS, found.detail)
        case Standing.FOREIGN:
            return Diagnosis(Verdict.KEK_REPLACED, found.detail)
    if identity != kek.token_serial:
        return Diagnosis(Verdict.TOKEN_CHANGED, f"another server: {identity}, not {kek.token_serial}")
    canary = Item(kek.canary_ciphertext, canary_binding(kek.reference))
    [opened] = server.open(name, [canary])
    if isinstance(opened, bytes) and hmac.compare_digest(sha256(opened).digest(), kek.canary_sha256):
        return Diagnosis(Verdict.OK, "the KEK opened its canary")
    if isinstance(opened, Unopened) and opened.is_disallowed:
        return Diagnosis(Verdict.KEK_DISABLED, f"the canary: {opened.reason}")
    # Seen a moment ago, so nothing is made by this encryption.
    fresh = server.random(KEY_MATERIAL_SIZE)
    [sealed] = server.seal(name, [Item(fresh, canary.binding)])
    if server.open(name, [Item(sealed, canary.binding)]) == [fresh]:
        return Diagnosis(Verdict.KEK_REPLACED, "the key of that name works and does not open the canary")
    return Diagnosis(Verdict.UNREACHABLE, "the server seals and does not open what it sealed")


def _by_date(kek: Kek, now_s: float) -> Diagnosis | None:
    if kek.valid_until_s is not None and now_s >= kek.valid_until_s:
        return Diagnosis(Verdict.KEK_EXPIRED, "the KEK is past its end")
    if kek.valid_from_s is not None and now_s < kek.valid_from_s:
        return Diagnosis(Verdict.KEK_EXPIRED, "the KEK's time has not come")
    return None


def _check_identity(server: KeyServer, kek: Kek) -> None:
    if (identity := server.identity()) != kek.token_serial:
        raise KeySourceError(f"another server: {identity}, not {kek.token_serial}")


def _require_usable(server: KeyServer, kek: Kek, now_s: float) -> None:
    """The canary opens: nothing is wrapped by another key of that name. KeySourceError proves nothing yet."""
    found = diagnose(server, kek, now_s=now_s)
    if found.verdict is not Verdict.OK:
        raise error_of(found) if not found.verdict.withdraws else KeySourceError(found.detail)


# Key material.


def generate(
    server: KeyServer, kek: Kek, wanted: Sequence[NewKey], *, now_ms: int, budget_s: float
) -> tuple[WrappedKey, ...]:
    """The first keys of *wanted*, as many as fit the budget, at least one."""
    _require_usable(server, kek, now_ms / 1000)
    deadline = time.monotonic() + budget_s
    made: list[WrappedKey] = []
    while len(made) < len(wanted) and (not made or time.monotonic() < deadline):
        batch = wanted[len(made) : len(made) + MAX_BATCH // 4]
        made += _generate(server, kek, batch, now_ms)
    return tuple(made)


def _generate(server: KeyServer, kek: Kek, wanted: Sequence[NewKey], now_ms: int) -> list[WrappedKey]:
    materials: list[bytes] = []
    try:
        rows = []
        for new in wanted:
            materials.append(_new_material(server, new))
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
            rows.append(replace(row, kcv=check_value(materials[-1], row)))
        return _wrap(server, kek, list(zip(rows, materials, strict=True)), now_ms)
    finally:
        for material in materials:
            wipe(material)


def _new_material(server: KeyServer, new: NewKey) -> bytes:
    if new.use is KeyUse.DATA:
        return server.random(KEY_MATERIAL_SIZE)
    seed = server.random(SEED_SIZE)
    try:
        return make_signing_key(SigningAlgorithm(new.algorithm or ""), seed)
    except ValueError as error:
        raise KeySourceError(str(error)) from None
    finally:
        wipe(seed)


def _wrap(
    server: KeyServer, kek: Kek, keys: Sequence[tuple[WrappedKey, bytes]], now_ms: int
) -> list[WrappedKey]:
    """Each under *kek*: sealed, opened again, compared. The caller wipes the materials."""
    name = name_of(kek.reference)
    bindings = [binding_under(row.owner, row.key_id, kek) for row, _ in keys]
    items = [Item(material, binding) for (_, material), binding in zip(keys, bindings, strict=True)]
    sealed = server.seal(name, items)
    back = server.open(name, [Item(data, binding) for data, binding in zip(sealed, bindings, strict=True)])
    made = []
    try:
        for (row, material), wrapped, opened in zip(keys, sealed, back, strict=True):
            same = isinstance(opened, bytes) and hmac.compare_digest(opened, material)
            if not same or not is_sound(material, row):
                raise KeySourceError("a key did not come back from its wrapping as it went in")
            made.append(
                replace(
                    row,
                    kek_id=kek.reference.kek_id,
                    environment_id=kek.reference.environment_id,
                    method=kek.method,
                    wrapped=wrapped,
                    token_serial=kek.token_serial,
                    created_at_ms=now_ms,
                )
            )
    finally:
        for opened in back:
            if isinstance(opened, bytes):
                wipe(opened)
    return made


def rewrap(
    server: KeyServer, old: Kek, new: Kek, keys: Sequence[WrappedKey], *, now_ms: int, budget_s: float
) -> tuple[tuple[WrappedKey, ...], tuple[tuple[KeyId, str], ...]]:
    """The first *keys*, as many as fit the budget, at least one: those under *new*, and those that failed."""
    now_s = now_ms / 1000
    _require_usable(server, old, now_s)
    _require_usable(server, new, now_s)
    deadline = time.monotonic() + budget_s
    made: list[WrappedKey] = []
    failed: list[tuple[KeyId, str]] = []
    while (done := len(made) + len(failed)) < len(keys) and (not done or time.monotonic() < deadline):
        opener = _Opener(server, old, now_s)
        batch = keys[done : done + MAX_BATCH // 4]
        opener.prepare([(row.owner, row) for row in batch])
        opened: list[tuple[WrappedKey, bytes]] = []
        try:
            for row in batch:
                try:
                    opened.append((row, opener.reveal(row.owner, row)))
                except WrappedKeyError as error:
                    failed.append((row.key_id, str(error)))
            if opened:
                made += _wrap(server, new, opened, now_ms)
        finally:
            opener.wipe()
            for _, material in opened:
                wipe(material)
    return tuple(made), tuple(failed)


def export_keys(
    server: KeyServer,
    kek: Kek,
    keys: Sequence[WrappedKey],
    destinations: Sequence[Destination],
    *,
    now_s: float,
    budget_s: float,
) -> tuple[tuple[Parcel, ...], tuple[tuple[KeyId, str], ...]]:
    """The first *keys*, as many as fit the budget, at least one: parcels for all destinations, or failed."""
    _require_usable(server, kek, now_s)
    deadline = time.monotonic() + budget_s
    parcels: list[Parcel] = []
    failed: list[tuple[KeyId, str]] = []
    done = 0
    while done < len(keys) and (not done or time.monotonic() < deadline):
        opener = _Opener(server, kek, now_s)
        batch = keys[done : done + MAX_BATCH // 4]
        done += len(batch)
        try:
            opener.prepare([(row.owner, row) for row in batch])
            for row in batch:
                try:
                    material = opener.reveal(row.owner, row)
                except WrappedKeyError as error:
                    failed.append((row.key_id, str(error)))
                    continue
                for to in destinations:
                    content_key = server.random(CONTENT_KEY_SIZE)
                    parcels.append(seal_parcel(material, row, to, content_key))
                    wipe(content_key)
        finally:
            opener.wipe()
    return tuple(parcels), tuple(failed)


def import_keys(
    server: KeyServer,
    kek: Kek,
    arrivals: Sequence[Arrival],
    transport_key: ec.EllipticCurvePrivateKey,
    *,
    now_ms: int,
    budget_s: float,
) -> tuple[tuple[WrappedKey, ...], tuple[tuple[KeyId, str], ...]]:
    """The first *arrivals*, as many as fit the budget, at least one: under *kek*, or failed."""
    _require_usable(server, kek, now_ms / 1000)
    deadline = time.monotonic() + budget_s
    made: list[WrappedKey] = []
    failed: list[tuple[KeyId, str]] = []
    while (done := len(made) + len(failed)) < len(arrivals) and (not done or time.monotonic() < deadline):
        opened: list[tuple[WrappedKey, bytes]] = []
        try:
            for arrival in arrivals[done : done + MAX_BATCH // 4]:
                try:
                    opened.append(_taken(kek, arrival, transport_key, now_ms))
                except WrappedKeyError as error:
                    failed.append((arrival.parcel.key_id, str(error)))
            if opened:
                made += _wrap(server, kek, opened, now_ms)
        finally:
            for _, material in opened:
                wipe(material)
    return tuple(made), tuple(failed)


def _taken(
    kek: Kek, arrival: Arrival, transport_key: ec.EllipticCurvePrivateKey, now_ms: int
) -> tuple[WrappedKey, bytes]:
    """WrappedKeyError: this parcel is bad."""
    parcel, place = arrival.parcel, kek.reference
    if (parcel.kek_id, parcel.environment_id) != (place.kek_id, place.environment_id):
        raise WrappedKeyError(f"is for KEK {parcel.kek_id} of environment {parcel.environment_id}")
    if parcel.route is not Route.PEER:
        raise WrappedKeyError(f"is sealed to a public key, which a KEK of method {kek.method} has not")
    row = WrappedKey(
        owner=parcel.owner,
        key_id=parcel.key_id,
        kek_id=place.kek_id,
        environment_id=place.environment_id,
        method=kek.method,
        wrapped=b"",
        kcv=arrival.kcv,
        token_serial=kek.token_serial,
        created_at_ms=now_ms,
        use=arrival.use,
        algorithm=arrival.algorithm,
        version=arrival.version,
    )
    material = open_peer_parcel(parcel, transport_key)
    if (row.use is KeyUse.DATA and len(material) != KEY_MATERIAL_SIZE) or not is_sound(material, row):
        wipe(material)
        raise WrappedKeyError("the key check value differs")
    return row, material


def seal_envelopes(
    server: KeyServer, signer: Signer, kek: Kek, requests: Sequence[EnvelopeRequest], *, budget_s: float
) -> tuple[SealedEnvelopes, ...]:
    """The results of the first *requests*, as many as fit the budget, at least one."""
    now_s = float(requests[0].issued_at_s)
    _require_usable(server, kek, now_s)
    deadline = time.monotonic() + budget_s
    results: list[SealedEnvelopes] = []
    while len(results) < len(requests) and (not results or time.monotonic() < deadline):
        batch = requests[len(results) : len(results) + MAX_BATCH // 4]
        opener = _Opener(server, kek, now_s)
        try:
            opener.prepare(
                [
                    (request.owner, row)
                    for request in batch
                    for row, state in request.keys
                    if state is not KeyState.DESTROYED
                ]
            )
            results += [seal_request(opener, signer, request) for request in batch]
        finally:
            opener.wipe()
    return tuple(results)


class _Opener:
    """Opens wrapped keys under one KEK, a batch at a time."""

    def __init__(self, server: KeyServer, kek: Kek, now_s: float) -> None:
        self._server = server
        self._kek = kek
        self._now_s = now_s
        self._results: dict[tuple[NetworkService, KeyId, bytes], bytes | Unopened] = {}

    def prepare(self, asked: Sequence[tuple[NetworkService, WrappedKey]]) -> None:
        """Ask the server for all of *asked* that may be asked for. KeySourceError: KEK or server is bad."""
        places = {
            (owner, row.key_id, row.wrapped): Item(row.wrapped, binding_under(owner, row.key_id, self._kek))
            for owner, row in asked
            if self._misplaced(owner, row) is None
        }
        pending = list(places)
        for start in range(0, len(pending), MAX_BATCH):
            part = pending[start : start + MAX_BATCH]
            results = self._server.open(name_of(self._kek.reference), [places[place] for place in part])
            self._results.update(zip(part, results, strict=True))
        if any(isinstance(result, Unopened) for result in self._results.values()):
            # Only if the KEK is sound is the wrapped key to blame.
            found = diagnose(self._server, self._kek, now_s=self._now_s)
            if found.verdict is not Verdict.OK:
                raise error_of(found) if not found.verdict.withdraws else KeySourceError(found.detail)

    def open(self, owner: NetworkService, row: WrappedKey, state: KeyState) -> KeyMaterial:
        """The key in the clear. WrappedKeyError: this one is bad."""
        if state is KeyState.DESTROYED:
            return material_of(row, state, b"")
        material = self.reveal(owner, row)
        try:
            return material_of(row, state, material, is_verified=True)
        finally:
            wipe(material)

    def reveal(self, owner: NetworkService, row: WrappedKey) -> bytes:
        """A copy of KM, for the caller to wipe. WrappedKeyError: this one is bad."""
        if (misplaced := self._misplaced(owner, row)) is not None:
            raise WrappedKeyError(misplaced)
        opened = self._results.get((owner, row.key_id, row.wrapped))
        if not isinstance(opened, bytes):
            raise WrappedKeyError(opened.reason if opened is not None else "was not asked for")
        if row.use is KeyUse.DATA and len(opened) != KEY_MATERIAL_SIZE:
            raise WrappedKeyError(f"opened to {len(opened)} bytes that are no key")
        if not is_sound(opened, row):
            raise WrappedKeyError("the key check value differs")
        return bytes(bytearray(opened))  # `bytes` of `bytes` would be the same object

    def wipe(self) -> None:
        """What was opened."""
        for result in self._results.values():
            if isinstance(result, bytes):
                wipe(result)
        self._results.clear()

    def _misplaced(self, owner: NetworkService, row: WrappedKey) -> str | None:
        if row.owner != owner:
            return f"belongs to {row.owner}"
        if row.kek_id != self._kek.reference.kek_id:
            return f"is wrapped by KEK {row.kek_id}"
        if row.method is not self._kek.method:
            return f"is wrapped by method {row.method}, the KEK's is {self._kek.method}"
        if row.use is KeyUse.DATA:
            size = self._server.sealed_size(KEY_MATERIAL_SIZE)
            if size is not None and len(row.wrapped) != size:
                return f"has {len(row.wrapped)} bytes, not {size}"
        return None
