"""Leaves of a tenant's interception CA, judged by a real TLS client."""

import contextlib
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from envelope.errors import FormatError
from proxy.interception import MAX_LEAVES, InterceptionCa, InterceptionError
from proxy.tenants.model import CertificateFiles
from runtime.clock import SystemClock
from runtime.settings import SettingsError
from tests import pki
from tests.fakes.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def ca(clock: ManualClock) -> InterceptionCa:
    credential = pki.make_interception_ca()
    return InterceptionCa(credential.certificate, credential.key, clock)


def names(certificate: x509.Certificate) -> list[str]:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in extension]


def test_a_leaf_names_what_was_asked_for(ca: InterceptionCa) -> None:
    assert names(ca.certificate_for("Files.Example.")) == ["files.example"]
    assert names(ca.certificate_for("127.0.0.1")) == ["127.0.0.1"]
    assert names(ca.certificate_for("[::1]")) == ["::1"]
    long_name = "a" * 60 + ".files.example"
    leaf = ca.certificate_for(long_name)
    assert names(leaf) == [long_name]
    assert not leaf.subject.rdns
    for bad in ("", "a b", "*.example", "x" * 300, "a\x00b"):
        with pytest.raises(FormatError):
            ca.certificate_for(bad)


def test_a_leaf_is_renewed_at_half_its_life_and_after_a_clock_that_went_back(
    ca: InterceptionCa, clock: ManualClock
) -> None:
    first = ca.certificate_for("a.example")
    clock.shift(12 * 3600 - 1)
    assert ca.certificate_for("a.example") is first
    clock.shift(1)
    second = ca.certificate_for("a.example")
    assert second is not first
    assert second.not_valid_after_utc > first.not_valid_after_utc
    clock.set_wall(clock.wall_s() - 3 * 24 * 3600)
    third = ca.certificate_for("a.example")
    assert third.not_valid_before_utc.timestamp() < clock.wall_s() < third.not_valid_after_utc.timestamp()


def test_the_cas_key_is_not_the_leafs_and_tenants_share_none(clock: ManualClock) -> None:
    one, two = (
        InterceptionCa(credential.certificate, credential.key, clock)
        for credential in (pki.make_interception_ca("acme"), pki.make_interception_ca("beta"))
    )
    keys = [
        one.certificate.public_key(),
        two.certificate.public_key(),
        one.certificate_for("a.example").public_key(),
        two.certificate_for("a.example").public_key(),
    ]
    assert all(a != b for at, a in enumerate(keys) for b in keys[:at])
    assert one.context_for("a.example", http2=True) is not two.context_for("a.example", http2=True)


def test_the_number_of_leaves_is_bounded(ca: InterceptionCa) -> None:
    first = ca.certificate_for("a.example")
    for number in range(MAX_LEAVES + 1):
        ca._leaves[f"n{number}.example"] = ca._leaf("a.example") if number == 0 else ca._leaf("b.example")
    assert len(ca._leaves) == MAX_LEAVES
    assert ca.certificate_for("a.example") is not first


def test_no_leaf_outlives_its_ca(clock: ManualClock) -> None:
    credential = pki.make_interception_ca()
    ca = InterceptionCa(credential.certificate, credential.key, clock)
    clock.set_wall(credential.certificate.not_valid_after_utc.timestamp() - 60)
    assert ca.certificate_for("a.example").not_valid_after_utc <= credential.certificate.not_valid_after_utc
    clock.set_wall(credential.certificate.not_valid_after_utc.timestamp() + 3600)
    with pytest.raises(InterceptionError, match="expired"):
        ca.certificate_for("b.example")


def handshake(
    ca: InterceptionCa, name: str, *, http2: bool, alpn: list[str], maximum: ssl.TLSVersion | None = None
) -> tuple[str | None, str | None]:
    """What a client that trusts *ca* negotiates: TLS version and application protocol."""
    trust = ssl.create_default_context(cadata=ca.certificate.public_bytes(Encoding.PEM).decode())
    trust.set_alpn_protocols(alpn)
    if maximum is not None:
        trust.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        trust.maximum_version = maximum
        trust.set_ciphers("ALL:@SECLEVEL=0")
    ours, theirs = socket.socketpair()
    connection = SSL.Connection(ca.context_for(name, http2=http2), ours)

    def serve() -> None:
        connection.set_accept_state()
        with contextlib.suppress(SSL.Error):
            connection.do_handshake()
            connection.recv(1)
        ours.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with theirs, trust.wrap_socket(theirs, server_hostname=name) as client:
            return client.version(), client.selected_alpn_protocol()
    finally:
        thread.join(10)


@pytest.mark.parametrize("name", ["files.example", "127.0.0.1"])
def test_a_real_client_trusts_a_leaf(name: str) -> None:
    credential = pki.make_interception_ca()
    ca = InterceptionCa(credential.certificate, credential.key, SystemClock())
    assert handshake(ca, name, http2=True, alpn=["http/1.1", "h2"]) == ("TLSv1.3", "h2")
    assert handshake(ca, name, http2=False, alpn=["h2", "http/1.1"]) == ("TLSv1.3", "http/1.1")
    assert handshake(ca, name, http2=False, alpn=["spdy/3"]) == ("TLSv1.3", None)


def test_another_cas_client_does_not() -> None:
    one, two = pki.make_interception_ca("acme"), pki.make_interception_ca("beta")
    ours = InterceptionCa(one.certificate, one.key, SystemClock())
    ours.certificate = two.certificate  # type: ignore[misc]
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(ours, "files.example", http2=True, alpn=["h2"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_tls_is_not_spoken(ca: InterceptionCa) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(ca, "a.example", http2=True, alpn=[], maximum=ssl.TLSVersion.TLSv1_1)


def test_files(tmp_path: Path, clock: ManualClock) -> None:
    credential = pki.make_interception_ca()
    certificate_file, key_file = pki.write_credential(credential, tmp_path, "ca")
    files = CertificateFiles(certificate_file=certificate_file, key_file=key_file)
    assert InterceptionCa.load(files, clock).certificate == credential.certificate
    key_file.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod"):
        InterceptionCa.load(files, clock)
    key_file.chmod(0o600)
    key_file.write_text("no key")
    with pytest.raises(InterceptionError, match="private key"):
        InterceptionCa.load(files, clock)
    certificate_file.write_text("no certificate")
    with pytest.raises(InterceptionError):
        InterceptionCa.load(files, clock)


def test_what_is_no_ca_or_not_its_key(clock: ManualClock) -> None:
    one, two = pki.make_interception_ca("acme"), pki.make_interception_ca("beta")
    with pytest.raises(InterceptionError, match="belong"):
        InterceptionCa(one.certificate, two.key, clock)
    server = pki.issue_server(pki.make_server_ca())
    with pytest.raises(InterceptionError):
        InterceptionCa(server.certificate, server.key, clock)
