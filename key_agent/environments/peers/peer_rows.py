"""Rows on their way between this agent and the others': pulled, brought, offered.

1. However many there are: nobody waits for them who asks whether an agent is there (peering.py). Each agent's
   are moved by a task of its own.
2. One agent at a time is asked for rows, as all have the same. Who is slow has that turn alone for TURN_S,
   and gives it back after half a registry lease at the latest: what it claims counts until then.
3. Rows are brought to an agent once, whoever wants that, and whoever stops waiting for it.
4. Before many rows their agent gets a word of what they make of its environment (forewords.py).
5. What is not given, or not signed as it must be, refutes that there is something newer.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final, Protocol

import structlog

from envelope.errors import IntegrityError, SealgateError
from key_agent.environments.peers.own_word import Notice
from key_agent.environments.peers.peer_sights import Sights
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.peers.peers import Ack, Peers
from key_agent.environments.peers.standing import lease_s_of
from key_agent.environments.shared.documents import Delta, Kind
from key_agent.environments.shared.registry_lease import Position, RegistryLease
from key_agent.environments.shared.shared import SharedRegistry
from key_agent.environments.shared.shared_errors import EpochGapError, StaleTermError
from key_agent.environments.shared.shared_view import Shared
from key_agent.journal import Journal
from key_agent.registry.database import RegistryError

log = structlog.get_logger(__name__)

TURN_S: Final = 3.0
MANY: Final = 200
"""Rows that take longer than a word before them."""
_BRING_ATTEMPTS: Final = 4
_LEASE_SHARE: Final = 0.5


class Party(Protocol):
    """What rows are moved for: this agent among the others (peering.py)."""

    shared: SharedRegistry
    peers: Peers
    lease: RegistryLease
    sights: Sights
    notices: dict[str, Notice]

    @property
    def view(self) -> Shared: ...

    @property
    def position(self) -> Position: ...

    async def apply(self, delta: Delta) -> None: ...

    def environment_of(self, agent_id: str) -> str | None: ...

    def is_appointed(self, name: str) -> bool: ...


class PeerRows:
    def __init__(self, peering: Party, journal: Journal) -> None:
        self._peering = peering
        self._journal = journal
        self._pulling = asyncio.Lock()
        self._claims: dict[str, bool] = {}
        """Who claims to have something newer; True: of another history, so all of it has to be seen."""
        self._bringing: dict[str, asyncio.Task[None]] = {}

    @property
    def patience_s(self) -> float:
        """For all rows of one agent, however slowly they come."""
        return _LEASE_SHARE * lease_s_of(self._peering.view)

    def claimed(self, name: str, *, is_other_history: bool) -> None:
        """*name* says that it has something newer."""
        self._claims[name] = is_other_history

    async def settle(self, name: str) -> None:
        """Have what *name* claims to have. PeerError, RegistryError; its lies refute its claim (rule 5)."""
        is_other_history = self._claims.pop(name, None)
        if is_other_history is None:
            return
        async with self._turn():
            peering = self._peering
            if is_other_history:
                await self._take_over(name, 0)
                return
            sight = peering.sights.get(name)
            if sight is not None and sight.position is not None and sight.position <= peering.position:
                return  # another one has brought it meanwhile
            await self._take_over(name, peering.view.epoch)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        has_turn = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TURN_S):
                has_turn = await self._pulling.acquire()
        try:
            yield
        finally:
            if has_turn:
                self._pulling.release()

    async def _take_over(self, name: str, epoch: int) -> None:
        """What *name* has after *epoch*. PeerError, RegistryError."""
        peering, lease = self._peering, self._peering.lease
        try:
            delta = await peering.peers.since(name, epoch, at_most_s=self.patience_s)
            try:
                await peering.apply(delta)
            except EpochGapError:
                if epoch == 0:
                    raise
                await peering.apply(await peering.peers.since(name, 0, at_most_s=self.patience_s))
        except (StaleTermError, EpochGapError) as error:
            lease.forget(name)
            raise PeerError("claim", f"{name} has nothing newer after all: {error}") from None
        except SealgateError as error:
            if isinstance(error, RegistryError):
                raise
            lease.forget(name)  # what is not given is not there, however often it is claimed
            if isinstance(error, PeerError):
                raise
            log.error(  # noqa: TRY400 - expected of a breached one
                "rows of another environment are not as they must be", peer=name, cause=str(error)
            )
            self._journal.note("peer-refused", outcome="failed", peer=name, reason=str(error))
            raise PeerError("claim", f"{name}: {error}") from None

    async def offered(self, delta: Delta, agent_id: str) -> Ack:
        """*agent_id*, a member's agent, brings *delta*. StaleTermError and what `apply` raises but for a gap,
        which is an answer.

        One that does not count brings nothing but a new term of its own, which has to show that it counts, or
        that none does (recovery.py).
        """
        peering = self._peering
        name = peering.environment_of(agent_id)
        body = None if name is None else peering.view.environments.get(name)
        begins = delta.signer == agent_id and delta.term > peering.view.term
        is_withdrawn = body is not None and (not body.state.counts or name in peering.notices)
        if name is not None and is_withdrawn and not begins and not peering.is_appointed(name):
            raise IntegrityError(f"{name} is withdrawn: it brings nothing")
        try:
            await peering.apply(delta)
        except EpochGapError:
            return Ack(*peering.position, applied=False)
        return Ack(*peering.position, applied=True)

    async def bring(self, name: str) -> None:
        """What *name* does not have yet, until it has it (rule 3). PeerError, RegistryError."""
        running = self._bringing.get(name)
        if running is None or running.done():
            running = asyncio.create_task(self._bring(name), name=f"bring:{name}")
            running.add_done_callback(_looked_at)
            self._bringing[name] = running
        await asyncio.shield(running)

    async def stop(self) -> None:
        """Nothing is on its way any more."""
        running = [task for task in self._bringing.values() if not task.done()]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    async def _bring(self, name: str) -> None:
        peering = self._peering
        sight = peering.sights.get(name)
        theirs = Position(0, 0) if sight is None or sight.position is None else sight.position
        if theirs == peering.position:
            return
        # A history that ours did not follow has to be replaced, not continued.
        epoch = theirs.epoch if theirs < peering.position and theirs.term == peering.position.term else 0
        for _ in range(_BRING_ATTEMPTS):
            delta = await peering.shared.since(epoch)
            if len(delta.rows) >= MANY:
                await self._forewarn(name, delta)
            ack = await peering.peers.send_delta(name, delta)
            theirs = Position(ack.term, ack.epoch)
            peering.sights.stands(name, theirs)
            if ack.applied and theirs >= peering.position:
                return
            epoch = theirs.epoch if theirs.epoch <= peering.position.epoch else 0
        raise PeerError("gap", f"{name} stays at epoch {theirs.epoch}")

    async def _forewarn(self, name: str, delta: Delta) -> None:
        for row in delta.rows:
            if row.key == (Kind.ENVIRONMENT, name):
                with contextlib.suppress(PeerError):  # the rows follow, and say it too
                    await self._peering.peers.forewarn(name, row)


def _looked_at(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        task.exception()  # whoever waits has it; nobody has to
