"""How a key comes to stand under another environment's KEK, and what proves that it does.

1. Key material goes from worker to worker, sealed (sources/parcels.py); agents and network see parcels. It
   is sent to an environment whose row is signed and whose state lets it have keys, and to nobody else: a
   healing environment is given nothing (system B, claim 7).
2. What is received is taken in by intake.py; whether proxies have it is said by readiness.py.
3. Only the manager may have keys made, or sent on to a third environment. Anybody who counts may deliver.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import batched
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from envelope.base64url import b64u_decode
from envelope.errors import FormatError, IntegrityError, MisuseError
from envelope.keys import NetworkService
from key_agent.environments.keys.deliveries import Why
from key_agent.environments.keys.intake import Intake, all_of
from key_agent.environments.keys.proofs import Proofs
from key_agent.environments.keys.readiness import Readiness
from key_agent.environments.keys.wrap_messages import (
    BATCH,
    NOTHING_STORED,
    Ask,
    Bring,
    Delivery,
    Look,
    Made,
    MadeKey,
    Make,
    Message,
    Missing,
    Stored,
    Waiting,
    parcel_of,
    read_message,
    sealed_key,
)
from key_agent.environments.peers.peer_api import PeerCall, PeerRoute
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.peers.peering import Peering
from key_agent.environments.peers.peers import WRAPS_PATH
from key_agent.environments.shared.shared_view import newest_term
from key_agent.environments.states import HAVE_KEYS
from key_agent.journal import Journal
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.model import Link
from key_agent.registry.states import KekState
from key_agent.registry.store import Registry
from key_agent.sources.source import Arrival, Destination, KeySource, NewKey, Parcel, WrapMethod, WrappedKey
from runtime.clock import Clock

LOOK_PATH: Final = f"{WRAPS_PATH}/missing"
WAITING_PATH: Final = f"{WRAPS_PATH}/waiting"
BRING_PATH: Final = f"{WRAPS_PATH}/bring"
MAKE_PATH: Final = f"{WRAPS_PATH}/make"
PATIENCE_S: Final = 60.0
"""For one batch: an HSM may take 10 s, and restart its worker once."""
PROVEN_AT_ONCE: Final = 2000
"""Keys that a peer has to have opened in one request: within PATIENCE_S, by an HSM that opens 40 a second."""
NO_WRAP_HERE: Final = "it has no wrap there"


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
        self._transport_key_file = transport_key_file
        self.intake = Intake(
            peering=peering,
            registry=registry,
            source=source,
            proofs=proofs,
            transport_key_file=transport_key_file,
            push=push,
            journal=journal,
            clock=clock,
        )
        self._readiness = Readiness(
            peering=peering, registry=registry, links=links, clock=clock, interval_s=interval_s
        )

    def routes(self) -> Sequence[PeerRoute]:
        return (
            PeerRoute("PUT", WRAPS_PATH, self._answer_delivery),
            PeerRoute("POST", LOOK_PATH, self._answer_look),
            PeerRoute("POST", WAITING_PATH, self._answer_waiting),
            PeerRoute("POST", BRING_PATH, self._answer_bring),
            PeerRoute("POST", MAKE_PATH, self._answer_make),
        )

    # What this environment sends.

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
        to, kek = self.destination(environment), await self._registry.active_kek()
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
            keys=tuple(sealed_key(parcel) for parcel in parcels),
        )
        found = await self._ask(to.environment_id, WRAPS_PATH, delivery, Stored, method="PUT")
        sent = {key.key_id for key in delivery.keys}
        told = set(found.verified) | found.failed.keys()
        if not told <= sent:
            raise PeerError("bad-answer", f"{to.environment_id} tells of keys that it was not sent")
        return found | Stored(verified=(), failed=dict.fromkeys(sent - told, "not a word about it"))

    async def make(self, wanted: Sequence[NewKey]) -> list[WrappedKey]:
        """New keys of this environment's HSM, wrapped by its KEK; in no registry yet. KeySourceError."""
        return await self._source.generate(await self._registry.active_kek(), wanted)

    async def made_elsewhere(self, generator: str, wanted: Sequence[NewKey]) -> list[WrappedKey]:
        """New keys of another environment's HSM, under our KEK; in no registry yet.

        PeerError, KeySourceError, RefusedChangeError.
        """
        question = Make(wanted=tuple((str(new.owner), new.use, new.algorithm) for new in wanted))
        made = await self._ask(generator, MAKE_PATH, question, Made)
        kek = await self._registry.active_kek()
        arrivals = [
            Arrival(
                parcel=parcel_of(key.parcel, new.owner, kek.reference.kek_id, self._peering.environment),
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
            return await self.intake.missing(look)
        missing: dict[str, str] = {}
        for keys in batched(look.keys, PROVEN_AT_ONCE) if look.prove else (look.keys,):
            some = msgspec.structs.replace(look, keys=keys)
            found = (await self._ask(environment, LOOK_PATH, some, Missing)).missing
            missing |= {key_id: found[key_id] for key_id in keys if key_id in found}
        return missing

    async def ask_waiting(self, environment: str, key_ids: Collection[str]) -> dict[str, str]:
        """PeerError."""
        if environment == self._peering.environment:
            return await self._readiness.waiting(key_ids)
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
            self.intake.refuse(call.agent_id, {Why.SENDER: all_of(delivery, why)})
            raise IntegrityError(why)
        return msgspec.json.encode(await self.intake.store(delivery, sender=call.agent_id))

    async def _answer_look(self, call: PeerCall) -> bytes:
        return msgspec.json.encode(Missing(missing=await self.intake.missing(read_message(call, Look))))

    async def _answer_waiting(self, call: PeerCall) -> bytes:
        return msgspec.json.encode(
            Waiting(waiting=await self._readiness.waiting(read_message(call, Ask).keys))
        )

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
        exported = await self._source.export_keys(await self._registry.active_kek(), made, [to])
        parcels = {str(parcel.key_id): parcel for parcel in exported.parcels}
        if len(parcels) != len(made):
            raise RefusedChangeError("keys that were just made do not open", "`key-agent doctor`")
        keys = [MadeKey(kcv=key.kcv.hex(), parcel=sealed_key(parcels[str(key.key_id)])) for key in made]
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


def _public_der(certificate_pem: str) -> bytes:
    """Of the transport key. ValueError: its environment has named something else."""
    if not certificate_pem:
        return b""
    try:
        key = x509.load_pem_x509_certificate(certificate_pem.encode()).public_key()
    except (x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise ValueError(f"its transport certificate: {error}") from None
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
