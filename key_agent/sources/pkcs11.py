"""An HSM as key source, over PKCS#11, by way of a worker process.

1. This process never loads the module and never sees KM: both belong to the worker (worker_main.py).
2. Work is cut into batches of some 250 ms, so that the KEK watch gets its turn between two of them.
3. A failure that the worker *answered* is diagnosed before it is reported; a time-out or crash is an
   outage.
4. A diagnosis takes two passes, the second in a new worker; that one counts (hsm.md 5).
5. Best effort against what Python cannot wipe: a worker that has handled KM does not grow old.
6. A refused PIN is not tried again before its file changes (pin.py).
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, override

import msgspec
import structlog

from envelope.keys import KeyId
from key_agent.errors import KeySourceError, UnsupportedError, error_of
from key_agent.sources import wire
from key_agent.sources.pin import PinGate, RefusedPin
from key_agent.sources.source import (
    Diagnosis,
    EnvelopeRequest,
    EnvelopeResult,
    Kek,
    KekReference,
    KekType,
    KeySource,
    NewKey,
    Rewrapped,
    Verdict,
    WrapMethod,
    WrappedKey,
)
from key_agent.sources.vendors import GENERIC, Vendor, load_vendor, read_vendor_file
from key_agent.sources.worker import Worker
from runtime.clock import Clock, SystemClock

# What a batch may weigh, in bytes on the pipe, either way; far below wire.FRAME_LIMIT.
BATCH_BYTES_LIMIT: Final = 8 * 1024 * 1024
FIRST_BATCH: Final = 32
RETIRE_AFTER_S: Final = 10.0
"""A worker that has handled KM is replaced by the first diagnosis after so long a pause (hsm.md 9)."""
LARGEST_BATCH: Final = 4096
_REQUEST_KEY_BYTES: Final = 400
_ENVELOPE_BYTES: Final = 1600
_ENVELOPE_KEY_BYTES: Final = 600

_log = structlog.get_logger(__name__)


type MethodSetting = Literal[
    "auto",
    "gcm",
    "gcm-in-place",
    "gcm-appended",
    "kw",
    "cbc+hmac",
    "rsa-oaep-256",
    "rsa-oaep-1",
    "ecdh-es",
]


class Pkcs11Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[pkcs11]` section. A KEK keeps the method it was made with, whatever `method` says later."""

    module_path: Path
    """The vendor's PKCS#11 library."""
    module_arguments: str = ""
    """pReserved of C_Initialize, for modules that are configured so (NSS: configdir='sql:DIR')."""
    token_label: str
    token_serial: str | None = None
    """Needed where two tokens have one label. Every KEK pins the serial of its token anyway."""
    pin_file: Path
    """Readable by its owner only. One line break at the end is not part of the PIN."""
    refused_pin_file: Path | None = None
    """Where to note that the PIN was refused; in a directory that the agent may write."""
    vendor: str = GENERIC
    """Whose module it is (`key-agent init --hsm` lists them): which methods to try, and how to treat it."""
    vendor_file: Path | None = None
    """A file of that form in place of ours, for a site that knows better."""
    method: MethodSetting = "auto"
    """Pin the wrap method of KEKs that are made or adopted from now on."""
    environment: dict[str, str] = {}
    """Further variables for the module, such as SOFTHSM2_CONF."""
    request_timeout_s: float = 10.0
    start_timeout_s: float = 20.0
    administration_timeout_s: float = 60.0
    """For creating and destroying KEKs and trying methods: dozens of calls, some slow on real HSMs."""
    batch_s: float = 0.25
    """How long one batch keeps the KEK watch waiting."""

    def __post_init__(self) -> None:
        for name in ("request_timeout_s", "start_timeout_s", "administration_timeout_s", "batch_s"):
            if not 0 < getattr(self, name) <= 3600:
                raise ValueError(f"{name} must be greater than 0 and at most 3600")
        if self.batch_s > self.request_timeout_s / 2:
            raise ValueError(
                "batch_s must be at most half of request_timeout_s, or a slow batch counts as a hang"
            )
        if not self.token_label:
            raise ValueError("token_label must not be empty")
        if not self.module_path.is_absolute():
            raise ValueError("module_path must be absolute: the dynamic linker must not choose the library")
        vendor = self.vendor_facts
        if not vendor.pkcs11:
            raise ValueError(f"{vendor.title} has no PKCS#11 module: {vendor.instead}")
        if vendor.needs_serial and self.token_serial is None:
            raise ValueError(f"all tokens of {vendor.title} have one label: set token_serial")
        if vendor.needs_module_arguments and not self.module_arguments:
            raise ValueError(
                f"{vendor.title} takes its configuration as module_arguments, such as "
                f"{vendor.needs_module_arguments}"
            )

    @property
    def vendor_facts(self) -> Vendor:
        return load_vendor(self.vendor) if self.vendor_file is None else read_vendor_file(self.vendor_file)

    def methods(self, kek_type: KekType | None = None) -> tuple[WrapMethod, ...]:
        """Candidates for a KEK of that type, best first. UnsupportedError if there is none."""
        known = self.vendor_facts.quirks.methods if self.method == "auto" else (WrapMethod(self.method),)
        found = tuple(method for method in known if kek_type in (None, method.kek_type))
        if not found:
            raise UnsupportedError(
                f"no wrap method for a KEK of type {kek_type}; the settings allow {', '.join(known)}"
            )
        return found


class Pkcs11Source(KeySource):
    """*signing_key_file* and its certificate are read by the worker, anew for every batch.

    Tools that never seal envelopes may leave them out.
    """

    def __init__(
        self,
        settings: Pkcs11Settings,
        signing_key_file: Path | None = None,
        signing_certificate_file: Path | None = None,
        agent_id: str = "",
        *,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings
        self._signing_key_file = signing_key_file
        self._signing_certificate_file = signing_certificate_file
        self._agent_id = agent_id
        self._clock = clock or SystemClock()
        note_file = settings.refused_pin_file or settings.pin_file.with_name(
            settings.pin_file.name + ".refused"
        )
        self._gate = PinGate(
            settings.pin_file,
            note_file,
            module_path=settings.module_path,
            token_label=settings.token_label,
        )
        self._pin_note: RefusedPin | None = None
        self._last_material_s: float | None = None
        self._batch_size = FIRST_BATCH
        self._worker = Worker(
            self._hello,
            self._on_refusal,
            environment=_vendor_environment(settings),
            request_timeout_s=settings.request_timeout_s,
            start_timeout_s=settings.start_timeout_s,
            clock=self._clock,
        )

    @property
    def worker_pid(self) -> int | None:
        """For status and tests."""
        return self._worker.pid

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
                methods=self._settings.methods(kek_type),
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
        settings = self._settings
        is_pinned = settings.method != "auto" or len(settings.vendor_facts.quirks.methods) == 1
        reply = await self._administer(
            wire.AdoptKek(
                reference=reference,
                methods=settings.methods(kek_type),
                is_method_pinned=is_pinned,
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
                wire.Generate(kek=kek, wanted=batch, now_ms=self._now_ms(), budget_s=self._settings.batch_s),
            )
            keys = _expect(reply, wire.Generated).keys
            answered = [NewKey(owner=key.owner, use=key.use, algorithm=key.algorithm) for key in keys]
            if answered != list(batch[: len(keys)]) or not keys:
                raise KeySourceError("the HSM worker answered for other keys than it was asked about")
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
                    old=old, new=new, keys=batch, now_ms=self._now_ms(), budget_s=self._settings.batch_s
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
    async def seal_envelopes(self, kek: Kek, requests: Sequence[EnvelopeRequest]) -> list[EnvelopeResult]:
        sealed: list[EnvelopeResult] = []
        while len(sealed) < len(requests):
            batch = _batch(requests, len(sealed), self._batch_size)
            began_s = self._clock.boot_s()
            reply = await self._ask_about(
                (kek,), wire.SealEnvelopes(kek=kek, requests=batch, budget_s=self._settings.batch_s)
            )
            results = _expect(reply, wire.Sealed).results
            if [result.owner for result in results] != [
                r.owner for r in batch[: len(results)]
            ] or not results:
                raise KeySourceError("the HSM worker answered for other services than it was asked about")
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
        if first.verdict is Verdict.OK or first.verdict.is_login_refusal:
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
        vendor = self._settings.vendor_facts
        reply = await self._administer(wire.Describe(methods=vendor.quirks.methods))
        known = {"title": vendor.title, "ran_on": vendor.ran_on, "notes": list(vendor.notes)}
        return _expect(reply, wire.Described).facts | {"vendor": known}

    @override
    async def close(self) -> None:
        await self._worker.close()

    def _hello(self) -> wire.Hello:
        pin = self._gate.read()
        vendor = self._settings.vendor_facts
        if vendor.pin_pattern and not re.fullmatch(vendor.pin_pattern, pin.text, re.DOTALL):
            raise KeySourceError(
                f"PIN file {self._settings.pin_file}: {vendor.title} wants {vendor.pin_form}; not tried"
            )
        self._pin_note = pin.note
        return wire.Hello(
            module_path=str(self._settings.module_path),
            module_arguments=self._settings.module_arguments,
            token_label=self._settings.token_label,
            token_serial=self._settings.token_serial,
            pin=pin.text,
            agent_id=self._agent_id,
            signing_key_file=_absolute(self._signing_key_file),
            signing_certificate_file=_absolute(self._signing_certificate_file),
            quirks=vendor.quirks,
        )

    async def _one_pass(self, kek: Kek, *, fresh: bool) -> Diagnosis:
        try:
            reply = await self._worker.request(
                wire.Diagnose(kek=kek, now_s=self._clock.wall_s()), fresh=fresh
            )
            found = _expect(reply, wire.Diagnosed)
        except KeySourceError as error:
            return error.diagnosis
        return Diagnosis(found.verdict, found.detail)

    async def _ask_about(self, keks: Sequence[Kek], message: wire.Message) -> wire.Reply:
        """The answer; a failure that the worker answered is diagnosed: revoked, unreachable, or once more."""
        self._last_material_s = self._clock.boot_s()
        reply = await self._worker.request(message)
        if not isinstance(reply, wire.Failed):
            return reply
        if not reply.verdict.is_login_refusal:
            for kek in keks:
                diagnosis = await self.diagnose(kek)
                if diagnosis.verdict is not Verdict.OK:
                    raise error_of(diagnosis)
            reply = await self._worker.request(message)
            if not isinstance(reply, wire.Failed):
                return reply
        raise self._unproven(reply)

    async def _administer(self, message: wire.Message) -> wire.Reply:
        """An operator's request, in a new worker: modules cache slots and keys until C_Finalize."""
        reply = await self._worker.request(
            message, timeout_s=self._settings.administration_timeout_s, fresh=True
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

    def _on_refusal(self, verdict: Verdict) -> None:
        if self._pin_note is not None:
            self._gate.refuse(self._pin_note, verdict)
            file = str(self._settings.pin_file)
            _log.error("the token refused the PIN", verdict=str(verdict), pin_file=file)

    def _unproven(self, reply: wire.Failed) -> KeySourceError:
        """What one look at the token found. Only a diagnosis proves a revocation: this is none."""
        if reply.verdict.withdraws:
            return KeySourceError(reply.detail)
        detail = reply.detail
        if reply.verdict.is_login_refusal:
            detail += f"; PIN file {self._settings.pin_file}"
        return error_of(Diagnosis(reply.verdict, detail))

    def _adapt(self, done: int, took_s: float) -> None:
        """Ask next time for about as much as fits one batch."""
        fits = done * self._settings.batch_s / max(took_s, 0.001)
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
        raise KeySourceError("the HSM worker answered for other keys than it was asked about")
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
            raise KeySourceError("the HSM worker wrapped a key for another place than it was asked to")


def _expect[T: wire.Message](reply: wire.Reply, kind: type[T]) -> T:
    if not isinstance(reply, kind):
        raise KeySourceError(f"the HSM worker answered {type(reply).__name__}, not {kind.__name__}")
    return reply


def _vendor_environment(settings: Pkcs11Settings) -> dict[str, str]:
    """What the vendor's module reads and is set here, then what the settings say."""
    inherited = {name: os.environ[name] for name in settings.vendor_facts.variables if name in os.environ}
    return inherited | settings.environment


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
