"""Wrap methods are negotiated by doing, on modules that do them, lie about them, or let nobody make keys."""

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from envelope.derive import ekm_binding, key_check_value
from key_agent.errors import KekRevokedError, KeySourceError, UnsupportedError
from key_agent.sources.hybrid import seal_to_public_key
from key_agent.sources.source import KekType, Verdict, WrapMethod
from key_agent.sources.vendors import Quirks
from tests.key_agent.sources.conftest import (
    KINDS,
    REFERENCE,
    SOFTHSM_METHODS,
    FakeModule,
    MakeSource,
    new_keys,
    request_for,
)
from tests.key_agent.sources.test_vendors import vendor_file
from tests.nss import Nss
from tests.pki import Tenant
from tests.softhsm import SoftHsm

CANARY = replace(REFERENCE, label="sealgate-canary", object_id=b"chosen by the vendor")


@pytest.mark.parametrize(
    ("modes", "method"),
    [
        ((), WrapMethod.GCM),
        (("iv-in-place",), WrapMethod.GCM_IN_PLACE),
        (("iv-appended-12",), WrapMethod.GCM_APPENDED),
        (("iv-appended-16",), WrapMethod.GCM_APPENDED),
    ],
)
async def test_who_makes_the_iv_is_found_out(
    make_source: MakeSource, fake: FakeModule, acme: Tenant, modes: tuple[str, ...], method: WrapMethod
) -> None:
    fake.be(*modes)
    source = make_source(fake.settings())
    kek = await source.create_kek(REFERENCE)
    assert kek.method is method
    keys = await source.generate(kek, new_keys(1) * 20)
    size = {(): 60, ("iv-in-place",): 60, ("iv-appended-12",): 61, ("iv-appended-16",): 65}[modes]
    assert {len(key.wrapped) for key in keys} == {size}
    ivs = {key.wrapped[: size - 48] for key in keys}
    assert len(ivs) == len(keys)
    assert not any(iv.endswith(bytes(12)) for iv in ivs)
    [result] = await source.seal_envelopes(kek, [request_for(keys, acme.service("service-0"))])
    assert not result.failed_keys
    # The firmware changes and takes IVs otherwise now: what was wrapped still opens.
    fake.be()
    [result] = await source.seal_envelopes(kek, [request_for(keys, acme.service("service-0"))])
    assert not result.failed_keys


async def test_a_token_that_stops_making_ivs_seals_nothing(make_source: MakeSource, fake: FakeModule) -> None:
    """It would take the zeros for the IV from then on, the same for every key."""
    fake.be("iv-in-place")
    source = make_source(fake.settings())
    kek = await source.create_kek(REFERENCE)
    fake.be()
    with pytest.raises(UnsupportedError, match="left the IV zero"):
        await source.generate(kek, new_keys(1))
    assert (await source.diagnose(kek)).verdict is Verdict.OK


async def test_negotiation_goes_down_the_list_and_keeps_the_reasons(
    make_source: MakeSource, fake: FakeModule
) -> None:
    source = make_source(fake.settings())
    fake.fail(C_EncryptInit="unsupported")
    assert (await source.create_kek(REFERENCE)).method is WrapMethod.KW
    fake.fail(C_EncryptInit="unsupported", C_WrapKey="unsupported")
    # RSA sealing encrypts outside of the HSM: nothing of the token's encryption is needed.
    rsa = await source.create_kek(replace(REFERENCE, label="second"))
    assert (rsa.method, rsa.kek_type) == (WrapMethod.RSA_OAEP_1, KekType.RSA_3072)
    fake.fail(C_EncryptInit="unsupported", C_WrapKey="unsupported", C_Sign="unsupported")
    with pytest.raises(UnsupportedError) as caught:
        await source.create_kek(replace(REFERENCE, label="third"))
    for method in WrapMethod:
        if method is not WrapMethod.TRANSIT:
            assert f"{method}: " in str(caught.value)
    assert fake.hsm.run("count", replace(REFERENCE, label="third")) == 0


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"C_Encrypt": "garble"}, "opened bytes differ|PKCS11Error|GeneralError"),
        ({"C_Decrypt": "zeros"}, "opened bytes differ"),
        ({"C_GenerateRandom": "zeros"}, "generator returned zeros"),
        ({"C_GetAttributeValue": "weaken"}, "weakened the KEK: EXTRACTABLE"),
        ({"C_DestroyObject": "lie", "C_Decrypt": "zeros"}, "could not be destroyed again"),
    ],
)
async def test_a_token_that_lies_gets_no_kek(
    make_source: MakeSource, fake: FakeModule, faults: dict[str, str], message: str
) -> None:
    source = make_source(fake.settings(method="gcm"))
    fake.fail(**faults)
    with pytest.raises(KeySourceError, match=message):
        await source.create_kek(REFERENCE)
    if "C_DestroyObject" not in faults:
        assert fake.hsm.run("count", REFERENCE) == 0


@pytest.mark.parametrize("method", ["rsa-oaep-256", "rsa-oaep-1", "cbc+hmac", "ecdh-es"])
async def test_nss_does_what_its_gcm_cannot(
    make_source: MakeSource, nss: Nss, acme: Tenant, method: str
) -> None:
    source = make_source(replace_method(nss, method))
    kek = await source.create_kek(REFERENCE)
    keys = await source.generate(kek, new_keys(2))
    requests = [request_for(key, acme.service(key.owner.service)) for key in keys]
    assert not any(result.failed_keys for result in await source.seal_envelopes(kek, requests))
    assert (await source.diagnose(kek)).verdict is Verdict.OK


def replace_method(nss: Nss, method: str) -> object:
    return msgspec.structs.replace(nss.settings(), vendor="nss", method=method)


@pytest.mark.parametrize("method", ["cbc+hmac", "ecdh-es"])
@pytest.mark.parametrize("hand", ["destroy", "set", "replace", "double"])
async def test_the_hmac_key_is_a_part_of_the_kek(
    make_source: MakeSource, hsm: SoftHsm, method: str, hand: str
) -> None:
    source = make_source(method=method)
    kek = await source.create_kek(REFERENCE)
    [key] = await source.generate(kek, new_keys(1))
    mac = replace(REFERENCE, label="sealgate-kek-mac", object_id=REFERENCE.object_id + b"-mac")
    new = {"type": "GENERIC_SECRET", "capabilities": 0x800 | 0x2000}
    if hand == "set":
        hsm.run("set", mac, arguments={"name": "SIGN", "value": False})
    if hand in ("destroy", "replace"):
        hsm.run("destroy", mac)
    if hand in ("replace", "double"):
        hsm.run("make", mac, arguments=new)
    verdict = {
        "destroy": Verdict.KEK_DESTROYED,
        "set": Verdict.KEK_DISABLED,
        "replace": Verdict.KEK_REPLACED,
        "double": Verdict.KEK_AMBIGUOUS,
    }[hand]
    assert (await source.diagnose(kek)).verdict is verdict
    with pytest.raises(KeySourceError) as caught:
        await source.seal_envelopes(kek, [request_for(key)])
    assert isinstance(caught.value, KekRevokedError) is (hand != "double")


@pytest.mark.parametrize("method", ["rsa-oaep-1", "ecdh-es"])
async def test_key_material_of_somebody_who_has_only_the_public_key_is_refused(
    make_source: MakeSource, acme: Tenant, method: str
) -> None:
    """With the public half and write access to the registry: it opens, and its HMAC is not the HSM's."""
    source = make_source(method=method)
    kek = await source.create_kek(REFERENCE)
    [good] = await source.generate(kek, new_keys(1))
    chosen = b"key material of the thief's     "
    binding = ekm_binding(
        good.owner, good.key_id, kek_id=REFERENCE.kek_id, environment_id=REFERENCE.environment_id
    )
    forged = seal_to_public_key(kek.method, kek.public_key_der, os.urandom(32), chosen, binding)
    kcv = key_check_value(chosen, good.owner, good.key_id)
    for tag in (bytes(32), good.wrapped[-32:]):
        row = replace(good, wrapped=forged + tag, kcv=kcv)
        [result] = await source.seal_envelopes(kek, [request_for(row, acme.service("service-0"))])
        assert set(result.failed_keys) == {good.key_id}
        assert not result.tokens


async def test_a_public_key_exchanged_in_the_token_changes_nothing(
    make_source: MakeSource, hsm: SoftHsm, acme: Tenant
) -> None:
    """What is sealed goes to the pinned key, whatever public key the token shows."""
    source = make_source(method="ecdh-es")
    kek = await source.create_kek(REFERENCE)
    hsm.run("destroy", REFERENCE, arguments={"class": "PUBLIC_KEY"})
    other = replace(REFERENCE, label="other")
    hsm.run("make", other, arguments=KINDS["ecdh-es"].make)
    hsm.run("rename", other, arguments={"class": "PUBLIC_KEY", "to": REFERENCE.label})
    [key] = await source.generate(kek, new_keys(1))
    [result] = await source.seal_envelopes(kek, [request_for(key, acme.service("service-0"))])
    assert not result.failed_keys
    assert (await source.diagnose(kek)).verdict is Verdict.OK


# Adoption


@pytest.mark.parametrize("method", SOFTHSM_METHODS)
async def test_a_kek_that_the_owner_made_is_adopted(
    make_source: MakeSource, hsm: SoftHsm, acme: Tenant, method: str
) -> None:
    kind = KINDS[method]
    hsm.run("make", REFERENCE, arguments=kind.make | ({"capabilities": 0x200} if method[:3] == "rsa" else {}))
    source = make_source(method=method)
    kek = await source.adopt_kek(REFERENCE)
    assert (kek.is_adopted, kek.method) == (True, method)
    [key] = await source.generate(kek, new_keys(1))
    [result] = await source.seal_envelopes(kek, [request_for(key, acme.service("service-0"))])
    assert not result.failed_keys
    hsm.run("set", REFERENCE, arguments={"name": kind.opening, "value": False} | kind.where)
    assert (await source.diagnose(kek)).verdict is Verdict.KEK_DISABLED


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "0 keys of that name"),
        ({"bits": 128}, "VALUE_LEN"),
        ({"extractable": True}, "EXTRACTABLE"),
        ({"capabilities": 0x100 | 0x200 | 0x20000 | 0x40000}, "WRAP, UNWRAP"),
        ({"type": "RSA", "bits": 2048, "capabilities": 0x200}, "MODULUS"),
    ],
)
async def test_a_kek_that_is_too_weak_is_left_alone(
    make_source: MakeSource, hsm: SoftHsm, made: dict[str, object] | None, message: str
) -> None:
    if made is not None:
        hsm.run("make", REFERENCE, arguments=made)
    with pytest.raises(UnsupportedError, match=message):
        await make_source().adopt_kek(REFERENCE)
    where = {"class": "PRIVATE_KEY"} if made is not None and "type" in made else {}
    assert hsm.run("count", REFERENCE, arguments=where) == int(made is not None)
    mac = replace(REFERENCE, label="sealgate-kek-mac", object_id=REFERENCE.object_id + b"-mac")
    assert hsm.run("count", mac) == 0


async def test_an_hsm_made_iv_is_not_tried_on_a_key_that_counts(
    make_source: MakeSource, fake: FakeModule, tmp_path: Path
) -> None:
    """A token that takes the zeros for the IV would use them for the KEK, at each attempt again."""
    fake.hsm.run("make", REFERENCE)
    fake.hsm.run("make", CANARY)
    methods = (WrapMethod.GCM_IN_PLACE, WrapMethod.GCM_APPENDED)
    path = vendor_file(tmp_path, Quirks(methods=methods, makes_keys=False))
    with pytest.raises(UnsupportedError, match="not tried on a key that counts"):
        await make_source(fake.settings(vendor_file=path)).adopt_kek(REFERENCE)
    path = vendor_file(tmp_path, Quirks(methods=methods))
    with pytest.raises(UnsupportedError, match="left the IV zero"):  # ... said of a throw-away key
        await make_source(fake.settings(vendor_file=path)).adopt_kek(REFERENCE)
    assert fake.hsm.run("list") == ["sealgate-canary", "sealgate-kek"]
    fake.be("iv-in-place")
    kek = await make_source(fake.settings(vendor_file=path)).adopt_kek(REFERENCE)
    assert kek.method is WrapMethod.GCM_IN_PLACE


async def test_an_hsm_whose_keys_are_made_elsewhere(
    make_source: MakeSource, fake: FakeModule, acme: Tenant, tmp_path: Path
) -> None:
    """As Google's: read-only sessions, nothing is made or changed, foreign ids, keys are listed once."""
    fake.be("iv-in-place", "read-only", "cached")
    path = vendor_file(
        tmp_path,
        Quirks(
            methods=(WrapMethod.GCM_IN_PLACE,),
            read_write=False,
            makes_keys=False,
            can_disable=False,
            reinitialize_before_look=True,
        ),
    )
    source = make_source(fake.settings(vendor_file=path))
    with pytest.raises(UnsupportedError, match="make them with the vendor's tools, then adopt"):
        await source.create_kek(REFERENCE)
    fake.hsm.run("make", REFERENCE)
    with pytest.raises(UnsupportedError, match="labelled 'sealgate-canary'"):
        await source.adopt_kek(REFERENCE)
    fake.hsm.run("make", CANARY)
    kek = await source.adopt_kek(REFERENCE)
    keys = await source.generate(kek, new_keys(3))
    requests = [request_for(key, acme.service(key.owner.service)) for key in keys]
    assert not any(result.failed_keys for result in await source.seal_envelopes(kek, requests))
    facts = await source.describe()
    assert facts["methods"] == {"gcm-in-place": "not tried: keys are not made here"}
    fake.hsm.run("destroy", REFERENCE)
    assert (await source.diagnose(kek)).verdict is Verdict.KEK_DESTROYED
    with pytest.raises(KekRevokedError):
        await source.seal_envelopes(kek, requests)


async def test_a_read_only_token_is_named(make_source: MakeSource, fake: FakeModule) -> None:
    fake.be("read-only")
    with pytest.raises(KeySourceError, match="TokenWriteProtected"):
        await make_source(fake.settings()).create_kek(REFERENCE)


def test_kek_types_and_methods_belong_together() -> None:
    assert {method.kek_type for method in WrapMethod} == set(KekType)
