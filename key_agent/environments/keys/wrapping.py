"""How a key comes to stand under another environment's KEK, and what proves that it does.

1. Key material goes from worker to worker, sealed (sources/parcels.py); agents and network see parcels. It
   is sent to an environment whose row is signed and whose state lets it have keys, and to nobody else.
2. The receiving agent takes the check value from its own copy of the signed rows, has its HSM open what it
   has wrapped, and only then says `verified`. What it says is asked for again: a wrap that is lost or damaged
   later is noticed and brought once more.
3. Only the manager may have keys made, or sent on to a third environment. Anybody who counts may deliver:
   what does not fit the check value is no key, and what is not lacked is not taken in (deliveries.py).
4. A healing environment is given nothing, and stores nothing that it is given (system B, claim 7).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import batched
from pathlib import Path
from typing import Annotated, Final

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from envelope.base64url import b64u_decode
from envelope.errors import FormatError, IntegrityError, MisuseError
from envelope.keys import KeyId, KeyState, KeyUse, NetworkService
from key_agent.environments.keys.deliveries import Refusals, Why, judge
from key_agent.environments.keys.proofs import Proofs
from key_agent.environments.peers.peer_api import PeerCall, PeerRoute
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.peers.peering import Peering
from key_agent.environments.peers.peers import WRAPS_PATH
from key_agent.environments.shared.documents import DekBody
from key_agent.environments.shared.shared_view import Shared, newest_term
from key_agent.environments.states import EnvironmentState
from key_agent.journal import Journal
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.model import UNSERVED_MS, Link
from key_agent.registry.states import KekState
from key_agent.registry.store import Registry
from key_agent.registry.wrap_rows import (
    after_sequences,
    sound_among,
    sound_wraps,
    store_wraps,
    takes_keys,
)
from key_agent.sources.source import (
    Arrival,
    Destination,
    Kek,
    KeySource,
    NewKey,
    Parcel,
    Route,
    WrapMethod,
    WrappedKey,
)
from runtime.clock import Clock

LOOK_PATH: Final = f"{WRAPS_PATH}/missing"
WAITING_PATH: Final = f"{WRAPS_PATH}/waiting"
BRING_PATH: Final = f"{WRAPS_PATH}/bring"
MAKE_PATH: Final = f"{WRAPS_PATH}/make"
BATCH: Final = 500
"""Keys in one request to an HSM and to a peer."""
PATIENCE_S: Final = 60.0
"""For one batch: an HSM may take 10 s, and restart its worker once."""
PROVEN_AT_ONCE: Final = 2000
"""Keys that a peer has to have opened in one request: within PATIENCE_S, by an HSM that opens 40 a second."""
HAVE_KEYS: Final = frozenset(
    {
        EnvironmentState.JOINING,
        EnvironmentState.ACTIVE,
        EnvironmentState.DRAINING,
        EnvironmentState.REJOINING,
    }
)
"""Environments that keys are sent to."""
NO_WRAP_HERE: Final = "it has no wrap there"

type Kid = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
type Name = Annotated[str, msgspec.Meta(min_length=1, max_length=127)]
type Kids = Annotated[tuple[Kid, ...], msgspec.Meta(max_length=200_000)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Between agents, as JSON."""


class SealedKey(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key_id: Kid
    route: Route
    sealed: Annotated[bytes, msgspec.Meta(max_length=16384)]


class Delivery(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parcels for one KEK of one environment."""

    environment: Name
    kek_id: Name
    keys: Annotated[tuple[SealedKey, ...], msgspec.Meta(max_length=BATCH)]


class Stored(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of keys that were to be wrapped."""

    verified: Kids
    failed: dict[Kid, str]

    def __or__(self, other: "Stored") -> "Stored":
        verified = tuple(dict.fromkeys(self.verified + other.verified))
        failed = {kid: why for kid, why in (self.failed | other.failed).items() if kid not in verified}
        return Stored(verified=verified, failed=failed)


NOTHING_STORED: Final = Stored(verified=(), failed={})


class Look(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which of *keys* has no sound wrap under that KEK? With *prove* the HSM opens them (proofs.py)."""

    kek_id: Name
    keys: Kids
    prove: bool = False


class Missing(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    missing: dict[Kid, str]


class Ask(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose proxies have *keys*?"""

    keys: Kids


class Waiting(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    waiting: dict[Kid, str]
    """What is waited for; a key that is not here is ready."""


class Bring(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The manager has another environment send *keys* to a third."""

    environment: Name
    keys: Annotated[tuple[Kid, ...], msgspec.Meta(max_length=BATCH)]


class Make(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The manager has another environment's HSM make keys: service, use and algorithm of each."""

    wanted: Annotated[
        tuple[tuple[Name, KeyUse, str | None], ...], msgspec.Meta(min_length=1, max_length=BATCH)
    ]


class MadeKey(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kcv: Annotated[str, msgspec.Meta(pattern="^(?:[0-9a-f]{2})*$", max_length=128)]
    parcel: SealedKey
    """For the manager's environment."""


class Made(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    keys: Annotated[tuple[MadeKey, ...], msgspec.Meta(max_length=BATCH)]


class Wraps:
    """One environment's part: it wraps for others, takes in what is for it, and answers for what it has."""

    def __init__(
        self,
        *,
        peering: Peering,
        registry: Registry,
        source: KeySource,
        proofs: Proofs,
        transport_key_file: Path,
        links: Callable[[Collection[NetworkService]], Collection[Link]],
        push: Callable[[Collection[NetworkService]], None],
        journal: Journal,
        clock: Clock,
        interval_s: float,
    ) -> None:
        """*links*: where the keys of services go. *push*: their proxies get what is new, now.

        *interval_s*: between two refreshes.
        """
        self._peering = peering
        self._registry = registry
        self._source = source
        self._proofs = proofs
        self._transport_key_file = transport_key_file
        self._links = links
        self._push = push
        self._clock = clock
        self._patience_s = 2 * interval_s
        self.refusals = Refusals(journal, clock)
        self._unopenable: tuple[str, frozenset[str]] = ("", frozenset())
        """A KEK, and the keys that the HSM has not opened with it when it was last asked."""
        self._asked_boot_s: dict[str, float] = {}
        """When it was first asked whether a key's proxies have it."""

    def routes(self) -> Sequence[PeerRoute]:
        return (
            PeerRoute("PUT", WRAPS_PATH, self._answer_delivery),
            PeerRoute("POST", LOOK_PATH, self._answer_look),
            PeerRoute("POST", WAITING_PATH, self._answer_waiting),
            PeerRoute("POST", BRING_PATH, self._answer_bring),
            PeerRoute("POST", MAKE_PATH, self._answer_make),
        )

    # What this environment does itself.

    async def kek(self) -> Kek:
        """RefusedChangeError unless the KEK of today is active."""
        row = await self._registry.current_kek()
        if row is None or row.kek is None or row.state is not KekState.ACTIVE:
            state = "missing" if row is None else row.state
            raise RefusedChangeError(f"the KEK is {state}", "see `key-agent kek status`")
        return row.kek

    async def store(self, delivery: Delivery, *, sender: str) -> Stored:
        """Take in what is for us and lacked here, from the agent *sender*.

        RefusedChangeError: this environment takes none. KeySourceError.
        """
        shared = await self._peering.shared.snapshot()
        own = shared.environments.get(self._peering.environment)
        if own is None or own.state not in HAVE_KEYS:
            state = "not one of several" if own is None else own.state
            why = f"{self._peering.environment} is {state}: it stores no keys"
            self._refuse(sender, {Why.STATE: _all(delivery, why)})
            raise RefusedChangeError(why, "wait")
        try:
            kek = await self.kek()
        except RefusedChangeError as error:
            self._refuse(sender, {Why.STATE: _all(delivery, str(error))})
            raise
        if (delivery.environment, delivery.kek_id) != (self._peering.environment, kek.reference.kek_id):
            why = (
                f"it is for KEK {delivery.kek_id} of {delivery.environment}, "
                f"the one of today is {kek.reference.kek_id} of {self._peering.environment}"
            )
            failed = {Why.DESTINATION: _all(delivery, why)}
            self._refuse(sender, failed)
            return Stored(verified=(), failed=failed[Why.DESTINATION])
        return await self._take(kek, delivery, shared, own.state, sender)

    async def _take(
        self, kek: Kek, delivery: Delivery, shared: Shared, state: EnvironmentState, sender: str
    ) -> Stored:
        refused: dict[Why, dict[str, str]] = {}
        held = await self._held(kek.reference.kek_id, [key.key_id for key in delivery.keys])
        arrivals: dict[Route, list[Arrival]] = {Route.PUBLIC: [], Route.PEER: []}
        for sealed in delivery.keys:
            body = shared.deks.get(sealed.key_id)
            if (found := judge(sealed.key_id, body, own=state, held=held)) is not None:
                refused.setdefault(found[0], {})[sealed.key_id] = found[1]
            elif body is not None:
                arrivals[sealed.route].append(_arrival(sealed, body, delivery))
        self._refuse(sender, refused)
        failed = {key_id: why for keys in refused.values() for key_id, why in keys.items()}
        verified: list[str] = []
        for route, some in arrivals.items():
            if not some:
                continue
            made = await self._source.import_keys(kek, some, transport_key_file=self._transport_key_file)
            self._proofs.opened(made.keys)
            bad = {str(key_id): why for key_id, why in made.failed_keys.items()}
            self._refuse(sender, {Why.PARCEL: bad})
            failed |= bad
            stored = await self._keep(kek, made.keys, route)
            verified += stored
            left = {str(key.key_id) for key in made.keys} - set(stored)
            failed |= dict.fromkeys(left, "the signed rows have changed meanwhile")
        if verified:
            self._unopenable = (self._unopenable[0], self._unopenable[1] - set(verified))
            self._push({NetworkService.parse(shared.deks[key_id].service) for key_id in verified})
        return Stored(verified=tuple(verified), failed=failed)

    async def _held(self, kek_id: str, key_ids: Sequence[str]) -> set[str]:
        """Those with a sound wrap that the HSM has not failed to open."""
        sound = await self._registry.transact(lambda c: sound_among(c, kek_id, key_ids))
        return sound - (self._unopenable[1] if self._unopenable[0] == kek_id else frozenset())

    def _refuse(self, sender: str, refused: Mapping[Why, Mapping[str, str]]) -> None:
        for why, keys in refused.items():
            if keys:
                environment = self._peering.environment_of(sender)
                self.refusals.tell(sender, environment, why, next(iter(keys.values())), list(keys))

    async def _keep(self, kek: Kek, keys: Sequence[WrappedKey], route: Route) -> list[str]:
        now_ms = int(self._clock.wall_s() * 1000)
        own, kek_id = self._peering.environment, kek.reference.kek_id
        return await self._registry.transact(
            lambda c: (
                store_wraps(c, keys, route=route.value, now_ms=now_ms)
                if takes_keys(c, own, kek_id, HAVE_KEYS)  # not withdrawn meanwhile (rule 4)
                else []
            )
        )

    async def missing(self, look: Look) -> dict[str, str]:
        """Which keys have no sound wrap here, and why. KeySourceError: it cannot be told."""
        row = await self._registry.current_kek()
        if row is None or row.kek is None or row.reference.kek_id != look.kek_id:
            return dict.fromkeys(look.keys, f"{look.kek_id} is not the KEK of today")
        if row.state is not KekState.ACTIVE:
            return dict.fromkeys(look.keys, f"the KEK is {row.state}")
        sound = await self._registry.transact(lambda c: sound_wraps(c, look.kek_id))
        missing = {key_id: "there is no sound wrap" for key_id in look.keys if key_id not in sound}
        if look.prove:
            wanted = set(look.keys) - missing.keys()
            held = [
                key for key in await self._registry.wrapped_keys(look.kek_id) if str(key.key_id) in wanted
            ]
            failed = await self._proofs.unopenable(self._source, row.kek, held)
            missing |= {str(key_id): why for key_id, why in failed.items()}
            opened = wanted - {str(key_id) for key_id in failed}
            before = self._unopenable[1] if self._unopenable[0] == look.kek_id else frozenset[str]()
            self._unopenable = (look.kek_id, (before - opened) | {str(key_id) for key_id in failed})
        return missing

    async def waiting(self, key_ids: Collection[str]) -> dict[str, str]:
        """What is waited for here before these keys may become active; one that is not named is ready.

        Proxies that do not acknowledge are waited for as in a rotation (rotation.py, rule 3): until what they
        had is not valid any more, or 15 s where nothing seals meanwhile.
        """
        kek = await self.kek()
        sound = await self._registry.transact(lambda c: sound_wraps(c, kek.reference.kek_id))
        found = await self._registry.transact(lambda c: after_sequences(c, key_ids))
        links = self._links({NetworkService.parse(service) for service, _ in found.values()})
        now_s = self._clock.boot_s()
        asked = {key_id: self._asked_boot_s.get(key_id, now_s) for key_id in key_ids}
        self._asked_boot_s = {
            key_id: since_s
            for key_id, since_s in (self._asked_boot_s | asked).items()
            if now_s - since_s < 10 * self._patience_s
        }
        waiting: dict[str, str] = {}
        for key_id in key_ids:
            if key_id not in found or key_id not in sound:
                waiting[key_id] = "its wrap"
                self._asked_boot_s[key_id] = now_s
                continue
            service, after = found[key_id]
            late = sorted(
                link.proxy_id
                for link in links
                if str(link.owner) == service and link.accepted_sequence <= after
            )
            if late and now_s - asked[key_id] < self._patience_for(key_id):
                waiting[key_id] = f"proxies {', '.join(late)}"
        return waiting

    def _patience_for(self, key_id: str) -> float:
        shared = self._peering.view
        body = shared.deks.get(key_id)
        seals = body is not None and any(
            other.ring == body.ring and other.state is KeyState.ACTIVE for other in shared.deks.values()
        )
        return self._patience_s if seals else min(self._patience_s, UNSERVED_MS / 1000)

    def destination(self, environment: str) -> Destination:
        """Where to, as the signed rows say. RefusedChangeError: nothing may be sent there."""
        shared = self._peering.view
        body = shared.environments.get(environment)
        if body is None or body.state not in HAVE_KEYS:
            state = "unknown" if body is None else body.state
            raise RefusedChangeError(f"{environment} is {state}: it gets no keys", "`key-agent env status`")
        kek = None if body.kek_id is None else shared.keks.get(body.kek_id)
        if body.kek_id is None or kek is None or kek.state != KekState.ACTIVE:
            raise RefusedChangeError(
                f"{environment} has no active KEK", f"`key-agent kek status` at the agent of {environment}"
            )
        try:
            return Destination(
                environment_id=environment,
                kek_id=body.kek_id,
                method=WrapMethod(kek.method),
                public_key_der=b"" if kek.public_key is None else b64u_decode(kek.public_key),
                transport_key_der=_public_der(body.transport_certificate_pem),
            )
        except (FormatError, ValueError) as error:
            raise RefusedChangeError(
                f"the row of {environment} names no usable key: {error}", "`key-agent env list`"
            ) from None

    async def bring(self, environment: str, key_ids: Collection[str]) -> Stored:
        """Send keys that have a wrap here to another environment, and have it verify them.

        RefusedChangeError, KeySourceError, PeerError: what was sent before is stored there.
        """
        to, kek = self.destination(environment), await self.kek()
        held = {str(key.key_id): key for key in await self._registry.wrapped_keys(kek.reference.kek_id)}
        done = Stored(verified=(), failed={key_id: NO_WRAP_HERE for key_id in key_ids if key_id not in held})
        for some in batched([held[key_id] for key_id in key_ids if key_id in held], BATCH):
            exported = await self._source.export_keys(kek, some, [to])
            done |= Stored(
                verified=(),
                failed={str(key_id): f"at {self._peering.environment}: {why}"
                        for key_id, why in exported.failed_keys.items()},
            )  # fmt: skip
            if exported.parcels:
                done |= await self._deliver(to, exported.parcels)
        return done

    async def _deliver(self, to: Destination, parcels: Sequence[Parcel]) -> Stored:
        delivery = Delivery(
            environment=to.environment_id,
            kek_id=to.kek_id,
            keys=tuple(_sealed(parcel) for parcel in parcels),
        )
        found = await self._ask(to.environment_id, WRAPS_PATH, delivery, Stored, method="PUT")
        sent = {key.key_id for key in delivery.keys}
        told = set(found.verified) | found.failed.keys()
        if not told <= sent:
            raise PeerError("bad-answer", f"{to.environment_id} tells of keys that it was not sent")
        return found | Stored(verified=(), failed=dict.fromkeys(sent - told, "not a word about it"))

    async def make(self, wanted: Sequence[NewKey]) -> list[WrappedKey]:
        """New keys of this environment's HSM, wrapped by its KEK; in no registry yet. KeySourceError."""
        return await self._source.generate(await self.kek(), wanted)

    async def made_elsewhere(self, generator: str, wanted: Sequence[NewKey]) -> list[WrappedKey]:
        """New keys of another environment's HSM, under our KEK; in no registry yet.

        PeerError, KeySourceError, RefusedChangeError.
        """
        question = Make(wanted=tuple((str(new.owner), new.use, new.algorithm) for new in wanted))
        made = await self._ask(generator, MAKE_PATH, question, Made)
        kek = await self.kek()
        arrivals = [
            Arrival(
                parcel=_parcel(key.parcel, new.owner, kek.reference.kek_id, self._peering.environment),
                kcv=bytes.fromhex(key.kcv),
                use=new.use,
                algorithm=new.algorithm,
            )
            for new, key in zip(wanted, made.keys, strict=False)
        ]
        taken = await self._source.import_keys(kek, arrivals, transport_key_file=self._transport_key_file)
        if len(made.keys) != len(wanted) or taken.failed_keys or len(taken.keys) != len(wanted):
            why = next(iter(taken.failed_keys.values()), "not as many keys as were asked for")
            raise PeerError("bad-answer", f"{generator} has made keys that are not taken over: {why}")
        by_id = {str(key.key_id): key for key in taken.keys}
        return [by_id[key.parcel.key_id] for key in made.keys]

    # What is asked of another environment.

    async def ask_missing(self, environment: str, look: Look) -> dict[str, str]:
        """PeerError."""
        if environment == self._peering.environment:
            return await self.missing(look)
        missing: dict[str, str] = {}
        for keys in batched(look.keys, PROVEN_AT_ONCE) if look.prove else (look.keys,):
            some = msgspec.structs.replace(look, keys=keys)
            found = (await self._ask(environment, LOOK_PATH, some, Missing)).missing
            missing |= {key_id: found[key_id] for key_id in keys if key_id in found}
        return missing

    async def ask_waiting(self, environment: str, key_ids: Collection[str]) -> dict[str, str]:
        """PeerError."""
        if environment == self._peering.environment:
            return await self.waiting(key_ids)
        return (await self._ask(environment, WAITING_PATH, Ask(keys=tuple(key_ids)), Waiting)).waiting

    async def ask_to_bring(self, source: str, environment: str, key_ids: Sequence[str]) -> Stored:
        """*source* sends keys to *environment*. PeerError."""
        done = NOTHING_STORED
        for some in batched(key_ids, BATCH):
            done |= await self._ask(source, BRING_PATH, Bring(environment=environment, keys=some), Stored)
        return done

    async def _ask[T: Message](
        self, environment: str, path: str, question: Message, answer: type[T], *, method: str = "POST"
    ) -> T:
        content = await self._peering.peers.post(
            environment, path, msgspec.json.encode(question), method=method, timeout_s=PATIENCE_S
        )
        try:
            return msgspec.json.decode(content, type=answer)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise PeerError("bad-answer", f"{environment}: {error}") from None

    # Answers.

    async def _answer_delivery(self, call: PeerCall) -> bytes:
        shared = self._peering.view
        sender = self._peering.environment_of(call.agent_id)
        delivery = read_message(call, Delivery)
        if sender is None or not shared.environments[sender].state.counts:
            why = f"{call.agent_id} is of no environment that counts: it delivers nothing"
            self._refuse(call.agent_id, {Why.SENDER: _all(delivery, why)})
            raise IntegrityError(why)
        return msgspec.json.encode(await self.store(delivery, sender=call.agent_id))

    async def _answer_look(self, call: PeerCall) -> bytes:
        return msgspec.json.encode(Missing(missing=await self.missing(read_message(call, Look))))

    async def _answer_waiting(self, call: PeerCall) -> bytes:
        return msgspec.json.encode(Waiting(waiting=await self.waiting(read_message(call, Ask).keys)))

    async def _answer_bring(self, call: PeerCall) -> bytes:
        self._for_the_manager(call)
        asked = read_message(call, Bring)
        return msgspec.json.encode(await self.bring(asked.environment, asked.keys))

    async def _answer_make(self, call: PeerCall) -> bytes:
        self._for_the_manager(call)
        asked = read_message(call, Make)
        manager = self._peering.environment_of(call.agent_id)
        try:
            wanted = [
                NewKey(owner=self._own(service), use=use, algorithm=algorithm)
                for service, use, algorithm in asked.wanted
            ]
        except MisuseError as error:
            raise FormatError(str(error)) from None
        to = self.destination(str(manager))
        made = await self.make(wanted)
        exported = await self._source.export_keys(await self.kek(), made, [to])
        parcels = {str(parcel.key_id): parcel for parcel in exported.parcels}
        if len(parcels) != len(made):
            raise RefusedChangeError("keys that were just made do not open", "`key-agent doctor`")
        keys = [MadeKey(kcv=key.kcv.hex(), parcel=_sealed(parcels[str(key.key_id)])) for key in made]
        return msgspec.json.encode(Made(keys=tuple(keys)))

    def _own(self, service: str) -> NetworkService:
        owner = NetworkService.parse(service)
        if owner.tenant != self._peering.tenant:
            raise FormatError(f"{owner} is of another tenant")
        return owner

    def _for_the_manager(self, call: PeerCall) -> None:
        if not self._is_manager(call):
            raise IntegrityError(f"{call.agent_id} is not the manager's agent: it has no keys made or sent")

    def _is_manager(self, call: PeerCall) -> bool:
        found = newest_term(self._peering.view)
        if found is None or found[1].agent != call.agent_id:
            return False
        body = self._peering.view.environments.get(found[1].environment)
        return body is not None and body.state.counts


def _all(delivery: Delivery, why: str) -> dict[str, str]:
    return {key.key_id: why for key in delivery.keys}


def _arrival(sealed: SealedKey, body: DekBody, delivery: Delivery) -> Arrival:
    owner = NetworkService.parse(body.service)
    return Arrival(
        parcel=_parcel(sealed, owner, delivery.kek_id, delivery.environment),
        kcv=bytes.fromhex(body.kcv),
        use=body.use,
        algorithm=body.algorithm,
        version=body.version,
    )


def _parcel(sealed: SealedKey, owner: NetworkService, kek_id: str, environment: str) -> Parcel:
    return Parcel(
        owner=owner,
        key_id=KeyId.parse(sealed.key_id),
        kek_id=kek_id,
        environment_id=environment,
        route=sealed.route,
        sealed=sealed.sealed,
    )


def _sealed(parcel: Parcel) -> SealedKey:
    return SealedKey(key_id=str(parcel.key_id), route=parcel.route, sealed=parcel.sealed)


def _public_der(certificate_pem: str) -> bytes:
    """Of the transport key. ValueError: its environment has named something else."""
    if not certificate_pem:
        return b""
    try:
        key = x509.load_pem_x509_certificate(certificate_pem.encode()).public_key()
    except (x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise ValueError(f"its transport certificate: {error}") from None
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def read_message[T: Message](call: PeerCall, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(call.body, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise FormatError(str(error)[:200]) from None
