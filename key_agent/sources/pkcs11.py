"""An HSM as key source, over PKCS#11, by way of a worker process.

1. The module is loaded by the worker alone (worker_main.py; worker_source.py says how it is asked).
2. A refused PIN is not tried again before its file changes (pin.py).
"""

import os
import re
from pathlib import Path
from typing import Literal, override

import msgspec
import structlog

from key_agent.errors import KeySourceError, UnsupportedError
from key_agent.sources import wire
from key_agent.sources.pace import Pace
from key_agent.sources.pin import PinGate, RefusedPin
from key_agent.sources.source import (
    KekType,
    Verdict,
    WrapMethod,
)
from key_agent.sources.vendors import GENERIC, Vendor, load_vendor, read_vendor_file
from key_agent.sources.worker import Worker
from key_agent.sources.worker_source import WorkerSettings, WorkerSource
from runtime.clock import Clock, SystemClock

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


class Pkcs11Settings(WorkerSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    """Further variables for the module, such as SOFTHSM2_CONF."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
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


class Pkcs11Source(WorkerSource):
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
        clock = clock or SystemClock()
        worker = Worker(
            self._hello,
            self._on_refusal,
            environment=_vendor_environment(settings),
            request_timeout_s=settings.request_timeout_s,
            start_timeout_s=settings.start_timeout_s,
            clock=clock,
            pace=Pace(settings.slow_after_s),
        )
        super().__init__(worker, settings, clock)

    @override
    def _methods(self, kek_type: KekType | None) -> tuple[WrapMethod, ...]:
        return self._settings.methods(kek_type)

    @override
    def _described_methods(self) -> tuple[WrapMethod, ...]:
        return self._settings.vendor_facts.quirks.methods

    @property
    @override
    def _is_method_pinned(self) -> bool:
        return self._settings.method != "auto" or len(self._described_methods()) == 1

    @override
    def _login_hint(self) -> str:
        return f"; PIN file {self._settings.pin_file}"

    @override
    async def describe(self) -> dict[str, object]:
        vendor = self._settings.vendor_facts
        known = {"title": vendor.title, "ran_on": vendor.ran_on, "notes": list(vendor.notes)}
        return await super().describe() | {"vendor": known}

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

    def _on_refusal(self, verdict: Verdict) -> None:
        if self._pin_note is not None:
            self._gate.refuse(self._pin_note, verdict)
            file = str(self._settings.pin_file)
            _log.error("the token refused the PIN", verdict=str(verdict), pin_file=file)


def _vendor_environment(settings: Pkcs11Settings) -> dict[str, str]:
    """What the vendor's module reads and is set here, then what the settings say."""
    inherited = {name: os.environ[name] for name in settings.vendor_facts.variables if name in os.environ}
    return inherited | settings.environment


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
