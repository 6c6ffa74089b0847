"""What a tenant asks of those who use its forward proxy, and who they are.

1. A tenant may have a listener of its own, or share one. At a shared one nobody is taken for a tenant's user
   without a proof: credentials, a client certificate, or a source network.
2. A password is drawn at random, never chosen, so a plain digest of it is safe to keep (credentials.py rule
   1). It is bound to one tenant and one name.
3. Networks restrict: who comes from elsewhere is refused, whatever else is shown.
"""

import base64
import ipaddress
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import Final, Self

from cryptography import x509

from envelope.errors import FormatError
from envelope.keys import check_name

type Network = ipaddress.IPv4Network | ipaddress.IPv6Network
type Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PASSWORD_BYTES: Final = 20  # 32 characters of base32
_USER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,62}")


class Proof(StrEnum):
    """What a user of the forward proxy may have to show, besides coming from the right network."""

    CREDENTIALS = "credentials"
    """Name and password in Proxy-Authorization (Basic, RFC 7617)."""
    CERTIFICATE = "certificate"
    """A client certificate in the TLS connection to the proxy itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserAccess:
    """A tenant's rules for its forward proxy. As a default nothing is asked for."""

    networks: tuple[Network, ...] = ()
    """Where its users are; empty: anywhere."""
    client_roots: tuple[x509.Certificate, ...] = ()
    """Who vouches for its users' client certificates."""
    requires: frozenset[Proof] = frozenset()
    proxies: tuple[str, ...] = ()
    """`host:port` of its proxies as its users' machines reach them, in the order to try: for its PAC file."""
    proxies_speak_tls: bool = False
    """Whether the PAC file says HTTPS instead of PROXY: the connection to the proxy is TLS itself."""

    def permits(self, address: Address) -> bool:
        return not self.networks or prefix_length(self.networks, address) is not None

    @property
    def identifies(self) -> bool:
        """Whether a user of this tenant can be told from another's at the same listener."""
        return bool(self.networks or self.requires)


OPEN: Final = UserAccess()


@dataclass(frozen=True, slots=True, kw_only=True)
class UserEntry:
    """One user of one tenant's forward proxy."""

    tenant: str
    name: str
    verifier: bytes = field(repr=False)
    """SHA-256 of the password, bound to tenant and name."""
    created_at_s: float
    not_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Password:
    """A fresh password, and what is kept of it."""

    text: str = field(repr=False)
    verifier: bytes = field(repr=False)

    @classmethod
    def draw(cls, tenant: str, name: str) -> Self:
        text = base64.b32encode(secrets.token_bytes(_PASSWORD_BYTES)).decode().lower()
        return cls(text, verifier_of(tenant, name, text.encode()))


def verifier_of(tenant: str, name: str, password: bytes) -> bytes:
    """32 bytes."""
    digest = sha256(b"sealgate proxy user\0")
    for part in (tenant.encode(), name.encode(), password):
        digest.update(len(part).to_bytes(4) + part)
    return digest.digest()


def check_user_name(name: str) -> str:
    """*name* if it can be one in Basic credentials; FormatError otherwise."""
    if not _USER_NAME.fullmatch(name):
        raise FormatError(f"not a user name: {name!r} (up to 63 letters, digits and . _ @ + - are)")
    return name


def parse_user(text: str) -> tuple[str, str]:
    """Tenant and name from `tenant/user`. FormatError for anything else."""
    tenant, slash, name = text.partition("/")
    if not slash:
        raise FormatError(f"not a user: {text!r} (tenant/user is)")
    return check_name("tenant", tenant), check_user_name(name)


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Sorted, each once. FormatError for what is no network, or one with host bits."""
    networks: set[Network] = set()
    for text in texts:
        try:
            networks.add(ipaddress.ip_network(text))
        except ValueError as error:
            raise FormatError(f"not a network: {error}") from None
    return tuple(sorted(networks, key=lambda network: (network.version, int(network[0]), network.prefixlen)))


def parse_proxy_address(text: str) -> str:
    """`host:port` for a PAC file. FormatError for anything else: the text stands in a script."""
    host, colon, port = text.rpartition(":")
    name = host.removeprefix("[").removesuffix("]")
    is_port = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536
    if not colon or not is_port or not re.fullmatch(r"[A-Za-z0-9.:-]{1,253}", name):
        raise FormatError(f"not host:port: {text!r}")
    return text


def prefix_length(networks: Iterable[Network], address: Address) -> int | None:
    """Of the narrowest of *networks* that holds *address*; None: it is in none."""
    plain = address
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        plain = address.ipv4_mapped
    found = [
        network.prefixlen for network in networks if network.version == plain.version and plain in network
    ]
    return max(found, default=None)


type Users = Mapping[tuple[str, str], UserEntry]
"""By tenant and name."""
