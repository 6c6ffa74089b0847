"""The settings of the encryption service's listeners: `[encryption_service]` of the proxy's configuration.

1. TLS is the rule. `plain` is for a TLS terminator on the same machine, so on loopback only.
2. A client certificate is asked for by `client_roots_file`, and whose it must be by `client_subject`: that
   any customer of a public CA may come in is nobody's intention.
3. Which dialects a listener speaks is said by the listener; which tenants use them, by the directory.
"""

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from proxy.encryption_service.model import DialectName

MAX_LISTENERS: Final = 64
MAX_MODEL_LENGTH: Final = 128


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a client may take for what, in seconds, and how many there may be."""

    handshake_s: float = 10.0
    head_s: float = 10.0
    """From the first byte of a request, or the connection's opening, to the end of its head."""
    body_idle_s: float = 10.0
    """Between two pieces of a body."""
    body_bytes_per_s: int = 1024
    """Slowest rate of a body that is not a stream, over the time that exceeds `body_idle_s`."""
    keep_alive_s: float = 75.0
    answer_s: float = 30.0
    """For a call that has to wait for something; most do not."""
    write_s: float = 30.0
    """For a client that does not read its answer."""
    linger_s: float = 2.0
    """For a client to read a refusal, while what it still sends is dropped and then left unread."""
    connections: int = 4096
    """Of one listener in one process."""
    connections_per_peer: int = 512
    """From one IPv4 address or IPv6 /64; not counted if `plain`: all come from the TLS terminator."""

    def __post_init__(self) -> None:
        for name in (
            "handshake_s", "head_s", "body_idle_s", "keep_alive_s", "answer_s", "write_s", "linger_s",
        ):  # fmt: skip
            if not 0.1 <= getattr(self, name) <= 3600:
                raise ValueError(f"{name} must be between 0.1 and 3600, not {getattr(self, name):g}")
        for name in ("body_bytes_per_s", "connections", "connections_per_peer"):
            if not 1 <= getattr(self, name) <= 1_000_000:
                raise ValueError(f"{name} must be between 1 and 1000000, not {getattr(self, name)}")


class QuotaSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much each tenant and each credential may ask for; one of a batch counts as one call."""

    tenant_requests_per_s: float = 10_000.0
    tenant_burst: float = 20_000.0
    credential_requests_per_s: float = 5_000.0
    """Of a credential that was issued without a rate of its own."""
    credential_burst: float = 10_000.0
    places: int = 256
    """Calls of one tenant that wait or stream at the same time."""

    def __post_init__(self) -> None:
        for name in (
            "tenant_requests_per_s",
            "tenant_burst",
            "credential_requests_per_s",
            "credential_burst",
        ):
            if not 1 <= getattr(self, name) <= 1e9:
                raise ValueError(f"{name} must be between 1 and 1e9, not {getattr(self, name):g}")
        if not 1 <= self.places <= 100_000:
            raise ValueError(f"places must be between 1 and 100000, not {self.places}")


class OutboundSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the service itself calls: for the key sets of token issuers, and another KACLS on migration."""

    ca_file: Path | None = None
    """PEM roots that are believed besides the system's."""
    private_hosts: tuple[str, ...] = ()
    """Host names, as in URLs, that may be at an address of the inside; all others must be outside."""


class ListenSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One address that the encryption service is called at."""

    host: str = "0.0.0.0"
    port: int = 8200
    dialects: tuple[DialectName, ...]
    certificate_file: Path | None = None
    """PEM, with intermediates; read again when it changes."""
    key_file: Path | None = None
    """PEM, readable by the proxy alone."""
    client_roots_file: Path | None = None
    """PEM: clients need a certificate below one of these."""
    client_subject: str | None = None
    """The common name that the client's certificate must have; AWS KMS: cks.kms.<region>.amazonaws.com."""
    plain: bool = False
    """HTTP without TLS, behind a TLS terminator on this machine."""

    def __post_init__(self) -> None:
        address = _address(self.host)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 (any free port) and 65535, not {self.port}")
        if not self.dialects or len(set(self.dialects)) != len(self.dialects):
            raise ValueError("dialects must name one dialect or more, each once")
        files = (self.certificate_file, self.key_file, self.client_roots_file, self.client_subject)
        if self.plain:
            if not address.is_loopback:
                raise ValueError("plain is for loopback addresses only: the terminator is on this machine")
            if any(files):
                raise ValueError("a plain listener has no certificates")
            return
        if self.certificate_file is None or self.key_file is None:
            raise ValueError("certificate_file and key_file are required unless plain = true")
        if self.certificate_file == self.key_file:
            raise ValueError("certificate_file and key_file must be two files")
        if self.client_subject is not None and self.client_roots_file is None:
            raise ValueError("client_subject needs client_roots_file")

    @property
    def address(self) -> str:
        """The IP address to bind."""
        return str(_address(self.host))

    @property
    def name(self) -> str:
        """For messages and metrics."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class XksFleet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a health call tells AWS KMS of this installation; AWS judges requests for more quota by it."""

    proxies: int = 1
    """How many Sealgate proxies serve the same key stores behind one name."""
    manager_model: str = "Sealgate key agent"
    """What stands behind them at the enterprise, such as the HSM's product and version."""

    def __post_init__(self) -> None:
        if not 1 <= self.proxies <= 100_000:
            raise ValueError(f"proxies must be between 1 and 100000, not {self.proxies}")
        text = self.manager_model
        if not 1 <= len(text) <= MAX_MODEL_LENGTH or not (text.isascii() and text.isprintable()):
            raise ValueError(f"manager_model must be 1 to {MAX_MODEL_LENGTH} printable ASCII characters")


class EncryptionServiceSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: tuple[ListenSettings, ...] = ()
    """Empty: this proxy runs no encryption service."""
    limits: HttpLimits = HttpLimits()
    outbound: OutboundSettings = OutboundSettings()
    quota: QuotaSettings = QuotaSettings()
    xks: XksFleet = XksFleet()

    def __post_init__(self) -> None:
        if len(self.listen) > MAX_LISTENERS:
            raise ValueError(f"at most {MAX_LISTENERS} listeners")
        taken = [(listen.address, listen.port) for listen in self.listen if listen.port]
        if len(set(taken)) != len(taken):
            raise ValueError("two listeners have the same address")


def listener_files(settings: EncryptionServiceSettings) -> Iterator[tuple[str, Path, bool]]:
    """Setting, file, and whether it is secret, of every file that the listeners name."""
    if settings.outbound.ca_file is not None:
        yield "encryption_service.outbound.ca_file", settings.outbound.ca_file, False
    for index, listen in enumerate(settings.listen):
        for name, secret in (("certificate_file", False), ("key_file", True), ("client_roots_file", False)):
            path = getattr(listen, name)
            if path is not None:
                yield f"encryption_service.listen[{index}].{name}", path, secret


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ValueError(f"host must be an IP address, not {host!r}") from None
