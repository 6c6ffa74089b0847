"""The settings of a load balancer's companion: a TOML file beside HAProxy (docs/environments.md).

1. It needs no database and no HSM: a TLS identity under the tenant's root, the addresses of two agents or
   more, and the keys that their rows are signed with.
2. Names of servers and backends become part of HAProxy's configuration: nothing else than letters, digits,
   `.`, `_` and `-` is let in.
"""

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import msgspec

from envelope.errors import FormatError
from envelope.keys import check_name
from key_agent.environments.shared.documents import read_registry_key
from runtime import settings as runtime_settings

ENVIRONMENT_PREFIX: Final = "KEY_AGENT_LB"
_ADDRESS: Final = re.compile(r"(?:[A-Za-z0-9.-]{1,253}|\[[0-9a-fA-F:]{2,45}\]):([0-9]{1,5})")
_URL: Final = re.compile(r"https?://(?:[A-Za-z0-9.-]{1,253}|\[[0-9a-fA-F:]{2,45}\]):[0-9]{1,5}")

type Label = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file."""


class Rule(StrEnum):
    """Where a request goes among the environments that are sound."""

    RANDOM = "random"
    LATENCY = "latency"
    """As random, weighted by how fast each answers."""
    GEO = "geo"
    """To the servers of the caller's part of the world."""


class AgentAddress(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    url: str
    registry_key: str
    """What `key-agent env identity --json` calls so: who else signs is known from its rows."""

    def __post_init__(self) -> None:
        try:
            check_name("agent", self.id)
            read_registry_key(self.registry_key)
        except FormatError as error:
            raise ValueError(f"agent: {error}") from None
        if not _URL.fullmatch(self.url) or not self.url.startswith("https://"):
            raise ValueError(f"agent.url is https://host:port, not {self.url!r}")


class Server(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data plane."""

    name: Label
    environment: str
    address: str
    """host:port that callers are sent to."""
    status_url: str
    """http://host:port of its health listener: /readyz, /v1/env/status."""
    geo: Label | None = None

    def __post_init__(self) -> None:
        try:
            check_name("environment", self.environment)
        except FormatError as error:
            raise ValueError(f"server: {error}") from None
        match = _ADDRESS.fullmatch(self.address)
        if match is None or not 0 < int(match[1]) < 65536:
            raise ValueError(f"server.address is host:port, not {self.address!r}")
        if not _URL.fullmatch(self.status_url):
            raise ValueError(f"server.status_url is http://host:port, not {self.status_url!r}")


class LbAgentSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    """As in its certificate: urn:sealgate:<tenant>:agent:<id>:tls."""
    tenant: str
    root_certificate_file: Path
    certificate_file: Path
    key_file: Path
    manager: str = ""
    """The agent that is the manager when this program begins for the first time; empty: `agents`' first.
    Who follows it has to be shown to."""
    state_file: Path | None = None
    """What it has learned of that, for its next life; default: `lb-agent.rows` beside the key file."""
    revocation_list_file: Path | None = None
    """Of the tenant's root: agents whose certificate it takes back are not spoken to."""
    host: str = "127.0.0.1"
    port: int = 9777
    """Where HAProxy's agent-checks are answered."""
    poll_s: float = 0.25
    """Between two looks at each agent and each server."""
    stale_s: float = 15.0
    """Without a word of any agent for so long everything is down: nobody knows what was withdrawn. Without a
    majority of them the registry lease is the limit, as it is for the environments themselves."""

    @property
    def rows_file(self) -> Path:
        return self.state_file or self.key_file.with_name("lb-agent.rows")

    def __post_init__(self) -> None:
        try:
            check_name("agent", self.id)
            check_name("tenant", self.tenant)
        except FormatError as error:
            raise ValueError(str(error)) from None
        if not 0.05 <= self.poll_s <= 5:
            raise ValueError("lb_agent.poll_s must be between 0.05 and 5")
        if not 4 * self.poll_s <= self.stale_s <= 300:
            raise ValueError("lb_agent.stale_s must be between 4 poll_s and 300")
        if not 0 <= self.port <= 65535:
            raise ValueError("lb_agent.port must be between 0 and 65535")


class FrontendSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `lb config` writes of HAProxy's own side."""

    bind: str
    """host:port for callers."""
    certificate_file: Path | None = None
    """PEM, certificate and key in one file as HAProxy wants it; without it the frontend speaks plain HTTP."""
    server_ca_file: Path | None = None
    """Who vouches for the servers; without it they are spoken to in plain HTTP."""
    rule: Rule = Rule.RANDOM
    strict_geo: bool = False
    """Rather 503 than another part of the world."""
    geo_map_file: Path | None = None
    """HAProxy's map of networks to parts of the world."""
    trusted_networks: tuple[str, ...] = ()
    """From where the header Sealgate-Region is believed."""
    agent_inter_ms: int = 500
    stats_socket: Path | None = None
    """For the watchdog: level admin."""
    stats_socket_group: str = ""
    """Who may use it besides its owner, the user that starts HAProxy; without it nobody else."""

    def __post_init__(self) -> None:
        match = _ADDRESS.fullmatch(self.bind.replace("*", "0.0.0.0"))
        if match is None:
            raise ValueError(f"frontend.bind is host:port, not {self.bind!r}")
        if not 50 <= self.agent_inter_ms <= 10_000:
            raise ValueError("frontend.agent_inter_ms must be between 50 and 10000")
        if not re.fullmatch(r"(?:[a-z_][a-z0-9_-]{0,31})?", self.stats_socket_group):
            raise ValueError(f"frontend.stats_socket_group: not a group: {self.stats_socket_group!r}")
        for network in self.trusted_networks:
            if not re.fullmatch(r"[0-9a-fA-F.:]{2,45}(?:/[0-9]{1,3})?", network):
                raise ValueError(f"frontend.trusted_networks: not a network: {network!r}")
        for name in ("certificate_file", "server_ca_file", "geo_map_file", "stats_socket"):
            if (path := getattr(self, name)) is not None and re.search(r"[\s\"'\\#]", str(path)):
                raise ValueError(f"frontend.{name}: HAProxy cannot take such a path")


class Settings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lb_agent: LbAgentSettings
    agents: tuple[AgentAddress, ...]
    servers: tuple[Server, ...]
    frontend: FrontendSettings

    def __post_init__(self) -> None:
        if len(self.agents) < 2:
            raise ValueError("name two agents at least: one alone could keep a withdrawal to itself")
        for what, names in (
            ("agents", [agent.id for agent in self.agents]),
            ("servers", [server.name for server in self.servers]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{what}: a name stands twice")
        if self.lb_agent.manager and self.lb_agent.manager not in {agent.id for agent in self.agents}:
            raise ValueError("lb_agent.manager is none of the agents")
        if not self.servers:
            raise ValueError("servers: there is none")
        if self.frontend.rule is Rule.GEO and not all(server.geo for server in self.servers):
            raise ValueError("with frontend.rule = geo every server has a geo")


def manager_of(settings: Settings) -> AgentAddress:
    """Whom to believe first."""
    wanted = settings.lb_agent.manager or settings.agents[0].id
    return next(agent for agent in settings.agents if agent.id == wanted)


def load(path: Path, environment: Mapping[str, str]) -> Settings:
    """The settings of *path*. SettingsError names file, key and value."""
    return runtime_settings.load(path, Settings, environment=environment, prefix=ENVIRONMENT_PREFIX)


def unusable_files(settings: Settings) -> Iterator[str]:
    """What is wrong with the files that *settings* name."""
    mine = settings.lb_agent
    yield from runtime_settings.unusable_files(
        {
            "lb_agent.root_certificate_file": mine.root_certificate_file,
            "lb_agent.certificate_file": mine.certificate_file,
            **(
                {"lb_agent.revocation_list_file": mine.revocation_list_file}
                if mine.revocation_list_file is not None
                else {}
            ),
        },
        secrets={"lb_agent.key_file": mine.key_file},
    )
