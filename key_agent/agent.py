"""The key agent as one object: its parts, wired; the loops; and what has to happen when consent changes.

1. When consent ends, in this order and none waiting for the next: deliveries of keys stop, withdrawals leave,
   the new state is written to the registry (again and again until that works), the proof is audited.
2. Keys leave only while this agent leads (registry/lease.py); withdrawals leave whoever leads.
3. When consent returns, the registry has it first; then the proxies get their keys.
4. When the registry works again after a failure it is read anew: a change may have been kept whose answer was
   lost. What waited for it goes on at once.
5. An HSM that is slow is said to be, and nothing else changes here: pace.py, environments/telling.py.
6. One process per `state_dir` (app.py holds its lock): memory and registry cannot diverge.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, NoReturn, Protocol

import structlog
from cryptography import x509

from envelope.errors import SealgateError
from key_agent import metrics
from key_agent.clock_watch import ClockWatch
from key_agent.consent import Change, Consent, EnvironmentStanding, Standing
from key_agent.journal import Journal
from key_agent.lifetimes import Credentials, Lifetimes, Signing
from key_agent.presence import PresenceLoop
from key_agent.push.pusher import Delivery, Pusher
from key_agent.push.recipients import Recipients
from key_agent.push.revocations import Revocations
from key_agent.push.sealing import KeySealing, WithdrawalSealing
from key_agent.push.targets import Targets
from key_agent.push.transport import Transport
from key_agent.refresh import KekWatch, RefreshLoop, WithdrawalLoop, next_delay, wait_until
from key_agent.registry.database import RegistryError
from key_agent.registry.states import KekState
from key_agent.registry.store import Registry
from key_agent.rotation import RotationLoop
from key_agent.sources.source import Diagnosis, Kek, KeySource
from key_agent.sources.verdict import NEXT_STEPS
from runtime.clock import Clock

__all__ = ["Agent", "Rhythm", "Signing", "Surroundings"]

log = structlog.get_logger(__name__)

_MAX_PERSIST_DELAY_S: Final = 10.0
# A watch that has not looked for this many intervals stands still.
_WATCH_PATIENCE: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """Every time constant of a running agent, in seconds."""

    interval_s: int
    validity_s: int
    watch_s: float
    presence_s: float
    request_timeout_s: float
    batch_size: int
    rotate_after_days: int = 90
    """Age at which keys are rotated where their service says nothing else; 0: never."""


class Surroundings(Protocol):
    """What an agent asks of the other environments; they are `environments.assembly.Environments`."""

    @property
    def is_united(self) -> bool:
        """Whether there are others."""

    def lease_left_s(self) -> float | None:
        """For how long what is pushed now may be valid at most; None: no bound but the validity."""

    def kek_changed(self) -> None:
        """This environment's KEK is another one: the others have to know."""


class Agent:
    """Use `Agent.open`; loops run inside `working`."""

    def __init__(
        self,
        *,
        agent_id: str,
        tenant: str,
        environment_id: str,
        root: x509.Certificate,
        rhythm: Rhythm,
        source: KeySource,
        registry: Registry,
        targets: Targets,
        transport: Transport,
        signing: Signing,
        journal: Journal,
        clock: Clock,
        jitter: Callable[[], float],
        load_credentials: Callable[[float], Credentials] | None = None,
        revocations: Revocations | None = None,
    ) -> None:
        """*load_credentials* reads the own certificates again, at a wall-clock time; SealgateError."""
        self.agent_id = agent_id
        self.tenant = tenant
        self.environment_id = environment_id
        self.rhythm = rhythm
        self.source = source
        self.registry = registry
        self.targets = targets
        self.transport = transport
        self.journal = journal
        self.signing = signing
        self.clock = clock
        self.recipients = Recipients(root, tenant, revocations)
        self.consent = Consent(clock)
        self.deliveries: dict[str, Delivery] = {}
        """The last delivery of keys to each proxy."""
        self.withdrawals_seen: dict[str, Delivery] = {}
        self._delivered = asyncio.Event()
        self._to_persist: Change | None = None
        self._persist_wake = asyncio.Event()
        self.environments: Surroundings | None = None
        """The other environments of the tenant; None: this is the only one."""
        self.is_running = False
        self.one_at_a_time = asyncio.Lock()
        """Held by whatever makes keys or KEKs, or changes who gets them."""
        self._withdrawal_sealing = WithdrawalSealing(
            agent_id=agent_id,
            signing_key=signing.key,
            signing_certificate=signing.certificate,
            registry=registry,
            targets=targets,
            clock=clock,
            validity_s=rhythm.validity_s,
            batch_size=rhythm.batch_size,
        )
        self.pusher = Pusher(
            transport=transport,
            registry=registry,
            targets=targets,
            clock=clock,
            make_key_sealing=self._make_key_sealing,
            withdrawal_sealing=self._withdrawal_sealing,
            may_push=self._may_push,
            request_timeout_s=rhythm.request_timeout_s,
        )
        self.watch = KekWatch(source=source, consent=self.consent, clock=clock, watch_s=rhythm.watch_s)
        self.refresh = RefreshLoop(
            pusher=self.pusher,
            targets=targets,
            consent=self.consent,
            journal=journal,
            clock=clock,
            interval_s=rhythm.interval_s,
            jitter=jitter,
            on_delivery=self._keys_delivered,
        )
        self.clock_watch = ClockWatch(
            clock=clock, journal=journal, look_s=rhythm.watch_s, push_at_once=self.refresh.at_once
        )
        self.withdrawals = WithdrawalLoop(
            pusher=self.pusher,
            targets=targets,
            consent=self.consent,
            clock=clock,
            on_delivery=self._withdrawal_delivered,
        )

        self.rotations = RotationLoop(
            source=source,
            registry=registry,
            targets=targets,
            consent=self.consent,
            journal=journal,
            clock=clock,
            interval_s=rhythm.interval_s,
            rotate_after_days=rhythm.rotate_after_days,
            one_at_a_time=self.one_at_a_time,
            push_at_once=self.refresh.at_once,
            is_alone=lambda: self.environments is None or not self.environments.is_united,
        )
        self.lifetimes = Lifetimes(
            root=root,
            signing=signing,
            load=load_credentials,
            revocations=revocations,
            recipients=self.recipients,
            registry=registry,
            targets=targets,
            journal=journal,
            clock=clock,
            renew=self._signing_renewed,
            withdraw=self._withdrawn_by_revocation,
            kek=lambda: self.consent.kek,
        )
        self.presence = PresenceLoop(
            transport=transport,
            pusher=self.pusher,
            targets=targets,
            consent=self.consent,
            clock=clock,
            presence_s=rhythm.presence_s,
            timeout_s=rhythm.request_timeout_s,
            interval_s=rhythm.interval_s,
            jitter=jitter,
            failures=self.refresh.schedule.failures,
            push_at_once=self.refresh.at_once,
        )

    def _make_key_sealing(self) -> KeySealing:
        return KeySealing(
            source=self.source,
            registry=self.registry,
            targets=self.targets,
            recipients=self.recipients,
            clock=self.clock,
            validity_s=self.rhythm.validity_s,
            batch_size=self.rhythm.batch_size,
            on_diagnosis=self._diagnosed_by_push,
            may_push=self._may_push,
            on_left_out=self.rotations.left_out,
            may_hold_s=self._may_hold_s,
        )

    async def start(self) -> None:
        """Take over what the registry says of the KEK. To be called once, before anything else."""
        self.consent.listen(self._consent_changed)
        self.source.pace.listen(self._pace_changed)
        self.consent.listen_environment(self._environment_changed)
        self.consent.adopt(await self.registry.current_kek())

    @asynccontextmanager
    async def working(self, *, refresh: bool) -> AsyncIterator[None]:
        """The loops run while the block does: all, or, without *refresh*, only those that withdraw."""
        failure: Exception | None = None
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._persist_loop(), name="persist"),
                group.create_task(self.withdrawals.run(), name="withdrawals"),
                group.create_task(self._follow_registry(), name="registry-returns"),
            ]
            if refresh:
                self.is_running = True
                tasks.append(group.create_task(self.watch.run(), name="kek-watch"))
                tasks.append(group.create_task(self.refresh.run(), name="refresh"))
                tasks.append(group.create_task(self.clock_watch.run(), name="clock-watch"))
                tasks.append(group.create_task(self.presence.run(), name="presence"))
                tasks.append(group.create_task(self.rotations.run(), name="rotations"))
                tasks.append(group.create_task(self.lifetimes.run(), name="lifetimes"))
            try:
                yield
            except Exception as error:  # noqa: BLE001 - raised again, outside of the group
                failure = error
            finally:
                self.is_running = False
                for task in tasks:
                    task.cancel()
        await self.pusher.settle()
        if failure is not None:
            raise failure

    async def reload(self, *, kek_changed: bool = False) -> None:
        """Read the registry again after a command has changed it."""
        book = await self.registry.book()
        self.targets.load(book)
        self.presence.wake()  # it sleeps while there is nobody to ask
        if kek_changed:
            self.consent.adopt(book.kek)

    async def wait_for_delivery(
        self, proxy_id: str, *, after: Delivery | None, timeout_s: float
    ) -> Delivery | None:
        """The next delivery of keys to a proxy, other than *after*.

        None if none has ended in time, or none will: nothing is pushed without consent.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while (found := self.deliveries.get(proxy_id)) is None or found is after:
                    if not self.consent.may_push:
                        return None
                    self._delivered.clear()
                    await self._delivered.wait()
                return found
        except TimeoutError:
            return None

    async def wait_for_withdrawals(self, *, timeout_s: float) -> bool:
        """True as soon as nothing is left to withdraw, False after *timeout_s*."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.withdrawals.is_done():
                    self._delivered.clear()
                    await self._delivered.wait()
        except TimeoutError:
            return False
        return True

    def reasons_not_alive(self) -> list[str]:
        looked_at_s = self.watch.looked_at_s
        patience_s = self.rhythm.watch_s * _WATCH_PATIENCE + 60
        if looked_at_s is not None and self.clock.boot_s() - looked_at_s > patience_s:
            return [f"the KEK watch has not looked for {patience_s:g} s"]
        return []

    def reasons_not_ready(self) -> list[str]:
        reasons = self.reasons_not_alive()
        if self.consent.standing is not Standing.CONSENTED:
            reason = f"no keys are pushed: {self.consent.standing}"
            if (found := self.consent.diagnosis) is not None:
                reason += f" ({found.verdict}: {found.detail})"
                reason += f"; {NEXT_STEPS[found.verdict]}" if found.verdict in NEXT_STEPS else ""
            reasons.append(reason)
        if (slow := self.source.pace.slow) is not None:
            reasons.append(f"slow: {slow}")
        if self.consent.environment is not EnvironmentStanding.SERVES:
            reasons.append(
                f"environment {self.environment_id} does not serve: {self.consent.environment_reason}"
            )
        if not self.registry.leads:
            reasons.append("the registry's lease is not renewed: no keys are pushed")
        if self.journal.failure is not None:
            reasons.append(self.journal.failure)
        if self._to_persist is not None:
            reasons.append("the registry does not know of the KEK's new state yet")
        return reasons

    # What happens by itself.

    def _signing_renewed(self, signing: Signing) -> None:
        self.signing = signing
        self._withdrawal_sealing.renew(signing.key, signing.certificate)

    async def _withdrawn_by_revocation(self) -> None:
        await self.reload()
        self.withdrawals.at_once()

    def _diagnosed_by_push(self, kek: Kek, diagnosis: Diagnosis) -> None:
        metrics.DIAGNOSES.labels(diagnosis.verdict).inc()
        if diagnosis.verdict.withdraws or diagnosis.verdict.is_login_refusal:
            self.consent.observe(kek, diagnosis)
        else:
            self.watch.wake()

    def _consent_changed(self, change: Change) -> None:
        for standing in Standing:
            metrics.STANDING.labels(standing).set(standing is change.new)
        self.presence.wake()
        if change.new is not Standing.CONSENTED:
            self.pusher.stop()
            self._delivered.set()
        if change.new.is_withdrawn:
            self.withdrawals.at_once()
        if change.new.is_withdrawn or change.old is Standing.SUSPENDED:
            self._to_persist = change
            self._persist_wake.set()
        elif change.new is Standing.CONSENTED:
            self.refresh.at_once()
        if change.new is Standing.CONSENTED:
            self.rotations.resume()
        diagnosis = change.diagnosis
        self.journal.note(
            "kek-standing",
            outcome=change.new,
            before=change.old,
            kek=change.kek_id,
            verdict=None if diagnosis is None else diagnosis.verdict,
            proof=None if diagnosis is None else diagnosis.detail,
        )

    def _pace_changed(self, slow: str | None) -> None:
        metrics.HSM_SLOW.set(slow is not None)
        self.journal.note("hsm-pace", outcome="quick" if slow is None else "slow", reason=slow)

    def _environment_changed(self, new: EnvironmentStanding) -> None:
        self.presence.wake()
        if new is EnvironmentStanding.SERVES:
            self.rotations.resume()
            self.refresh.at_once()
        else:
            self.pusher.stop()
            self._delivered.set()
        if new is EnvironmentStanding.WITHDRAWN:
            self.withdrawals.at_once()
        self.journal.note("environment-standing", outcome=new, reason=self.consent.environment_reason)

    async def _persist_loop(self) -> NoReturn:
        failures = 0
        while True:
            if (change := self._to_persist) is None:
                await wait_until(self.clock, self._persist_wake, None)
                continue
            try:
                await self._persist(change)
            except SealgateError as error:  # MisuseError too: a command changed the row between two looks
                failures += 1
                log.error("the KEK's state is not stored yet", error=str(error))  # noqa: TRY400
                await self.clock.sleep(
                    next_delay(interval_s=_MAX_PERSIST_DELAY_S, failures=failures, jitter=0)
                )
                continue
            failures = 0
            if self._to_persist is change:
                self._to_persist = None
            if self.consent.may_push:
                self.refresh.at_once()

    async def _follow_registry(self) -> NoReturn:
        while True:
            await wait_until(self.clock, self.registry.returned, None)
            try:
                await self.reload()
            except RegistryError as error:  # then it will return once more
                log.warning("the registry is not read anew yet", cause=str(error))
                continue
            self.withdrawals.at_once()
            self.refresh.at_once(
                name for name in self.targets.fed() if self.refresh.schedule.failures(name) > 0
            )
            self.rotations.look_soon()

    async def _persist(self, change: Change) -> None:
        detail = (
            None if change.diagnosis is None else f"{change.diagnosis.verdict}: {change.diagnosis.detail}"
        )
        row = await self.registry.current_kek()
        if row is None or row.reference.kek_id != change.kek_id:
            return  # replaced meanwhile
        states = {
            Standing.REVOKED: KekState.REVOKED,
            Standing.SUSPENDED: KekState.SUSPENDED,
            Standing.CONSENTED: KekState.ACTIVE,
        }
        state = states.get(change.new)
        if state is None or row.state.is_sticky:
            return
        await self.registry.set_kek_state(row.reference.kek_id, state, detail, now_ms=self.now_ms())

    def _keys_delivered(self, delivery: Delivery) -> None:
        self.deliveries[delivery.proxy_id] = delivery
        metrics.PUSHES.labels(delivery.proxy_id, delivery.outcome).inc()
        if delivery.is_complete:
            metrics.LAST_ACCEPTED.labels(delivery.proxy_id).set(self.clock.wall_s())
        self.rotations.delivered(delivery.proxy_id)
        self._report("keys-pushed", delivery)

    def _withdrawal_delivered(self, delivery: Delivery) -> None:
        self.withdrawals_seen[delivery.proxy_id] = delivery
        metrics.WITHDRAWALS.labels(delivery.proxy_id, delivery.outcome).inc()
        metrics.WITHDRAWALS_PENDING.set(self.withdrawals.count())
        self._report("keys-withdrawn", delivery)

    def _report(self, action: str, delivery: Delivery) -> None:
        self._delivered.set()
        report = log.info if delivery.is_complete or delivery.code == "stopped" else log.error
        report(
            action,
            proxy=delivery.proxy_id,
            outcome=delivery.outcome,
            services=delivery.accepted,
            error=delivery.error,
        )
        self.journal.note(
            action,
            outcome="ok" if delivery.is_complete else delivery.outcome,
            proxy=delivery.proxy_id,
            services=delivery.accepted,
            refused=delivery.refused,
            code=delivery.code,
        )

    def _may_push(self) -> bool:
        """No key leaves without the enterprise's consent, nor from an agent that another has followed."""
        return self.consent.may_push and self.registry.leads

    def _may_hold_s(self) -> float | None:
        return None if self.environments is None else self.environments.lease_left_s()

    def now_ms(self) -> int:
        """Unix milliseconds."""
        return int(self.clock.wall_s() * 1000)
