"""TLS towards clients and services: leaves of a tenant's interception CA, and one way to verify a service.

1. One CA per tenant. Leaves, their key and TLS contexts (with the session tickets) never serve another.
2. A CA's key signs leaves and nothing else. All leaves of a tenant share one P-256 key that lives as long as
   the process, so the CA's key takes no part in a handshake.
3. A leaf is good for 24 hours and renewed at half of that; the number kept is bounded.
4. Whatever fails on the way to a TLS context leaves no context: mitmproxy then fails the connection. Half of
   one, say without verification, must never be used.
5. A service is verified by the very name that was planned and connected to, never by what the client named.
6. A session with a service is taken up again by that tenant alone (sessions.py).
7. TLS to a forward proxy itself may show a certificate of its own, and asks for a client's where a tenant's
   users have one. Those sessions are never resumed: each connection proves its key anew.
8. HTTP/1.1 towards services; HTTP/2 towards clients where it is on, but not for CONNECT, which is HTTP/1.1.
"""

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self, override

from cachetools import LRUCache
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from mitmproxy import connection, tls
from mitmproxy.addonmanager import Loader
from mitmproxy.addons import tlsconfig
from mitmproxy.proxy import mode_specs, server_hooks
from mitmproxy.proxy.layers import quic
from OpenSSL import SSL
from OpenSSL.crypto import X509, X509StoreFlags

from envelope.certificates import key_usage
from envelope.errors import SealgateError
from proxy.sessions import Handshake, UpstreamSessions
from proxy.tenants.model import CertificateFiles, normal_host
from runtime.clock import Clock
from runtime.settings import read_secret_file

LEAF_VALIDITY: Final = timedelta(hours=24)
MAX_LEAVES: Final = 1024
"""Per tenant. A forward proxy needs one per service; in reverse mode clients choose the name they ask for."""
CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2; TLS 1.3 has no others worth a name."""
_BACKDATING: Final = timedelta(minutes=5)  # clients whose clock is behind
_MAX_COMMON_NAME: Final = 64

type _SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class InterceptionError(SealgateError):
    """A connection that cannot be answered for, or a CA that cannot be used; the text says why."""


@dataclass(slots=True, eq=False)
class _Leaf:
    certificate: x509.Certificate
    made_at_s: float
    renew_at_s: float
    contexts: dict[tuple[bool, tuple[bytes, ...]], SSL.Context] = field(default_factory=dict, repr=False)


class InterceptionCa:
    """The CA of one tenant, and the leaves this process has made under it."""

    def __init__(self, certificate: x509.Certificate, key: _SigningKey, clock: Clock) -> None:
        """InterceptionError if *certificate* is no CA or *key* is not its key."""
        if key.public_key() != certificate.public_key():
            raise InterceptionError("the interception CA's key does not belong to its certificate")
        try:
            is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
            self._issuer_id = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            )
        except x509.ExtensionNotFound as error:
            raise InterceptionError(
                f"the interception CA's certificate lacks extension {error.oid.dotted_string}"
            ) from None
        if not is_ca:
            raise InterceptionError("the interception CA's certificate is not that of a CA")
        self.certificate: Final = certificate
        self._key = key
        self._clock = clock
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._leaves: LRUCache[str, _Leaf] = LRUCache(maxsize=MAX_LEAVES)
        self.sessions: Final = UpstreamSessions(clock)
        """With services, on behalf of this tenant."""

    @classmethod
    def load(cls, files: CertificateFiles, clock: Clock) -> Self:
        """InterceptionError if the files hold no CA; SettingsError for a key file open to others."""
        try:
            certificate = x509.load_pem_x509_certificate(files.certificate_file.read_bytes())
        except (OSError, ValueError) as error:
            raise InterceptionError(f"{files.certificate_file}: {error}") from None
        secret = read_secret_file(files.key_file)
        try:
            key = serialization.load_pem_private_key(secret, password=None)
        except (ValueError, TypeError):
            raise InterceptionError(f"{files.key_file} holds no unencrypted private key in PEM") from None
        finally:
            secret[:] = bytes(len(secret))
        if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise InterceptionError(f"{files.key_file} holds no EC or RSA key")
        return cls(certificate, key, clock)

    def certificate_for(self, name: str) -> x509.Certificate:
        """A leaf for *name*, a host name or IP address. FormatError if it is neither."""
        return self._leaf(normal_host(name)).certificate

    def context_for(
        self, name: str, *, http2: bool, client_roots: Sequence[x509.Certificate] = ()
    ) -> SSL.Context:
        """A server's TLS context that shows the leaf for *name*. FormatError as `certificate_for`.

        *client_roots*: who may vouch for a client's certificate, which is then asked for, not demanded.
        """
        leaf = self._leaf(normal_host(name))
        kind = (http2, tuple(root.fingerprint(hashes.SHA256()) for root in client_roots))
        context = leaf.contexts.get(kind)
        if context is None:
            context = self._context(http2=http2)
            context.use_certificate(leaf.certificate)
            context.use_privatekey(self._leaf_key)
            context.check_privatekey()
            ask_for_certificate(context, client_roots)
            leaf.contexts[kind] = context
        return context

    def _leaf(self, name: str) -> _Leaf:
        now_s = self._clock.wall_s()
        leaf = self._leaves.get(name)
        if leaf is None or not leaf.made_at_s <= now_s < leaf.renew_at_s:  # also if the clock was set back
            leaf = self._leaves[name] = self._issue(name, datetime.fromtimestamp(now_s, UTC))
        return leaf

    def _issue(self, name: str, now: datetime) -> _Leaf:
        ca = self.certificate
        not_before = max(now - _BACKDATING, ca.not_valid_before_utc)
        not_after = min(now + LEAF_VALIDITY, ca.not_valid_after_utc)
        if not_before >= not_after:
            raise InterceptionError("the interception CA has expired or is not valid yet")
        try:
            subject: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            subject = x509.DNSName(name)
        common_name = [x509.NameAttribute(NameOID.COMMON_NAME, name)] if len(name) <= _MAX_COMMON_NAME else []
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(common_name))
            .issuer_name(ca.subject)
            .public_key(self._leaf_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_after)
            .add_extension(x509.SubjectAlternativeName([subject]), critical=not common_name)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self._leaf_key.public_key()), critical=False
            )
            .add_extension(self._issuer_id, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        made_at_s = now.timestamp()
        half_s = (not_after - now).total_seconds() / 2
        return _Leaf(certificate, made_at_s=made_at_s, renew_at_s=made_at_s + half_s)

    def _context(self, *, http2: bool) -> SSL.Context:
        context = _server_context((b"h2", b"http/1.1") if http2 else (b"http/1.1",))
        context.set_session_id(self.certificate.fingerprint(hashes.SHA256()))
        return context


def _server_context(offers: Sequence[bytes]) -> SSL.Context:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_cipher_list(CIPHERS.encode())
    context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION | SSL.OP_CIPHER_SERVER_PREFERENCE)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # a third of what an idle connection costs
    context.set_alpn_select_callback(_alpn_choice(offers))
    return context


def own_context(files: CertificateFiles, client_roots: Sequence[x509.Certificate]) -> SSL.Context:
    """Of TLS to a forward proxy itself, with the proxy's own certificate. InterceptionError."""
    context = _server_context((b"http/1.1",))
    try:
        context.use_certificate_chain_file(str(files.certificate_file))
        context.use_privatekey_file(str(files.key_file))
        context.check_privatekey()
    except SSL.Error:
        raise InterceptionError(
            f"{files.certificate_file} and {files.key_file} are no certificate and key"
        ) from None
    ask_for_certificate(context, client_roots)
    return context


def ask_for_certificate(context: SSL.Context, client_roots: Sequence[x509.Certificate]) -> None:
    """Ask the client for a certificate below one of *client_roots*; one from elsewhere ends the handshake."""
    if not client_roots:
        return
    store = context.get_cert_store()
    if store is None:
        raise InterceptionError("there is nowhere to keep the authorities of clients")
    for root in client_roots:
        store.add_cert(X509.from_cryptography(root))
    store.set_flags(X509StoreFlags.X509_STRICT)
    context.set_verify(SSL.VERIFY_PEER, None)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET)
    context.set_client_ca_list([X509.from_cryptography(root).get_subject() for root in client_roots])


def _alpn_choice(offers: Sequence[bytes]) -> Callable[[SSL.Connection, list[bytes]], Any]:
    def choose(_connection: SSL.Connection, wanted: list[bytes]) -> Any:
        # In our order: a client that can speak HTTP/2 means to. Without overlap the handshake goes on without
        # ALPN, as HTTP/1.1, which is what such a client expects.
        return next((offer for offer in offers if offer in wanted), SSL.NO_OVERLAPPING_PROTOCOLS)

    return choose


class TenantTls(tlsconfig.TlsConfig):
    """mitmproxy's TLS addon with our certificates and rules in place of its own.

    *ca_of*: the CA for this client's connections; *outer_of*: the context of TLS to the proxy itself, which
    is asked for by name. If one raises, the connection fails. *is_served*: whether a client's server name is
    one to answer to; if not, the client is told so by TLS's alert `unrecognized_name` (`gate.hello`).
    """

    name = "tlsconfig"

    def __init__(
        self,
        ca_of: Callable[[connection.Client], InterceptionCa],
        *,
        http2: bool,
        outer_of: Callable[[connection.Client, str], SSL.Context] | None = None,
        is_served: Callable[[connection.Client], bool] | None = None,
    ) -> None:
        self._ca_of = ca_of
        self._outer_of = outer_of
        self._http2 = http2
        self._is_served = is_served
        self._handshakes: dict[str, Handshake] = {}
        """By the id of the connection to a service."""

    @override
    def load(self, loader: Loader) -> None:
        super().load(loader)  # type: ignore[no-untyped-call]  # the options the base class reads

    @override
    def configure(self, updated: object) -> None:
        """Without the base class's certificate store, which would make a CA in the home directory."""

    @override
    def running(self) -> None:
        """As `configure`."""

    # The base class serves revocation lists of its own CA to whoever asks for a path of that shape.
    request = None  # type: ignore[assignment]

    @override
    def tls_start_client(self, tls_start: tls.TlsData) -> None:
        try:
            tls_start.ssl_conn = self._client_connection(tls_start)
        except BaseException:
            tls_start.ssl_conn = None
            raise

    def _client_connection(self, tls_start: tls.TlsData) -> SSL.Connection | None:
        """None: there is no certificate for the name that is asked for."""
        client, server = tls_start.context.client, tls_start.context.server
        if tls_start.is_dtls or tls_start.conn is not client:
            raise InterceptionError("only TLS over TCP is answered")
        # Before a CONNECT there is no address: this handshake is with the proxy itself (HTTP/1.1 only).
        to_proxy_itself = server.address is None
        # Without a server name the client connected to an address: the service's, or ours.
        meant = client.sockname
        if server.address is not None and not isinstance(client.proxy_mode, mode_specs.ReverseMode):
            meant = server.address
        name = client.sni or meant[0]
        if to_proxy_itself and self._outer_of is not None:
            context = self._outer_of(client, name)
        elif self._is_served is not None and not self._is_served(client):
            return None
        else:
            context = self._ca_of(client).context_for(name, http2=self._http2 and not to_proxy_itself)
        answering = SSL.Connection(context)
        answering.set_accept_state()
        return answering

    @override
    def tls_start_server(self, tls_start: tls.TlsData) -> None:
        try:
            server = tls_start.conn
            if tls_start.is_dtls or not isinstance(server, connection.Server) or server.address is None:
                raise InterceptionError("only TLS over TCP is spoken to services")  # noqa: TRY301
            server.sni = server.address[0]
            server.alpn_offers = (b"http/1.1",)
            super().tls_start_server(tls_start)
            if tls_start.ssl_conn is None:
                raise InterceptionError("there is no TLS context for services")  # noqa: TRY301
            client = tls_start.context.client
            place = (client.proxy_mode.full_spec, server.address[0], server.address[1], server.sni)
            self._handshakes[server.id] = self._ca_of(client).sessions.resume(place, tls_start.ssl_conn)
        except BaseException:
            tls_start.ssl_conn = None
            raise

    def tls_established_server(self, established: tls.TlsData) -> None:
        try:
            handshake = self._handshakes.get(established.conn.id)
            if handshake is not None and established.ssl_conn is not None:
                handshake.succeeded(established.ssl_conn)
        except BaseException:
            self._handshakes.pop(established.conn.id, None)
            raise

    def server_disconnected(self, ended: server_hooks.ServerConnectionHookData) -> None:
        try:
            if (handshake := self._handshakes.pop(ended.server.id, None)) is not None:
                handshake.ended()
        except BaseException as error:
            # The connection is over: only a session is lost. The gate logs what is raised here.
            raise InterceptionError("a session could not be kept") from error

    @override
    def quic_start_client(self, tls_start: quic.QuicTlsData) -> None:
        raise InterceptionError("QUIC is not answered")

    @override
    def quic_start_server(self, tls_start: quic.QuicTlsData) -> None:
        raise InterceptionError("QUIC is not spoken to services")
