"""The encryption service of one process: its parts, and how a picture of the directory reaches them.

1. One core, one limiter, one object per dialect, whatever number of listeners.
2. Only dialects that a listener names are made; which tenants may use them is the directory's to say, call by
   call, so that a change needs nothing to be told but the limiter.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

from proxy.encryption_service.access import Access
from proxy.encryption_service.core import Core
from proxy.encryption_service.credentials import SecretSealer
from proxy.encryption_service.dialects.dialect import Dialect
from proxy.encryption_service.dialects.kacls import KaclsDialect
from proxy.encryption_service.dialects.native import NativeDialect
from proxy.encryption_service.dialects.transit import TransitDialect
from proxy.encryption_service.dialects.xks import XksDialect
from proxy.encryption_service.http_server import ServiceServer
from proxy.encryption_service.jwks import KeySets
from proxy.encryption_service.limits import Limiter, Limits, Quota
from proxy.encryption_service.metrics import ServiceMetrics
from proxy.encryption_service.model import DialectName, ServiceDirectory
from proxy.encryption_service.outbound import Outbound, outbound_context
from proxy.encryption_service.pressure import LOOK_S, Pressure
from proxy.encryption_service.settings import EncryptionServiceSettings
from proxy.keys.cache import KeyCache
from runtime.audit import AuditLog
from runtime.clock import Clock


class EncryptionService:
    """`start`, `apply` as often as the directory changes, `stop`."""

    def __init__(
        self,
        settings: EncryptionServiceSettings,
        *,
        state_dir: Path,
        keys: KeyCache,
        audit: AuditLog,
        clock: Clock,
        directory: ServiceDirectory,
        processes: int = 1,
        refuses: Callable[[str], bool] | None = None,
        is_one_of_several: Callable[[str], bool] | None = None,
    ) -> None:
        """*processes*: how many serve the same listeners; this one holds its share of every quota.

        *refuses*: whether the environment must not serve a tenant at this moment (proxy/environments.py).
        *is_one_of_several*: whether the tenant has other environments.
        """
        self._directory = directory
        self._clock = clock
        self.metrics: Final = ServiceMetrics()
        access = Access(self._current, clock, SecretSealer(state_dir))
        quota = settings.quota
        self._limiter = Limiter(
            clock,
            Limits(
                tenant=Quota(requests_per_s=quota.tenant_requests_per_s, burst=quota.tenant_burst),
                credential=Quota(
                    requests_per_s=quota.credential_requests_per_s, burst=quota.credential_burst
                ),
                places=quota.places,
            ),
            processes=processes,
            credential_rate=self._credential_rate,
        )
        core = Core(
            keys=keys,
            access=access,
            directory=self._current,
            audit=audit,
            clock=clock,
            limiter=self._limiter,
            counted=self.metrics.called,
            refuses=refuses,
            is_one_of_several=is_one_of_several,
        )
        names = {name for listen in settings.listen for name in listen.dialects}
        dialects: dict[DialectName, Dialect] = {}
        if DialectName.NATIVE in names:
            dialects[DialectName.NATIVE] = NativeDialect(
                core=core, access=access, limiter=self._limiter, directory=self._current, clock=clock
            )
        if DialectName.TRANSIT in names:
            dialects[DialectName.TRANSIT] = TransitDialect(
                core=core, access=access, limiter=self._limiter, directory=self._current, clock=clock
            )
        if DialectName.XKS in names:
            dialects[DialectName.XKS] = XksDialect(
                core=core,
                access=access,
                limiter=self._limiter,
                directory=self._current,
                clock=clock,
                fleet=settings.xks,
            )
        self._outbound: Outbound | None = None
        self._issuer_keys: KeySets | None = None
        if DialectName.KACLS in names:
            # No connection and no thread before the first call.
            self._outbound = outbound = Outbound(
                outbound_context(settings.outbound.ca_file), private_hosts=settings.outbound.private_hosts
            )
            self._issuer_keys = KeySets(outbound.get, clock)
            dialects[DialectName.KACLS] = KaclsDialect(
                core=core,
                limiter=self._limiter,
                directory=self._current,
                clock=clock,
                issuer_keys=self._issuer_keys,
                post=outbound.post_json,
            )
        self._server = ServiceServer(
            settings, dialects, metrics=self.metrics, clock=clock, reuse_port=processes > 1
        )

    @property
    def problems(self) -> list[str]:
        """Why something that should be served is not as it should be."""
        return self._server.problems

    @property
    def ports(self) -> list[int]:
        """In the order of the settings, once it listens."""
        return [listener.port for listener in self._server.listeners]

    def apply(self, directory: ServiceDirectory) -> None:
        """Serve what *directory* says from the next call on; calls under way are asked again."""
        self._directory = directory
        tenants = {tenant for tenant, _ in directory.dialects}
        self._limiter.forget(tenants, set(directory.credentials))

    def start(self) -> None:
        """Open the listeners. OSError names the address in `filename`; TlsError."""
        self._server.open()

    async def sweep(self) -> None:
        """Time-outs, changed certificates, how much of our time is left: until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._server.sweep(), name="service:listeners")
            group.create_task(self._watch_pressure(), name="service:pressure")

    async def _watch_pressure(self) -> NoReturn:
        pressure = Pressure.of_this_thread()
        while True:
            self._limiter.strained(pressure.look(self._clock.boot_s()))
            await self._clock.sleep(LOOK_S)

    async def stop(self, *, grace_s: float) -> None:
        """Take no more connections, let answers under way end within *grace_s*, reset the rest."""
        await self._server.stop(grace_s=grace_s)
        if self._issuer_keys is not None:
            await self._issuer_keys.aclose()
        if self._outbound is not None:
            await self._outbound.aclose()

    def _current(self) -> ServiceDirectory:
        return self._directory

    def _credential_rate(self, credential_id: str) -> float | None:
        entry = self._directory.credentials.get(credential_id)
        return None if entry is None else entry.requests_per_s
