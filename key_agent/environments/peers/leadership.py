"""Who may write what all environments share: an appointment, or a lease in an etcd of the administrator's.

1. Whoever leads has a *term*, a number that stands in every write; an agent that has seen a higher one
   refuses it (`stale_term`). So a manager that was frozen or cut off while another followed changes nothing.
2. Appointed: the newest term in the shared registry names the manager; `env promote` writes the next one.
3. Elected: a key in etcd, made by whoever comes first, that lives as long as its maker's lease (15 s, kept
   alive every 5 s). Its create revision, which never falls, is the term.
4. Who leads counts itself out on its own boot clock, MARGIN_S before etcd may: between two there is a time at
   which nobody leads. What is in memory is never believed beyond that, however long the process was frozen.
5. A member believes an elected term only if etcd itself says that this agent made the key at that revision
   (`confirm`), now or in its history. That proves who came first, not that it is sound: the rows say that.
6. No leader, no new keys and no incidents; serving, refreshing and withdrawing need none.
7. While no environment counts none is elected: two administrators appoint one (recovery.py). It leads until
   one counts; that one is elected then.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn, override

import msgspec
import structlog

from envelope.errors import IntegrityError
from key_agent.environments.peers.etcd import EtcdClient, EtcdError, EtcdSettings
from key_agent.environments.shared.terms import Holder
from runtime.clock import Clock

log = structlog.get_logger(__name__)

MARGIN_S: Final = 2.0
_RETRY_S: Final = 1.0
_MAX_ADVANCES: Final = 10_000


class Leadership(ABC):
    """Whether this agent may write, and with which term."""

    @property
    @abstractmethod
    def term(self) -> int | None:
        """The term that this agent leads with at this moment; None if it does not."""

    @property
    @abstractmethod
    def proven_boot_s(self) -> float | None:
        """When it was last proven to others that this agent leads, on the boot clock; None: no proof but the
        registry's word.
        """

    @abstractmethod
    async def run(self) -> NoReturn:
        """Look after it, until cancelled."""


class Appointed(Leadership):
    """Rule 2. *current*: the newest term and the agent that holds it, as the registry has them."""

    def __init__(self, agent_id: str, current: Callable[[], tuple[int, str] | None]) -> None:
        self._agent_id = agent_id
        self._current = current

    @property
    @override
    def term(self) -> int | None:
        found = self._current()
        return found[0] if found is not None and found[1] == self._agent_id else None

    @property
    @override
    def proven_boot_s(self) -> float | None:
        return None

    @override
    async def run(self) -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError("unreachable: nobody sets it")


class ElectedOrAppointed(Leadership):
    """Rule 7. *appointed*: the term that administrators gave this agent while no environment counts."""

    def __init__(self, elected: Leadership, appointed: Callable[[], int | None]) -> None:
        self._elected = elected
        self._appointed = appointed

    @property
    @override
    def term(self) -> int | None:
        elected = self._elected.term
        return self._appointed() if elected is None else elected

    @property
    @override
    def proven_boot_s(self) -> float | None:
        return self._elected.proven_boot_s

    @override
    async def run(self) -> NoReturn:
        await self._elected.run()


class Candidate(msgspec.Struct, frozen=True):
    """What the key says of its maker, for people."""

    agent: str
    environment: str


class Elected(Leadership):
    """Rules 3 and 4."""

    def __init__(
        self,
        client: EtcdClient,
        settings: EtcdSettings,
        *,
        tenant: str,
        candidate: Candidate,
        clock: Clock,
        highest_term: Callable[[], int],
        may_lead: Callable[[], bool],
        elected: Callable[[int], Awaitable[None]],
    ) -> None:
        """*highest_term*: the highest that this agent has seen. *may_lead*: a healing environment does not.
        *elected* hears of the new term, in the candidate's own task; what it raises gives the term back.
        """
        self._client = client
        self._settings = settings
        self._key = f"{settings.key}/{tenant}"
        self._candidate = candidate
        self._clock = clock
        self._highest_term = highest_term
        self._may_lead = may_lead
        self._elected = elected
        self._term: int | None = None
        self._lease_id: int | None = None
        self._proven_boot_s: float | None = None
        self._is_ready = False
        """The registry knows of the term."""
        self.leader: str | None = None
        """Who led when etcd was last asked, for people."""
        self.problem: str | None = None
        """Why nobody can tell, for people."""

    @property
    @override
    def term(self) -> int | None:
        return self._term if self._is_ready and self._is_trusted() else None

    @property
    @override
    def proven_boot_s(self) -> float | None:
        return self._proven_boot_s if self._is_ready and self._term is not None else None

    def _is_trusted(self) -> bool:
        return (
            self._proven_boot_s is not None
            and self._clock.boot_s() < self._proven_boot_s + self._settings.lease_s - MARGIN_S
        )

    @override
    async def run(self) -> NoReturn:
        try:
            while True:
                try:
                    delay_s = await self._look()
                    self.problem = None
                except EtcdError as error:
                    if self.problem is None:
                        log.warning("the election cannot be held", cause=str(error))
                    self.problem, delay_s = str(error), _RETRY_S
                if self._term is not None and not self._is_trusted():
                    log.error("this agent is the manager no more", term=self._term)
                    self._forget()
                await self._clock.sleep(delay_s)
        finally:
            await self._resign()

    async def _look(self) -> float:
        """Seconds to the next look. EtcdError."""
        if self._term is not None and self._lease_id is not None:
            return await self._stay(self._lease_id)
        if not self._may_lead():
            await self._read()
            return _RETRY_S
        began_boot_s = self._clock.boot_s()
        if await self._read():
            return _RETRY_S
        lease_id = await self._client.grant(self._settings.lease_s)
        try:
            term = await self._make(lease_id)
        except EtcdError:
            await self._give_back(lease_id)
            raise
        if term is None:
            await self._give_back(lease_id)
            return _RETRY_S
        self._term, self._lease_id, self._proven_boot_s = term, lease_id, began_boot_s
        self.leader = self._candidate.agent
        log.info("this agent is the manager", term=term)
        try:
            await self._elected(term)
        except BaseException as error:
            log.error("the term cannot be used", term=term, cause=str(error))  # noqa: TRY400 - told below
            await self._resign()
            if not isinstance(error, Exception):
                raise
            return self._settings.keep_alive_s
        self._is_ready = True
        return 0.0  # that may have taken its time: stay at once

    async def _stay(self, lease_id: int) -> float:
        if not self._may_lead():
            log.warning("this agent hands its term back", term=self._term)
            await self._resign()
            return _RETRY_S
        began_boot_s = self._clock.boot_s()
        if not await self._client.keep_alive(lease_id):
            log.error("this agent is the manager no more", term=self._term)
            self._forget()
            return 0.0
        self._proven_boot_s = began_boot_s
        return self._settings.keep_alive_s

    async def _read(self) -> bool:
        """Whether somebody leads."""
        held = await self._client.read(self._key)
        if held is None:
            self.leader = None
            return False
        self.leader = _maker(held.value) or "somebody that says nothing of itself"
        return True

    async def confirm(self, holder: Holder) -> None:
        """Rule 5. IntegrityError: it was not elected. EtcdError: nobody can tell.

        Within `keep_alive_s` in all: the shared registry waits, and so does everybody who reads there.
        """
        try:
            async with asyncio.timeout(self._settings.keep_alive_s):
                held = await self._client.read(self._key)
                if held is None or held.create_revision != holder.term:
                    held = await self._client.read(self._key, revision=holder.term)
        except TimeoutError:
            raise EtcdError(
                f"etcd: its members took more than {self._settings.keep_alive_s:g} s together"
            ) from None
        if held is None or held.create_revision != holder.term or _maker(held.value) != holder.agent:
            raise IntegrityError(f"etcd has not given term {holder.term} to {holder.agent}")

    async def _make(self, lease_id: int) -> int | None:
        value = msgspec.json.encode(self._candidate)
        for _ in range(_MAX_ADVANCES):
            # Terms that were appointed before etcd came may be higher than its revisions.
            if await self._client.advance(f"{self._key}/revision") >= self._highest_term():
                break
        else:
            raise EtcdError(f"etcd: its revisions stay below term {self._highest_term()}")
        return await self._client.create(self._key, value, lease_id)

    async def _resign(self) -> None:
        lease_id = self._lease_id
        self._forget()
        if lease_id is not None:
            await self._give_back(lease_id)

    async def _give_back(self, lease_id: int) -> None:
        try:
            await self._client.revoke(lease_id)
        except EtcdError as error:  # it ends by itself
            log.info("a lease is left to end by itself", cause=str(error))

    def _forget(self) -> None:
        self._term = self._lease_id = self._proven_boot_s = None
        self._is_ready = False


def _maker(value: bytes) -> str | None:
    """Who made the key, in its own words."""
    try:
        return msgspec.json.decode(value, type=Candidate).agent
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
