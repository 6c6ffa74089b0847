"""The key agent's settings: a TOML file, overridden by KEY_AGENT_SECTION__KEY (runtime/settings.py).

1. Unknown keys are refused. Units stand in the names. What depends on each other is checked here.
2. Relative paths are relative to the configuration file: a service's working directory is nobody's intention.
3. Secrets stand in files of their own (`*_file`); a database password does not stand in `database_url`.
"""

import ipaddress
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from envelope.errors import FormatError
from envelope.keys import check_name
from key_agent.environments.peers.etcd import EtcdSettings
from key_agent.sources.key_server import KmipSettings, OpenBaoSettings
from key_agent.sources.pkcs11 import Pkcs11Settings
from runtime import broker, database
from runtime import settings as runtime_settings
from runtime.audit_files import RotationSettings

ENVIRONMENT_PREFIX: Final = "KEY_AGENT"


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the configuration file."""


class AgentSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    """As in the agent's certificates: urn:sealgate:<tenant>:agent:<id>:signing and :tls."""
    tenant: str
    environment_id: str
    """Which of the tenant's environments this agent's KEK and registry are; part of every EKM's binding."""
    state_dir: Path = Path("/var/lib/sealgate-agent")
    """0700, on a local disk: database, audit log, lock, control socket."""
    root_certificate_file: Path
    """The tenant's root (PEM): every network service's certificate must hang on it."""
    revocation_list_file: Path | None = None
    """CRL of the tenant's root (and of authorities below it), read again when it changes. Without a list in
    date no keys are sent to anyone."""
    database_url: str | None = None
    """Default: SQLite in `state_dir`. PostgreSQL: postgresql+psycopg://user@host/database."""
    database_url_file: Path | None = None
    """A file that holds the URL, for one with a password in it."""

    def __post_init__(self) -> None:
        names = {"agent": self.id, "tenant": self.tenant, "environment": self.environment_id}
        for kind, name in names.items():
            try:
                check_name(kind, name)
            except FormatError as error:
                raise ValueError(str(error)) from None
        database.check_url_settings("agent", self.database_url, self.database_url_file)


class KeyPairSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    certificate_file: Path
    key_file: Path
    """PEM, readable by the agent alone."""


class RefreshSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    interval_s: int = 300
    validity_s: int = 330
    """From issue; longer than the interval so that one retry fits."""
    watch_s: float = 5.0
    """Between two proofs that the KEK still works."""

    def __post_init__(self) -> None:
        if self.interval_s < 1:
            raise ValueError("refresh.interval_s must be at least 1")
        if self.validity_s <= self.interval_s:
            raise ValueError(
                f"refresh.validity_s ({self.validity_s}) must be greater than "
                f"refresh.interval_s ({self.interval_s})"
            )
        if not 0.05 <= self.watch_s <= self.interval_s:
            raise ValueError("refresh.watch_s must be at least 0.05 and at most refresh.interval_s")


class KeySettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rotate_after_days: int = 90
    """Age at which a service's key is followed by a new one; 0: never. A service may have its own."""

    def __post_init__(self) -> None:
        if not 0 <= self.rotate_after_days <= 3660:
            raise ValueError("keys.rotate_after_days must be between 0 (never) and 3660")


class PushSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    request_timeout_s: float = 10.0
    """One request to one proxy: connection, TLS and answer included."""
    batch_size: int = 100
    """Network services per HSM request and per POST."""
    presence_s: float = 5.0
    """Between two questions to a proxy whether it is there: one that restarted has no keys until noticed."""

    def __post_init__(self) -> None:
        if not 1 <= self.presence_s <= 60:
            raise ValueError("push.presence_s must be between 1 and 60")
        if not 0 < self.request_timeout_s <= 60:
            raise ValueError("push.request_timeout_s must be greater than 0 and at most 60")
        if not 1 <= self.batch_size <= 100:
            raise ValueError("push.batch_size must be between 1 and 100 (8 MiB of 64 KiB envelopes)")


class AdminSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The read-only listener: health, metrics, status. Commands go through the socket in `state_dir`."""

    host: str = "127.0.0.1"
    port: int = 8320
    """0: any free port (the log names it)."""

    def __post_init__(self) -> None:
        try:
            is_loopback = self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            is_loopback = False
        if not is_loopback:
            raise ValueError(f"admin.host must be a loopback address, not {self.host!r}: it has no login")
        if not 0 <= self.port <= 65535:
            raise ValueError("admin.port must be between 0 and 65535")


class EnvironmentsSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """This agent's environment is one of several (docs/environments.md). Without it nothing is different."""

    host: str = "0.0.0.0"
    port: int = 8330
    """Where the agents of the other environments, and lb-agents, reach this one: mutual TLS. 0: any free
    port (the log names it)."""
    heartbeat_s: float = 5.0
    """Between two questions to the other agents."""
    request_timeout_s: float = 3.0
    """One request to one of them: an environment that hangs delays nobody longer."""
    etcd: EtcdSettings | None = None
    """The manager is elected; default: `key-agent env promote` appoints it."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError("environments.port must be between 0 and 65535")
        if not 0.1 <= self.heartbeat_s <= 15:
            raise ValueError(
                "environments.heartbeat_s must be between 0.1 and 15: the strictest lease is 60 s"
            )
        if not 0.1 <= self.request_timeout_s <= 10:
            raise ValueError("environments.request_timeout_s must be between 0.1 and 10")


class LogSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    json: bool | None = None
    """JSON lines; default: JSON unless stderr is a terminal."""


class Settings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    agent: AgentSettings
    signing: KeyPairSettings
    tls: KeyPairSettings
    pkcs11: Pkcs11Settings | None = None
    openbao: OpenBaoSettings | None = None
    kmip: KmipSettings | None = None
    refresh: RefreshSettings = RefreshSettings()
    push: PushSettings = PushSettings()
    keys: KeySettings = KeySettings()
    environments: EnvironmentsSettings | None = None
    nats: broker.BrokerSettings | None = None
    """A second road to the proxies, beside the direct one."""
    admin: AdminSettings = AdminSettings()
    log: LogSettings = LogSettings()
    audit: RotationSettings = RotationSettings()

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.pkcs11, self.openbao, self.kmip)) != 1:
            raise ValueError("exactly one of [pkcs11], [openbao] and [kmip] says where the KEK is")
        if self.signing.key_file == self.tls.key_file:
            raise ValueError("signing.key_file and tls.key_file must be different keys: their roles differ")
        if self.refresh.watch_s >= self.refresh.validity_s:
            raise ValueError("refresh.watch_s must be less than refresh.validity_s")


def database_url(agent: AgentSettings) -> str:
    """Where the registry is. SettingsError if the URL file cannot be read or holds no URL."""
    return database.chosen_url(
        agent.database_url, agent.database_url_file, default=agent.state_dir / "registry.db"
    )


def source_files(settings: Settings) -> tuple[dict[str, Path], dict[str, Path]]:
    """The files that the section of the key source names, by setting: readable ones, and secrets."""
    files: dict[str, Path | None] = {}
    secrets: dict[str, Path | None] = {}
    if settings.pkcs11 is not None:
        files["pkcs11.module_path"] = settings.pkcs11.module_path
        secrets["pkcs11.pin_file"] = settings.pkcs11.pin_file
    if settings.openbao is not None:
        files["openbao.ca_file"] = settings.openbao.ca_file
        files["openbao.certificate_file"] = settings.openbao.certificate_file
        secrets["openbao.token_file"] = settings.openbao.token_file
        secrets["openbao.key_file"] = settings.openbao.key_file
    if settings.kmip is not None:
        files["kmip.ca_file"] = settings.kmip.ca_file
        files["kmip.certificate_file"] = settings.kmip.certificate_file
        secrets["kmip.key_file"] = settings.kmip.key_file
    return (
        {name: path for name, path in files.items() if path is not None},
        {name: path for name, path in secrets.items() if path is not None},
    )


def unusable_files(settings: Settings) -> Iterator[str]:
    """What is wrong with the files that *settings* name. SettingsError for the database's URL."""
    database_url(settings.agent)
    files = {
        "agent.root_certificate_file": settings.agent.root_certificate_file,
        "signing.certificate_file": settings.signing.certificate_file,
        "tls.certificate_file": settings.tls.certificate_file,
    }
    if settings.agent.revocation_list_file is not None:
        files["agent.revocation_list_file"] = settings.agent.revocation_list_file
    secrets = {
        "signing.key_file": settings.signing.key_file,
        "tls.key_file": settings.tls.key_file,
    }
    more, more_secrets = source_files(settings)
    files, secrets = files | more, secrets | more_secrets
    if settings.environments is not None and (etcd := settings.environments.etcd) is not None:
        if etcd.ca_file is not None:
            files["environments.etcd.ca_file"] = etcd.ca_file
        if etcd.certificate_file is not None and etcd.key_file is not None:
            files["environments.etcd.certificate_file"] = etcd.certificate_file
            secrets["environments.etcd.key_file"] = etcd.key_file
    if settings.nats is not None:
        broker.check_library()
        more, more_secrets = broker.unusable_files(settings.nats)
        files, secrets = files | more, secrets | more_secrets
    yield from runtime_settings.unusable_files(files, secrets=secrets)


def load(path: Path, environment: Mapping[str, str]) -> Settings:
    """The settings of *path* with overrides from *environment*. SettingsError names file, key and value."""
    return runtime_settings.load(path, Settings, environment=environment, prefix=ENVIRONMENT_PREFIX)
