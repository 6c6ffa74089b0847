"""TLS contexts: 1.3 unless a caller must talk to older ones, mutual where asked for, renewable while serving.

1. A server that wants client certificates gets an iterable of roots, and an empty one admits nobody. None
   means that no client certificate is asked for: the absence of roots must never be taken for the absence of
   the rule.
2. OpenSSL checks that a client's chain ends at one of the roots; which tenant and role it is,
   `peer_certificate` with `envelope.certificates.verify_certificate` must decide.
3. A server with client certificates resumes no session: every connection proves its identity anew, so a
   removed root is gone at once.
4. A password-protected key is refused; OpenSSL would ask for the password on the terminal.
5. Renewal replaces the whole context for new connections (`ServerTls.renew`); running ones keep theirs.
"""

import asyncio
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from envelope.errors import SealgateError


class TlsError(SealgateError):
    """A certificate or key file that cannot be used; the text names it. `next_step` says how to mend it."""

    def __init__(self, cause: str, next_step: str) -> None:
        super().__init__(cause)
        self.next_step = next_step


def server_context(
    certificate_file: Path,
    key_file: Path,
    *,
    client_roots: Iterable[x509.Certificate] | None = None,
    minimum_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ciphers: str | None = None,
) -> ssl.SSLContext:
    """The context of a server; with *client_roots* clients need a certificate below one of them (rule 1).

    *ciphers*, in OpenSSL's notation, are those of TLS 1.2, where *minimum_version* admits it.

    TlsError if a file is missing, not PEM, or the key is not the certificate's.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = minimum_version
    if ciphers is not None:
        context.set_ciphers(ciphers)
    _load_identity(context, certificate_file, key_file)
    if client_roots is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET  # the same for TLS 1.2
        for root in client_roots:
            context.load_verify_locations(cadata=root.public_bytes(Encoding.DER))
    return context


def client_context(
    ca_file: Path, certificate_file: Path | None = None, key_file: Path | None = None
) -> ssl.SSLContext:
    """The context of a client that trusts only the roots in *ca_file*, with its own identity where given.

    TlsError if a file is missing, not PEM, or the key is not the certificate's.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies the chain and the host name
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        context.load_verify_locations(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(
            f"{ca_file}: no usable root certificate ({_reason(error)})", "give a file of PEM certificates"
        ) from error
    if certificate_file is not None and key_file is not None:
        _load_identity(context, certificate_file, key_file)
    elif certificate_file is not None or key_file is not None:
        raise TlsError(
            "a certificate without its key, or a key without its certificate", "give both files or none"
        )
    return context


class ServerTls:
    """A server's context whose certificate and client roots can change while it serves.

    `context` is for the listener; it hands each new connection to the context that is current.
    """

    def __init__(
        self,
        certificate_file: Path,
        key_file: Path,
        *,
        client_roots: Iterable[x509.Certificate] | None = None,
    ) -> None:
        self._certificate_file = certificate_file
        self._key_file = key_file
        self._verifies = client_roots is not None
        self._current = server_context(certificate_file, key_file, client_roots=client_roots)
        # Another object than the current one, although it begins equal: OpenSSL takes the roots of the
        # context that the callback sets, and this one must not lend old roots to a connection.
        self.context = server_context(certificate_file, key_file, client_roots=() if self._verifies else None)
        self.context.sni_callback = self._use_current  # called for every ClientHello, with or without a name

    def renew(self, *, client_roots: Iterable[x509.Certificate] | None = None) -> None:
        """Read the files again, take *client_roots* from now on. TlsError: all stays as it was."""
        if (client_roots is not None) is not self._verifies:
            raise TlsError(
                "whether clients need certificates cannot change while serving", "restart the server"
            )
        self._current = server_context(self._certificate_file, self._key_file, client_roots=client_roots)

    def _use_current(
        self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext
    ) -> None:
        connection.context = self._current


def peer_certificate(transport: asyncio.BaseTransport | None) -> x509.Certificate | None:
    """The certificate the peer of a TLS connection has proven to own, or None without one.

    ValueError for one that OpenSSL has taken, and that cannot be read.
    """
    connection = transport.get_extra_info("ssl_object") if transport else None
    der = connection.getpeercert(binary_form=True) if connection else None
    try:
        return x509.load_der_x509_certificate(der) if der else None
    except x509.InvalidVersion as error:
        raise ValueError(str(error)) from None


def has_common_name(certificate_der: bytes | None, name: str) -> bool:
    """Whether *name* is the one common name of a certificate that TLS has verified; None: there was none."""
    if not certificate_der:
        return False
    try:
        subject = x509.load_der_x509_certificate(certificate_der).subject
        found = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except Exception:  # noqa: BLE001 - OpenSSL takes what the parser does not: InvalidVersion, KeyError
        return False
    return [one.value for one in found] == [name]


def load_certificates(path: Path) -> list[x509.Certificate]:
    """The PEM certificates in *path*, at least one; TlsError otherwise."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TlsError(
            f"{path}: no certificate ({_reason(error)})", "give a file of PEM certificates"
        ) from error


def _load_identity(context: ssl.SSLContext, certificate_file: Path, key_file: Path) -> None:
    def refuse_to_ask() -> NoReturn:
        raise TlsError(f"{key_file}: the key is protected by a password", "store it without one, mode 0600")

    for file in (certificate_file, key_file):  # OpenSSL does not say which one it misses
        if not file.is_file():
            raise TlsError(f"{file}: no such file", "check the path in the configuration")
    try:
        context.load_cert_chain(certificate_file, key_file, password=refuse_to_ask)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(
            f"{certificate_file} with {key_file}: not a certificate with its key ({_reason(error)})",
            "give the PEM certificate and the PEM private key that belong together",
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return getattr(error, "strerror", None) or type(error).__name__
