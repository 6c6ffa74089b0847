"""Key material of a key server, inside the worker: generated, wrapped, opened, put into envelopes, wiped.

1. KM leaves these functions only wrapped by the KEK or encrypted to a recipient's certificate.
2. Before a call the KEK has opened its canary: nothing is wrapped by another key of its name.
3. A wrapped key that fails costs one look at the KEK; only if the KEK is sound is the wrapped key to blame.
4. Items travel in batches; a call stops when its budget is used up and answers for what is done.
"""

import hmac
import time
from collections.abc import Sequence
from dataclasses import replace

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
from key_agent.errors import KeySourceError, error_of
from key_agent.sources.envelopes import (
    Signer,
    WrappedKeyError,
    binding_under,
    check_value,
    is_sound,
    material_of,
    seal_request,
)
from key_agent.sources.hybrid import CONTENT_KEY_SIZE
from key_agent.sources.parcels import open_peer_parcel, seal_parcel
from key_agent.sources.servers.diagnosis import diagnose, require_usable
from key_agent.sources.servers.server import MAX_BATCH, Item, KeyServer, Unopened, name_of
from key_agent.sources.signing_keys import SEED_SIZE, make_signing_key
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


def generate(
    server: KeyServer, kek: Kek, wanted: Sequence[NewKey], *, now_ms: int, budget_s: float
) -> tuple[WrappedKey, ...]:
    """The first keys of *wanted*, as many as fit the budget, at least one."""
    require_usable(server, kek, now_ms / 1000)
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
    require_usable(server, old, now_s)
    require_usable(server, new, now_s)
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
    require_usable(server, kek, now_s)
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
    require_usable(server, kek, now_ms / 1000)
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
    require_usable(server, kek, now_s)
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
