"""Whose connection is it, where may it go: from a listener and the names in a request to a network service.

1. The listener decides the tenant, before anything the client says is looked at. Where tenants share one,
   the client's proofs do (proxy/users/identification.py), and every question here names that tenant.
2. In forward mode CONNECT host, TLS server name, Host and request target name one host, or nothing goes on.
3. In reverse mode the listener decides the service too. It is served by its own names and the listener's, or
   by those that are listed for it; the TLS handshake with another ends (engine.py). What names stand in the
   request is then the client's own affair.
4. What is tunnelled unread is on the tenant's list by CONNECT host and server name, and no managed host.
5. A connection is opened to an address of this picture only, whatever led to it: names below a service's own
   lead to the service itself.
6. Content in the clear is taken on the loopback interface only: from a TLS terminator beside us.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from envelope.errors import FormatError
from envelope.keys import NetworkService
from proxy import refusals
from proxy.plans.profile_options import ProfileOptions
from proxy.plans.request import Mode, Route
from proxy.profiles import PROFILES, Profile
from proxy.refusals import RefusedError
from proxy.tenants.model import Directory, Listen, ServiceEntry, TenantEntry, Upstream, normal_host

_DEFAULT_PORT: Final = {"https": 443, "http": 80}

type Holder = tuple[str, x509.Certificate, NetworkService | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """One address this proxy listens at. `service` None: a forward proxy, of one tenant or several."""

    spec: str
    """mitmproxy's words for it; every connection carries them."""
    listen: Listen
    tenants: tuple[TenantEntry, ...]
    service: ServiceEntry | None

    @property
    def sole(self) -> TenantEntry | None:
        """The tenant whose it is alone."""
        return self.tenants[0] if len(self.tenants) == 1 else None

    def tenant(self, name: str | None = None) -> TenantEntry:
        """The tenant *name* here; without a name the sole one. UNMANAGED_HOST if there is none."""
        for entry in self.tenants:
            if name == entry.tenant or (name is None and entry is self.sole):
                return entry
        raise RefusedError(refusals.UNMANAGED_HOST)

    def holder(self, name: str | None = None) -> "Holder | None":
        """Whose it is: an address can pass from one to another while connections made there live on.

        *name*: the tenant that a client is known to belong to. None: it is not that tenant's.
        """
        owner = self.service.owner if self.service is not None else None
        for entry in self.tenants:
            if name == entry.tenant or (name is None and entry is self.sole):
                return (entry.tenant, entry.root_certificate, owner)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The names in one request. `connected`: what CONNECT asked for on this connection, if it was used."""

    scheme: str
    host: str
    port: int
    names: tuple[str, ...]
    """Host field and authority, as far as present: `host[:port]`."""
    server_name: str | None
    connected: tuple[str, int] | None
    in_clear: bool = False
    """The client speaks without TLS."""
    target: str = "/"
    """Path and query: policies may depend on it."""


class Routing:
    """The directory's picture, as the engine asks it."""

    def __init__(self, directory: Directory, profiles: Mapping[str, Profile] = PROFILES) -> None:
        self.directory: Final = directory
        self.listeners: Final[Mapping[str, Listener]] = {
            listener.spec: listener for listener in _listeners(directory)
        }
        self._profiles: Final = profiles
        self._options: Final[dict[NetworkService, ProfileOptions]] = {}
        self.broken: Final[dict[NetworkService, str]] = {}
        """Services that cannot be served: their profile is unknown, or does not know its options."""
        for entry in directory.services.values():
            profile = profiles.get(entry.profile)
            if profile is None:
                self.broken[entry.owner] = f"there is no profile {entry.profile!r}"
                continue
            try:
                self._options[entry.owner] = profile.options.of(entry.profile_options)
            except FormatError as error:
                self.broken[entry.owner] = str(error)
        self._managed: Final = frozenset(
            (entry.owner.tenant, entry.upstream.host) for entry in directory.services.values()
        )
        self._upstreams: Final = frozenset(
            (entry.owner.tenant, entry.upstream.host, entry.upstream.port)
            for entry in directory.services.values()
        )
        self._with_subdomains: Final = tuple(
            entry
            for entry in directory.services.values()
            if (options := self._options.get(entry.owner)) is not None and options.has_subdomains
        )

    def listener(self, spec: str) -> Listener:
        """RefusedError(UNMANAGED_HOST) if nothing listens there any more."""
        try:
            return self.listeners[spec]
        except KeyError:
            raise RefusedError(refusals.UNMANAGED_HOST) from None

    def check_connect(self, spec: str, host: str, port: int, *, tenant: str | None = None) -> None:
        """Whether CONNECT to *host* may be answered at all. RefusedError(UNMANAGED_HOST) if not."""
        listener = self.listener(spec)
        entry = listener.tenant(tenant)
        managed = self._service_for(entry.tenant, host, port)
        if listener.service is not None or (managed is None and not self._on_list(entry, host)):
            raise RefusedError(refusals.UNMANAGED_HOST)

    def tunnels(
        self, spec: str, host: str, port: int, server_name: str | None, *, tenant: str | None = None
    ) -> bool:
        """Whether the TLS connection to *host* that names *server_name* is passed through unread."""
        listener = self.listener(spec)
        entry = listener.tenant(tenant)
        if listener.service is not None or server_name is None:
            return False
        if self._service_for(entry.tenant, host, port) is not None:
            return False
        return self._on_list(entry, host) and self._on_list(entry, server_name)

    def may_connect(self, spec: str, host: str, port: int, *, tenant: str | None = None) -> bool:
        """Whether a connection from *spec* may be opened to this address."""
        listener = self.listeners.get(spec)
        if listener is None:
            return False
        if listener.service is not None:
            upstream = listener.service.upstream
            return (host, port) == (upstream.host, upstream.port)
        try:
            name, entry = normal_host(host), listener.tenant(tenant)
        except (FormatError, RefusedError):
            return False
        return (entry.tenant, name, port) in self._upstreams or self._on_list(entry, name)

    def route(self, spec: str, wanted: Wanted, *, tenant: str | None = None) -> Route:
        """The service a request goes to. RefusedError if there is none, or if its names disagree."""
        listener = self.listener(spec)
        if wanted.in_clear and not listener.listen.is_loopback:
            raise RefusedError(refusals.TLS_REQUIRED)
        if listener.service is not None:
            upstream = listener.service.upstream
            if (wanted.scheme, wanted.host, wanted.port) != (upstream.scheme, upstream.host, upstream.port):
                raise RefusedError(refusals.INTERNAL)  # not what this listener leads to: a bug, not a client
            return self._route(listener.service, Mode.REVERSE, wanted)
        service = self._service_for(listener.tenant(tenant).tenant, wanted.host, wanted.port)
        if service is None or service.upstream.scheme != wanted.scheme:
            raise RefusedError(refusals.UNMANAGED_HOST)
        _check_names(service.upstream, normal_host(wanted.host), wanted)
        return self._route(service, Mode.FORWARD, wanted)

    def _service_for(self, tenant: str, host: str, port: int) -> ServiceEntry | None:
        """By the service's own name, or by one below it where its profile has such (S3's buckets)."""
        service = self.directory.service_for_host(tenant, host, port)
        if service is not None:
            return service
        try:
            name = normal_host(host)
        except FormatError:
            return None
        # The longest name counts: one service's host may lie below another's.
        found = [
            entry
            for entry in self._with_subdomains
            if entry.owner.tenant == tenant
            and entry.upstream.port == port
            and name.endswith("." + entry.upstream.host)
        ]
        return max(found, key=lambda entry: len(entry.upstream.host), default=None)

    def _route(self, service: ServiceEntry, mode: Mode, wanted: Wanted) -> Route:
        options = self._options.get(service.owner)
        if options is None:
            raise RefusedError(refusals.INTERNAL)  # `broken` says why
        stored = options.policy_for(wanted.target)
        pages = options.has_pages and stored is None
        return Route(service=service, mode=mode, options=options, stored=stored, pages=pages)

    def is_served_as(self, service: ServiceEntry, host: str | None) -> bool:
        """Whether clients of its reverse listener may call it *host* (normal form; None: by no name).

        Who asks for no name is shown the certificate of the address that the connection was made to.
        """
        if service.reverse_names:
            return service.is_named(host)
        options, listen = self._options.get(service.owner), service.reverse_listen
        if host is None:
            return True
        if options is None or listen is None:
            return False
        own = service.upstream.host
        above = (*options.reverse_hosts, own) if options.has_subdomains else options.reverse_hosts
        return (
            host in {own, listen.host, *options.reverse_hosts}
            or (host == "localhost" and listen.is_loopback)
            or host.partition(".")[2] in above
        )

    def profile(self, service: ServiceEntry) -> Profile:
        """Of a service that `route` has led to."""
        return self._profiles[service.profile]

    def _on_list(self, tenant: TenantEntry, host: str) -> bool:
        """On the tenant's list of hosts to tunnel, and not a managed host at any port."""
        try:
            name = normal_host(host)
            if any(
                entry.owner.tenant == tenant.tenant and name.endswith("." + entry.upstream.host)
                for entry in self._with_subdomains
            ):
                return False
            return (tenant.tenant, name) not in self._managed and tenant.tunnels(name)
        except FormatError:
            return False


def managed_hosts(directory: Directory, tenant: str, profiles: Mapping[str, Profile] = PROFILES) -> list[str]:
    """Hosts of *tenant*'s services, for a PAC file: `*.host` for all below it, where these belong to one."""
    hosts = set(directory.hosts_of(tenant))
    for entry in directory.services_of(tenant):
        profile = profiles.get(entry.profile)
        try:
            if profile is not None and profile.options.of(entry.profile_options).has_subdomains:
                hosts.add(f"*.{entry.upstream.host}")
        except FormatError:
            continue  # a service that cannot be served (`Routing.broken`)
    return sorted(hosts)


def _listeners(directory: Directory) -> Iterable[Listener]:
    for listen, tenants in directory.forward_listeners.items():
        yield Listener(
            spec=f"regular@{listen.host}:{listen.port}", listen=listen, tenants=tenants, service=None
        )
    for service in directory.services.values():
        if (at := service.reverse_listen) is not None:
            yield Listener(
                spec=f"reverse:{service.upstream}@{at.host}:{at.port}",
                listen=at,
                tenants=(directory.tenants[service.owner.tenant],),
                service=service,
            )


def _check_names(upstream: Upstream, host: str, wanted: Wanted) -> None:
    """*host*: what the request goes to; the service's own name, or one below it."""
    try:
        addresses = [_address(name, upstream.scheme) for name in wanted.names]
        if wanted.connected is not None:
            addresses.append((normal_host(wanted.connected[0]), wanted.connected[1]))
        elif upstream.scheme == "https":
            # An https target without CONNECT came over the clear leg to us, or to the proxy's own TLS name.
            raise RefusedError(refusals.UNMANAGED_HOST)
        if wanted.connected is not None and wanted.server_name is not None:
            addresses.append((normal_host(wanted.server_name), upstream.port))
    except FormatError:
        raise RefusedError(refusals.BAD_MESSAGE) from None
    if any(address != (host, upstream.port) for address in addresses):
        raise RefusedError(refusals.HOST_MISMATCH)


def _address(name: str, scheme: str) -> tuple[str, int]:
    """Of `host[:port]`. FormatError if it is none."""
    host, colon, port = name.rpartition(":")
    if not colon or port.endswith("]"):
        return normal_host(name), _DEFAULT_PORT[scheme]
    if not (port.isascii() and port.isdecimal() and len(port) <= 5):
        raise FormatError(f"not host:port: {name!r}")
    return normal_host(host), int(port)
