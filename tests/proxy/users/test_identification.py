"""Whose user it is, from every combination of what is shown."""

import base64
import datetime as dt
import ipaddress
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.pki import Credential
from proxy import refusals
from proxy.refusals import Refusal, RefusedError
from proxy.users.identification import Identity, Shown, address_of, identify, still_holds
from proxy.users.model import Password, Proof, UserAccess, UserEntry, parse_networks
from tests.pki import with_unknown_string

NOW_S = 1_800_000_000.0
HERE = ipaddress.ip_address("10.1.2.3")
AWAY = ipaddress.ip_address("192.0.2.9")


class Authority:
    """Of client certificates."""

    def __init__(self, *, now_s: float | None = None) -> None:
        self._now_s = time.time() if now_s is None else now_s
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._signed(self.key, "users", is_ca=True)

    def client(
        self, name: str = "alice", *, usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH
    ) -> x509.Certificate:
        return self._signed(ec.generate_private_key(ec.SECP256R1()), name, is_ca=False, usage=usage)

    def write_client(self, directory: Path, name: str) -> tuple[Path, Path]:
        """Certificate and key of a client whose dates are those of the real clock."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(key, name, is_ca=False)
        certificate_file, key_file = directory / f"{name}.pem", directory / f"{name}.key"
        certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certificate_file, key_file

    def _signed(
        self,
        key: ec.EllipticCurvePrivateKey,
        name: str,
        *,
        is_ca: bool,
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
    ) -> x509.Certificate:
        day = dt.timedelta(days=1)
        now = dt.datetime.fromtimestamp(self._now_s, dt.UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "users")])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
        )
        if is_ca:
            builder = builder.add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            ).add_extension(
                x509.KeyUsage(
                    digital_signature=False,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
        else:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.RFC822Name(f"{name}@acme.example")]), critical=False
            ).add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return builder.sign(self.key, hashes.SHA256())


PASSWORD = Password.draw("acme", "alice")
ALICE = UserEntry(tenant="acme", name="alice", verifier=PASSWORD.verifier, created_at_s=NOW_S)
USERS = {("acme", "alice"): ALICE}
OPEN = UserAccess()
INSIDE = UserAccess(networks=parse_networks(["10.0.0.0/8"]))
KNOWN = UserAccess(requires=frozenset({Proof.CREDENTIALS}))


def basic(name: str, password: str) -> tuple[str, ...]:
    return ("Basic " + base64.b64encode(f"{name}:{password}".encode()).decode(),)


def shown(
    *authorization: str,
    address: ipaddress.IPv4Address | ipaddress.IPv6Address = HERE,
    certificate: x509.Certificate | None = None,
) -> Shown:
    return Shown(address=address, certificate=certificate, authorization=authorization)


def refused(candidates: dict[str, UserAccess], what: Shown, users: object = USERS) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        identify(candidates, what, users, now_s=NOW_S)  # type: ignore[arg-type]
    return caught.value.refusal


def identity(candidates: dict[str, UserAccess], what: Shown) -> Identity:
    return identify(candidates, what, USERS, now_s=NOW_S)


def test_a_listener_of_ones_own_asks_for_nothing_by_default() -> None:
    assert identity({"acme": OPEN}, shown()).tenant == "acme"


def test_credentials() -> None:
    found = identity({"acme": KNOWN}, shown(*basic("alice", PASSWORD.text)))
    assert (found.tenant, found.user, found.name) == ("acme", "alice", "alice")
    assert identity({"acme": KNOWN}, shown(*basic("acme/alice", PASSWORD.text))) == found
    assert PASSWORD.text not in repr(PASSWORD)
    assert PASSWORD.text not in repr(shown(*basic("alice", PASSWORD.text)))
    assert str(PASSWORD.verifier) not in repr(ALICE)


@pytest.mark.parametrize(
    "authorization",
    [
        basic("alice", "wrong"),
        basic("alice", PASSWORD.text + "a"),
        basic("alice", ""),
        basic("bob", PASSWORD.text),
        basic("globex/alice", PASSWORD.text),
        basic("", PASSWORD.text),
        basic("/alice", PASSWORD.text),
        ("Basic",),
        ("Basic !!!",),
        ("Basic " + base64.b64encode(b"\xff\xfe:x").decode(),),
        ("Basic " + base64.b64encode(b"alice").decode(),),
        ("Basic " + "A" * 4096,),
        ("Bearer " + PASSWORD.text,),
        ("",),
        (*basic("alice", PASSWORD.text), *basic("alice", PASSWORD.text)),
    ],
)
@pytest.mark.parametrize("access", [OPEN, KNOWN])
def test_wrong_credentials_are_refused_even_where_none_are_asked_for(
    authorization: tuple[str, ...], access: UserAccess
) -> None:
    refusal = refused({"acme": access}, shown(*authorization))
    assert (refusal.status, refusal.code) == (407, "proxy-credentials-refused")
    assert dict(refusal.headers())["Proxy-Authenticate"] == 'Basic realm="Sealgate acme", charset="UTF-8"'


def test_missing_credentials_are_asked_for() -> None:
    refusal = refused({"acme": KNOWN}, shown())
    assert (refusal.status, refusal.code) == (407, "proxy-authentication-required")
    assert "Proxy-Authenticate" in dict(refusal.headers())


def test_a_password_ends() -> None:
    over = {
        ("acme", "alice"): UserEntry(
            tenant="acme", name="alice", verifier=PASSWORD.verifier, created_at_s=0, not_after_s=NOW_S
        )
    }
    assert refused({"acme": KNOWN}, shown(*basic("alice", PASSWORD.text)), over).status == 407


def test_another_tenants_user_is_nobody_here() -> None:
    assert refused({"globex": OPEN}, shown(*basic("acme/alice", PASSWORD.text))).status == 407
    assert refused({"globex": OPEN}, shown(*basic("alice", PASSWORD.text))).status == 407


def test_a_shared_listener_by_credentials() -> None:
    both = {"acme": KNOWN, "globex": KNOWN}
    assert identity(both, shown(*basic("acme/alice", PASSWORD.text))).tenant == "acme"
    assert refused(both, shown(*basic("alice", PASSWORD.text))).status == 407, "which tenant's alice?"
    assert refused(both, shown()).status == 407
    assert dict(refused(both, shown()).headers())["Proxy-Authenticate"].startswith('Basic realm="Sealgate"')


def test_a_shared_listener_by_source_network() -> None:
    both = {"acme": INSIDE, "globex": UserAccess(networks=parse_networks(["10.1.0.0/16", "2001:db8::/32"]))}
    assert identity(both, shown()).tenant == "globex", "the narrowest"
    assert identity(both, shown(address=ipaddress.ip_address("10.9.0.1"))).tenant == "acme"
    assert identity(both, shown(address=ipaddress.ip_address("2001:db8::1"))).tenant == "globex"
    assert identity(both, shown(address=ipaddress.ip_address("::ffff:10.9.0.1"))).tenant == "acme"
    assert refused(both, shown(address=AWAY)).status == 407
    alike = {"acme": INSIDE, "globex": INSIDE}
    assert refused(alike, shown()).status == 407, "a tie is nobody"


def test_networks_restrict_whatever_else_is_shown() -> None:
    access = UserAccess(networks=INSIDE.networks, requires=frozenset({Proof.CREDENTIALS}))
    what = shown(*basic("alice", PASSWORD.text), address=AWAY)
    assert refused({"acme": access}, what) == refusals.USER_NETWORK
    assert refused({"acme": INSIDE}, shown(address=AWAY)) == refusals.USER_NETWORK


def test_client_certificates() -> None:
    ours, theirs = Authority(now_s=NOW_S), Authority(now_s=NOW_S)
    access = UserAccess(client_roots=(ours.certificate,), requires=frozenset({Proof.CERTIFICATE}))
    other = UserAccess(client_roots=(theirs.certificate,))
    found = identity({"acme": access}, shown(certificate=ours.client()))
    assert (found.tenant, found.name) == ("acme", "CN=alice")
    assert refused({"acme": access}, shown()) == refusals.USER_CERTIFICATE
    assert refused({"acme": access}, shown(certificate=theirs.client())) == refusals.USER_CERTIFICATE
    assert refused({"acme": OPEN}, shown(certificate=theirs.client())) == refusals.USER_CERTIFICATE
    server = ours.client(usage=ExtendedKeyUsageOID.SERVER_AUTH)
    assert refused({"acme": access}, shown(certificate=server)) == refusals.USER_CERTIFICATE
    both = {"acme": access, "globex": other}
    assert identity(both, shown(certificate=theirs.client())).tenant == "globex"
    mixed = shown(*basic("acme/alice", PASSWORD.text), certificate=theirs.client())
    assert refused(both, mixed) == refusals.USER_MISMATCH


def test_an_expired_certificate_is_refused() -> None:
    ours = Authority(now_s=NOW_S)
    access = UserAccess(client_roots=(ours.certificate,))
    with pytest.raises(RefusedError):
        identify({"acme": access}, shown(certificate=ours.client()), USERS, now_s=NOW_S + 3 * 86400)


def test_a_certificate_whose_subject_cannot_be_read_is_nobodys() -> None:
    """Where it has expired `cryptography` raises KeyError, which ended what looks at all clients."""
    ours = Authority(now_s=NOW_S)
    access = UserAccess(client_roots=(ours.certificate,))
    issuer = Credential(ours.key, ours.certificate)
    odd = with_unknown_string(ours.client(), issuer)
    assert refused({"acme": access}, shown(certificate=odd)) == refusals.USER_CERTIFICATE
    certified = Identity(tenant="acme", certificate=odd, address=HERE)
    for days in (0, 3):
        assert not still_holds(certified, access, USERS, now_s=NOW_S + days * 86400)


def test_an_identity_holds_as_long_as_what_it_rests_on() -> None:
    alice = identity({"acme": KNOWN}, shown(*basic("alice", PASSWORD.text)))
    assert still_holds(alice, KNOWN, USERS, now_s=NOW_S)
    assert not still_holds(alice, KNOWN, {}, now_s=NOW_S)
    renewed = UserEntry(
        tenant="acme", name="alice", verifier=Password.draw("acme", "alice").verifier, created_at_s=NOW_S
    )
    assert not still_holds(alice, KNOWN, {("acme", "alice"): renewed}, now_s=NOW_S)
    assert not still_holds(alice, UserAccess(networks=parse_networks(["192.0.2.0/24"])), USERS, now_s=NOW_S)
    stranger = identity({"acme": OPEN}, shown())
    assert still_holds(stranger, OPEN, USERS, now_s=NOW_S)
    assert not still_holds(stranger, KNOWN, USERS, now_s=NOW_S)
    assert not still_holds(stranger, UserAccess(requires=frozenset({Proof.CERTIFICATE})), USERS, now_s=NOW_S)
    ours = Authority(now_s=NOW_S)
    access = UserAccess(client_roots=(ours.certificate,))
    certified = identity({"acme": access}, shown(certificate=ours.client()))
    assert still_holds(certified, access, USERS, now_s=NOW_S)
    assert not still_holds(certified, OPEN, USERS, now_s=NOW_S), "its authority is not trusted any more"


def test_addresses() -> None:
    assert address_of("fe80::1%eth0") == ipaddress.ip_address("fe80::1")
    with pytest.raises(RefusedError):
        address_of("localhost")
