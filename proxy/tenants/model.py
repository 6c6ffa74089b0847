"""What this proxy hosts: a frozen picture of the directory, asked on every request.

1. A picture is never changed. The engine exchanges it whole when the directory's revision has moved on.
2. A tenant is found by its listener, a network service by tenant and upstream host: no look-up crosses them.
   Keys are pushed to *recipients*: to these services, and to the named keys of the encryption service.
3. Host names are compared in one form: lower case, without the root's dot.
4. Plain HTTP towards a service is for a TLS sidecar on the loopback interface only.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, Self, override
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from envelope.errors import FormatError
from envelope.keys import NetworkService, check_name
from proxy.encryption_service.model import EMPTY, NamedKey, ServiceDirectory
from proxy.users.model import OPEN, UserAccess, Users
from proxy.vault.model import UpstreamCredential

_HOST: Final = re.compile(
    r"(?!.{254})[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
)
_DEFAULT_PORT: Final = {"https": 443, "http": 80}


def normal_host(host: str) -> str:
    """*host* as it is compared: lower case, no trailing dot, IP addresses in their shortest form.

    FormatError if it is neither a DNS name (in its ASCII form) nor an IP address.
    """
    name = host.strip("[]").lower().removesuffix(".")
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not _HOST.fullmatch(name):
        raise FormatError(f"not a host name or IP address: {host!r}")
    return name


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise FormatError(f"not host:port: {text!r}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise FormatError(f"an IPv6 address needs brackets: {text!r}")
    return normal_host(host), int(port)


@dataclass(frozen=True, slots=True, order=True)
class Listen:
    """Where this proxy listens: an IP address (or `localhost`) and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `127.0.0.1:8080` or `[::1]:8080`. FormatError for anything else."""
        host, port = _split(text)
        if host != "localhost":
            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise FormatError(f"a listener needs an IP address, not {host!r}") from None
        return cls(host, port)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return _is_loopback(self.host)

    def clashes_with(self, other: "Listen") -> bool:
        """Whether both cannot listen at once: the same port at the same or at every address."""
        anywhere = {"0.0.0.0", "::"}
        return self.port == other.port and (
            self.host == other.host or bool({self.host, other.host} & anywhere) or self._local(other)
        )

    def _local(self, other: "Listen") -> bool:
        return "localhost" in {self.host, other.host} and _is_loopback(self.host) and _is_loopback(other.host)

    @override
    def __str__(self) -> str:
        return _join(self.host, self.port)


@dataclass(frozen=True, slots=True, order=True)
class Upstream:
    """The cloud service itself."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `https://host[:port]`. FormatError for anything else, `http` to other machines included."""
        try:
            url = urlsplit(text)
            port = url.port
        except ValueError as error:
            raise FormatError(f"not an upstream: {text!r} ({error})") from None
        if url.scheme not in _DEFAULT_PORT or not url.hostname:
            raise FormatError(f"not an upstream: {text!r} (https://host[:port] is)")
        if (
            url.path.strip("/")
            or url.query
            or url.fragment
            or url.username is not None
            or url.password is not None
        ):
            raise FormatError(f"an upstream has no path, query or credentials: {text!r}")
        host = normal_host(url.hostname)
        if url.scheme == "http" and not _is_loopback(host):
            raise FormatError(f"plain http is for a sidecar on the loopback interface only, not for {host}")
        return cls(url.scheme, host, port or _DEFAULT_PORT[url.scheme])

    @property
    def authority(self) -> str:
        """`host:port`, IPv6 in brackets."""
        return _join(self.host, self.port)

    @override
    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"


class LegacyPolicy(StrEnum):
    """What a stored body without our magic means (docs/format.md 3.4)."""

    STRICT = "strict"  # an error
    MIGRATE = "migrate"  # passes, and is counted


@dataclass(frozen=True, slots=True, order=True)
class TunnelRule:
    """Hosts that are passed through unread: `host`, or `*.domain` for all names below it."""

    pattern: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """FormatError unless *text* is a host name, or `*.` and a domain of two labels at least."""
        wild = text.startswith("*.")
        host = normal_host(text.removeprefix("*."))
        if wild and "." not in host:
            raise FormatError(f"{text!r} would tunnel a whole top-level domain")
        return cls(f"*.{host}" if wild else host)

    def matches(self, host: str) -> bool:
        """*host* in its normal form."""
        if self.pattern.startswith("*."):
            return host.endswith(self.pattern[1:])
        return host == self.pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFiles:
    """A certificate and its private key, PEM, in two files; the key's has mode 0600."""

    certificate_file: Path
    key_file: Path


ANY_NAME: Final = "*"
"""Among the names of a reverse listener: it answers to whatever it is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceEntry:
    """One network service. Without `certificate` nothing can be pushed to it, so it refuses all."""

    owner: NetworkService
    upstream: Upstream
    profile: str
    legacy: LegacyPolicy
    reverse_listen: Listen | None
    certificate: x509.Certificate | None
    key_file: Path
    reverse_names: frozenset[str] = frozenset()
    """Host names that clients of the reverse listener may use, or ANY_NAME; empty: those of the service and
    of the listener (`Routing.is_served_as`)."""
    profile_options: Mapping[str, object] = field(default_factory=dict)
    """What the profile is told of this service, JSON-able, in the profile's own words (docs/profiles.md)."""
    credentials: Mapping[str, UpstreamCredential] = field(default_factory=dict)
    """By access key id: what requests to it are signed with anew (docs/profiles-s3.md)."""

    def is_named(self, host: str | None) -> bool:
        """Whether `reverse_names` lists *host* (normal form; None: the client asks for no name)."""
        if ANY_NAME in self.reverse_names:
            return True
        return host is not None and any(TunnelRule(name).matches(host) for name in self.reverse_names)


type Recipient = ServiceEntry | NamedKey
"""What keys are pushed to: has an `owner`, a `certificate`, a `key_file`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantEntry:
    tenant: str
    root_certificate: x509.Certificate
    forward_listen: Listen | None
    tunnel_hosts: frozenset[str]
    interception_ca: CertificateFiles
    signers: tuple[x509.Certificate, ...] = ()
    """Pinned signing certificates of agents; empty: any that the root has certified for the role."""
    access: UserAccess = OPEN
    """Who may use its forward proxy."""

    def tunnels(self, host: str) -> bool:
        """Whether connections to *host* are passed through unread. A managed service never is."""
        name = normal_host(host)
        return any(TunnelRule(pattern).matches(name) for pattern in self.tunnel_hosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """A picture of the directory at `revision`."""

    revision: int
    tenants: Mapping[str, TenantEntry]
    services: Mapping[NetworkService, ServiceEntry]
    encryption_service: ServiceDirectory = EMPTY
    users: Users = field(default_factory=dict)
    """Of all tenants' forward proxies, by tenant and name."""
    recipients: Mapping[NetworkService, Recipient] = field(init=False, repr=False, compare=False)
    _by_host: Mapping[tuple[str, str, int], ServiceEntry] = field(init=False, repr=False, compare=False)
    forward_listeners: Mapping[Listen, tuple[TenantEntry, ...]] = field(init=False, repr=False, compare=False)
    _by_reverse_listener: Mapping[Listen, ServiceEntry] = field(init=False, repr=False, compare=False)
    _by_fingerprint: Mapping[bytes, Recipient] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        entries = self.services.values()
        hosts = {(entry.owner.tenant, entry.upstream.host, entry.upstream.port): entry for entry in entries}
        listeners: dict[Listen, tuple[TenantEntry, ...]] = {}
        for tenant in self.tenants.values():
            if tenant.forward_listen is not None:
                sharing = listeners.get(tenant.forward_listen, ())
                listeners[tenant.forward_listen] = (*sharing, tenant)
        reverse = {entry.reverse_listen: entry for entry in entries if entry.reverse_listen}
        recipients: dict[NetworkService, Recipient] = {**self.services, **self.encryption_service.keys}
        prints = {
            entry.certificate.fingerprint(SHA256()): entry
            for entry in recipients.values()
            if entry.certificate
        }
        object.__setattr__(self, "recipients", recipients)
        object.__setattr__(self, "_by_host", hosts)
        object.__setattr__(self, "forward_listeners", listeners)
        object.__setattr__(self, "_by_reverse_listener", reverse)
        object.__setattr__(self, "_by_fingerprint", prints)

    @classmethod
    def of(
        cls,
        revision: int,
        tenants: Iterable[TenantEntry],
        services: Iterable[ServiceEntry],
        encryption_service: ServiceDirectory = EMPTY,
        users: Users | None = None,
    ) -> Self:
        return cls(
            revision=revision,
            tenants={entry.tenant: entry for entry in tenants},
            services={entry.owner: entry for entry in services},
            encryption_service=encryption_service,
            users=users or {},
        )

    def hosts_of(self, tenant: str) -> list[str]:
        """The names of *tenant*'s managed hosts."""
        return sorted({entry.upstream.host for entry in self.services_of(tenant)})

    def service_for_host(self, tenant: str, host: str, port: int) -> ServiceEntry | None:
        """The service of *tenant* at this upstream address, never another tenant's."""
        try:
            return self._by_host.get((tenant, normal_host(host), port))
        except FormatError:
            return None

    def tenants_of_listener(self, listen: Listen) -> tuple[TenantEntry, ...]:
        """The tenants whose forward proxy listens here, or the one whose service does in reverse mode."""
        service = self._by_reverse_listener.get(listen)
        if service is not None:
            return (self.tenants[service.owner.tenant],)
        return self.forward_listeners.get(listen, ())

    def service_of_listener(self, listen: Listen) -> ServiceEntry | None:
        """The service that is served at this address in reverse mode."""
        return self._by_reverse_listener.get(listen)

    def recipient_of_certificate(self, fingerprint: bytes) -> Recipient | None:
        """The service or named key whose certificate has this SHA-256 of its DER form."""
        return self._by_fingerprint.get(fingerprint)

    def recipients_of(self, tenant: str) -> list[Recipient]:
        """Services and named keys of *tenant*, by name."""
        return [self.recipients[owner] for owner in sorted(self.recipients) if owner.tenant == tenant]

    def services_of(self, tenant: str) -> list[ServiceEntry]:
        check_name("tenant", tenant)
        return sorted(
            (entry for entry in self.services.values() if entry.owner.tenant == tenant),
            key=lambda entry: entry.owner,
        )
