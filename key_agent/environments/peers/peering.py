"""What keeps an environment's agent in step with the others: ask, follow, bring, and stop when it cannot.

1. Every few seconds each other agent is asked where it stands, each by a task of its own that does nothing
   else: one that hangs holds up nobody, and neither does a long transaction, here or there. The answers feed
   the registry lease (registry_lease.py); what follows from that and from the own row is acted upon at once
   (standing.py).
2. Whoever has something newer is asked for it; who leads brings what is newer to whoever has it not, as soon
   as it is written and then until it is acknowledged: by another task (peer_rows.py).
3. A claim to be newer counts until it is shown or refuted. A head that the known term's holder has not
   signed refutes it at once; rows that are not signed as they must be, or are not given, refute it as well: a
   breached environment can stop itself, not the others.
4. The own registry is verified every VERIFY_S and whenever somebody's digest differs at the same epoch. What
   is found tampered with withdraws the environment, is told, and is replaced by what the others have.
5. An environment may say of itself, without any manager, that it is not to be trusted (`declare`). That is
   written beside the database first (own_word.py), and ends when the signed row says it too.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final, NoReturn

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from envelope.errors import SealgateError
from key_agent.consent import Consent, EnvironmentStanding
from key_agent.environments.peers.heartbeats import (
    Heartbeat,
    Question,
    check_heartbeat,
    new_challenge,
    sign_heartbeat,
)
from key_agent.environments.peers.leadership import Leadership
from key_agent.environments.peers.own_word import Declaration, Notice
from key_agent.environments.peers.peer_rows import PeerRows
from key_agent.environments.peers.peer_sights import Sights
from key_agent.environments.peers.peer_transport import PeerAddress, PeerError
from key_agent.environments.peers.peers import NOTICE_PATH, Peers
from key_agent.environments.peers.standing import Verdict, judge, lease_s_of
from key_agent.environments.shared.documents import (
    Delta,
    EnvironmentBody,
    Head,
    SharedRow,
    check_head,
    read_registry_key,
)
from key_agent.environments.shared.forewords import Foreword
from key_agent.environments.shared.recovery import appointed
from key_agent.environments.shared.registry_lease import NEVER_S, Members, Position, RegistryLease
from key_agent.environments.shared.shared import SharedRegistry
from key_agent.environments.shared.shared_errors import RegistryTamperedError
from key_agent.environments.shared.shared_view import Shared, newest_term
from key_agent.environments.states import EnvironmentState
from key_agent.journal import Journal
from key_agent.refresh import wait_until
from key_agent.registry.database import RegistryError
from runtime.clock import Clock

log = structlog.get_logger(__name__)

VERIFY_S: Final = 30.0
_LOOK_S: Final = 0.25
"""Between two looks at the clock: a lease ends that much late at most."""
_FIRST_RETRY_S: Final = 0.2


class Peering:
    def __init__(
        self,
        *,
        tenant: str,
        environment: str,
        agent_id: str,
        shared: SharedRegistry,
        registry_key: Ed25519PrivateKey,
        peers: Peers,
        consent: Consent,
        journal: Journal,
        clock: Clock,
        heartbeat_s: float,
        state_dir: Path,
    ) -> None:
        self.tenant = tenant
        self.environment = environment
        self.agent_id = agent_id
        self.shared = shared
        self.peers = peers
        self._registry_key = registry_key
        self._consent = consent
        self._journal = journal
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._declaration = Declaration(state_dir)
        self.leadership: Leadership | None = None
        """Set by whoever composes the agent, before `run`."""
        self.ratify: Callable[[Notice], Awaitable[None]] | None = None
        """What the manager does with a notice; incidents.py's."""
        self.lease = RegistryLease()
        self.sights = Sights()
        self.notices: dict[str, Notice] = {}
        """By environment: its own word, until the signed rows say it."""
        self._view = Shared()
        self._foreword: Foreword | None = None
        """What the own environment will be, as long as it is not in the rows."""
        self.rows = PeerRows(self, journal)
        self._wakes: dict[str, asyncio.Event] = {}
        """By environment: it is to be asked now."""
        self._moves: dict[str, asyncio.Event] = {}
        """By environment: there may be rows to pull from it, or to bring to it."""
        self._changed = asyncio.Event()
        self._verify = asyncio.Event()
        self._listeners: list[Callable[[Shared], None]] = []
        self._was_proven = False
        self.tampered: str | None = None
        self.verdict = self._judge()

    # What others ask of this object.

    @property
    def view(self) -> Shared:
        """The shared rows as last read."""
        return self._view

    @property
    def leads(self) -> bool:
        return self.leadership is not None and self.leadership.term is not None

    @property
    def position(self) -> Position:
        return Position(self._view.term, self._view.epoch)

    @property
    def is_united(self) -> bool:
        """Whether there is a set of environments that this one is part of, or to be part of."""
        return self._view.epoch > 0

    def listen(self, listener: Callable[[Shared], None]) -> None:
        """Call *listener* after each change of the shared rows; it must not wait and must not raise."""
        self._listeners.append(listener)

    def proven_boot_s(self) -> float:
        return self.lease.proven_boot_s(self._members(), self._clock.boot_s())

    def lease_left_s(self) -> float | None:
        """For how long what is pushed now may be valid at most; None: no bound but the validity."""
        until_boot_s = self.verdict.until_boot_s
        return None if until_boot_s is None else max(0.0, until_boot_s - self._clock.boot_s())

    async def load(self) -> None:
        """Read the shared rows. RegistryTamperedError is acted upon, not raised; RegistryError is raised."""
        try:
            self._take(await self.shared.snapshot())
        except RegistryTamperedError as error:
            await self._found_tampered(error)

    async def changed(self) -> None:
        """This agent has written shared rows: bring them to the others."""
        await self.load()
        for wake in (*self._moves.values(), *self._wakes.values()):
            wake.set()

    async def spread(self, environments: Iterable[str], *, timeout_s: float) -> dict[str, bool]:
        """Bring what is newest to these at once; who has acknowledged it in time."""
        names = list(environments)

        async def one(name: str) -> bool:
            try:
                async with asyncio.timeout(timeout_s):
                    await self.rows.bring(name)
            except (PeerError, TimeoutError):
                return False
            return True

        return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))

    def others(self) -> list[str]:
        """Every environment whose agent there is something to talk about with."""
        return [
            name
            for name, body in self._view.environments.items()
            if name != self.environment
            and body.registry_key
            and body.state not in (EnvironmentState.PROVISIONING, EnvironmentState.RETIRED)
        ]

    def environment_of(self, agent_id: str) -> str | None:
        """Whose agent that is; None: of no environment."""
        for name, body in self._view.environments.items():
            if body.agent_id == agent_id and body.state is not EnvironmentState.RETIRED:
                return name
        return None

    def address(self, environment: str) -> PeerAddress:
        """PeerError if it is not known."""
        body = self._view.environments.get(environment)
        if body is None:
            raise PeerError("unknown", f"there is no environment {environment}")
        return PeerAddress(body.api_url, body.agent_id)

    async def declare(self, reason: str) -> None:
        """This environment is not to be trusted from now on (rule 5). OSError: it could not be written, but
        it counts.
        """
        self._declaration.reason = reason
        self.evaluate()
        try:
            await asyncio.to_thread(self._declaration.write)
        finally:
            self._journal.note("environment-declared", outcome="healing", reason=reason)
            await self.tell_notice()

    async def tell_notice(self) -> None:
        """The own word, to everybody who can be reached."""
        if (reason := self._declaration.reason) is None:
            return
        notice = Notice(environment=self.environment, reason=reason, at_ms=self._now_ms())
        body = msgspec.json.encode(notice)
        await asyncio.gather(
            self._ratify_own(notice),
            *(self.peers.post(name, NOTICE_PATH, body) for name in self.others()),
            return_exceptions=True,
        )

    async def _ratify_own(self, notice: Notice) -> None:
        """As the manager. Beside the others' telling: a database that fails or hangs keeps it from nobody."""
        if not self.leads or self.ratify is None:
            return
        try:
            await self.ratify(notice)
        except SealgateError as error:  # it is said again
            log.warning("the own word is not in the rows yet", cause=str(error))

    # The loops.

    async def run(self) -> NoReturn:
        """Until cancelled; a bug ends it."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._judge_for_ever(), name="peering:standing")
                group.create_task(self._verify_for_ever(), name="peering:verify")
                if self.leadership is not None:
                    group.create_task(self.leadership.run(), name="peering:leadership")
                await self._follow_all(group)
        finally:
            await self.rows.stop()
        raise AssertionError("unreachable: the loop above does not end")

    async def _follow_all(self, group: asyncio.TaskGroup) -> NoReturn:
        following: dict[str, list[asyncio.Task[NoReturn]]] = {}
        while True:
            wanted = set(self.others())
            for name in following.keys() - wanted:
                for task in following.pop(name):
                    task.cancel()
                self.sights.pop(name, None)
                self.lease.forget(name)
            for name in wanted - following.keys():
                self._wakes[name], self._moves[name] = asyncio.Event(), asyncio.Event()
                following[name] = [
                    group.create_task(self._ask_for_ever(name), name=f"peering:{name}"),
                    group.create_task(self._move_for_ever(name), name=f"peering:{name}:rows"),
                ]
            await wait_until(self._clock, self._changed, None)

    async def _ask_for_ever(self, name: str) -> NoReturn:
        """What keeps the lease: no row, no database and no lock is waited for here (rule 1)."""
        failures = 0
        while True:
            began_s = self._clock.boot_s()
            try:
                await self._ask(name)
                failures = 0
                self._moves[name].set()
            except PeerError as error:
                failures += 1
                self.sights.failed(name, error, now_ms=self._now_ms())
            await wait_until(self._clock, self._wakes[name], began_s + self._retry_s(failures))

    async def _move_for_ever(self, name: str) -> NoReturn:
        failures = 0
        while True:
            await wait_until(self._clock, self._moves[name], None)
            began_s = self._clock.boot_s()
            try:
                await self.rows.settle(name)
                if self.leads and self.tampered is None:
                    await self.rows.bring(name)
                failures = 0
                continue
            except PeerError as error:
                self.sights.failed(name, error, now_ms=self._now_ms())
            except RegistryError as error:  # it is read anew when it works again
                log.warning("the registry cannot be used", cause=str(error))
            failures += 1
            await wait_until(self._clock, self._moves[name], began_s + self._retry_s(failures))
            self._wake(name)  # where it stands now decides what is to be done

    def _retry_s(self, failures: int) -> float:
        if not failures:
            return self._heartbeat_s
        return min(self._heartbeat_s, _FIRST_RETRY_S * 2.0 ** min(failures - 1, 10))

    async def _judge_for_ever(self) -> NoReturn:
        while True:
            if self.leadership is not None:
                self.lease.elected(self.leadership.proven_boot_s)
            self.evaluate()
            await self._clock.sleep(_LOOK_S)

    async def _verify_for_ever(self) -> NoReturn:
        while True:
            try:
                await self.shared.verify()
                if self.tampered is None:
                    await self.load()
            except RegistryTamperedError as error:
                await self._found_tampered(error)
            except RegistryError as error:
                log.warning("the registry cannot be verified", cause=str(error))
            if self.tampered is not None:
                await self._restore()
            await self.tell_notice()
            await wait_until(self._clock, self._verify, self._clock.boot_s() + VERIFY_S)

    # Asking.

    async def ask(self, name: str) -> None:
        """One question to *name*, and what follows from the answer. PeerError, RegistryError."""
        await self._ask(name)
        await self.rows.settle(name)

    async def _ask(self, name: str) -> None:
        body = self._view.environments.get(name)
        if body is None:
            raise PeerError("unknown", f"there is no environment {name}")
        challenge, asked_boot_s = new_challenge(), self._clock.boot_s()
        question = Question(self.environment, challenge, *self.position)
        beat = await self.peers.heartbeat(name, question)
        self._check(beat, name, body, challenge)
        position = Position(beat.term, beat.epoch)
        latency_s = self._clock.boot_s() - asked_boot_s
        self.sights.heard(name, beat, latency_s=latency_s, now_ms=self._now_ms())
        if not body.state.counts and not self.is_appointed(name):
            # What a withdrawn environment says proves nothing; its registry is no source of anything.
            self.lease.forget(name)
            return
        if not self._is_of_our_term(beat):
            # A lie; or the term has two holders, and then it is all of it that tells which one holds.
            self.lease.forget(name)
            self.rows.claimed(name, is_other_history=True)
            return
        self.lease.heard(name, position, asked_boot_s=asked_boot_s, proven_ago_s=beat.proven_ago_s)
        if position > self.position:
            self.rows.claimed(name, is_other_history=False)
        elif position == self.position and beat.digest != self._view.digest and self.tampered is None:
            log.error("the registries differ at the same epoch", peer=name, epoch=position.epoch)
            self.lease.forget(name)
            self._verify.set()
        self.evaluate()

    def _check(self, beat: Heartbeat, name: str, body: EnvironmentBody, challenge: str) -> None:
        try:
            check_heartbeat(
                beat,
                read_registry_key(body.registry_key),
                tenant=self.tenant,
                environment=name,
                agent=body.agent_id,
                challenge=challenge,
            )
        except SealgateError as error:
            raise PeerError("signature", str(error)) from None

    def _is_of_our_term(self, beat: Heartbeat) -> bool:
        """False: it claims an epoch of the newest known term that this term's holder has not signed."""
        newest = newest_term(self._view)
        if newest is None or beat.term != newest[0]:
            return True  # an older one, or one that has to be shown
        head = Head(term=beat.term, epoch=beat.epoch, digest=beat.digest, signature=beat.head)
        try:
            check_head(self.tenant, head, read_registry_key(newest[1].registry_key))
        except SealgateError:
            return False
        return True

    async def apply(self, delta: Delta) -> None:
        """Take over *delta*. StaleTermError, EpochGapError, IntegrityError, RegistryTamperedError ..."""
        await self.shared.apply(delta, now_ms=self._now_ms())
        await self.load()

    def is_appointed(self, name: str) -> bool:
        """Whether none counts, and two administrators have appointed it to be the first again."""
        recovery = appointed(self._view)
        return recovery is not None and recovery.environment == name

    async def forewarned(self, row: SharedRow) -> None:
        """What this environment will be when the rows are here. Errors as `SharedRegistry.foreword`."""
        foreword = await self.shared.foreword(row)
        known = self.position if self._foreword is None else max(self.position, self._foreword.position)
        if foreword is None or foreword.position <= known:
            return  # an older one, passed on again, would end before the newest is here
        self._foreword = foreword
        self._journal.note(
            "environment-forewarned", outcome=foreword.body.state, epoch=foreword.position.epoch
        )
        self.evaluate()

    def signed(self, content: bytes) -> str:
        """By this environment's registry key, in hex."""
        return self._registry_key.sign(content).hex()

    # Answering.

    def answer(self, question: Question) -> Heartbeat:
        """Where this environment stands."""
        if Position(question.term, question.epoch) > self.position:
            self._wake(question.environment)  # a hint that proves nothing: it is asked
        proven_s = self.proven_boot_s()
        unsigned = Heartbeat(
            tenant=self.tenant,
            environment=self.environment,
            agent=self.agent_id,
            term=self._view.term,
            epoch=self._view.epoch,
            digest=self._view.digest,
            head=self._view.head,
            state=self.verdict.state,
            proven_ago_s=None if proven_s == NEVER_S else max(0.0, self._clock.boot_s() - proven_s),
            challenge=question.challenge,
        )
        return sign_heartbeat(unsigned, self._registry_key)

    async def noticed(self, notice: Notice) -> None:
        """Another environment says of itself that it is not to be trusted."""
        body = self._view.environments.get(notice.environment)
        if body is not None and body.state is EnvironmentState.HEALING:
            return  # a word that was repeated and overtaken: the signed row says it
        if notice.environment not in self.notices:
            log.error("an environment declares itself healing", peer=notice.environment, reason=notice.reason)
            self._journal.note(
                "environment-notice", outcome="healing", peer=notice.environment, reason=notice.reason
            )
        self.notices[notice.environment] = notice
        self.lease.forget(notice.environment)
        for listener in self._listeners:
            listener(self._view)
        if self.leads and self.ratify is not None:
            await self.ratify(notice)

    def _wake(self, name: str) -> None:
        if (wake := self._wakes.get(name)) is not None:
            wake.set()

    # Acting.

    def evaluate(self) -> None:
        """Judge anew, and act on it."""
        verdict = self._judge()
        if verdict.standing is EnvironmentStanding.SERVES:
            self._was_proven = True
        before, self.verdict = self.verdict, verdict
        self._consent.set_environment(verdict.standing, verdict.reason)
        if (before.state, before.reason) != (verdict.state, verdict.reason):
            for listener in self._listeners:
                listener(self._view)

    def _judge(self) -> Verdict:
        return judge(
            self._own_body(),
            is_shared=self.is_united,
            tampered=self.tampered,
            declared=self._declaration.reason,
            proven_boot_s=self.proven_boot_s(),
            was_proven=self._was_proven,
            lease_s=lease_s_of(self._view),
            now_boot_s=self._clock.boot_s(),
        )

    def _own_body(self) -> EnvironmentBody | None:
        foreword = self._foreword
        if foreword is not None and foreword.position > self.position:
            return foreword.body
        return self._view.environments.get(self.environment)

    def _members(self) -> Members:
        counted = frozenset(
            name
            for name, body in self._view.environments.items()
            if body.state.counts and name not in self.notices
        )
        manager = newest_term(self._view)
        return Members(
            own=self.environment, counted=counted, manager=None if manager is None else manager[1].environment
        )

    def _take(self, view: Shared) -> None:
        before, self._view = self._view, view
        self.lease.applied(self.position)
        own = view.environments.get(self.environment)
        is_declared = self._declaration.reason is not None
        if is_declared and own is not None and own.state is EnvironmentState.HEALING:
            self._declaration.end()  # the signed row says it now
        for name in list(self.notices):
            body = view.environments.get(name)
            if body is None or not body.state.counts:
                del self.notices[name]
        self.evaluate()
        if (before.epoch, before.term) != (view.epoch, view.term):
            self._changed.set()
            for listener in self._listeners:
                listener(view)

    async def _found_tampered(self, error: RegistryTamperedError) -> None:
        if self.tampered is None:
            log.error("the shared registry is not as it was written", cause=str(error))
            self._journal.note("registry-tampered", outcome="failed", reason=str(error))
        self.tampered = str(error)
        self.evaluate()

    async def _restore(self) -> None:
        """What the others have, in place of what was tampered with; the newest first."""
        sights = {name: sight for name, sight in self.sights.items() if sight.position is not None}
        for name in sorted(sights, key=lambda one: sights[one].position or Position(0, 0), reverse=True):
            body = self._view.environments.get(name)
            if body is None or not (body.state.counts or self.is_appointed(name)):
                continue
            try:
                await self.shared.restore(
                    await self.peers.since(name, 0, at_most_s=self.rows.patience_s), now_ms=self._now_ms()
                )
                await self.shared.verify()
            except SealgateError as error:
                log.warning("the registry is not restored yet", peer=name, cause=str(error))
                continue
            self.tampered = None
            self._journal.note("registry-restored", peer=name)
            await self.load()
            return

    def _now_ms(self) -> int:
        return int(self._clock.wall_s() * 1000)
