"""The PKCS#11 source over a real token: KEKs, wrapped keys, envelopes."""

import hmac
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509

from envelope.certificates import fingerprint
from envelope.derive import ekm_binding, key_check_value
from envelope.keys import KeyId, KeyState, NetworkService
from envelope.material import Expectation, Operation, Signer, open_envelope
from key_agent.errors import KekRevokedError, KeySourceError, UnsupportedError
from key_agent.sources.pkcs11 import Pkcs11Settings, Pkcs11Source
from key_agent.sources.source import Kek, KekReference, NewKey, Verdict, WrapMethod, WrappedKey
from tests.key_agent.sources.conftest import (
    AGENT,
    KINDS,
    NONCE,
    REFERENCE,
    SOFTHSM_METHODS,
    MakeSource,
    new_keys,
    owners,
    request_for,
)
from tests.pki import ServiceCredential, Tenant, write_credential
from tests.softhsm import SoftHsm

METHODS = ["gcm", "kw"]
NOW_S = 1_800_000_010.0


def unseal(
    token: str, owner: NetworkService, service: ServiceCredential, hsm: SoftHsm, *, audience: str = "proxy-0"
) -> dict[KeyId, bytes]:
    """As the proxy does it: key id -> KM."""
    certificate = x509.load_pem_x509_certificate((hsm.directory / "signing.pem").read_bytes())
    claims = open_envelope(
        token,
        Expectation(
            owner=owner,
            audience=audience,
            recipient_certificate=service.certificate,
            recipient_key=service.key,
            signers={fingerprint(certificate): Signer(certificate, AGENT)},
            now_s=NOW_S,
            validity_s=330,
            nonce=NONCE,
            last_sequence=0,
            seen_token_ids=frozenset(),
        ),
    )
    assert claims.operation is Operation.SET
    return {key.key_id: bytes(key.secret) for key in claims.keys}


@pytest.mark.parametrize("method", SOFTHSM_METHODS)
async def test_a_kek_is_made_as_the_design_demands(
    make_source: MakeSource, hsm: SoftHsm, method: str
) -> None:
    kek = await make_source(method=method).create_kek(REFERENCE)
    assert kek.reference == REFERENCE
    assert kek.method == method
    assert len(kek.canary_sha256) == 32
    attributes = hsm.run("attributes", REFERENCE, arguments=KINDS[method].where)
    may = {
        "gcm": {"ENCRYPT", "DECRYPT"},
        "kw": {"WRAP", "UNWRAP"},
        "cbc+hmac": {"ENCRYPT", "DECRYPT"},
        "rsa-oaep-1": {"DECRYPT"},
        "ecdh-es": {"DERIVE"},
    }[method]
    protected = {"SENSITIVE", "TOKEN", "PRIVATE"}
    assert {name for name, value in attributes.items() if value} == protected | may
    mac = replace(REFERENCE, label="sealgate-kek-mac", object_id=REFERENCE.object_id + b"-mac")
    if kek.method.has_mac_key:
        attributes = hsm.run("attributes", mac)
        assert {name for name, value in attributes.items() if value} == protected | {"SIGN"}
    assert hsm.run("count", mac) == int(kek.method.has_mac_key)
    public = ["sealgate-kek"] * bool(kek.public_key_der)
    macs = ["sealgate-kek-mac"] * kek.method.has_mac_key
    assert hsm.run("list") == ["sealgate-canary", "sealgate-kek", *public, *macs]


async def test_gcm_is_preferred(source: Pkcs11Source) -> None:
    assert (await source.create_kek(REFERENCE)).method is WrapMethod.GCM


async def test_an_existing_key_is_never_destroyed_by_accident(source: Pkcs11Source, hsm: SoftHsm) -> None:
    kek = await source.create_kek(REFERENCE)
    [key] = await source.generate(kek, new_keys(1))
    with pytest.raises(KeySourceError, match="exists"):
        await source.create_kek(REFERENCE)
    assert hsm.run("count", REFERENCE) == 1
    [result] = await source.seal_envelopes(kek, [request_for(key)])
    assert not result.failed_keys


async def test_a_half_made_kek_is_replaced_when_the_registry_says_so(
    source: Pkcs11Source, hsm: SoftHsm
) -> None:
    hsm.run("make", REFERENCE)
    hsm.run("make", REFERENCE)
    kek = await source.create_kek(REFERENCE, replace_unfinished=True)
    assert hsm.run("count", REFERENCE) == 1
    assert (await source.diagnose(kek)).verdict is Verdict.OK


@pytest.mark.parametrize("method", METHODS)
async def test_keys_come_back_for_their_recipients_and_no_two_are_equal(
    make_source: MakeSource, hsm: SoftHsm, acme: Tenant, method: str
) -> None:
    source = make_source(method=method)
    kek = await source.create_kek(REFERENCE)
    first, second = owners(2)
    [a, b, c] = await source.generate(kek, [NewKey(owner=owner) for owner in (first, second, first)])
    assert [a.owner, b.owner, c.owner] == [first, second, first]
    assert len({a.key_id, b.key_id, c.key_id}) == len({a.wrapped, b.wrapped, c.wrapped}) == 3
    ec, rsa = acme.service(first.service), acme.service(first.service, key_type="rsa-2048")
    [result] = await source.seal_envelopes(kek, [request_for([a, c], ec, rsa)])
    assert not result.failed_keys
    assert not result.failed_recipients
    keys = unseal(result.tokens["proxy-0"], first, ec, hsm)
    assert keys == unseal(result.tokens["proxy-1"], first, rsa, hsm, audience="proxy-1")
    assert set(keys) == {a.key_id, c.key_id}
    assert keys[a.key_id] != keys[c.key_id]
    for row in (a, c):
        assert hmac.compare_digest(key_check_value(keys[row.key_id], first, row.key_id), row.kcv)


async def test_the_wrapping_is_the_formats_and_not_ours_alone(
    source: Pkcs11Source, hsm: SoftHsm, acme: Tenant
) -> None:
    """Another process opens the EKM with nothing but the token and format.md 6.1."""
    kek = await source.create_kek(REFERENCE)
    [key] = await source.generate(kek, new_keys(1))
    binding = ekm_binding(
        key.owner, key.key_id, kek_id=REFERENCE.kek_id, environment_id=REFERENCE.environment_id
    )
    material = hsm.run(
        "unwrap-gcm", REFERENCE, arguments={"wrapped": key.wrapped.hex(), "binding": binding.hex()}
    )
    service = acme.service(key.owner.service)
    [result] = await source.seal_envelopes(kek, [request_for(key, service)])
    assert unseal(result.tokens["proxy-0"], key.owner, service, hsm)[key.key_id].hex() == material


async def test_states_travel_and_a_tombstone_needs_no_key(
    source: Pkcs11Source, hsm: SoftHsm, acme: Tenant
) -> None:
    kek = await source.create_kek(REFERENCE)
    [old, new] = await source.generate(kek, new_keys(1) * 2)
    service = acme.service(old.owner.service)
    request = request_for(old, service, state=KeyState.DESTROYED)
    request = replace(request, keys=((old, KeyState.DESTROYED), (new, KeyState.PRE_ACTIVE)))
    [result] = await source.seal_envelopes(kek, [request])
    assert not result.failed_keys
    keys = unseal(result.tokens["proxy-0"], old.owner, service, hsm)
    assert keys[old.key_id] == b""
    assert len(keys[new.key_id]) == 32


def spoilt(key: WrappedKey, **changes: object) -> WrappedKey:
    return replace(key, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", SOFTHSM_METHODS)
async def test_one_bad_wrapped_key_spoils_nothing_else(
    make_source: MakeSource, hsm: SoftHsm, acme: Tenant, method: str
) -> None:
    source = make_source(method=method)
    kek = await source.create_kek(REFERENCE)
    [good, flipped, cut, exchanged, wrong_kcv] = await source.generate(kek, new_keys(1) * 5)
    [foreign] = await source.generate(kek, [NewKey(owner=NetworkService("acme", "another"))])
    flipped = spoilt(flipped, wrapped=bytes([flipped.wrapped[0] ^ 1]) + flipped.wrapped[1:])
    cut = spoilt(cut, wrapped=cut.wrapped[:-1])
    exchanged = spoilt(exchanged, wrapped=good.wrapped)
    wrong_kcv = spoilt(wrong_kcv, kcv=bytes(16))
    # A row of another service filed under this one: by its own words, and with its owner forged.
    forged = spoilt(foreign, owner=good.owner)
    bad = [flipped, cut, exchanged, wrong_kcv, foreign, forged]
    service = acme.service(good.owner.service)
    other = spoilt(good)
    requests = [
        request_for([good, *bad], service, owner=good.owner),
        request_for(other, service),
        request_for(foreign, acme.service("another")),
    ]
    mixed, sound, elsewhere = await source.seal_envelopes(kek, requests)
    assert set(mixed.failed_keys) == {key.key_id for key in bad}
    assert set(unseal(mixed.tokens["proxy-0"], good.owner, service, hsm)) == {good.key_id}
    for result in (sound, elsewhere):
        assert not result.failed_keys
        assert set(result.tokens) == {"proxy-0"}


async def test_no_key_opened_means_no_envelope_for_an_empty_set_would_revoke(
    source: Pkcs11Source, acme: Tenant
) -> None:
    kek = await source.create_kek(REFERENCE)
    [key] = await source.generate(kek, new_keys(1))
    [result] = await source.seal_envelopes(
        kek, [request_for(spoilt(key, wrapped=bytes(60)), acme.service(key.owner.service))]
    )
    assert set(result.failed_keys) == {key.key_id}
    assert not result.tokens


async def test_one_bad_recipient_spoils_nothing_else(
    source: Pkcs11Source, hsm: SoftHsm, acme: Tenant, globex: Tenant
) -> None:
    kek = await source.create_kek(REFERENCE)
    [key] = await source.generate(kek, new_keys(1))
    good = acme.service(key.owner.service)
    foreign = globex.service(key.owner.service)
    request = request_for(key, good, foreign, good)
    rubbish = replace(request.recipients[2], certificate_der=b"rubbish")
    request = replace(request, recipients=(*request.recipients[:2], rubbish))
    [result] = await source.seal_envelopes(kek, [request])
    assert set(result.tokens) == {"proxy-0"}
    assert set(result.failed_recipients) == {"proxy-1", "proxy-2"}
    assert unseal(result.tokens["proxy-0"], key.owner, good, hsm)


async def test_a_key_under_another_kek_or_environment_does_not_open(
    source: Pkcs11Source, acme: Tenant
) -> None:
    kek = await source.create_kek(REFERENCE)
    other_reference = KekReference(kek_id="kek-2", label="other", object_id=b"2", environment_id="env-1")
    other = await source.create_kek(other_reference)
    [key] = await source.generate(kek, new_keys(1))
    service = acme.service(key.owner.service)
    [by_words] = await source.seal_envelopes(other, [request_for(key, service)])
    [by_force] = await source.seal_envelopes(other, [request_for(spoilt(key, kek_id="kek-2"), service)])
    moved = replace(kek, reference=replace(REFERENCE, environment_id="env-2"))
    # The canary is bound to the environment too: not even the diagnosis takes it for ours.
    with pytest.raises(KekRevokedError):
        await source.seal_envelopes(moved, [request_for(key, service)])
    for result in (by_words, by_force):
        assert set(result.failed_keys) == {key.key_id}
        assert not result.tokens


async def test_many_services_are_worked_through_in_batches(source: Pkcs11Source, acme: Tenant) -> None:
    kek = await source.create_kek(REFERENCE)
    everybody = owners(300)
    keys = await source.generate(kek, new_keys(300))
    assert [key.owner for key in keys] == everybody
    service = acme.service(everybody[7].service)
    requests = [
        request_for(key, service) if number == 7 else request_for(key) for number, key in enumerate(keys)
    ]
    results = await source.seal_envelopes(kek, requests)
    assert [result.owner for result in results] == everybody
    assert [len(result.tokens) for result in results].count(1) == 1
    assert await source.generate(kek, []) == []
    assert await source.seal_envelopes(kek, []) == []


async def test_sealing_without_a_signing_key_says_so(hsm: SoftHsm) -> None:
    source = Pkcs11Source(hsm.settings())
    try:
        kek = await source.create_kek(REFERENCE)
        [key] = await source.generate(kek, new_keys(1))
        with pytest.raises(KeySourceError, match="signing key"):
            await source.seal_envelopes(kek, [request_for(key)])
    finally:
        await source.close()


async def test_a_signing_key_that_is_not_the_certificates_is_refused(
    hsm: SoftHsm, source: Pkcs11Source, acme: Tenant, tmp_path: Path
) -> None:
    kek = await source.create_kek(REFERENCE)
    [key] = await source.generate(kek, new_keys(1))
    _, other_key = write_credential(acme.agent_signing("other"), tmp_path, "other")
    mismatched = Pkcs11Source(hsm.settings(), other_key, hsm.directory / "signing.pem", AGENT)
    try:
        with pytest.raises(KeySourceError, match="not the certificate of"):
            await mismatched.seal_envelopes(kek, [request_for(key, acme.service(key.owner.service))])
    finally:
        await mismatched.close()


@pytest.mark.parametrize("method", METHODS)
async def test_disabling_and_enabling(make_source: MakeSource, hsm: SoftHsm, method: str) -> None:
    source = make_source(method=method)
    kek = await source.create_kek(REFERENCE)
    [key] = await source.generate(kek, new_keys(1))
    await source.set_kek_enabled(kek, enabled=False)
    opening = {"gcm": "DECRYPT", "kw": "UNWRAP"}[method]
    assert not hsm.run("attributes", REFERENCE)[opening]
    assert (await source.diagnose(kek)).verdict is Verdict.KEK_DISABLED
    with pytest.raises(KekRevokedError):
        await source.seal_envelopes(kek, [request_for(key)])
    with pytest.raises(KekRevokedError):
        await source.generate(kek, new_keys(1))
    await source.set_kek_enabled(kek, enabled=True)
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    [result] = await source.seal_envelopes(kek, [request_for(key)])
    assert not result.failed_keys


async def test_destroying_is_verified_and_may_be_repeated(source: Pkcs11Source, hsm: SoftHsm) -> None:
    kek = await source.create_kek(REFERENCE)
    [key] = await source.generate(kek, new_keys(1))
    await source.destroy_kek(kek)
    assert hsm.run("count", REFERENCE) == 0
    await source.destroy_kek(kek)
    assert (await source.diagnose(kek)).verdict is Verdict.KEK_DESTROYED
    with pytest.raises(KekRevokedError) as caught:
        await source.seal_envelopes(kek, [request_for(key)])
    assert caught.value.verdict is Verdict.KEK_DESTROYED


async def test_nothing_is_destroyed_in_another_token(source: Pkcs11Source, hsm: SoftHsm) -> None:
    kek = await source.create_kek(REFERENCE)
    hsm.replace_token()
    hsm.run("make", REFERENCE)
    with pytest.raises(KeySourceError, match="serial"):
        await source.destroy_kek(kek)
    assert hsm.run("count", REFERENCE) == 1


async def test_a_pinned_serial_chooses_the_token(make_source: MakeSource, hsm: SoftHsm) -> None:
    serial = (await make_source().create_kek(REFERENCE)).token_serial
    pinned = make_source(token_serial=serial)
    other = KekReference(kek_id="kek-2", label="other", object_id=b"2", environment_id="env-1")
    assert (await pinned.create_kek(other)).token_serial == serial
    with pytest.raises(KeySourceError, match="serial"):
        await make_source(token_serial="ffff").create_kek(
            KekReference(kek_id="kek-3", label="third", object_id=b"3", environment_id="env-1")
        )


async def test_describe_says_what_the_token_is_and_leaves_nothing_behind(
    source: Pkcs11Source, hsm: SoftHsm
) -> None:
    facts = await source.describe()
    methods = facts["methods"]
    assert isinstance(methods, dict)
    assert {name for name, outcome in methods.items() if outcome == "ok"} == set(SOFTHSM_METHODS)
    # Zeros, or nothing, as the caller's IV: a token that does not make IVs must not pass for one that does.
    assert methods["gcm-in-place"] == "gcm-in-place: UnsupportedError: the token left the IV zero"
    assert "appended no IV" in methods["gcm-appended"]
    assert methods["rsa-oaep-256"].startswith("rsa-oaep-256: ")
    assert isinstance(facts["token"], dict)
    assert facts["token"]["label"] == hsm.label
    assert hsm.run("list") == []


async def test_a_wrong_label_names_it(make_source: MakeSource) -> None:
    with pytest.raises(KeySourceError, match="no token is labelled 'elsewhere'"):
        await make_source(token_label="elsewhere").create_kek(REFERENCE)


async def test_a_module_that_cannot_be_loaded_names_it(make_source: MakeSource, tmp_path: Path) -> None:
    with pytest.raises(KeySourceError, match="does not begin"):
        await make_source(module_path=tmp_path / "absent.so").create_kek(REFERENCE)


async def test_a_key_servers_method_is_refused(source: Pkcs11Source) -> None:
    kek: Kek = replace(await source.create_kek(REFERENCE), method=WrapMethod.TRANSIT)
    with pytest.raises(UnsupportedError, match="not a method of PKCS#11"):
        await source.generate(kek, new_keys(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module_path": Path("softhsm.so")}, "absolute"),
        ({"token_label": ""}, "token_label"),
        ({"request_timeout_s": 0}, "request_timeout_s"),
        ({"batch_s": 20.0}, "batch_s"),
        ({"slow_after_s": 0}, "slow_after_s"),
        ({"slow_after_s": 10.0}, "slow_after_s must be less than request_timeout_s"),
    ],
)
def test_settings_refuse_what_cannot_work(change: dict[str, object], message: str) -> None:
    sound: dict[str, object] = {
        "module_path": Path("/usr/lib/softhsm.so"),
        "token_label": "sealgate",
        "pin_file": Path("/etc/pin"),
    }
    Pkcs11Settings(**sound)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        Pkcs11Settings(**(sound | change))  # type: ignore[arg-type]
