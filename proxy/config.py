"""The proxy's settings: a TOML file, overridden by SEALGATE_SECTION__KEY (runtime/settings.py).

1. Unknown keys are refused. Units stand in the names. What depends on each other is checked here.
2. A relative path is relative to the file's directory: a working directory is nobody's intention.
3. Secrets stand in files of their own (`*_file`); a database password does not stand in `database_url`.
4. Tenants and network services are no settings: they are in the directory (`sealgate tenant`, `service`).
"""

import ipaddress
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from envelope.errors import FormatError
from envelope.keys import check_name
from proxy.encryption_service.settings import EncryptionServiceSettings, listener_files
from proxy.limits import ClientLimits
from proxy.tenants.model import CertificateFiles
from runtime import broker, database
from runtime import settings as runtime_settings
from runtime.audit_files import RotationSettings

ENVIRONMENT_PREFIX: Final = "SEALGATE"
MAX_VALIDITY_S: Final = 3600
"""Longer would turn the promise of minutes into hours."""


MAX_WORKERS: Final = 64


def _check_host(name: str, host: str) -> None:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if host != "localhost":
            raise ValueError(f"{name} must be an IP address, not {host!r}") from None


def _check_port(name: str, port: int) -> None:
    if not 0 <= port <= 65535:
        raise ValueError(f"{name} must be between 0 (any free port) and 65535, not {port}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, not {value:g}")


class ProxySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    """This proxy, or the cluster it belongs to: the audience of key-material envelopes."""
    state_dir: Path = Path("/var/lib/sealgate")
    """0700, on a local disk: directory database, private keys, interception CAs, audit log."""
    database_url: str | None = None
    """Default: SQLite in `state_dir`. PostgreSQL: postgresql+psycopg://user@host/database."""
    database_url_file: Path | None = None
    """A file that holds the URL, for one with a password in it."""
    reload_s: float = 0.25
    """How often the running proxy looks whether the directory has changed, so how long a revoked credential
    may still let in. A look costs about a third of a millisecond."""
    workers: int = 1
    """Processes that serve clients, sharing their ports; above 1 each is a child of one that does not."""
    worker_patience_s: float = 1.0
    """A worker that has not put a push or a withdrawal in force by then is killed and replaced."""

    def __post_init__(self) -> None:
        try:
            check_name("proxy", self.id)
        except FormatError as error:
            raise ValueError(f"proxy.id: {error}") from None
        database.check_url_settings("proxy", self.database_url, self.database_url_file)
        _check_range("proxy.reload_s", self.reload_s, 0.05, 60)
        _check_range("proxy.workers", self.workers, 1, MAX_WORKERS)
        _check_range("proxy.worker_patience_s", self.worker_patience_s, 0.1, 5)

    @property
    def audit_file(self) -> Path:
        return self.state_dir / "audit.jsonl"

    def audit_files(self) -> list[Path]:
        """The proxy's, and those of its workers, also of workers that there once were."""
        return [self.audit_file, *sorted(self.state_dir.glob("audit-worker-*.jsonl"))]

    def worker_audit_file(self, number: int) -> Path:
        """Worker processes have a chain each, numbered from 0."""
        return self.state_dir / f"audit-worker-{number}.jsonl"


class PushSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The listener for the enterprises' key agents: TLS 1.3, client certificates of the tenants' roots."""

    host: str = "0.0.0.0"
    port: int = 8443
    certificate_file: Path
    """PEM, with intermediates; the agents verify it."""
    key_file: Path
    """PEM, readable by the proxy alone."""
    requests_per_s: float = 20.0
    """Sustained, per tenant; a burst may be five times as many."""

    def __post_init__(self) -> None:
        _check_host("push.host", self.host)
        _check_port("push.port", self.port)
        if self.certificate_file == self.key_file:
            raise ValueError("push.certificate_file and push.key_file must be two files")
        _check_range("push.requests_per_s", self.requests_per_s, 1, 10_000)


class KeySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    validity_s: int = 330
    """The longest that pushed keys may live here, whatever their envelope says."""
    wait_s: float = 5.0
    """How long an upload waits for a key that is not here yet, before it is refused."""

    def __post_init__(self) -> None:
        _check_range("keys.validity_s", self.validity_s, 10, MAX_VALIDITY_S)
        _check_range("keys.wait_s", self.wait_s, 0, 60)
        if self.wait_s >= self.validity_s:
            raise ValueError(
                f"keys.wait_s ({self.wait_s:g}) must be less than keys.validity_s ({self.validity_s})"
            )


LONGEST_COLLECTED_BYTES: Final = 16 << 20


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    http2: bool = True
    """HTTP/2 towards clients."""
    upstream_ca_file: Path | None = None
    """PEM roots that services must be verified by; default: the Mozilla roots of certifi."""
    drain_s: float = 20.0
    """On SIGTERM: how long bodies in flight may go on."""
    proxy_certificate_file: Path | None = None
    """PEM, with intermediates: shown to clients that reach a forward proxy by TLS. Default: one of the
    tenant's interception CA, where the listener is one tenant's alone."""
    proxy_key_file: Path | None = None
    spool_bytes: int = 1 << 30
    """Sealed bytes that may wait on this process's disk, all uploads together: where a service has to be told
    a length that the client does not say. In nameless files in `proxy.state_dir`."""
    collected_bytes: int = 256 << 20
    """Bodies that this process reads into memory before they go on (lists, documents), all together."""
    tenant_share: float = 0.5
    """The part of `spool_bytes`, and of `collected_bytes`, that one tenant may hold."""
    levers: bool = True
    """The performance patches of the gate; off to find out whether one is at fault."""

    def __post_init__(self) -> None:
        _check_range("engine.drain_s", self.drain_s, 0, 600)
        _check_range("engine.spool_bytes", self.spool_bytes, 1 << 20, 1 << 50)
        _check_range("engine.collected_bytes", self.collected_bytes, 32 << 20, 1 << 50)
        _check_range("engine.tenant_share", self.tenant_share, 0.01, 1)
        if self.collected_bytes * self.tenant_share < LONGEST_COLLECTED_BYTES:
            raise ValueError(
                "engine.collected_bytes * engine.tenant_share must be 16 MiB at least, one long body"
            )
        if (self.proxy_certificate_file is None) != (self.proxy_key_file is None):
            raise ValueError("engine.proxy_certificate_file and engine.proxy_key_file come together")

    @property
    def proxy_certificate(self) -> CertificateFiles | None:
        if self.proxy_certificate_file is None or self.proxy_key_file is None:
            return None
        return CertificateFiles(certificate_file=self.proxy_certificate_file, key_file=self.proxy_key_file)


class HealthSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The listener of /livez, /readyz and /metrics; no login, so on loopback unless told otherwise."""

    host: str = "127.0.0.1"
    port: int = 9080

    def __post_init__(self) -> None:
        _check_host("health.host", self.host)
        _check_port("health.port", self.port)


class PortalSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where users of forward proxies fetch PAC file and CA: `/<tenant>/`. Without this section: nowhere."""

    host: str = "0.0.0.0"
    port: int = 8080
    certificate_file: Path | None = None
    """PEM; without it and its key the portal speaks plain HTTP."""
    key_file: Path | None = None

    def __post_init__(self) -> None:
        _check_host("portal.host", self.host)
        _check_port("portal.port", self.port)
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("portal.certificate_file and portal.key_file come together")


class EnvironmentSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a proxy that belongs to one of several environments (docs/environments.md)."""

    name: str
    """Nothing is served before an agent of this environment has said that it may be."""
    agents: dict[str, str] = {}
    """By tenant, that agent's id. Where none is named, whoever speaks first since the start is believed."""
    agent_check_host: str = "127.0.0.1"
    agent_check_port: int | None = None
    """Where HAProxy's agent-check is answered, if it asks this proxy itself."""

    def __post_init__(self) -> None:
        try:
            check_name("environment", self.name)
        except FormatError as error:
            raise ValueError(f"environment.name: {error}") from None
        try:
            for tenant, agent in self.agents.items():
                check_name("tenant", tenant)
                check_name("agent", agent)
        except FormatError as error:
            raise ValueError(f"environment.agents: {error}") from None
        _check_host("environment.agent_check_host", self.agent_check_host)
        if self.agent_check_port is not None:
            _check_port("environment.agent_check_port", self.agent_check_port)


class LogSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    json: bool | None = None
    """JSON lines; default: JSON unless stderr is a terminal."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    proxy: ProxySettings
    push: PushSettings
    nats: broker.BrokerSettings | None = None
    """A broker that envelopes may come by, beside the push listener."""
    keys: KeySettings = KeySettings()
    engine: EngineSettings = EngineSettings()
    limits: ClientLimits = ClientLimits()
    """Of clients of the forward and reverse listeners."""
    health: HealthSettings = HealthSettings()
    portal: PortalSettings | None = None
    environment: EnvironmentSettings | None = None
    log: LogSettings = LogSettings()
    audit: RotationSettings = RotationSettings()
    encryption_service: EncryptionServiceSettings = EncryptionServiceSettings()

    def __post_init__(self) -> None:
        own = {(self.push.host, self.push.port): "push", (self.health.host, self.health.port): "health"}
        for listen in self.encryption_service.listen:
            if listen.port and (taken := own.get((listen.host, listen.port))):
                raise ValueError(f"encryption_service and {taken} must not listen at the same address")
            if not listen.port and self.proxy.workers > 1:
                raise ValueError("with proxy.workers > 1 a listener of encryption_service needs a port")
        if self.portal is not None and self.portal.port and (self.portal.host, self.portal.port) in own:
            raise ValueError("portal must not listen at the address of push or health")
        if self.push.port and (self.push.host, self.push.port) == (self.health.host, self.health.port):
            raise ValueError("push and health must not listen at the same address")


def database_url(proxy: ProxySettings) -> str:
    """Where the directory is. SettingsError if the URL file cannot be read or holds no URL."""
    return database.chosen_url(
        proxy.database_url, proxy.database_url_file, default=proxy.state_dir / "directory.db"
    )


def unusable_files(settings: Settings) -> Iterator[str]:
    """What is wrong with the files that *settings* name. SettingsError for the database's URL."""
    database_url(settings.proxy)
    files = {"push.certificate_file": settings.push.certificate_file}
    if settings.engine.upstream_ca_file is not None:
        files["engine.upstream_ca_file"] = settings.engine.upstream_ca_file
    secrets = {"push.key_file": settings.push.key_file}
    if (own := settings.engine.proxy_certificate) is not None:
        files["engine.proxy_certificate_file"] = own.certificate_file
        secrets["engine.proxy_key_file"] = own.key_file
    portal = settings.portal
    if portal is not None and portal.certificate_file is not None and portal.key_file is not None:
        files["portal.certificate_file"] = portal.certificate_file
        secrets["portal.key_file"] = portal.key_file
    for name, path, is_secret in listener_files(settings.encryption_service):
        (secrets if is_secret else files)[name] = path
    if settings.nats is not None:
        broker.check_library()
        more, more_secrets = broker.unusable_files(settings.nats)
        files, secrets = files | more, secrets | more_secrets
    yield from runtime_settings.unusable_files(files, secrets=secrets)


def load(path: Path, environment: Mapping[str, str]) -> Settings:
    """The settings of *path* with overrides from *environment*. SettingsError names file, key and value."""
    return runtime_settings.load(path, Settings, environment=environment, prefix=ENVIRONMENT_PREFIX)
