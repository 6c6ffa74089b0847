"""What serves clients in one process: the engine with its addon, and the encryption service.

1. Both live on the same keys and the same audit log; neither knows of the other.
2. What cannot be opened of the directory's listeners is told and tried again (engine.py). What cannot be
   opened of the settings' listeners ends the process with cause and next step: nobody else will mend it.
3. Several processes may share the ports: then every socket says so, and each process has its part of quotas.
"""

import asyncio
import contextlib
from typing import Self

from prometheus_client import CollectorRegistry

from envelope.errors import MisuseError
from proxy.addon import SealgateAddon
from proxy.bodies.collecting import Collecting
from proxy.bodies.prefetch import Prefetch
from proxy.bodies.spool import Spools
from proxy.config import Settings, database_url
from proxy.encryption_service.service import EncryptionService
from proxy.engine import Engine, upstream_trust
from proxy.environments import Environments
from proxy.keys.cache import KeyCache
from proxy.metrics import ProxyMetrics
from proxy.tenants.model import Directory
from proxy.uploads import UploadStore
from runtime.audit import AuditLog
from runtime.cli import CommandError, ExitCode
from runtime.clock import Clock


class DataPlane:
    """`async with` prepares it; then `start`, `apply` as often as the directory changes, `stop`."""

    def __init__(
        self,
        settings: Settings,
        *,
        keys: KeyCache,
        audit: AuditLog,
        clock: Clock,
        directory: Directory,
        registry: CollectorRegistry,
        environments: Environments | None = None,
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._audit = audit
        self._clock = clock
        self._directory = directory
        self._registry = registry
        self._environments = environments or Environments()
        self._parts = contextlib.AsyncExitStack()
        self._addon: SealgateAddon | None = None
        self._uploads: UploadStore | None = None
        self._engine: Engine | None = None
        self._service: EncryptionService | None = None

    @property
    def problems(self) -> list[str]:
        """Why no traffic should come here; empty when all is well."""
        found = [self._addon.audit_trouble] if self._addon is not None else []
        problems = [problem for problem in found if problem]
        if self._engine is not None:
            problems += self._engine.problems
        if self._service is not None:
            problems += self._service.problems
        return problems

    @property
    def service_ports(self) -> list[int]:
        """Of the encryption service, in the order of the settings."""
        return [] if self._service is None else self._service.ports

    def listening(self) -> list[str]:
        """The specs of the engine's listeners that are open."""
        return [] if self._engine is None else self._engine.listening()

    async def __aenter__(self) -> Self:
        """Put the gate in place and rehearse it. UnknownEngineError, SelfTestError: do not go on."""
        settings, clock = self._settings, self._clock
        processes = settings.proxy.workers
        prefetch = await self._parts.enter_async_context(
            Prefetch(upstream_trust(settings.engine.upstream_ca_file))
        )
        self._uploads = await self._parts.enter_async_context(
            UploadStore.open(database_url(settings.proxy), clock=clock)
        )
        self._addon = SealgateAddon(
            keys=self._keys,
            audit=self._audit,
            prefetch=prefetch,
            uploads=self._uploads,
            spools=Spools(
                limit_bytes=settings.engine.spool_bytes,
                share=settings.engine.tenant_share,
                directory=settings.proxy.state_dir,
            ),
            collecting=Collecting(
                limit_bytes=settings.engine.collected_bytes, share=settings.engine.tenant_share
            ),
            metrics=ProxyMetrics(self._registry),
            wait_s=settings.keys.wait_s,
            clock=clock,
            environments=self._environments,
        )
        self._engine = Engine(
            settings.engine, self._addon, clock, limits=settings.limits, reuse_port=processes > 1
        )
        meters = self._engine.meters()
        self._registry.register(meters)
        self._parts.callback(self._registry.unregister, meters)
        await self._engine.prepare()
        if settings.encryption_service.listen:
            self._service = service = EncryptionService(
                settings.encryption_service,
                state_dir=settings.proxy.state_dir,
                keys=self._keys,
                audit=self._audit,
                clock=clock,
                directory=self._directory.encryption_service,
                processes=processes,
                refuses=self._environments.refuses,
                is_one_of_several=self._is_one_of_several,
            )
            self._registry.register(service.metrics)
            self._parts.callback(self._registry.unregister, service.metrics)
        return self

    def _is_one_of_several(self, tenant: str) -> bool:
        """Whether *tenant* has environments besides this one: what ends here may go on there."""
        environments = self._environments
        return environments.name is not None or environments.word(tenant) is not None

    async def __aexit__(self, *_: object) -> None:
        await self._parts.aclose()

    async def start(self, directory: Directory) -> None:
        """Open the listeners. CommandError if one of the encryption service cannot be."""
        if self._engine is None:
            raise MisuseError("the data plane was not prepared")
        if self._service is not None:
            self._service.apply(directory.encryption_service)
            try:
                self._service.start()
            except OSError as error:
                raise CommandError(
                    f"the encryption service cannot listen at {error.filename}: {error.strerror or error}",
                    "choose another address in [[encryption_service.listen]] or stop what uses it",
                    ExitCode.UNAVAILABLE,
                ) from None
        await self._engine.start(directory)

    def tasks(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """What has to run beside it, in *group*; to be cancelled after `stop`."""
        if self._engine is None:
            raise MisuseError("the data plane was not prepared")
        tasks: list[asyncio.Task[None]] = [
            group.create_task(self._engine.cut_ended(), name="engine:cut-ended"),
            group.create_task(self._engine.retry_problems(), name="engine:retry"),
        ]
        if self._service is not None:
            tasks.append(group.create_task(self._service.sweep(), name="service:sweep"))
        if self._uploads is not None:
            tasks.append(group.create_task(self._uploads.keep_swept(), name="uploads:sweep"))
        return tasks

    async def apply(self, directory: Directory) -> None:
        """Serve *directory* from now on."""
        if self._service is not None:
            self._service.apply(directory.encryption_service)
        if self._engine is not None:
            await self._engine.apply(directory)

    async def stop(self, *, grace_s: float) -> None:
        """Close the listeners, let what is under way end within *grace_s*, reset the rest. Again: no harm."""
        async with asyncio.TaskGroup() as group:
            if self._service is not None:
                group.create_task(self._service.stop(grace_s=grace_s), name="service:stop")
            if self._engine is not None:
                group.create_task(self._engine.stop(grace_s=grace_s), name="engine:stop")
