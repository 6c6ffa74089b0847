"""The parts of an agent whose environment is one of several, wired; its loops, and its listener for peers.

1. Everything here exists only with a section [environments]; an agent without it runs as ever.
2. The listener opens before anything is asked of others, and closes last. Whoever stands by (another agent of
   the same environment leads) has none of it.
3. Pushing is bounded by the registry lease: what is sealed now ends with it at the latest.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from cryptography import x509

from key_agent.config import EnvironmentsSettings, Settings
from key_agent.consent import Consent
from key_agent.environments.changes.founding import FIRST_TERM, founding_rows, kek_body
from key_agent.environments.keys.proofs import Proofs
from key_agent.environments.keys.transport_key import transport_files
from key_agent.environments.peers.etcd import EtcdClient
from key_agent.environments.peers.leadership import (
    Appointed,
    Candidate,
    Elected,
    ElectedOrAppointed,
    Leadership,
)
from key_agent.environments.peers.membership import Membership
from key_agent.environments.peers.peer_api import PeerRoute, keep_current, listening, make_api
from key_agent.environments.peers.peer_routes import REFUSALS, PeerRoutes
from key_agent.environments.peers.peer_transport import PeerAddress, PeerError, PeerTransport
from key_agent.environments.peers.peer_trust import PeerTrust
from key_agent.environments.peers.peering import Peering
from key_agent.environments.peers.peers import Introduction, JoinRequest, Peers
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.recovery import appointed, is_in_other_hands
from key_agent.environments.shared.registry_key import public_text, read_or_make_registry_key
from key_agent.environments.shared.registry_key_exchange import finish_exchange
from key_agent.environments.shared.shared import SharedRegistry
from key_agent.environments.shared.shared_view import newest_term
from key_agent.journal import Journal
from key_agent.push.revocations import Revocations
from key_agent.registry.store import RefusedChangeError, Registry
from runtime.clock import Clock
from runtime.tls import ServerTls

if TYPE_CHECKING:
    from key_agent.environments.incidents.incident_parts import IncidentParts
    from key_agent.environments.keys.key_parts import KeyParts
    from key_agent.environments.peers.telling import Telling

log = structlog.get_logger(__name__)


class Environments:
    """Use `Environments.open`; loops and listener run inside `working`."""

    def __init__(
        self,
        *,
        settings: EnvironmentsSettings,
        registry: Registry,
        shared: SharedRegistry,
        transport: PeerTransport,
        trust: PeerTrust,
        tls_files: tuple[Path, Path],
        root: x509.Certificate,
        introduction: Introduction,
        state_dir: Path,
        consent: Consent,
        journal: Journal,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self.shared = shared
        self._transport = transport
        self._trust = trust
        self._tls_files = tls_files
        self._root = root
        self.state_dir = state_dir
        self._clock = clock
        self.proofs = Proofs(clock)
        self._registry_key = read_or_make_registry_key(state_dir)
        self.peers = Peers(transport, address=self._address, timeout_s=settings.request_timeout_s)
        self.peering = Peering(
            tenant=introduction.tenant,
            environment=introduction.environment,
            agent_id=introduction.agent,
            shared=shared,
            registry_key=self._registry_key,
            peers=self.peers,
            consent=consent,
            journal=journal,
            clock=clock,
            heartbeat_s=settings.heartbeat_s,
            state_dir=state_dir,
        )
        self.membership = Membership(
            peering=self.peering,
            peers=self.peers,
            introduction=introduction,
            state_dir=state_dir,
            clock=clock,
            pin=shared.pin,
        )
        self._etcd: EtcdClient | None = None
        self.peering.leadership = self._leadership()
        self.routes: list[PeerRoute] = []
        """What other parts answer peers with; to be filled before `working`."""
        self.tasks: list[tuple[str, Callable[[], Coroutine[Any, Any, object]]]] = []
        """Loops of other parts: a name and a coroutine function; to be filled before `working`."""
        self.key_parts: KeyParts | None = None
        """What makes keys for all environments and takes them in; set likewise."""
        self.incident_parts: IncidentParts | None = None
        """What deals with incidents; set by whoever composes the agent, before `working`."""
        self.telling: Telling | None = None
        """What tells the proxies; set likewise."""
        self.port: int | None = None
        """Where peers are answered, while `working`."""

    @classmethod
    async def open(
        cls,
        settings: Settings,
        *,
        registry: Registry,
        root: x509.Certificate,
        revocations: Revocations | None,
        consent: Consent,
        journal: Journal,
        clock: Clock,
    ) -> "Environments | None":
        """None without a section [environments]. RegistryError, SettingsError, OSError."""
        if settings.environments is None:
            return None
        mine = settings.agent
        await finish_exchange(registry, mine.state_dir)
        key = await asyncio.to_thread(read_or_make_registry_key, mine.state_dir)
        shared = await SharedRegistry.open(registry, key=key, state_dir=mine.state_dir)
        trust = PeerTrust(tenant=mine.tenant, root=root, revocations=revocations, clock=clock)
        made = cls(
            settings=settings.environments,
            registry=registry,
            shared=shared,
            transport=PeerTransport(
                trust=trust, certificate_file=settings.tls.certificate_file, key_file=settings.tls.key_file
            ),
            trust=trust,
            tls_files=(settings.tls.certificate_file, settings.tls.key_file),
            root=root,
            introduction=Introduction(
                tenant=mine.tenant,
                environment=mine.environment_id,
                agent=mine.id,
                registry_key=public_text(key),
            ),
            state_dir=mine.state_dir,
            consent=consent,
            journal=journal,
            clock=clock,
        )
        await made.peering.load()
        return made

    def _address(self, environment: str) -> PeerAddress:
        return self.peering.address(environment)

    async def close(self) -> None:
        """Idempotent."""
        await self._transport.close()
        if self._etcd is not None:
            await self._etcd.close()

    @property
    def is_united(self) -> bool:
        """Whether there is a set of environments that this one is part of, or to be part of."""
        return self.peering.is_united

    def lease_left_s(self) -> float | None:
        """For how long what is pushed now may be valid at most; None: no bound but the validity."""
        return self.peering.lease_left_s()

    def kek_changed(self) -> None:
        """This environment's KEK is another one: the others have to know."""
        if self.incident_parts is not None:
            self.incident_parts.reaction.wake()

    @property
    def is_elected(self) -> bool:
        """Whether an election makes the manager, and nobody's command."""
        return self._etcd is not None

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """The listener is open and the loops run while the block does. OSError: it cannot be bound."""
        answers = PeerRoutes(self.peering, self.membership)
        api = make_api(
            [*answers.table(), *self.routes],
            trust=self._trust,
            is_member=answers.is_member,
            refusals=REFUSALS,
        )
        tls = ServerTls(*self._tls_files, client_roots=[self._root])
        host, port = self._settings.host, self._settings.port
        failure: Exception | None = None
        async with listening(api, host=host, port=port, ssl_context=tls.context) as self.port:
            log.info("answers peers", host=host, port=self.port)
            async with asyncio.TaskGroup() as group:
                tasks: list[asyncio.Task[object]] = [
                    group.create_task(self.peering.run(), name="environments:peering"),
                    group.create_task(self.membership.run(), name="environments:membership"),
                    group.create_task(
                        keep_current(tls, *self._tls_files, client_roots=[self._root], clock=self._clock),
                        name="environments:certificate",
                    ),
                    *(group.create_task(run(), name=f"environments:{name}") for name, run in self.tasks),
                ]
                try:
                    yield
                except Exception as error:  # noqa: BLE001 - raised again, outside of the group
                    failure = error
                finally:
                    for task in tasks:
                        task.cancel()
        self.port = None
        if failure is not None:
            raise failure

    # What commands need.

    async def request(
        self, *, url: str, region: str, geo: str, address: str, load_balancer_name: str
    ) -> JoinRequest:
        """What this environment says of itself. RefusedChangeError without a KEK; OSError."""
        row = await self._registry.current_kek()
        if row is None or row.kek is None:
            raise RefusedChangeError("there is no KEK yet", "`key-agent kek create` makes it in the HSM")
        certificate_file, _ = await asyncio.to_thread(transport_files, self.state_dir)
        certificate = await asyncio.to_thread(certificate_file.read_text, encoding="ascii")
        unsigned = JoinRequest(
            introduction=self.membership.introduction,
            url=url,
            region=region,
            geo=geo,
            address=address,
            load_balancer_name=load_balancer_name,
            kms_type=row.kek.method,
            transport_certificate_pem=certificate,
            kek_id=row.reference.kek_id,
            kek=kek_body(row, self.peering.environment),
        )
        return unsigned.signed_by(self._registry_key)

    async def found(self, request: JoinRequest, *, lease_s: int, now_ms: int) -> None:
        """Write the first shared rows. RefusedChangeError while a rotation is under way."""
        rows = await self._registry.transact(
            lambda c: founding_rows(c, request=request, lease_s=lease_s, now_ms=now_ms)
        )

        def change(draft: Draft) -> None:
            for kind, row_id, body in rows:
                draft.put(kind, row_id, body)

        await self.shared.write(change, term=FIRST_TERM, now_ms=now_ms)

    async def catch_up(self, name: str) -> bool:
        """Take over what *name* has, if it is newer. False: it did not answer."""
        try:
            await self.peering.ask(name)
        except PeerError as error:
            log.warning("not caught up with", peer=name, cause=str(error))
            return False
        return True

    # Who leads.

    def _leadership(self) -> Leadership:
        mine = self._settings.etcd
        if mine is None:
            return Appointed(self.peering.agent_id, self._current)
        self._etcd = EtcdClient(mine)
        elected = Elected(
            self._etcd,
            mine,
            tenant=self.peering.tenant,
            candidate=Candidate(self.peering.agent_id, self.peering.environment),
            clock=self._clock,
            highest_term=lambda: max(self.peering.view.term, self.peering.lease.newest.term),
            may_lead=self._may_lead,
            elected=self._elected,
        )
        self.shared.confirm = elected.confirm
        return ElectedOrAppointed(elected, self._appointed)

    def _appointed(self) -> int | None:
        """The term that this agent was given while no environment counts, as long as none does."""
        found = appointed(self.peering.view)
        is_ours = found is not None and self._current() == (found.term, self.peering.agent_id)
        return found.term if found is not None and is_ours else None

    def _current(self) -> tuple[int, str] | None:
        found = newest_term(self.peering.view)
        if found is None or is_in_other_hands(self.peering.view):
            return None
        return found[0], found[1].agent

    def _may_lead(self) -> bool:
        own = self.peering.view.environments.get(self.peering.environment)
        may_begin = own is not None and own.state.counts and not own.registry_key_exposed
        return may_begin and self.peering.tampered is None

    async def _elected(self, term: int) -> None:
        """Write the new term: first what the others have."""
        await asyncio.gather(*map(self.catch_up, self.peering.others()))
        await self.shared.begin_term(term, cause="elected by etcd", now_ms=int(self._clock.wall_s() * 1000))
        await self.peering.changed()
