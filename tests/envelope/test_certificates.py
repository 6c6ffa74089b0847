from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs import pki
from certs.pki import Credential
from envelope.certificates import (
    AnyHolder,
    CertificateError,
    Identity,
    Role,
    fingerprint,
    identity_uri,
    key_usage,
    parse_identity_uri,
    read_identity,
    verify_certificate,
)
from envelope.errors import FormatError
from tests.pki import (
    VALID_FROM,
    VALIDITY,
    PrivateKey,
    Tenant,
    make_csr,
    make_tenant,
    new_key,
    rsa_key,
    with_unknown_string,
)

NOW_S = 1_800_000_000.0
S3 = Identity("acme", Role.SERVICE, "s3")
SIGNING = Identity("acme", Role.AGENT_SIGNING, "hq")
TLS = Identity("acme", Role.AGENT_TLS, "hq")
BALANCER = Identity("acme", Role.BALANCER, "lb-1")

USAGE = {
    Role.SERVICE: key_usage(key_agreement=True),
    Role.AGENT_SIGNING: key_usage(digital_signature=True),
    Role.AGENT_TLS: key_usage(digital_signature=True),
    Role.BALANCER: key_usage(digital_signature=True),
}
CLIENT_AUTH = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])


def issue(
    issuer: Credential,
    identity: Identity,
    *,
    uris: Iterable[str] | None = None,
    key: PrivateKey | None = None,
    usage: x509.KeyUsage | None = None,
    purposes: x509.ExtendedKeyUsage | None = None,
    is_ca: bool = False,
    extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
    valid_from: datetime = VALID_FROM,
    validity: timedelta = VALIDITY,
) -> x509.Certificate:
    """A leaf that is right for *identity* but for what the test changes."""
    if purposes is None and identity.role is Role.AGENT_TLS:
        purposes = CLIENT_AUTH
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=is_ca, path_length=None), True),
        (usage or USAGE[identity.role], True),
        *extra,
    ]
    stated = [identity_uri(identity)] if uris is None else uris
    if names := [x509.UniformResourceIdentifier(uri) for uri in stated]:
        extensions.append((x509.SubjectAlternativeName(names), False))
    if purposes is not None:
        extensions.append((purposes, False))
    return pki.certify(
        (key or new_key()).public_key(),
        subject=pki.name("leaf"),
        issuer=issuer,
        extensions=extensions,
        valid_from=valid_from,
        validity=validity,
    )


def verify(
    certificate: x509.Certificate,
    tenant: Tenant,
    expected: Identity | AnyHolder = S3,
    *,
    intermediates: Sequence[x509.Certificate] = (),
    now_s: float = NOW_S,
) -> Identity:
    return verify_certificate(
        certificate,
        root=tenant.root.certificate,
        intermediates=intermediates,
        expected=expected,
        now_s=now_s,
    )


def refusal(
    certificate: x509.Certificate,
    tenant: Tenant,
    expected: Identity | AnyHolder = S3,
    *,
    intermediates: Sequence[x509.Certificate] = (),
    now_s: float = NOW_S,
) -> str:
    """The code by which *certificate* is refused."""
    with pytest.raises(CertificateError) as caught:
        verify(certificate, tenant, expected, intermediates=intermediates, now_s=now_s)
    return caught.value.code


def test_a_chain_that_fails_on_a_subject_nobody_can_read_is_refused(acme: Tenant) -> None:
    """The verifier would quote the name, and raises KeyError."""
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"")
    certificate = issue(acme.root, S3, extra=[(unknown, True)])
    assert refusal(with_unknown_string(certificate, acme.root), acme) == "chain"


@pytest.mark.parametrize("identity", [S3, SIGNING, TLS, BALANCER])
def test_uri_round_trip(identity: Identity) -> None:
    assert parse_identity_uri(identity_uri(identity)) == identity
    assert str(identity) == identity_uri(identity)


def test_uris_are_those_of_the_format() -> None:
    assert identity_uri(S3) == "urn:sealgate:acme:service:s3"
    assert identity_uri(SIGNING) == "urn:sealgate:acme:agent:hq:signing"
    assert identity_uri(TLS) == "urn:sealgate:acme:agent:hq:tls"
    assert identity_uri(BALANCER) == "urn:sealgate:acme:balancer:lb-1"


@pytest.mark.parametrize("bad", ["", "Acme", "acme:x", "-acme", "a" * 64, "acme\n"])
def test_an_identity_has_valid_names(bad: str) -> None:
    with pytest.raises(FormatError):
        Identity(bad, Role.SERVICE, "s3")
    with pytest.raises(FormatError):
        Identity("acme", Role.AGENT_TLS, bad)


@pytest.mark.parametrize("key_type", ["p256", "p384", "rsa-2048", "rsa-3072"])
def test_service_certificates_verify(acme: Tenant, key_type: str) -> None:
    certificate = acme.service("s3", key_type=key_type).certificate
    assert verify(certificate, acme) == S3
    assert verify(certificate, acme, AnyHolder("acme", Role.SERVICE)) == S3
    assert read_identity(certificate) == S3


def test_agent_certificates_verify(acme: Tenant) -> None:
    assert verify(acme.agent_signing().certificate, acme, SIGNING) == SIGNING
    assert verify(acme.agent_tls().certificate, acme, TLS) == TLS
    serving = acme.agent_tls(hostnames=["agent.acme.example", "127.0.0.1"]).certificate
    assert verify(serving, acme, AnyHolder("acme", Role.AGENT_TLS)) == TLS


def test_a_load_balancers_companion_is_no_agent(acme: Tenant) -> None:
    certificate = acme.balancer("hq").certificate
    assert verify(certificate, acme, AnyHolder("acme", Role.BALANCER)).name == "hq"
    for role in (Role.AGENT_TLS, Role.AGENT_SIGNING, Role.SERVICE):
        assert refusal(certificate, acme, AnyHolder("acme", role)) == "role"
    assert refusal(acme.agent_tls("hq").certificate, acme, AnyHolder("acme", Role.BALANCER)) == "role"
    without_purpose = issue(acme.root, BALANCER)
    assert refusal(without_purpose, acme, BALANCER) == "key-usage"


def test_fingerprint_is_sha256_of_der(acme: Tenant) -> None:
    import hashlib

    from cryptography.hazmat.primitives.serialization import Encoding

    certificate = acme.service().certificate
    assert fingerprint(certificate) == hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()


def test_wrong_root(acme: Tenant) -> None:
    namesake = make_tenant("acme")  # the same subject, another key
    assert refusal(namesake.service("s3").certificate, acme) == "chain"


def test_another_tenants_root_cannot_claim_our_tenant(acme: Tenant, globex: Tenant) -> None:
    assert refusal(issue(globex.root, S3), acme) == "chain"
    assert refusal(issue(globex.root, S3), acme, AnyHolder("acme", Role.SERVICE)) == "chain"
    # Presenting that root as an intermediate does not help.
    assert refusal(issue(globex.root, S3), acme, intermediates=[globex.root.certificate]) == "chain"


def test_another_tenants_certificate(acme: Tenant, globex: Tenant) -> None:
    theirs = globex.service("s3").certificate
    assert refusal(theirs, acme) == "tenant"
    assert refusal(theirs, globex) == "tenant"
    # ... even if our own root signed it.
    assert refusal(issue(acme.root, Identity("globex", Role.SERVICE, "s3")), acme) == "tenant"


def test_self_signed(acme: Tenant) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity_uri(S3))])
    certificate = pki.certify(
        key.public_key(),
        subject=acme.root.certificate.subject,
        issuer_key=key,
        extensions=[(names, False), (USAGE[Role.SERVICE], True)],
        valid_from=VALID_FROM,
        validity=VALIDITY,
    )
    assert refusal(certificate, acme) == "chain"


def test_a_leaf_cannot_issue(acme: Tenant) -> None:
    agent = acme.agent_signing()
    assert refusal(issue(agent, S3), acme, intermediates=[agent.certificate]) == "chain"


def test_a_bit_flipped_in_the_signature(acme: Tenant) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding

    der = bytearray(acme.service().certificate.public_bytes(Encoding.DER))
    der[-1] ^= 1
    assert refusal(x509.load_der_x509_certificate(bytes(der)), acme) == "chain"


def seconds(moment: datetime) -> float:
    return moment.replace(tzinfo=UTC).timestamp()


def test_validity_includes_both_ends_and_nothing_more(acme: Tenant) -> None:
    begin, end = datetime(2027, 1, 1, tzinfo=UTC), datetime(2027, 2, 1, tzinfo=UTC)
    certificate = issue(acme.root, S3, valid_from=begin, validity=end - begin)
    assert verify(certificate, acme, now_s=seconds(begin)) == S3
    assert verify(certificate, acme, now_s=seconds(end)) == S3
    assert refusal(certificate, acme, now_s=seconds(begin) - 1) == "not-yet-valid"
    assert refusal(certificate, acme, now_s=seconds(end) + 1) == "expired"
    assert refusal(certificate, acme, now_s=seconds(end) + 0.5) == "expired"


def test_an_expired_root_or_intermediate(acme: Tenant) -> None:
    short = Tenant("acme", pki.make_root("acme", valid_from=VALID_FROM, validity=timedelta(days=1)))
    assert refusal(issue(short.root, S3), short) == "chain"

    parent = Tenant("acme", make_parent())
    issuing = pki.make_ca(
        pki.name("issuing"), issuer=parent.root, valid_from=VALID_FROM, validity=timedelta(days=1)
    )
    assert refusal(issue(issuing, S3), parent, intermediates=[issuing.certificate]) == "chain"


def make_parent(path_length: int | None = 1) -> Credential:
    return pki.make_ca(pki.name("parent"), path_length=path_length, valid_from=VALID_FROM, validity=VALIDITY)


def below(issuer: Credential, path_length: int | None = 0) -> Credential:
    return pki.make_ca(
        pki.name(f"below {issuer.certificate.serial_number}"),
        path_length=path_length,
        issuer=issuer,
        valid_from=VALID_FROM,
        validity=VALIDITY,
    )


def test_an_intermediate_verifies_when_presented(acme: Tenant) -> None:
    parent = Tenant("acme", make_parent())
    issuing = below(parent.root)
    certificate = issue(issuing, S3)
    assert verify(certificate, parent, intermediates=[issuing.certificate]) == S3
    assert refusal(certificate, parent) == "chain"


def test_path_length_is_kept(acme: Tenant) -> None:
    sub = below(acme.root)  # acme's root says: no CA below me
    assert refusal(issue(sub, S3), acme, intermediates=[sub.certificate]) == "chain"


def test_chains_are_short() -> None:
    top = Tenant("acme", make_parent(path_length=None))
    issuers = [top.root]
    for _ in range(3):
        issuers.append(below(issuers[-1], None))
    intermediates = [issuer.certificate for issuer in issuers[1:]]
    assert verify(issue(issuers[2], S3), top, intermediates=intermediates) == S3
    assert refusal(issue(issuers[3], S3), top, intermediates=intermediates) == "chain"


@pytest.mark.parametrize(
    ("held", "asked"),
    [(held, asked) for held in (S3, SIGNING, TLS) for asked in Role if held.role is not asked],
)
def test_roles_are_not_exchanged(acme: Tenant, held: Identity, asked: Role) -> None:
    assert refusal(issue(acme.root, held), acme, AnyHolder("acme", asked)) == "role"


def test_the_name_is_checked(acme: Tenant) -> None:
    assert refusal(acme.service("s3").certificate, acme, Identity("acme", Role.SERVICE, "box")) == "name"
    assert refusal(acme.agent_tls("hq").certificate, acme, Identity("acme", Role.AGENT_TLS, "dr")) == "name"


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["https://acme.example/s3"],
        [identity_uri(S3), identity_uri(S3)],
        [identity_uri(S3), identity_uri(SIGNING)],
        [identity_uri(S3), "URN:SEALGATE:acme:service:s3"],
        [identity_uri(S3), "urn:sealgate:"],
        ["urn:sealgate:acme:service:"],
        ["urn:sealgate::service:s3"],
        ["urn:sealgate:acme:service:S3"],
        ["urn:sealgate:acme:service:s3:x"],
        ["urn:sealgate:acme:service:s3\n"],
        ["urn:sealgate:acme:service:s3?x"],
        ["urn:sealgate:acme:services:s3"],
        ["urn:sealgate:acme:agent:hq"],
        ["urn:sealgate:acme:agent:hq:both"],
        ["URN:sealgate:acme:service:s3"],
        ["urn:sealgate:acme:agent:service:s3:signing"],
    ],
)
def test_exactly_one_well_formed_uri(acme: Tenant, uris: list[str]) -> None:
    certificate = issue(acme.root, S3, uris=uris)
    assert refusal(certificate, acme) == "identity"
    with pytest.raises(CertificateError) as caught:
        read_identity(certificate)
    assert caught.value.code == "identity"


def test_foreign_uris_may_stand_beside_ours(acme: Tenant) -> None:
    certificate = issue(acme.root, S3, uris=["spiffe://acme.example/s3", identity_uri(S3)])
    assert verify(certificate, acme) == S3


def test_read_identity_of_a_csr() -> None:
    assert read_identity(make_csr(new_key(), [identity_uri(S3)])) == S3
    with pytest.raises(CertificateError):
        read_identity(make_csr(new_key(), []))


def test_a_ca_is_no_leaf(acme: Tenant) -> None:
    assert refusal(issue(acme.root, S3, is_ca=True), acme) == "ca"


def test_weak_and_unsuitable_keys(acme: Tenant) -> None:
    rsa_usage = key_usage(key_encipherment=True)
    assert refusal(issue(acme.root, S3, key=rsa_key(1024), usage=rsa_usage), acme) == "key"
    assert refusal(issue(acme.root, S3, key=ec.generate_private_key(ec.SECP224R1())), acme) == "key"
    assert refusal(issue(acme.root, S3, key=ec.generate_private_key(ec.SECP521R1())), acme) == "key"
    # ES256 is P-256: no other key can sign an envelope.
    assert refusal(issue(acme.root, SIGNING, key=new_key("p384")), acme, SIGNING) == "key"
    assert refusal(issue(acme.root, SIGNING, key=rsa_key()), acme, SIGNING) == "key"


def test_other_kinds_of_keys(acme: Tenant) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity_uri(SIGNING))])
    from cryptography.hazmat.primitives import hashes

    certificate = (
        x509.CertificateBuilder()
        .subject_name(pki.name("leaf"))
        .issuer_name(acme.root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_FROM + VALIDITY)
        .add_extension(names, critical=False)
        .add_extension(USAGE[Role.AGENT_SIGNING], critical=True)
        .sign(acme.root.key, hashes.SHA256())
    )
    assert refusal(certificate, acme, SIGNING) == "key"


def test_a_key_nobody_can_read(acme: Tenant) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding

    der = acme.service().certificate.public_bytes(Encoding.DER)
    prime256v1 = bytes.fromhex("06082a8648ce3d030107")
    assert der.count(prime256v1) == 1
    unknown_curve = der.replace(prime256v1, bytes.fromhex("06082a8648ce3d030163"))
    assert refusal(x509.load_der_x509_certificate(unknown_curve), acme) == "key"


U = key_usage


@pytest.mark.parametrize(
    ("identity", "usage"),
    [
        (S3, U(digital_signature=True)),  # a TLS certificate that was reused
        (S3, U(key_agreement=True, digital_signature=True)),
        (S3, U(key_encipherment=True)),  # what an RSA key needs, on an EC key
        (S3, U(key_agreement=True, key_cert_sign=True)),
        (S3, U(data_encipherment=True)),
        (SIGNING, U(key_agreement=True)),
        (SIGNING, U(digital_signature=True, key_agreement=True)),
        (SIGNING, U(digital_signature=True, key_cert_sign=True)),
        (SIGNING, U(digital_signature=True, crl_sign=True)),
        (TLS, U(key_agreement=True)),
        (TLS, U(digital_signature=True, key_cert_sign=True)),
    ],
)
def test_key_usage(acme: Tenant, identity: Identity, usage: x509.KeyUsage) -> None:
    assert refusal(issue(acme.root, identity, usage=usage), acme, identity) == "key-usage"


@pytest.mark.parametrize(
    "usage",
    [U(digital_signature=True), U(key_agreement=True), U(key_encipherment=True, digital_signature=True)],
)
def test_key_usage_of_an_rsa_recipient(acme: Tenant, usage: x509.KeyUsage) -> None:
    assert refusal(issue(acme.root, S3, key=rsa_key(), usage=usage), acme) == "key-usage"


def test_key_usage_must_be_there(acme: Tenant) -> None:
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity_uri(S3))])
    certificate = pki.certify(
        new_key().public_key(),
        subject=pki.name("leaf"),
        issuer=acme.root,
        extensions=[(names, False)],
        valid_from=VALID_FROM,
        validity=VALIDITY,
    )
    assert refusal(certificate, acme) == "key-usage"


@pytest.mark.parametrize("identity", [S3, SIGNING])
@pytest.mark.parametrize(
    "purpose",
    [
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
    ],
)
def test_a_tls_certificate_is_not_reused(
    acme: Tenant, identity: Identity, purpose: x509.ObjectIdentifier
) -> None:
    certificate = issue(acme.root, identity, purposes=x509.ExtendedKeyUsage([purpose]))
    assert refusal(certificate, acme, identity) == "key-usage"


def test_other_purposes_are_allowed(acme: Tenant) -> None:
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
    assert verify(issue(acme.root, S3, purposes=purposes), acme) == S3


def test_an_agents_tls_certificate_is_for_clients(acme: Tenant) -> None:
    servers_only = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    assert refusal(issue(acme.root, TLS, purposes=servers_only), acme, TLS) == "key-usage"


def test_unknown_critical_extensions(acme: Tenant) -> None:
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\x05\x00")
    assert refusal(issue(acme.root, S3, extra=[(unknown, True)]), acme) == "chain"
    assert verify(issue(acme.root, S3, extra=[(unknown, False)]), acme) == S3


def test_a_name_that_cannot_be_read(acme: Tenant) -> None:
    # x400Address, a kind of name that no one uses and the parser does not know.
    raw = bytes.fromhex("3004a3020500")
    names = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, raw)
    certificate = issue(acme.root, S3, uris=[], extra=[(names, False)])
    assert refusal(certificate, acme) == "malformed"


def test_a_root_without_key_identifier_is_usable() -> None:
    from cryptography.hazmat.primitives import hashes

    key = ec.generate_private_key(ec.SECP256R1())
    subject = pki.name("plain root")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_FROM + VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(key_usage(key_cert_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    root = Credential(key, certificate)
    assert verify(issue(root, S3), Tenant("acme", root)) == S3
