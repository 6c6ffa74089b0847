"""A key source whose work is done in another process: what holds for every HSM and every key server.

1. This process never sees KM, and never loads a vendor's library: both belong to the worker.
2. Work is cut into batches of some 250 ms, so that the KEK watch gets its turn between two of them.
3. A failure that the worker *answered* is diagnosed before it is reported; a time-out or crash is an
   outage.
4. A diagnosis takes two passes, the second in a new worker; that one counts (docs/hsm.md).
5. Best effort against what Python cannot wipe: a worker that has handled KM does not grow old.
6. A server that throttles us is left alone for as long as it says (back_off.py). That is an answer, so no
   second pass follows it; operators' requests go there all the same.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, override

import msgspec
import structlog

from envelope.keys import KeyId
from key_agent.errors import KeySourceError, error_of
from key_agent.sources import wire
from key_agent.sources.back_off import BackOff
from key_agent.sources.pace import SLOW_AFTER_S
from key_agent.sources.source import (
    Arrival,
    Destination,
    Diagnosis,
    EnvelopeRequest,
    EnvelopeResult,
    Exported,
    Kek,
    KekReference,
    KekType,
    KeySource,
    NewKey,
    Parcel,
    Rewrapped,
    Verdict,
    WrapMethod,
    WrappedKey,
)
from key_agent.sources.worker import Worker
from runtime.clock import Clock

# What a batch may weigh, in bytes on the pipe, either way; far below wire.FRAME_LIMIT.
BATCH_BYTES_LIMIT: Final = 8 * 1024 * 1024
FIRST_BATCH: Final = 32
RETIRE_AFTER_S: Final = 10.0
"""A worker that has handled KM is replaced by the first diagnosis after so long a pause."""
LARGEST_BATCH: Final = 4096
_REQUEST_KEY_BYTES: Final = 400
_ENVELOPE_BYTES: Final = 1600
_ENVELOPE_KEY_BYTES: Final = 600

_log = structlog.get_logger(__name__)


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the section of any key source has."""

    request_timeout_s: float = 10.0
    """The worker is killed when it has not answered by then."""
    slow_after_s: float = SLOW_AFTER_S
    """From then on load balancers are told to send callers to other environments (pace.py)."""
    start_timeout_s: float = 20.0
    administration_timeout_s: float = 60.0
    """For creating and destroying KEKs and trying methods: dozens of calls, some slow on real HSMs."""
    batch_s: float = 0.25
    """How long one batch keeps the KEK watch waiting."""

    def __post_init__(self) -> None:
        for name in (
            "request_timeout_s",
            "slow_after_s",
            "start_timeout_s",
            "administration_timeout_s",
            "batch_s",
        ):
            if not 0 < getattr(self, name) <= 3600:
                raise ValueError(f"{name} must be greater than 0 and at most 3600")
        if self.batch_s > self.request_timeout_s / 2:
            raise ValueError(
                "batch_s must be at most half of request_timeout_s, or a slow batch counts as a hang"
            )
        if self.slow_after_s >= self.request_timeout_s:
            raise ValueError("slow_after_s must be less than request_timeout_s, or nobody is told in time")


class WorkerSource(KeySource):
    """What differs between HSMs and key servers is in the few methods without a body."""

    def __init__(self, worker: Worker, limits: WorkerSettings, clock: Clock) -> None:
        self._worker = worker
        self.pace = worker.pace
        self._limits = limits
        self._clock = clock
        self._back_off = BackOff(clock)
        self._last_material_s: float | None = None
        self._batch_size = FIRST_BATCH

    @property
    def worker_pid(self) -> int | None:
        """For status and tests."""
        return self._worker.pid

    @abstractmethod
    def _methods(self, kek_type: KekType | None) -> tuple[WrapMethod, ...]:
        """Candidates for a KEK of that type, best first. UnsupportedError if there is none."""

    @abstractmethod
    def _described_methods(self) -> tuple[WrapMethod, ...]:
        """Those that `describe` tries."""

    @property
    def _is_method_pinned(self) -> bool:
        """The method of an adopted KEK is not tried on a throw-away key first."""
        return True

    def _login_hint(self) -> str:
        """What an error text about a refused login adds."""
        return ""

    @override
    async def create_kek(
        self,
        reference: KekReference,
        *,
        kek_type: KekType | None = None,
        valid_until_s: int | None = None,
        replace_unfinished: bool = False,
    ) -> Kek:
        reply = await self._administer(
            wire.CreateKek(
                reference=reference,
                methods=self._methods(kek_type),
                replace_unfinished=replace_unfinished,
                now_ms=self._now_ms(),
                valid_until_s=valid_until_s,
            )
        )
        return _expect(reply, wire.KekMade).kek

    @override
    async def adopt_kek(
        self,
        reference: KekReference,
        *,
        kek_type: KekType | None = None,
        valid_from_s: int | None = None,
        valid_until_s: int | None = None,
    ) -> Kek:
        reply = await self._administer(
            wire.AdoptKek(
                reference=reference,
                methods=self._methods(kek_type),
                is_method_pinned=self._is_method_pinned,
                now_ms=self._now_ms(),
                valid_from_s=valid_from_s,
                valid_until_s=valid_until_s,
            )
        )
        return _expect(reply, wire.KekMade).kek

    @override
    async def destroy_kek(self, kek: Kek) -> None:
        _expect(await self._administer(wire.DestroyKek(kek=kek)), wire.Done)

    @override
    async def set_kek_enabled(self, kek: Kek, *, enabled: bool) -> None:
        _expect(await self._administer(wire.EnableKek(kek=kek, enabled=enabled)), wire.Done)

    @override
    async def generate(self, kek: Kek, wanted: Sequence[NewKey]) -> list[WrappedKey]:
        made: list[WrappedKey] = []
        while len(made) < len(wanted):
            batch = tuple(wanted[len(made) : len(made) + self._batch_size])
            began_s = self._clock.boot_s()
            reply = await self._ask_about(
                (kek,),
                wire.Generate(kek=kek, wanted=batch, now_ms=self._now_ms(), budget_s=self._limits.batch_s),
            )
            keys = _expect(reply, wire.Generated).keys
            answered = [NewKey(owner=key.owner, use=key.use, algorithm=key.algorithm) for key in keys]
            if answered != list(batch[: len(keys)]) or not keys:
                raise KeySourceError("the worker answered for other keys than it was asked about")
            made += keys
            self._adapt(len(keys), self._clock.boot_s() - began_s)
        return made

    @override
    async def rewrap(self, old: Kek, new: Kek, keys: Sequence[WrappedKey]) -> Rewrapped:
        made: list[WrappedKey] = []
        failed: dict[KeyId, str] = {}
        while (done := len(made) + len(failed)) < len(keys):
            batch = tuple(keys[done : done + self._batch_size])
            began_s = self._clock.boot_s()
            reply = await self._ask_about(
                (old, new),
                wire.Rewrap(
                    old=old, new=new, keys=batch, now_ms=self._now_ms(), budget_s=self._limits.batch_s
                ),
            )
            answer = _expect(reply, wire.RewrapDone)
            _check_rewrapped(answer, batch, new)
            made += answer.keys
            failed |= dict(answer.failed_keys)
            count = len(answer.keys) + len(answer.failed_keys)
            self._adapt(count, self._clock.boot_s() - began_s)
        return Rewrapped(keys=tuple(made), failed_keys=failed)

    @override
    async def export_keys(
        self, kek: Kek, keys: Sequence[WrappedKey], destinations: Sequence[Destination]
    ) -> Exported:
        parcels: list[Parcel] = []
        failed: dict[KeyId, str] = {}
        done = 0
        while done < len(keys) and destinations:
            batch = tuple(keys[done : done + self._batch_size])
            began_s = self._clock.boot_s()
            reply = await self._ask_about(
                (kek,),
                wire.ExportKeys(
                    kek=kek,
                    keys=batch,
                    destinations=tuple(destinations),
                    now_s=self._clock.wall_s(),
                    budget_s=self._limits.batch_s,
                ),
            )
            answer = _expect(reply, wire.ExportDone)
            count = _check_exported(answer, batch, destinations)
            parcels += answer.parcels
            failed |= dict(answer.failed_keys)
            done += count
            self._adapt(count, self._clock.boot_s() - began_s)
        return Exported(parcels=tuple(parcels), failed_keys=failed)

    @override
    async def import_keys(
        self, kek: Kek, arrivals: Sequence[Arrival], *, transport_key_file: Path
    ) -> Rewrapped:
        made: list[WrappedKey] = []
        failed: dict[KeyId, str] = {}
        while (done := len(made) + len(failed)) < len(arrivals):
            batch = tuple(arrivals[done : done + self._batch_size])
            began_s = self._clock.boot_s()
            reply = await self._ask_about(
                (kek,),
                wire.ImportKeys(
                    kek=kek,
                    arrivals=batch,
                    transport_key_file=str(transport_key_file),
                    now_ms=self._now_ms(),
                    budget_s=self._limits.batch_s,
                ),
            )
            answer = _expect(reply, wire.RewrapDone)
            count = _check_imported(answer, batch, kek)
            made += answer.keys
            failed |= dict(answer.failed_keys)
            self._adapt(count, self._clock.boot_s() - began_s)
        return Rewrapped(keys=tuple(made), failed_keys=failed)

    @override
    async def seal_envelopes(self, kek: Kek, requests: Sequence[EnvelopeRequest]) -> list[EnvelopeResult]:
        sealed: list[EnvelopeResult] = []
        while len(sealed) < len(requests):
            batch = _batch(requests, len(sealed), self._batch_size)
            began_s = self._clock.boot_s()
            reply = await self._ask_about(
                (kek,), wire.SealEnvelopes(kek=kek, requests=batch, budget_s=self._limits.batch_s)
            )
            results = _expect(reply, wire.Sealed).results
            if [result.owner for result in results] != [
                r.owner for r in batch[: len(results)]
            ] or not results:
                raise KeySourceError("the worker answered for other services than it was asked about")
            sealed += [
                EnvelopeResult(
                    owner=result.owner,
                    tokens=dict(result.tokens),
                    failed_keys=dict(result.failed_keys),
                    failed_recipients=dict(result.failed_recipients),
                )
                for result in results
            ]
            self._adapt(len(results), self._clock.boot_s() - began_s)
        return sealed

    @override
    async def diagnose(self, kek: Kek) -> Diagnosis:
        first = await self._one_pass(kek, fresh=self._is_worker_to_be_retired())
        if first.verdict in (Verdict.OK, Verdict.THROTTLED) or first.verdict.is_login_refusal:
            return first
        second = await self._one_pass(kek, fresh=True)
        _log.info(
            "KEK diagnosed",
            kek_id=kek.reference.kek_id,
            first=str(first.verdict),
            verdict=str(second.verdict),
            detail=second.detail,
        )
        return second

    @override
    async def describe(self) -> dict[str, object]:
        reply = await self._administer(wire.Describe(methods=self._described_methods()))
        return _expect(reply, wire.Described).facts

    @override
    async def close(self) -> None:
        await self._worker.close()

    async def _one_pass(self, kek: Kek, *, fresh: bool) -> Diagnosis:
        if (spared := self._spared()) is not None:
            return spared
        try:
            reply = await self._worker.request(
                wire.Diagnose(kek=kek, now_s=self._clock.wall_s()), fresh=fresh
            )
            found = _expect(reply, wire.Diagnosed)
        except KeySourceError as error:
            return error.diagnosis
        self._note(found.verdict, found.retry_after_s)
        return Diagnosis(found.verdict, found.detail)

    async def _ask_about(self, keks: Sequence[Kek], message: wire.Message) -> wire.Reply:
        """The answer; a failure that the worker answered is diagnosed: revoked, unreachable, or once more."""
        if (spared := self._spared()) is not None:
            raise error_of(spared)
        self._last_material_s = self._clock.boot_s()
        reply = await self._worker.request(message)
        if not isinstance(reply, wire.Failed):
            return reply
        self._note(reply.verdict, reply.retry_after_s)
        if not reply.verdict.is_login_refusal and reply.verdict is not Verdict.THROTTLED:
            for kek in keks:
                diagnosis = await self.diagnose(kek)
                if diagnosis.verdict is not Verdict.OK:
                    raise error_of(diagnosis)
            reply = await self._worker.request(message)
            if not isinstance(reply, wire.Failed):
                return reply
            self._note(reply.verdict, reply.retry_after_s)
        raise self._unproven(reply)

    def _spared(self) -> Diagnosis | None:
        """What is found while the server is left alone; None: it may be asked."""
        if (left_s := self._back_off.left_s()) > 0:
            return Diagnosis(Verdict.THROTTLED, f"the key server is not asked again for {left_s:.0f} s")
        return None

    def _note(self, verdict: Verdict, retry_after_s: float) -> None:
        if verdict is Verdict.THROTTLED:
            self._back_off.throttled(retry_after_s)
        elif verdict is not Verdict.UNREACHABLE:
            self._back_off.answered()

    async def _administer(self, message: wire.Message) -> wire.Reply:
        """An operator's request, in a new worker: modules cache slots and keys until C_Finalize."""
        reply = await self._worker.request(
            message, timeout_s=self._limits.administration_timeout_s, fresh=True
        )
        if isinstance(reply, wire.Failed):
            raise self._unproven(reply)
        return reply

    def _is_worker_to_be_retired(self) -> bool:
        """The worker has handled KM and is idle since: what it could not wipe ends with the process."""
        if self._last_material_s is None or self._clock.boot_s() - self._last_material_s < RETIRE_AFTER_S:
            return False
        self._last_material_s = None
        return True

    def _unproven(self, reply: wire.Failed) -> KeySourceError:
        """What one look at the token found. Only a diagnosis proves a revocation: this is none."""
        if reply.verdict.withdraws:
            return KeySourceError(reply.detail)
        detail = reply.detail
        if reply.verdict.is_login_refusal:
            detail += self._login_hint()
        return error_of(Diagnosis(reply.verdict, detail))

    def _adapt(self, done: int, took_s: float) -> None:
        """Ask next time for about as much as fits one batch."""
        fits = done * self._limits.batch_s / max(took_s, 0.001)
        self._batch_size = max(1, min(LARGEST_BATCH, 2 * self._batch_size, int(1.25 * fits)))

    def _now_ms(self) -> int:
        return int(self._clock.wall_s() * 1000)


def _batch(requests: Sequence[EnvelopeRequest], start: int, count: int) -> tuple[EnvelopeRequest, ...]:
    """At most *count* requests from *start* on that fit a frame both ways; at least one."""
    batch: list[EnvelopeRequest] = []
    asked = answered = 0
    for request in requests[start : start + count]:
        asked += _REQUEST_KEY_BYTES * len(request.keys)
        asked += sum(len(recipient.certificate_der) for recipient in request.recipients)
        answered += len(request.recipients) * (_ENVELOPE_BYTES + _ENVELOPE_KEY_BYTES * len(request.keys))
        if batch and max(asked, answered) > BATCH_BYTES_LIMIT:
            break
        batch.append(request)
    return tuple(batch)


def _check_rewrapped(answer: wire.RewrapDone, batch: Sequence[WrappedKey], new: Kek) -> None:
    """KeySourceError unless *answer* is about the first of *batch*, each once, and under *new*."""
    count = len(answer.keys) + len(answer.failed_keys)
    asked = {key.key_id: key for key in batch[:count]}
    answered = [key.key_id for key in answer.keys] + [key_id for key_id, _ in answer.failed_keys]
    if not answered or len(asked) != count or set(answered) != asked.keys():
        raise KeySourceError("the worker answered for other keys than it was asked about")
    for key in answer.keys:
        wanted = replace(
            asked[key.key_id],
            kek_id=new.reference.kek_id,
            environment_id=new.reference.environment_id,
            method=new.method,
            token_serial=new.token_serial,
            wrapped=key.wrapped,
            created_at_ms=key.created_at_ms,
        )
        if key != wanted:
            raise KeySourceError("the worker wrapped a key for another place than it was asked to")


def _check_exported(
    answer: wire.ExportDone, batch: Sequence[WrappedKey], destinations: Sequence[Destination]
) -> int:
    """How many of *batch* it is about, the first ones. KeySourceError if it is about anything else."""
    failed = [key_id for key_id, _ in answer.failed_keys]
    count, rest = divmod(len(answer.parcels), len(destinations))
    count += len(failed)
    asked = {key.key_id: key for key in batch[:count]}
    wanted = {
        (key_id, key.owner, to.kek_id, to.environment_id, to.route)
        for key_id, key in asked.items()
        if key_id not in failed
        for to in destinations
    }
    found = {(one.key_id, one.owner, one.kek_id, one.environment_id, one.route) for one in answer.parcels}
    if rest or not count or len(asked) != count or set(failed) - asked.keys() or found != wanted:
        raise KeySourceError("the worker answered for other keys than it was asked about")
    return count


def _check_imported(answer: wire.RewrapDone, batch: Sequence[Arrival], kek: Kek) -> int:
    """The same for what was taken in."""
    count = len(answer.keys) + len(answer.failed_keys)
    asked = {arrival.parcel.key_id: arrival for arrival in batch[:count]}
    answered = [key.key_id for key in answer.keys] + [key_id for key_id, _ in answer.failed_keys]
    if not answered or len(asked) != count or set(answered) != asked.keys():
        raise KeySourceError("the worker answered for other keys than it was asked about")
    for key in answer.keys:
        arrival = asked[key.key_id]
        wanted = WrappedKey(
            owner=arrival.parcel.owner,
            key_id=key.key_id,
            kek_id=kek.reference.kek_id,
            environment_id=kek.reference.environment_id,
            method=kek.method,
            wrapped=key.wrapped,
            kcv=arrival.kcv,
            token_serial=kek.token_serial,
            created_at_ms=key.created_at_ms,
            use=arrival.use,
            algorithm=arrival.algorithm,
            version=arrival.version,
        )
        if key != wanted:
            raise KeySourceError("the worker wrapped a key for another place than it was asked to")
    return count


def _expect[T: wire.Message](reply: wire.Reply, kind: type[T]) -> T:
    if not isinstance(reply, kind):
        raise KeySourceError(f"the worker answered {type(reply).__name__}, not {kind.__name__}")
    return reply
