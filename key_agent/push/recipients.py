"""The certificates that keys are encrypted to: checked before every use.

1. A certificate must name the very service, hang on the tenant's root, and be a recipient's
   (envelope/certificates.py).
2. A chain that verified is not verified again for an hour; its dates, and whether it was revoked, are looked
   at every time.
"""

import functools
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from envelope.certificates import CertificateError, Identity, Role, fingerprint, verify_certificate
from envelope.keys import NetworkService
from key_agent.push.revocations import Revocations

_RECHECK_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class _Checked:
    chain: tuple[x509.Certificate, ...]
    """Leaf first, root last."""
    from_s: float
    until_s: float


class Recipients:
    def __init__(self, root: x509.Certificate, tenant: str, revocations: Revocations | None = None) -> None:
        self._root = root
        self._tenant = tenant
        self._revocations = revocations
        self._checked: dict[tuple[NetworkService, str], _Checked] = {}

    def check(self, owner: NetworkService, chain_pem: str, *, now_s: float) -> x509.Certificate:
        """The leaf of *chain_pem*, fit to receive keys of *owner*; else CertificateError."""
        known = self._checked.get((owner, chain_pem))
        if known is not None and known.from_s <= now_s < known.until_s:
            return self._unless_revoked(known.chain, now_s)
        self._checked.pop((owner, chain_pem), None)
        if owner.tenant != self._tenant:
            raise CertificateError("tenant", f"{owner} is not of tenant {self._tenant}")
        leaf, *intermediates = read_chain(chain_pem)
        verify_certificate(
            leaf,
            root=self._root,
            intermediates=intermediates,
            expected=Identity(owner.tenant, Role.SERVICE, owner.service),
            now_s=now_s,
        )
        chain = (leaf, *intermediates, self._root)
        ends_s = min(certificate.not_valid_after_utc.timestamp() for certificate in chain)
        self._checked[owner, chain_pem] = _Checked(chain, now_s, min(ends_s, now_s + _RECHECK_S))
        return self._unless_revoked(chain, now_s)

    def _unless_revoked(self, chain: tuple[x509.Certificate, ...], now_s: float) -> x509.Certificate:
        if self._revocations is not None:
            self._revocations.check(chain, now_s=now_s)
        return chain[0]


@functools.lru_cache(maxsize=1 << 16)
def leaf_sha256(chain_pem: str) -> str:
    """Hex SHA-256 of the leaf's DER form. CertificateError if there is no certificate in *chain_pem*."""
    return fingerprint(read_chain(chain_pem)[0]).hex()


def read_chain(chain_pem: str) -> list[x509.Certificate]:
    """Leaf first. CertificateError if there is no certificate in it."""
    try:
        return x509.load_pem_x509_certificates(chain_pem.encode())
    except (ValueError, x509.InvalidVersion) as error:
        raise CertificateError("malformed", f"not a PEM certificate: {error}") from error
