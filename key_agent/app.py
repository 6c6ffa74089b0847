"""Composition root: from settings to a working agent, in this process or in the one that already runs.

1. Who holds the lock of `state_dir` opens registry, audit log and HSM, and nobody else.
2. A command goes to the running agent through the socket in `state_dir`; if none runs, the command takes the
   lock and does the work itself. Both ways end in the same `Operations`.
"""

import asyncio
import functools
import os
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from envelope.certificates import Identity, Role, verify_certificate
from envelope.errors import MisuseError
from key_agent import config, metrics
from key_agent.agent import Agent, Rhythm, Signing
from key_agent.api import server
from key_agent.collector import spare_what_lives
from key_agent.config import Settings
from key_agent.environments.assembly import Environments
from key_agent.environments.incidents.incident_parts import IncidentParts
from key_agent.environments.keys.key_parts import KeyParts
from key_agent.environments.metrics import EnvironmentMetrics
from key_agent.environments.peers.following import Following
from key_agent.environments.peers.telling import Telling
from key_agent.journal import Journal
from key_agent.lifetimes import Credentials
from key_agent.operations.operations import Operations
from key_agent.push.broker import BrokerLink
from key_agent.push.recipients import read_chain
from key_agent.push.revocations import Revocations
from key_agent.push.roads import BothRoads
from key_agent.push.targets import Targets
from key_agent.push.transport import HttpsTransport, Transport
from key_agent.registry.database import OnStandby, RegistryInUseError
from key_agent.registry.store import Registry
from key_agent.sources.key_server import KeyServerSource
from key_agent.sources.pkcs11 import Pkcs11Source
from key_agent.sources.source import KeySource
from key_agent.standby import Standby, StoppedOnStandbyError
from key_agent.state_dir import AUDIT_NAME, REFUSED_PIN_NAME, SOCKET_NAME, state_lock
from runtime.audit import AuditLog
from runtime.broker import check_library
from runtime.clock import Clock, SystemClock
from runtime.observe import REGISTRY
from runtime.serve import serving
from runtime.settings import SettingsError, read_secret_file

log = structlog.get_logger(__name__)


def load_root(settings: Settings) -> x509.Certificate:
    """The tenant's root. SettingsError if there is not exactly one certificate in the file."""
    path = settings.agent.root_certificate_file
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(
            str(path), "", allowed=f"the tenant's root (PEM) cannot be read: {error}"
        ) from None
    if len(found) != 1:
        raise SettingsError(
            str(path), "", allowed=f"holds {len(found)} certificates, the root alone is allowed"
        )
    return found[0]


def load_signing(settings: Settings, root: x509.Certificate, *, now_s: float) -> Signing:
    """The agent's signing key and certificate, checked as a proxy will check them.

    SettingsError, CertificateError.
    """
    leaf = _checked_leaf(settings, settings.signing.certificate_file, Role.AGENT_SIGNING, root, now_s=now_s)
    path = settings.signing.key_file
    secret = read_secret_file(path)
    try:
        key = load_pem_private_key(bytes(secret), password=None)
    except (ValueError, TypeError) as error:
        raise SettingsError(
            str(path), "", allowed=f"not a PEM private key without a passphrase ({type(error).__name__})"
        ) from None
    finally:
        secret[:] = bytes(len(secret))
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != leaf.public_key():
        raise SettingsError(str(path), "", allowed="is not the key of signing.certificate_file")
    return Signing(key=key, certificate=leaf)


def check_tls_identity(settings: Settings, root: x509.Certificate, *, now_s: float) -> x509.Certificate:
    """The agent's mTLS certificate. SettingsError, CertificateError."""
    read_secret_file(settings.tls.key_file)[:] = b""
    return _checked_leaf(settings, settings.tls.certificate_file, Role.AGENT_TLS, root, now_s=now_s)


def _checked_leaf(
    settings: Settings, path: Path, role: Role, root: x509.Certificate, *, now_s: float
) -> x509.Certificate:
    try:
        leaf, *intermediates = read_chain(path.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(str(path), "", allowed=f"the certificate cannot be read: {error}") from None
    verify_certificate(
        leaf,
        root=root,
        intermediates=intermediates,
        expected=Identity(settings.agent.tenant, role, settings.agent.id),
        now_s=now_s,
    )
    return leaf


def load_credentials(settings: Settings, root: x509.Certificate, now_s: float) -> Credentials:
    """Both own certificates as their files have them now. SettingsError, CertificateError."""
    return Credentials(
        signing=load_signing(settings, root, now_s=now_s),
        tls=check_tls_identity(settings, root, now_s=now_s),
    )


def rhythm_of(settings: Settings) -> Rhythm:
    return Rhythm(
        interval_s=settings.refresh.interval_s,
        validity_s=settings.refresh.validity_s,
        watch_s=settings.refresh.watch_s,
        presence_s=settings.push.presence_s,
        request_timeout_s=settings.push.request_timeout_s,
        batch_size=settings.push.batch_size,
        rotate_after_days=settings.keys.rotate_after_days,
    )


def make_source(settings: Settings, clock: Clock) -> KeySource:
    server = settings.openbao or settings.kmip
    if server is not None:
        return KeyServerSource(
            server,
            settings.signing.key_file,
            settings.signing.certificate_file,
            settings.agent.id,
            clock=clock,
        )
    pkcs11 = settings.pkcs11
    if pkcs11 is None:
        raise MisuseError("settings without a key source were let through")
    if pkcs11.refused_pin_file is None:
        # Where the agent may write, whoever owns the PIN file.
        pkcs11 = msgspec.structs.replace(pkcs11, refused_pin_file=settings.agent.state_dir / REFUSED_PIN_NAME)
    return Pkcs11Source(
        pkcs11,
        settings.signing.key_file,
        settings.signing.certificate_file,
        settings.agent.id,
        clock=clock,
    )


def make_transport(settings: Settings, clock: Clock) -> Transport:
    """The roads to the proxies; on the event loop only. SettingsError: the broker's client is missing."""
    direct = HttpsTransport(
        agent_id=settings.agent.id,
        certificate_file=settings.tls.certificate_file,
        key_file=settings.tls.key_file,
        signing_certificate_file=settings.signing.certificate_file,
    )
    if settings.nats is None:
        return direct
    check_library()
    link = BrokerLink(
        settings.nats,
        tenant=settings.agent.tenant,
        agent_id=settings.agent.id,
        validity_s=settings.refresh.validity_s,
        clock=clock,
    )
    roads = BothRoads(direct, link)
    roads.start()
    return roads


def _revocations(file: Path | None, root: x509.Certificate) -> Revocations | None:
    return None if file is None else Revocations(file, root)


@asynccontextmanager
async def opened(
    settings: Settings,
    *,
    clock: Clock | None = None,
    source: KeySource | None = None,
    transport: Transport | None = None,
    on_standby: OnStandby | None = None,
) -> AsyncIterator[Agent]:
    """An agent with every part open, in this process. The state lock is held while the block runs.

    While another agent leads: RegistryInUseError, or, with *on_standby*, wait until the lease is ours.
    StateLockedError, StateDirError, SettingsError, CertificateError, RegistryError, AuditUnavailableError.
    """
    clock = clock or SystemClock()
    mine = settings.agent
    async with AsyncExitStack() as stack:
        stack.enter_context(state_lock(mine.state_dir))
        now_s = clock.wall_s()
        root = load_root(settings)
        signing = load_signing(settings, root, now_s=now_s)
        check_tls_identity(settings, root, now_s=now_s)
        journal = Journal(AuditLog.open(mine.state_dir / AUDIT_NAME, clock, settings.audit))
        stack.push_async_callback(journal.close)
        registry = await Registry.open(
            config.database_url(mine),
            tenant_id=mine.tenant,
            environment_id=mine.environment_id,
            agent_id=mine.id,
            now_ms=int(now_s * 1000),
            on_standby=on_standby,
        )
        stack.push_async_callback(registry.close)
        source = source or make_source(settings, clock)
        stack.push_async_callback(source.close)
        transport = transport or make_transport(settings, clock)
        stack.push_async_callback(transport.close)
        revocations = _revocations(mine.revocation_list_file, root)
        agent = Agent(
            agent_id=mine.id,
            tenant=mine.tenant,
            environment_id=mine.environment_id,
            root=root,
            rhythm=rhythm_of(settings),
            source=source,
            registry=registry,
            targets=Targets(await registry.book()),
            transport=transport,
            signing=signing,
            journal=journal,
            clock=clock,
            jitter=random.SystemRandom().random,
            load_credentials=functools.partial(load_credentials, settings, root),
            revocations=revocations,
        )
        agent.environments = others = await Environments.open(
            settings,
            registry=registry,
            root=root,
            revocations=revocations,
            consent=agent.consent,
            journal=journal,
            clock=clock,
        )
        if others is not None:
            stack.push_async_callback(others.close)
            following = Following(agent, others.peering)
            others.tasks.append(("following", following.run))
            others.telling = telling = Telling.of(
                others.peering,
                consent=agent.consent,
                pace=source.pace,
                transport=transport,
                targets=agent.targets,
                journal=journal,
                clock=clock,
            )
            others.tasks.append(("telling", telling.run))
            others.key_parts = keys = KeyParts(agent, others)
            others.incident_parts = IncidentParts(agent, others, keys.manager)
        await agent.start()
        yield agent


async def serve(
    settings: Settings,
    stop: asyncio.Event,
    *,
    clock: Clock | None = None,
    hangup: asyncio.Event | None = None,
) -> None:
    """Run the agent until *stop* is set. *hangup* set: certificates and revocation list are read again.

    It stands by while another one leads. RegistryInUseError: another has taken over from this one.
    """
    standby = Standby(
        agent_id=settings.agent.id,
        socket_file=settings.agent.state_dir / SOCKET_NAME,
        host=settings.admin.host,
        port=settings.admin.port,
        stop=stop,
    )
    try:
        async with standby, opened(settings, clock=clock, on_standby=standby.stand_by) as agent:
            await standby.end()
            spare_what_lives()
            metrics.LEADS.set_function(lambda: float(agent.registry.leads))
            metrics.TERM.set(agent.registry.term)
            if hangup is not None:
                agent.lifetimes.wake_by(hangup)
            operations = Operations(agent)
            await agent.journal.record("agent-started", agent=agent.agent_id, pid=os.getpid())
            async with (
                agent.working(refresh=True),
                _among_others(agent),
                server.control_socket(operations, settings.agent.state_dir / SOCKET_NAME),
                serving(
                    server.read_only(agent, operations), host=settings.admin.host, port=settings.admin.port
                ) as port,
            ):
                log.info("key agent runs", agent=agent.agent_id, tenant=agent.tenant, admin_port=port)
                await _either(stop, agent.registry.deposed)
            deposed = agent.registry.deposed.is_set()
            await agent.journal.record(
                "agent-stopped", outcome="deposed" if deposed else "ok", agent=agent.agent_id
            )
            if deposed:
                raise RegistryInUseError(
                    "another key agent has taken it over",
                    "start this one again: it stands by, and leads when it can",
                )
    except StoppedOnStandbyError as error:
        log.info("key agent stopped", agent=settings.agent.id, cause=str(error))


@asynccontextmanager
async def _among_others(agent: Agent) -> AsyncIterator[None]:
    """What this agent and those of other environments do for each other, while the block runs."""
    others = agent.environments
    if not isinstance(others, Environments):
        yield
        return
    telling, keys = others.telling, others.key_parts
    seen = EnvironmentMetrics(
        others.peering,
        told=lambda: {} if telling is None else telling.told,
        standings=lambda: {} if keys is None else keys.manager.bringing.standings,
    )
    REGISTRY.register(seen)
    try:
        async with others.working():
            yield
    finally:
        REGISTRY.unregister(seen)


async def _either(first: asyncio.Event, second: asyncio.Event) -> None:
    waits = [
        asyncio.create_task(event.wait(), name=f"until:{name}")
        for name, event in (("stop", first), ("deposed", second))
    ]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
