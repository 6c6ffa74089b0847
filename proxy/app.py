"""The composition root of `sealgate run`: the parts, the order they start and stop in, when we are ready.

1. Before a listener opens: formats known-answer tested, the gate's versions, sources and rehearsal checked,
   audit log and directory open. What fails there ends the process with cause and next step.
2. Ready means: every listener of the directory is open, the directory can be read, the audit log takes
   events. Missing keys are no reason: one tenant's silent agent must not take the others' proxy out of
   service, and the refusal a client then gets says more than a closed port.
3. A change of the directory is served within `reload_s`. While it cannot be read, what was last read goes on;
   keys expire regardless.
4. A task that ends by an error ends the process: a supervisor restarts it, and a proxy without keys refuses.
5. With `proxy.workers` above 1 clients are served by processes of their own (workers/fleet.py); this one
   receives keys, watches, and answers for all of them.
6. SIGTERM: not ready, listeners closed, bodies in flight may end within `drain_s` while keys are still
   refreshed, then the rest is reset and keys are overwritten.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Final, override

import structlog
from cryptography import x509
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from envelope.derive import object_key
from envelope.errors import FormatError, IntegrityError, MisuseError, SealgateError
from envelope.keys import KeyId, NetworkService
from envelope.objects import Opener, Sealer
from proxy import gate
from proxy.api.broker import BrokerListener
from proxy.api.connections import AgentConnections
from proxy.api.environment import answering_checks, status_routes
from proxy.api.push import make_push_application
from proxy.config import Settings, database_url
from proxy.data_plane import DataPlane
from proxy.environments import Environments, Word
from proxy.keys.cache import KeyCache
from proxy.keys.receive import Receiver
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.model import Directory
from proxy.tenants.watch import DirectoryWatch
from proxy.users.portal import make_portal
from proxy.workers.fleet import Fleet
from runtime import lifecycle, serve
from runtime.audit import AuditLog
from runtime.cli import CommandError, ExitCode
from runtime.clock import Clock, SystemClock
from runtime.observe import NAMESPACE, REGISTRY, configure_logging
from runtime.tls import ServerTls, TlsError

log = structlog.get_logger(__name__)

# docs/format.md 2.5, "hello"; the same bytes stand in tests/vectors.
_KAT_OWNER: Final = NetworkService("tenant-a", "drive")
_KAT_KEY_ID: Final = KeyId(bytes(range(0xA0, 0xB0)))
_KAT_MATERIAL: Final = bytes(range(32))
_KAT_PLAIN: Final = b"hello"
_KAT_OBJECT: Final = bytes.fromhex(
    "895347540d0a1a0a01010020a0a1a2a3a4a5a6a7a8a9aaabacadaeaf00000000404142434445464748494a4b4c4d4e"
    "4f50515253545556579e1db225d1ed32207e195e078a52ab3623f0ab0927f2ed81606ccb800a657d557dffcd2dae1a"
    "ed7fd5a333ae8d4e618e7bb800718f"
)


class SelfCheckError(SealgateError):
    """The formats do not give the answers they must: this build or machine is unsound."""


def check_formats() -> None:
    """Known answer: open the vector, seal and open again, and be refused with another key. SelfCheckError."""
    try:
        key = object_key(_KAT_MATERIAL, _KAT_OWNER, _KAT_KEY_ID)
        foreign = object_key(os.urandom(32), _KAT_OWNER, _KAT_KEY_ID)
        if _opened(_KAT_OBJECT, key) != _KAT_PLAIN:
            raise SelfCheckError("the known object does not open to the known plaintext")
        sealer = Sealer(key, _KAT_OWNER, _KAT_KEY_ID)
        sealed = bytes(sealer.update(_KAT_PLAIN)) + sealer.finalize()
        if _opened(sealed, key) != _KAT_PLAIN or _KAT_PLAIN in sealed:
            raise SelfCheckError("what was sealed does not open again")
    except (FormatError, IntegrityError) as error:
        raise SelfCheckError(f"the known answer was not reached: {error}") from error
    with contextlib.suppress(IntegrityError):
        _opened(sealed, foreign)
        raise SelfCheckError("a foreign key opens what was sealed")


def _opened(sealed: bytes, key: bytes) -> bytes:
    opener = Opener(_KAT_OWNER, lambda _header: key)
    return bytes(opener.update(sealed)) + opener.finalize()


class KeyCountdown(Collector):
    """Metrics of the key cache: for each service, whether it can seal and how long its keys are good."""

    def __init__(self, keys: KeyCache, receiver: Receiver) -> None:
        self._keys = keys
        self._receiver = receiver

    @override
    def collect(self) -> Iterable[GaugeMetricFamily]:
        labels = ("tenant", "service")
        valid = GaugeMetricFamily(
            f"{NAMESPACE}_key_valid_seconds", "Until the service is blind if nobody renews", labels=labels
        )
        seals = GaugeMetricFamily(f"{NAMESPACE}_key_can_seal", "Whether uploads can be sealed", labels=labels)
        for status in self._keys.status(sorted(self._receiver.directory.recipients)):
            names = (status.owner.tenant, status.owner.service)
            valid.add_metric(names, status.valid_for_s)
            seals.add_metric(names, 1.0 if status.can_seal else 0.0)
        return (valid, seals)


class ProxyProcess:
    """All parts of one running proxy. `run` once; `ports` are known while it runs."""

    def __init__(
        self, settings: Settings, *, clock: Clock | None = None, registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self._registry = registry
        self._phase: str | None = "starting"
        self._plane: DataPlane | Fleet | None = None
        self._watch: DirectoryWatch | None = None
        self._receiver: Receiver | None = None
        self._push_tls: ServerTls | None = None
        self._environments = Environments()
        self.ports: dict[str, int] = {}
        """Of `push`, `health` and the encryption service (`service:0`, `service:1` ...), once they listen."""

    def not_ready(self) -> list[str]:
        """The reasons why no traffic should come here."""
        reasons = [self._phase, self._watch and self._watch.failure]
        problems = self._plane.problems if self._plane is not None else []
        return [reason for reason in reasons if reason] + problems

    def hang_up(self) -> None:
        """SIGHUP, and after a change of the directory: read the push listener's files and roots again."""
        if self._push_tls is None or self._receiver is None:
            return
        try:
            self._push_tls.renew(client_roots=_roots(self._receiver.directory))
        except TlsError as error:
            log.exception("push listener not renewed; it stays as it was", cause=str(error))

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until *stop* is set. CommandError or SealgateError for what the operator has to mend."""
        settings, clock = self._settings, self._clock
        check_formats()
        async with contextlib.AsyncExitStack() as parts:
            audit = AuditLog.open(settings.proxy.audit_file, clock, settings.audit)
            parts.callback(audit.close)
            store = await asyncio.to_thread(
                DirectoryStore.open, database_url(settings.proxy), settings.proxy.state_dir, clock=clock
            )
            parts.callback(store.close)
            self._watch = watch = DirectoryWatch(
                store,
                audit,
                clock,
                interval_s=settings.proxy.reload_s,
                recorded_file=settings.proxy.audit_file.with_suffix(".revision"),
            )
            directory = await watch.load()
            keys = KeyCache(clock, on_clock_set=self._clock_was_set)
            parts.callback(keys.close)
            mine = settings.environment
            self._environments = environments = Environments(
                None if mine is None else mine.name,
                agents={} if mine is None else mine.agents,
                on_refused=keys.withdraw_tenant,
            )
            fleet = None
            if settings.proxy.workers > 1:
                fleet = Fleet(settings, clock=clock, registry=self._registry, on_blind=self._forget_past)
            self._receiver = receiver = Receiver(
                proxy_id=settings.proxy.id,
                cache=keys,
                audit=audit,
                clock=clock,
                validity_s=settings.keys.validity_s,
                directory=directory,
                relay=fleet,
            )
            countdown = KeyCountdown(keys, receiver)
            self._registry.register(countdown)
            parts.callback(self._registry.unregister, countdown)
            plane: DataPlane | Fleet = fleet or DataPlane(
                settings,
                keys=keys,
                audit=audit,
                clock=clock,
                directory=directory,
                registry=self._registry,
                environments=environments,
            )
            self._plane = plane
            await parts.enter_async_context(plane)
            audit.append("proxy-started", proxy=settings.proxy.id, revision=directory.revision)
            await parts.enter_async_context(self._health(fleet))
            await parts.enter_async_context(self._push(receiver))
            await parts.enter_async_context(self._portal(receiver))
            if mine is not None and mine.agent_check_port is not None:
                with _binding("agent-check", mine.agent_check_host, mine.agent_check_port):
                    check = await answering_checks(
                        lambda: environments.line(self._tenants()),
                        host=mine.agent_check_host,
                        port=mine.agent_check_port,
                    )
                parts.push_async_callback(check.wait_closed)
                parts.callback(check.close)
                self.ports["agent-check"] = check.sockets[0].getsockname()[1]
            await self._serve(plane, keys, directory, stop)
            audit.append("proxy-stopped", proxy=settings.proxy.id)

    async def _serve(
        self, plane: DataPlane | Fleet, keys: KeyCache, directory: Directory, stop: asyncio.Event
    ) -> None:
        watch = _present(self._watch)
        try:
            async with asyncio.TaskGroup() as group:
                await plane.start(directory)
                self.ports |= {f"service:{index}": port for index, port in enumerate(plane.service_ports)}
                tasks = plane.tasks(group)
                tasks.append(group.create_task(keys.run_sweeper(), name="keys:sweep"))
                tasks.append(group.create_task(watch.run(directory, self._apply), name="directory:watch"))
                if self._settings.nats is not None:
                    listener = BrokerListener(
                        self._settings.nats,
                        _present(self._receiver),
                        clock=self._clock,
                        requests_per_s=self._settings.push.requests_per_s,
                        entitled=self._environments.check_entitled,
                    )
                    tasks.append(group.create_task(listener.run(), name="push:broker"))
                self._phase = None
                log.info("serving", listeners=plane.listening(), ports=self.ports)
                await stop.wait()
                self._phase = "stopping"
                await plane.stop(grace_s=self._settings.engine.drain_s)
                for task in tasks:
                    task.cancel()
        finally:
            self._phase = "stopping"
            await plane.stop(grace_s=0)

    async def _apply(self, directory: Directory) -> None:
        """Serve what the directory says now."""
        plane = _present(self._plane)
        if isinstance(plane, Fleet):  # first those that serve: what we take they must know
            await plane.apply(directory)
        _present(self._receiver).apply(directory)
        self._environments.keep(directory.tenants)
        self.hang_up()
        if isinstance(plane, DataPlane):
            await plane.apply(directory)

    def _tenants(self) -> Iterable[str]:
        return self._receiver.directory.tenants if self._receiver is not None else ()

    async def _told(self, tenant: str, agent: str, word: Word) -> Word:
        """An agent has said what its environment is: in force everywhere when this returns."""
        before = self._environments.word(tenant)
        in_force = self._environments.take(tenant, word, agent=agent, now_boot_s=self._clock.boot_s())
        if isinstance(self._plane, Fleet):
            await self._plane.tell(tenant, in_force)
        if before is None or before.state != in_force.state:
            log.info("environment", tenant=tenant, environment=word.environment, state=in_force.state)
        return in_force

    def _forget_past(self) -> None:
        _present(self._receiver).forget_past()

    def _clock_was_set(self, ahead_s: float) -> None:
        """Keys may have ended for it, or pushes may have been refused: agents come anew in some seconds."""
        log.warning("the wall clock was set", ahead_s=round(ahead_s, 1))
        if self._receiver is not None:
            self._receiver.forget_past()

    @contextlib.asynccontextmanager
    async def _health(self, fleet: Fleet | None) -> AsyncIterator[None]:
        application = serve.make_application()
        serve.health_routes(
            application,
            readyz=self.not_ready,
            registry=self._registry,
            scrape=None if fleet is None else fleet.scrape,
        )
        status_routes(application, self._environments, tenants=self._tenants)
        health = self._settings.health
        with _binding("health", health.host, health.port):
            server = serve.serving(application, host=health.host, port=health.port)
            self.ports["health"] = await server.__aenter__()
        try:
            yield
        finally:
            await server.__aexit__(None, None, None)

    @contextlib.asynccontextmanager
    async def _push(self, receiver: Receiver) -> AsyncIterator[None]:
        push = self._settings.push
        self._push_tls = ServerTls(
            push.certificate_file, push.key_file, client_roots=_roots(receiver.directory)
        )
        application = make_push_application(
            receiver,
            clock=self._clock,
            requests_per_s=push.requests_per_s,
            told=self._told,
            entitled=self._environments.check_entitled,
        )
        with _binding("push", push.host, push.port):
            server = serve.serving(
                application,
                host=push.host,
                port=push.port,
                ssl_context=self._push_tls.context,
                admit=AgentConnections(lambda: receiver.directory, self._clock).admit,
            )
            self.ports["push"] = await server.__aenter__()
        try:
            yield
        finally:
            await server.__aexit__(None, None, None)

    @contextlib.asynccontextmanager
    async def _portal(self, receiver: Receiver) -> AsyncIterator[None]:
        portal = self._settings.portal
        if portal is None:
            yield
            return
        tls = None
        if portal.certificate_file is not None and portal.key_file is not None:
            tls = ServerTls(portal.certificate_file, portal.key_file).context
        application = make_portal(lambda: receiver.directory)
        with _binding("portal", portal.host, portal.port):
            server = serve.serving(application, host=portal.host, port=portal.port, ssl_context=tls)
            self.ports["portal"] = await server.__aenter__()
        try:
            yield
        finally:
            await server.__aexit__(None, None, None)


def _roots(directory: Directory) -> list[x509.Certificate]:
    return [tenant.root_certificate for tenant in directory.tenants.values()]


def _present[T](part: T | None) -> T:
    if part is None:
        raise MisuseError("the proxy is not running")
    return part


@contextlib.contextmanager
def _binding(what: str, host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(
            f"the {what} listener cannot open {host}:{port}: {error.strerror or error}",
            f"choose another address for [{what}] or stop what uses it",
            ExitCode.UNAVAILABLE,
        ) from None


def run_proxy(settings: Settings) -> None:
    """`sealgate run`: serve until a signal. CommandError for what the operator has to mend."""
    configure_logging(json=settings.log.json)
    for warning in lifecycle.harden_process():
        log.warning("process not fully hardened", cause=warning)
    open_files = lifecycle.raise_open_files()
    places = settings.limits.places(open_files)
    if open_files >= 0 and places < settings.limits.connections:
        log.warning("fewer clients than limits.connections", connections=places, open_files=open_files)
    process = ProxyProcess(settings)
    try:
        lifecycle.run(process.run, on_hangup=process.hang_up)
    except* (CommandError, SealgateError, gate.UnknownEngineError, gate.SelfTestError) as group:
        raise _explained(group.exceptions[0]) from None


def _explained(error: BaseException) -> CommandError:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, CommandError):
        return error
    next_step = getattr(error, "next_step", None)
    if isinstance(error, gate.UnknownEngineError):
        next_step = "install the versions of requirements-proxy.lock; docs/adr/0002 says how to update"
    return CommandError(
        str(error),
        next_step if isinstance(next_step, str) else "run `sealgate doctor`; it checks the installation",
        ExitCode.UNAVAILABLE,
    )
