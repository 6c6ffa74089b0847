"""How an environment becomes one of the set: it asks, an administrator of the manager says yes.

1. Two administrators, two consoles. At the new environment `env join` names the manager's agent and the
   fingerprint of its registry key; at the manager `env add` names the fingerprint of the new one's. Each
   reads the other's from the other console: nothing is trusted on first sight.
2. The new environment asks again and again until it is added; who asks is kept in the manager's memory alone,
   bounded, and forgotten when it stops asking.
3. An environment that joins has no keys of its own: they would be unknown to the others. Its KEK it has.
4. From the moment it is added it is told everything, its KEK wraps every key, and only when all of them are
   proven there does it serve.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import msgspec
import structlog

from envelope.errors import FormatError, IntegrityError
from key_agent.environments.peers.peer_transport import PeerAddress, PeerError
from key_agent.environments.peers.peering import Peering
from key_agent.environments.peers.peers import Introduction, JoinAnswer, JoinRequest, Peers
from key_agent.environments.shared.registry_key import fingerprint_of, same_fingerprint
from key_agent.refresh import wait_until
from runtime.clock import Clock
from runtime.files import replace_file

log = structlog.get_logger(__name__)

MAX_WAITING: Final = 16
FORGET_S: Final = 60.0
"""Who has not asked for so long is not waiting any more."""
_ASK_S: Final = 1.0
JOINING_NAME: Final = "joining.json"


class Joining(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What this environment waits for; in a file, so that a restart goes on with it."""

    manager_url: str
    manager_agent: str
    manager_key: str
    """base64url of the registry key whose fingerprint the administrator has compared."""
    request: JoinRequest


@dataclass(frozen=True, slots=True)
class Waiting:
    """An environment that asks to be added."""

    request: JoinRequest
    asked_boot_s: float


class Membership:
    def __init__(
        self,
        *,
        peering: Peering,
        peers: Peers,
        introduction: Introduction,
        state_dir: Path,
        clock: Clock,
        pin: Callable[[str, str], None],
    ) -> None:
        """*pin*: have the shared registry believe this agent's registry key (public, base64url)."""
        self._peering = peering
        self._peers = peers
        self.introduction = introduction
        self._file = state_dir / JOINING_NAME
        self._clock = clock
        self._pin = pin
        self._wake = asyncio.Event()
        self._waiting: dict[str, Waiting] = {}
        self.joining = self._read()
        self.problem: str | None = None
        """Why it is not added yet, for people."""
        if self.joining is not None:
            pin(self.joining.manager_agent, self.joining.manager_key)

    # The side that is asked.

    def asked(self, agent_id: str, request: JoinRequest) -> JoinAnswer:
        """*agent_id*, proven by its certificate, asks. IntegrityError: it speaks for somebody else."""
        told = request.introduction
        if told.tenant != self.introduction.tenant or told.agent != agent_id:
            raise IntegrityError(f"{agent_id} asks in the name of {told.tenant} and agent {told.agent}")
        request.check()
        known = self._peering.view.environments.get(told.environment)
        is_added = known is not None and known.registry_key == told.registry_key
        if not is_added:
            self._forget_old()
            if told.environment not in self._waiting:
                if len(self._waiting) >= MAX_WAITING:
                    raise IntegrityError(f"{MAX_WAITING} environments wait already")
                log.warning(
                    "an environment asks to be added",
                    environment=told.environment,
                    agent=agent_id,
                    fingerprint=fingerprint_of(told.registry_key),
                )
            self._waiting[told.environment] = Waiting(request, self._clock.boot_s())
        return JoinAnswer(is_added=is_added, introduction=self.introduction)

    def waiting(self) -> dict[str, Waiting]:
        """Who asks, by environment."""
        self._forget_old()
        return dict(self._waiting)

    def added(self, environment: str) -> None:
        """It waits no more."""
        self._waiting.pop(environment, None)

    def _forget_old(self) -> None:
        oldest_s = self._clock.boot_s() - FORGET_S
        for name in [name for name, one in self._waiting.items() if one.asked_boot_s < oldest_s]:
            del self._waiting[name]

    # The side that asks.

    async def begin(self, manager: PeerAddress, fingerprint: str, request: JoinRequest) -> Introduction:
        """Ask *manager*, and go on asking. PeerError; IntegrityError: it is not whom the administrator means.

        OSError: what is asked for could not be kept.
        """
        found = await self._peers.introduction(manager)
        try:
            is_meant = same_fingerprint(fingerprint, found.registry_key)
        except FormatError:
            is_meant = False
        if not is_meant or found.agent != manager.agent_id or found.tenant != self.introduction.tenant:
            raise IntegrityError(
                f"the registry key of {manager.agent_id} at {manager.url} has another fingerprint than "
                "the one that was given: compare it with `key-agent env identity` there"
            )
        joining = Joining(
            manager_url=manager.url,
            manager_agent=manager.agent_id,
            manager_key=found.registry_key,
            request=request,
        )
        await asyncio.to_thread(replace_file, self._file, msgspec.json.encode(joining))
        self._pin(joining.manager_agent, joining.manager_key)
        self.joining = joining
        await self._ask(joining)
        self._wake.set()
        return found

    async def run(self) -> NoReturn:
        """Ask until it is added."""
        while True:
            if (joining := self.joining) is None:
                await wait_until(self._clock, self._wake, None)
                continue
            if self._peering.environment in self._peering.view.environments:
                self.joining = self.problem = None
                self._file.unlink(missing_ok=True)
                continue
            try:
                await self._ask(joining)
            except PeerError as error:
                if self.problem is None:
                    log.warning("the manager does not answer", cause=str(error))
                self.problem = str(error)
            await wait_until(self._clock, self._wake, self._clock.boot_s() + _ASK_S)

    async def _ask(self, joining: Joining) -> None:
        manager = PeerAddress(joining.manager_url, joining.manager_agent)
        answer = await self._peers.ask_to_join(manager, joining.request)
        if answer.introduction.registry_key != joining.manager_key:
            raise PeerError("identity", f"{manager.agent_id} has another registry key now")
        waits = "it waits for `key-agent env add` at the manager"
        self.problem = None if answer.is_added else waits

    def _read(self) -> Joining | None:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Joining)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            log.error("env join has to be repeated", file=str(self._file), cause=str(error))  # noqa: TRY400
            return None
