"""Certificates that network services had until they were renewed.

1. A renewal interrupts nothing: from the import of a new certificate until the agent has heard of it, the
   agent seals to the old one, and that counts as before, for as long as the old certificate is valid.
2. The first keys that are accepted under the new certificate show that the agent has heard of it. From then
   on the old one takes withdrawals alone, for one validity: then no keys that were pushed under it can be
   left.
3. They are in memory only: after a restart the new certificate alone counts.
4. They end sooner with the service, or with all trust in its tenant's agents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cryptography import x509

from envelope.certificates import fingerprint
from envelope.keys import NetworkService
from proxy.tenants.certificates import PrivateKey
from runtime.clock import Clock


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Former:
    """A certificate that counts beside the one of today, until `until_boot_s`."""

    owner: NetworkService
    certificate: x509.Certificate
    key: PrivateKey = field(repr=False)
    until_boot_s: float = math.inf
    is_superseded: bool = False
    """The agent seals to the new one: withdrawals only."""


class FormerCertificates:
    def __init__(self, clock: Clock, *, validity_s: float) -> None:
        self._clock = clock
        self._validity_s = validity_s
        self._by_fingerprint: dict[bytes, Former] = {}

    def keep(self, owner: NetworkService, certificate: x509.Certificate, key: PrivateKey) -> None:
        """*owner* has another certificate from now on."""
        self._by_fingerprint[fingerprint(certificate)] = Former(owner=owner, certificate=certificate, key=key)

    def supersede(self, owner: NetworkService) -> None:
        """Keys were accepted under the certificate that *owner* has today (rule 2)."""
        until_boot_s = self._clock.boot_s() + self._validity_s
        for name, former in self._by_fingerprint.items():
            if former.owner == owner and not former.is_superseded:
                self._by_fingerprint[name] = replace(former, until_boot_s=until_boot_s, is_superseded=True)

    def find(self, thumbprint: bytes) -> Former | None:
        """The certificate of that SHA-256, if it counts for anything."""
        self._forget(self._is_over)
        return self._by_fingerprint.get(thumbprint)

    def takes_keys(self, thumbprint: bytes) -> bool:
        """Whether keys sealed to it count (rule 1)."""
        former = self._by_fingerprint.get(thumbprint)
        now_s = self._clock.wall_s()
        return (
            former is not None
            and not former.is_superseded
            and former.certificate.not_valid_before_utc.timestamp() <= now_s
            and now_s <= former.certificate.not_valid_after_utc.timestamp()
        )

    def forget(self, owner: NetworkService) -> None:
        self._forget(lambda former: former.owner == owner)

    def _is_over(self, former: Former) -> bool:
        # One that the agent never left ends with itself, and with the keys that it brought last.
        end_s = former.certificate.not_valid_after_utc.timestamp() + self._validity_s
        return former.until_boot_s <= self._clock.boot_s() or self._clock.wall_s() > end_s

    def _forget(self, is_over: Callable[[Former], bool]) -> None:
        self._by_fingerprint = {
            name: former for name, former in self._by_fingerprint.items() if not is_over(former)
        }
