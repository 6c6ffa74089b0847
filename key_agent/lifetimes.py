"""Certificates end, are renewed and are taken back: what the agent does about it by itself.

1. Every half minute, and on SIGHUP, it reads its own signing and TLS certificates and the revocation list
   again. What changed and is good is used from then on, without a restart; what is no good is said, and the
   old goes on.
2. A network service whose certificate was revoked is withdrawn from that proxy, at once and for good:
   `service add` with another certificate brings it back.
3. What ends soon is told by `status`, `doctor` and a metric, a month ahead.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NoReturn

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from envelope.certificates import CertificateError, fingerprint
from envelope.errors import SealgateError
from key_agent import metrics
from key_agent.journal import Journal
from key_agent.push.recipients import Recipients, read_chain
from key_agent.push.revocations import Revocations
from key_agent.push.targets import Targets
from key_agent.refresh import wait_until
from key_agent.registry.model import Link
from key_agent.registry.store import Registry
from key_agent.sources.source import Kek
from runtime.clock import Clock
from runtime.doctor import EXPIRY_WARNING

log = structlog.get_logger(__name__)

LOOK_S: Final = 30.0
_DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Signing:
    """The agent's signature; here for withdrawals only: keys are signed where they are unwrapped."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What the agent shows the proxies, as its files have it now."""

    signing: Signing
    tls: x509.Certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """One certificate or list that ends."""

    kind: str
    """root, signing, tls, service, proxy-authority, revocation-list, kek."""
    name: str
    not_after: datetime | None
    problem: str | None = None

    def days_left(self, now_s: float) -> float | None:
        """None if nobody can tell."""
        return None if self.not_after is None else (self.not_after.timestamp() - now_s) / _DAY_S

    def is_worth_telling(self, now_s: float) -> bool:
        left = self.days_left(now_s)
        return self.problem is not None or left is None or left < EXPIRY_WARNING.days


class Lifetimes:
    def __init__(
        self,
        *,
        root: x509.Certificate,
        signing: Signing,
        load: Callable[[float], Credentials] | None,
        revocations: Revocations | None,
        recipients: Recipients,
        registry: Registry,
        targets: Targets,
        journal: Journal,
        clock: Clock,
        renew: Callable[[Signing], None],
        withdraw: Callable[[], Awaitable[None]],
        kek: Callable[[], Kek | None] = lambda: None,
    ) -> None:
        """*load* reads the own credentials at a wall-clock time; *renew* hears of a new signature, *withdraw*
        that a service was taken from a proxy.
        """
        self._root = root
        self._signing = signing
        self._tls: x509.Certificate | None = None
        self._load = load
        self._revocations = revocations
        self._recipients = recipients
        self._registry = registry
        self._targets = targets
        self._journal = journal
        self._clock = clock
        self._renew = renew
        self._withdraw = withdraw
        self._kek = kek
        self._wake = asyncio.Event()
        self.problem: str | None = None
        """Why the files of the own certificates are not in use as they are now."""

    def wake_by(self, event: asyncio.Event) -> None:
        """Whoever sets *event* says that files have changed. To be called before `run`."""
        self._wake = event

    async def run(self) -> NoReturn:
        while True:
            try:
                await self.look()
            except SealgateError as error:  # registry or audit log: the next look tries again
                log.error("certificates", error=str(error))  # noqa: TRY400 - expected
            await wait_until(self._clock, self._wake, self._clock.boot_s() + LOOK_S)

    async def look(self) -> None:
        """Rules 1 and 2, once. RegistryError, AuditUnavailableError: not all of it was done."""
        self._look_at_own()
        if self._revocations is not None and self._revocations.refresh():
            log.info("a revocation list is in force", until=str(self._revocations.next_update()))
        self._count()
        await self._withdraw_revoked()

    def lifetimes(self) -> list[Lifetime]:
        """All that ends, what ends first at the head."""
        found = list(self._all())
        return sorted(found, key=lambda one: one.not_after or datetime.min.replace(tzinfo=UTC))

    def _look_at_own(self) -> None:
        if self._load is None:
            return
        try:
            found = self._load(self._clock.wall_s())
        except SealgateError as error:
            if str(error) != self.problem:
                log.error("own certificates cannot be used as they are now", error=str(error))  # noqa: TRY400
            self.problem = str(error)
            return
        self.problem = None
        if self._tls is not None and fingerprint(found.tls) != fingerprint(self._tls):
            self._journal.note("tls-certificate", sha256=fingerprint(found.tls).hex())
        self._tls = found.tls
        if fingerprint(found.signing.certificate) != fingerprint(self._signing.certificate):
            self._signing = found.signing
            self._renew(found.signing)
            sha256 = fingerprint(found.signing.certificate).hex()
            log.info("own signing certificate renewed", sha256=sha256)
            self._journal.note("signing-certificate", sha256=sha256)

    async def _withdraw_revoked(self) -> None:
        if self._revocations is None:
            return
        revoked = [link for link in self._targets.links if not link.withdrawn and self._is_revoked(link)]
        for link in revoked:
            log.error("a service's certificate was revoked", service=str(link.owner), proxy=link.proxy_id)
            self._journal.note("certificate-revoked", service=str(link.owner), proxy=link.proxy_id)
            await self._registry.remove_service(
                link.owner, proxy_id=link.proxy_id, now_ms=int(self._clock.wall_s() * 1000)
            )
        if revoked:
            await self._withdraw()

    def _is_revoked(self, link: Link) -> bool:
        try:
            self._recipients.check(link.owner, link.certificate_pem, now_s=self._clock.wall_s())
        except CertificateError as error:
            return error.code == "revoked"
        return False

    def _count(self) -> None:
        now_s = self._clock.wall_s()
        left: dict[str, float] = {}
        for one in self.lifetimes():
            days = -1.0 if one.problem is not None else one.days_left(now_s)
            if days is not None:
                left[one.kind] = min(days, left.get(one.kind, days))
        for kind, days in left.items():
            metrics.CERTIFICATE_DAYS_LEFT.labels(kind).set(days)

    def _all(self) -> Iterator[Lifetime]:
        yield from self._of_kek()
        yield Lifetime(kind="root", name="root", not_after=self._root.not_valid_after_utc)
        yield Lifetime(
            kind="signing",
            name="signing",
            not_after=self._signing.certificate.not_valid_after_utc,
            problem=self.problem or self._revoked(self._signing.certificate),
        )
        if self._tls is not None:
            yield Lifetime(
                kind="tls",
                name="tls",
                not_after=self._tls.not_valid_after_utc,
                problem=self._revoked(self._tls),
            )
        for link in self._targets.links:
            if not link.withdrawn:
                yield self._of_service(link)
        for proxy in self._targets.proxies.values():
            if not proxy.removed:
                yield _of_chain("proxy-authority", proxy.id, proxy.ca_pem)
        if self._revocations is not None:
            yield Lifetime(
                kind="revocation-list",
                name="revocation list",
                not_after=self._revocations.next_update(),
                problem=self._revocations.problem,
            )

    def _of_kek(self) -> Iterator[Lifetime]:
        """One without an end is no worry."""
        kek = self._kek()
        if kek is not None and kek.valid_until_s is not None:
            end = datetime.fromtimestamp(kek.valid_until_s, UTC)
            yield Lifetime(kind="kek", name=kek.reference.kek_id, not_after=end)

    def _revoked(self, own: x509.Certificate) -> str | None:
        """Why one of the agent's own is not to be believed, as far as the root's list says."""
        if self._revocations is None or own.issuer != self._root.subject:
            return None
        try:
            self._revocations.check((own, self._root), now_s=self._clock.wall_s())
        except CertificateError as error:
            return str(error)
        return None

    def _of_service(self, link: Link) -> Lifetime:
        found = _of_chain("service", f"{link.owner} at {link.proxy_id}", link.certificate_pem)
        try:
            self._recipients.check(link.owner, link.certificate_pem, now_s=self._clock.wall_s())
        except CertificateError as error:
            return Lifetime(
                kind=found.kind,
                name=found.name,
                not_after=found.not_after,
                problem=f"certificate-{error.code}: {error}",
            )
        return found


def _of_chain(kind: str, name: str, pem: str) -> Lifetime:
    """The first certificate of a chain to end."""
    try:
        return Lifetime(kind=kind, name=name, not_after=_first_end(pem))
    except CertificateError as error:
        return Lifetime(kind=kind, name=name, not_after=None, problem=str(error))


@functools.lru_cache(maxsize=1 << 16)
def _first_end(pem: str) -> datetime:
    return min(certificate.not_valid_after_utc for certificate in read_chain(pem))
