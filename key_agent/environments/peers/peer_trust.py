"""Which agent is at the other end: mutual TLS under the tenant's root, proven before a byte is exchanged.

1. TLS 1.3 with certificates on both sides, both from the tenant's root and with the role of an agent's TLS
   identity (envelope/certificates.py). Not the host's name but the agent's id says who it is: an address can
   change or lie, the id stands in the certificate. The companion of a load balancer has a role of its own: it
   is never taken for an agent.
2. A client checks the server's identity inside of the handshake: if it is another agent, or a revoked one,
   nothing has been sent to it. A server checks at each request: a certificate taken back counts at once, on
   connections that are open too.
3. A certificate hangs directly on the root, as it has to for the proxies.
4. Where a revocation list is configured, each check asks it; without one in date nobody is believed.
"""

import ssl
from pathlib import Path
from typing import override

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from envelope.certificates import AnyHolder, CertificateError, Identity, Role, verify_certificate
from key_agent.push.revocations import Revocations
from runtime.clock import Clock


class PeerTrust:
    def __init__(
        self, *, tenant: str, root: x509.Certificate, revocations: Revocations | None, clock: Clock
    ) -> None:
        self._tenant = tenant
        self._root = root
        self._revocations = revocations
        self._clock = clock

    def identify(
        self,
        leaf: x509.Certificate | None,
        *,
        agent_id: str | None = None,
        role: Role = Role.AGENT_TLS,
    ) -> str:
        """The id of the agent that *leaf* speaks for, which has to be *agent_id* if that is given; or of a
        load balancer's companion, if that is the *role*.

        CertificateError: whoever shows it is not to be spoken with.
        """
        if leaf is None:
            raise CertificateError("identity", "no certificate was shown")
        expected = (
            AnyHolder(self._tenant, role)
            if agent_id is None
            else Identity(self._tenant, Role.AGENT_TLS, agent_id)
        )
        now_s = self._clock.wall_s()
        found = verify_certificate(leaf, root=self._root, expected=expected, now_s=now_s)
        if self._revocations is not None:
            self._revocations.check((leaf, self._root), now_s=now_s)
        return found.name

    def standing(self) -> tuple[object, ...]:
        """Differs when who was believed may not be believed any more: open connections are of no use then."""
        if self._revocations is None:
            return ()
        return self._revocations.standing(now_s=self._clock.wall_s())

    def client_context(self, certificate_file: Path, key_file: Path, *, agent_id: str) -> ssl.SSLContext:
        """For connections to *agent_id* alone. OSError, ValueError if an own file is no good."""
        trust = self

        class Proving(ssl.SSLObject):
            """Ends its handshake only with that agent (rule 2)."""

            @override
            def do_handshake(self) -> None:
                super().do_handshake()
                shown = self.getpeercert(binary_form=True)
                try:
                    trust.identify(
                        x509.load_der_x509_certificate(shown) if shown else None, agent_id=agent_id
                    )
                except (CertificateError, ValueError) as error:
                    raise ssl.SSLCertVerificationError(1, f"not agent {agent_id}: {error}") from error

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # rule 1: the agent's id takes its place
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(cadata=self._root.public_bytes(Encoding.DER))
        context.load_cert_chain(certificate_file, key_file)
        context.sslobject_class = Proving
        return context
