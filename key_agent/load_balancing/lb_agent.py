"""`key-agent lb-agent`: beside HAProxy, tells it which servers may be used, and the agents that it knows.

1. It looks at every agent and every server all the time; a check of HAProxy's is answered from memory.
2. What it has acted on it acknowledges to every agent: rejoining waits for that (system B, claim 7). An
   acknowledgement is sent only after every later check will be answered by the new state.
3. Nothing here decides anything: states are the signed rows', answers answers.py's.
4. Whom it believes is kept in a file: a restart does not bring back a manager that was followed by another.
5. Whom it does not believe, and why, stands in the log and in the answer to STATUS_QUESTION (sights.py).
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

import aiohttp
import msgspec
import structlog
from cryptography import x509

from envelope.errors import FormatError, IntegrityError
from key_agent.environments.incidents.acknowledgements import LB_ACK_PATH, LbAck
from key_agent.environments.peers.peer_transport import PeerAddress, PeerError, PeerTransport
from key_agent.environments.peers.peer_trust import PeerTrust
from key_agent.environments.peers.peers import REGISTRY_PATH
from key_agent.environments.shared.documents import decode_delta, encode_delta
from key_agent.load_balancing.answers import (
    FULL_WEIGHT,
    Report,
    answer,
    drains_by_itself,
    is_up,
    smoothed,
    weights,
)
from key_agent.load_balancing.following import NEVER_S, Follower
from key_agent.load_balancing.settings import AgentAddress, Rule, Server, Settings, manager_of
from key_agent.load_balancing.sights import (
    STATUS_QUESTION,
    AgentSight,
    AgentSights,
    LbStatus,
    ServerSight,
    Word,
)
from key_agent.push.revocations import Revocations
from runtime.clock import Clock
from runtime.files import replace_file

log = structlog.get_logger(__name__)

_AGENT_TIMEOUT_S: Final = 3.0
_STATUS_TIMEOUT_S: Final = 1.0
_SILENT_S: Final = 2.0
"""A server whose last answer is older than that says nothing."""
_ACK_S: Final = 2.0
_CHECK_S: Final = 1.0
_REVOCATIONS_S: Final = 5.0
_MAX_NAME_BYTES: Final = 128
_MAX_STATUS_BYTES: Final = 64 << 10
_MAX_REASON_CHARS: Final = 200
_SILENCE: Final = (aiohttp.ClientError, OSError, TimeoutError, ValueError, RecursionError)


class _Status(msgspec.Struct):
    serves: bool
    tenants: dict[str, "_TenantStatus"] = {}


class _TenantStatus(msgspec.Struct):
    serves: bool = False
    state: str = "untold"
    reason: str | None = None


class StateFileError(Exception):
    """What an earlier life has kept cannot be read: nobody knows whom to believe."""


class LbAgent:
    """`run` until cancelled; `port` is known while it runs."""

    def __init__(self, settings: Settings, *, root: x509.Certificate, clock: Clock) -> None:
        """StateFileError: what an earlier life has kept cannot be read."""
        mine = settings.lb_agent
        self._settings = settings
        self._clock = clock
        manager = manager_of(settings)
        self._follower = Follower(
            mine.tenant,
            agents=[agent.id for agent in settings.agents],
            manager=(manager.id, manager.registry_key),
        )
        self._kept = _remembered(self._follower, mine.rows_file)
        self._keeping = asyncio.Lock()
        path = mine.revocation_list_file
        self._revocations = None if path is None else Revocations(path, root)
        self._transport = PeerTransport(
            trust=PeerTrust(tenant=mine.tenant, root=root, revocations=self._revocations, clock=clock),
            certificate_file=mine.certificate_file,
            key_file=mine.key_file,
        )
        self._reports: dict[str, tuple[Report, float]] = {}
        self._latencies_s: dict[str, float] = {}
        self._lines: dict[str, str] = {}
        self._sights = AgentSights(agent.id for agent in settings.agents)
        self._stale: str | None = None
        self._acked: dict[str, tuple[int, int]] = {}
        self.port = 0

    async def run(self, *, started: Callable[[], None] | None = None) -> NoReturn:
        """OSError: the listener cannot be opened."""
        mine = self._settings.lb_agent
        server = await asyncio.start_server(self._check, mine.host, mine.port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            async with (
                server,
                aiohttp.ClientSession(
                    timeout=aiohttp.ClientTimeout(total=_STATUS_TIMEOUT_S),
                    trust_env=False,
                    cookie_jar=aiohttp.DummyCookieJar(),
                ) as session,
                asyncio.TaskGroup() as group,
            ):
                for agent in self._settings.agents:
                    group.create_task(self._follow(agent), name=f"lb:agent:{agent.id}")
                    group.create_task(self._acknowledge(agent), name=f"lb:ack:{agent.id}")
                for one in self._settings.servers:
                    group.create_task(self._look(session, one), name=f"lb:server:{one.name}")
                group.create_task(self._refresh_revocations(), name="lb:revocations")
                if started is not None:
                    started()
        finally:
            await self._transport.close()
        raise AssertionError("unreachable: the loops above do not end")

    # ---- answering

    async def _check(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One check of HAProxy's: the server's name in a line, then the answer."""
        with contextlib.suppress(OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
            async with asyncio.timeout(_CHECK_S):
                line = await reader.readuntil(b"\n")
                name = line[:_MAX_NAME_BYTES].decode("ascii").strip()
                if name == STATUS_QUESTION:
                    writer.write(msgspec.json.encode(self.status()) + b"\n")
                else:
                    writer.write(self.line(name).encode("ascii"))
                await writer.drain()
        writer.close()

    def line(self, name: str) -> str:
        """What is answered for the server *name* at this moment."""
        server = next((one for one in self._settings.servers if one.name == name), None)
        made = self._answer(name, server)
        if self._lines.get(name) != made and server is not None:
            log.info("answers HAProxy", server=name, answer=made.strip())
            self._lines[name] = made
        return made

    def _answer(self, name: str, server: Server | None) -> str:
        state = None if server is None else self._follower.state_of(server.environment)
        report, stale = self._report(name), self.stale()
        if stale != self._stale:
            self._stale = stale
            log.log(logging.INFO if stale is None else logging.ERROR, "what the rows say of now", stale=stale)
        is_last = drains_by_itself(state, report) and not any(
            is_up(
                answer(
                    self._follower.state_of(one.environment), self._report(one.name), is_fresh=stale is None
                )
            )
            for one in self._settings.servers
            if one.name != name
        )
        return answer(state, report, is_fresh=stale is None, weight=self._weight(name), is_last=is_last)

    def stale(self) -> str | None:
        """Why the rows are not of now; None: they are."""
        now_s, follower = self._clock.boot_s(), self._follower
        heard_s, proven_s = follower.heard_boot_s(), follower.proven_boot_s()
        if heard_s == NEVER_S:
            return "no agent's rows were believed since this program began"
        if now_s - heard_s > self._settings.lb_agent.stale_s:
            return f"no agent has answered with these rows for {self._settings.lb_agent.stale_s:g} s"
        if now_s - proven_s > follower.lease_s:
            return f"no majority of the environments was heard for {follower.lease_s:g} s"
        return None

    def status(self) -> LbStatus:
        """All of it, for people."""
        now_s = self._clock.boot_s()
        term, epoch = self._follower.position
        heard = self._follower.heard
        return LbStatus(
            load_balancer=self._settings.lb_agent.id,
            term=term,
            epoch=epoch,
            stale=self.stale(),
            agents=tuple(
                AgentSight(
                    agent=agent.id,
                    word=self._sights.word(agent.id)[0],
                    cause=self._sights.word(agent.id)[1],
                    heard_s=round(now_s - heard[agent.id], 1) if agent.id in heard else None,
                )
                for agent in self._settings.agents
            ),
            servers=tuple(
                ServerSight(
                    server=one.name,
                    environment=one.environment,
                    state=self._follower.state_of(one.environment),
                    says=None if (report := self._report(one.name)) is None else report.state,
                    reason=None if report is None else report.reason,
                    answer=self.line(one.name).strip(),
                )
                for one in self._settings.servers
            ),
        )

    def _report(self, name: str) -> Report | None:
        report, at_s = self._reports.get(name, (None, 0.0))
        return report if self._clock.boot_s() - at_s <= _SILENT_S + self._settings.lb_agent.poll_s else None

    def _weight(self, name: str) -> int:
        if self._settings.frontend.rule is not Rule.LATENCY:
            return FULL_WEIGHT
        sound = {
            server: latency_s
            for server, latency_s in self._latencies_s.items()
            if (report := self._report(server)) is not None and report.serves
        }
        return weights(sound).get(name, FULL_WEIGHT)

    # ---- looking

    async def _follow(self, agent: AgentAddress) -> NoReturn:
        address, everything = PeerAddress(agent.url, agent.id), False
        while True:
            began_s = self._clock.boot_s()
            epoch = 0 if everything else self._follower.needs()
            try:
                content = await self._transport.request(
                    address, "GET", f"{REGISTRY_PATH}?after={epoch}", timeout_s=_AGENT_TIMEOUT_S
                )
                delta = decode_delta(content)
                self._follower.take(delta, agent=agent.id, asked_boot_s=began_s)
                await self._keep()
                everything = False
                self._sights.note(agent.id, Word.BELIEVED)
            except PeerError as error:
                self._sights.note(agent.id, Word.UNREACHED, str(error))
            except (FormatError, IntegrityError) as error:
                if not everything:
                    everything = True  # another history: all of it
                    continue
                self._sights.note(agent.id, Word.DOUBTED, str(error))
            await self._clock.sleep(self._settings.lb_agent.poll_s)

    async def _keep(self) -> None:
        """Rule 4, before anything that rests on it is answered by a later life."""
        async with self._keeping:
            anchor = self._follower.anchor()
            if anchor == self._kept:
                return
            content = encode_delta(self._follower.everything())
            try:
                await asyncio.to_thread(replace_file, self._settings.lb_agent.rows_file, content)
            except OSError as error:
                log.error("what was learned cannot be kept", cause=str(error))  # noqa: TRY400 - said again
                return
            self._kept = anchor

    async def _refresh_revocations(self) -> NoReturn:
        while True:
            await self._clock.sleep(_REVOCATIONS_S)
            if self._revocations is not None:
                await asyncio.to_thread(self._revocations.refresh)

    async def _look(self, session: aiohttp.ClientSession, server: Server) -> NoReturn:
        tenant = self._settings.lb_agent.tenant
        while True:
            began_s = self._clock.boot_s()
            with contextlib.suppress(*_SILENCE):
                url = f"{server.status_url}/v1/env/status"
                async with session.get(url, allow_redirects=False) as found:
                    content = await found.content.read(_MAX_STATUS_BYTES)
                took_s = self._clock.boot_s() - began_s
                status = msgspec.json.decode(content, type=_Status)
                own = status.tenants.get(tenant, _TenantStatus())
                self._latencies_s[server.name] = smoothed(self._latencies_s.get(server.name), took_s)
                report = Report(
                    serves=own.serves, state=own.state, latency_s=took_s, reason=_shown(own.reason)
                )
                self._reports[server.name] = (report, self._clock.boot_s())
            await self._clock.sleep(self._settings.lb_agent.poll_s)

    async def _acknowledge(self, agent: AgentAddress) -> NoReturn:
        address, last_s = PeerAddress(agent.url, agent.id), float("-inf")
        while True:
            position, now_s = self._follower.position, self._clock.boot_s()
            is_new = self._acked.get(agent.id) != position
            if position > (0, 0) and (is_new or now_s - last_s >= _ACK_S) and self.stale() is None:
                ack = LbAck(
                    load_balancer=self._settings.lb_agent.id,
                    term=position[0],
                    epoch=position[1],
                    answers={one.name: self.line(one.name).strip() for one in self._settings.servers[:64]},
                )
                with contextlib.suppress(PeerError):
                    await self._transport.request(
                        address, "POST", LB_ACK_PATH, msgspec.json.encode(ack), timeout_s=_AGENT_TIMEOUT_S
                    )
                    self._acked[agent.id], last_s = position, now_s
            await self._clock.sleep(self._settings.lb_agent.poll_s / 2)


def _shown(reason: str | None) -> str | None:
    """What a server gives as its reason, as far as a terminal should see it."""
    return None if reason is None else "".join(filter(str.isprintable, reason[:_MAX_REASON_CHARS]))


def _remembered(follower: Follower, file: Path) -> tuple[int, frozenset[bytes]] | None:
    """What *follower* is to know again; None: it is its first life."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateFileError(f"{file}: {error.strerror}") from None
    try:
        follower.remember(decode_delta(content))
    except (FormatError, IntegrityError) as error:
        raise StateFileError(f"{file}: {error}") from None
    return follower.anchor()
