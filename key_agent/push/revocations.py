"""Which certificates the tenant's root has taken back: a signed list in a file, read again when it changes.

1. The file holds one list (CRL, PEM or DER), or several: of the root and of authorities below it. Each
   certificate of a chain, but for the root, must be covered by a list of its issuer that the issuer has
   signed.
2. Fail closed: no list, an unreadable one, one that is not its issuer's or past its `nextUpdate` refuses
   every certificate it would have to cover. A new file that is no good does not replace a good one: while
   that is in date it counts, and `problem` says so.
3. A list is believed if it is ours, not because it is new: one with an earlier `lastUpdate` than the one
   before is refused.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from envelope.certificates import CertificateError

MAX_FILE_BYTES: Final = 16 << 20
_SIGNERS: Final = (rsa.RSAPublicKey, ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey)
_CLOCK_SLACK: Final = timedelta(seconds=30)
_BEGIN: Final = b"-----BEGIN X509 CRL-----"
_END: Final = b"-----END X509 CRL-----"


@dataclass(frozen=True, slots=True)
class _Lists:
    """What one reading of the file gave."""

    by_issuer: dict[x509.Name, x509.CertificateRevocationList]
    version: tuple[int, int, int] | None


class Revocations:
    def __init__(self, path: Path, root: x509.Certificate) -> None:
        self._path = path
        self._root = root
        self._lists = _Lists({}, None)
        self._signers: dict[x509.Name, x509.Certificate] = {}
        """By issuer: whose signature of its list in force was verified."""
        self.problem: str | None = None
        """Why the newest content of the file is not in force."""
        self.refresh()

    def refresh(self) -> bool:
        """Look at the file; True if other lists are in force now."""
        try:
            status = self._path.stat()
            version = (status.st_mtime_ns, status.st_ino, status.st_size)
            if version == self._lists.version:
                self.problem = None
                return False
            found = _read(self._path)
            self._refuse_worse(found)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.problem = f"{self._path}: {reason}"
            return False
        self.problem = None
        self._lists = _Lists(found, version)
        self._signers.clear()
        return True

    def next_update(self) -> datetime | None:
        """When the first of the lists ends; None without any."""
        ends = [crl.next_update_utc for crl in self._lists.by_issuer.values() if crl.next_update_utc]
        return min(ends, default=None)

    def standing(self, *, now_s: float) -> tuple[object, ...]:
        """Differs when `check` may answer otherwise than before: other lists, or one that ended or began."""
        now = datetime.fromtimestamp(now_s, UTC)
        out_of_date = frozenset(
            issuer for issuer, crl in self._lists.by_issuer.items() if _out_of_date(crl, now) is not None
        )
        return (self._lists.version, out_of_date)

    def check(self, chain: Sequence[x509.Certificate], *, now_s: float) -> None:
        """CertificateError "revoked" or "revocation-list" if one of *chain* (leaf first, root last) is not
        to be believed. The chain itself has been verified.
        """
        now = datetime.fromtimestamp(now_s, UTC)
        by_subject = {certificate.subject: certificate for certificate in chain[1:]}
        certificate, left = chain[0], len(chain)
        while certificate != chain[-1]:
            issuer, left = by_subject.get(certificate.issuer), left - 1
            crl = self._lists.by_issuer.get(certificate.issuer)
            name = certificate.subject.rfc4514_string() or f"serial {certificate.serial_number:x}"
            if crl is None or issuer is None or left == 0:
                raise CertificateError(
                    "revocation-list",
                    f"{name}: no revocation list of its issuer in force" + self._because(),
                )
            self._check_list(crl, issuer, now)
            if (entry := crl.get_revoked_certificate_by_serial_number(certificate.serial_number)) is not None:
                raise CertificateError(
                    "revoked", f"{name} was revoked on {entry.revocation_date_utc.isoformat()}"
                )
            certificate = issuer

    def _check_list(
        self, crl: x509.CertificateRevocationList, issuer: x509.Certificate, now: datetime
    ) -> None:
        if self._signers.get(crl.issuer) != issuer:
            if not _is_signed(crl, issuer):
                raise CertificateError("revocation-list", f"{self._path}: a list is not signed by its issuer")
            self._signers[crl.issuer] = issuer
        if (why := _out_of_date(crl, now)) is not None:
            raise CertificateError("revocation-list", f"{self._path}: {why}" + self._because())

    def _because(self) -> str:
        return f" ({self.problem})" if self.problem else ""

    def _refuse_worse(self, found: dict[x509.Name, x509.CertificateRevocationList]) -> None:
        for issuer, before in self._lists.by_issuer.items():
            after = found.get(issuer)
            if after is None or after.last_update_utc < before.last_update_utc:
                raise ValueError("older than the revocation list that is in force")
        ours = found.get(self._root.subject)
        if ours is not None and not _is_signed(ours, self._root):
            raise ValueError("not signed by the tenant's root")


def _out_of_date(crl: x509.CertificateRevocationList, now: datetime) -> str | None:
    """Why *crl* does not count at *now*; None: it does."""
    end = crl.next_update_utc
    if end is None or now > end:
        return "the revocation list " + ("has no end" if end is None else f"ended {end.isoformat()}")
    if crl.last_update_utc > now + _CLOCK_SLACK:
        return "a list from the future"
    return None


def _is_signed(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    key = issuer.public_key()
    try:
        return crl.issuer == issuer.subject and isinstance(key, _SIGNERS) and crl.is_signature_valid(key)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False


def _read(path: Path) -> dict[x509.Name, x509.CertificateRevocationList]:
    """ValueError if there is no list in it, or two of one issuer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - opened above
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
    found: dict[x509.Name, x509.CertificateRevocationList] = {}
    for one in _split(content):
        issuer, is_partial = _understood(one)
        if is_partial:
            raise ValueError("holds a list that is about a part of the certificates only")
        if issuer in found:
            raise ValueError("holds two revocation lists of one issuer")
        found[issuer] = one
    if not found:
        raise ValueError("holds no revocation list")
    return found


def _split(content: bytes) -> list[x509.CertificateRevocationList]:
    try:
        if _BEGIN not in content:
            return [x509.load_der_x509_crl(content)]
        parts = content.split(_BEGIN)[1:]
        return [x509.load_pem_x509_crl(_BEGIN + part.partition(_END)[0] + _END + b"\n") for part in parts]
    except x509.InvalidVersion as error:
        raise ValueError(str(error)) from None


def _understood(crl: x509.CertificateRevocationList) -> tuple[x509.Name, bool]:
    """Whose it is, and whether it is about a part of the certificates only. ValueError."""
    try:
        # What is read of it later is read here once: it is parsed when it is asked for.
        _ = crl.next_update_utc, crl.last_update_utc
        return crl.issuer, any(extension.critical for extension in crl.extensions)
    except Exception as error:  # noqa: BLE001 - the parser's own kinds, KeyError, TypeError
        raise ValueError(f"holds a list that cannot be read ({type(error).__name__})") from None
