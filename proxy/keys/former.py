"""Certificates that a network service had until it was renewed: for withdrawals alone.

1. From the import of a new certificate until the agent has heard of it, the agent seals to the old one. Keys
   wait for it; a withdrawal must not.
2. So the old certificate and its private key, if it can still be had, are kept in memory for one validity:
   then no keys that were pushed before can be left.
3. They end sooner with the service, or with all trust in its tenant's agents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography import x509

from envelope.certificates import fingerprint
from envelope.keys import NetworkService
from proxy.tenants.certificates import PrivateKey
from runtime.clock import Clock


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Former:
    """A certificate that counts for withdrawals until `until_boot_s`."""

    owner: NetworkService
    certificate: x509.Certificate
    key: PrivateKey = field(repr=False)
    until_boot_s: float


class FormerCertificates:
    def __init__(self, clock: Clock, *, validity_s: float) -> None:
        self._clock = clock
        self._validity_s = validity_s
        self._by_fingerprint: dict[bytes, Former] = {}

    def keep(self, owner: NetworkService, certificate: x509.Certificate, key: PrivateKey) -> None:
        """*owner* has another certificate from now on."""
        self._by_fingerprint[fingerprint(certificate)] = Former(
            owner=owner,
            certificate=certificate,
            key=key,
            until_boot_s=self._clock.boot_s() + self._validity_s,
        )

    def find(self, thumbprint: bytes) -> Former | None:
        self._forget(lambda former: former.until_boot_s <= self._clock.boot_s())
        return self._by_fingerprint.get(thumbprint)

    def forget(self, owner: NetworkService) -> None:
        self._forget(lambda former: former.owner == owner)

    def _forget(self, is_over: Callable[[Former], bool]) -> None:
        self._by_fingerprint = {
            name: former for name, former in self._by_fingerprint.items() if not is_over(former)
        }
