"""Keys between real tokens of three kinds, and what no environment is given or takes."""

from base64 import b64encode
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from envelope.errors import SealgateError
from envelope.keys import KeyUse
from key_agent.environments.keys.wrap_messages import Bring, Look, Make
from key_agent.environments.keys.wrapping import BRING_PATH, MAKE_PATH, PROVEN_AT_ONCE
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.peers.peers import WRAPS_PATH
from key_agent.environments.shared.documents import Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.states import EnvironmentState
from key_agent.registry.store import RefusedChangeError
from key_agent.sources.pkcs11 import Pkcs11Source
from key_agent.sources.source import KekType, KeySource
from tests.environments.key_site import FILES, MAIL, KeySite, key_site
from tests.key_agent.environments.keys.parcels import parcels_for, put_state
from tests.pki import Tenant, write_credential
from tests.softhsm import SoftHsm

KINDS = {"a": KekType.AES_256, "b": KekType.RSA_3072, "c": KekType.EC_P256}


async def test_keys_of_one_hsm_stand_under_an_aes_an_rsa_and_an_ec_kek(tmp_path: Path, acme: Tenant) -> None:
    """B-01 to B-04 on three SoftHSM tokens, and B-06's keys."""

    def source(name: str) -> KeySource:
        hsm = SoftHsm.create(tmp_path / f"hsm-{name}")
        certificate_file, key_file = write_credential(
            acme.agent_signing(f"agent-{name}"), hsm.directory, "signing"
        )
        return Pkcs11Source(hsm.settings(), key_file, certificate_file, f"agent-{name}")

    async with key_site(tmp_path, acme, "abc", make_source=source, kek_types=KINDS) as site:
        await site.unite()
        await site["a"].manager.ensure_service(FILES, KeyUse.DATA, None)
        await site["a"].manager.ensure_service(MAIL, KeyUse.SIGN, "ES256")
        data, signing = await site.keys_active(), await site.keys_active(MAIL)
        assert set(data) == set(signing) == set("abc")
        everything = [*data.values(), *signing.values()]
        wraps = [wrap for name in "abc" for wrap in (await site[name].wrapped()).values()]
        assert len(set(wraps)) == len(wraps) == 18
        for name in "abc":
            assert await site[name].opens(everything)  # with the check value of the signed row
            routes = await site[name].sql("SELECT DISTINCT route FROM dek_wrap")
            # Asymmetric KEKs wrap nothing: what was sealed to their public half only gets its HMAC there.
            assert [row[0] for row in routes] == [{"a": "kms", "b": "public", "c": "public"}[name]]
        # What is under one KEK opens under no other: the foreign HSM does not even find it.
        b_wraps = await site["b"].wrapped()
        await site["c"].sql(
            "UPDATE dek_wrap SET wrapped = :wrapped, wrapped_sha256 = :digest WHERE dek_id = :kid",
            **swapped(b_wraps[data["a"]], data["a"]),
        )
        assert not await site["c"].opens([data["a"]])
        kek_id = (await site["c"].kek()).reference.kek_id
        look = Look(kek_id=kek_id, keys=tuple(everything), prove=True)
        assert list(await site["a"].wraps.ask_missing("c", look)) == [data["a"]]
        assert await site["a"].manager.prove("c") == {}
        assert await site["c"].opens(everything)


def swapped(wrapped: bytes, kid: str) -> dict[str, object]:
    return {"wrapped": wrapped, "digest": sha256(wrapped).digest(), "kid": kid}


@pytest.fixture
async def site(tmp_path: Path, acme: Tenant) -> AsyncIterator[KeySite]:
    async with key_site(tmp_path, acme, "ab") as made:
        await made.unite()
        await made["a"].manager.ensure_service(FILES, KeyUse.DATA, None)
        await made.keys_active()
        await made.in_step()
        yield made


async def test_whoever_heals_is_sent_nothing_and_stores_nothing(site: KeySite) -> None:
    delivery = await parcels_for(site, "b")
    for state in (EnvironmentState.HEALING, EnvironmentState.HEALED):
        await put_state(site, "b", state)
        with pytest.raises(RefusedChangeError):
            site["a"].wraps.destination("b")
        with pytest.raises(RefusedChangeError):
            await site["b"].wraps.intake.store(delivery, sender="agent-a")


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x07"),
        (b"*\x86H\xce=\x02\x01", b"*\x86H\xce=\x02\x7f"),
        (b"0", b"1"),
    ],
    ids=["version", "kind-of-key", "no-certificate"],
)
async def test_an_environment_that_names_no_certificate_is_sent_nothing(
    site: KeySite, acme: Tenant, good: bytes, bad: bytes
) -> None:
    """It chose what stands in its row; whoever reads that refuses, and goes on."""
    der = acme.agent_tls("agent-b").certificate.public_bytes(Encoding.DER)
    assert good in der
    text = b64encode(der.replace(good, bad)).decode()
    certificate = f"-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n"

    def change(draft: Draft) -> None:
        body = draft.shared.environments["b"]
        draft.put(Kind.ENVIRONMENT, "b", msgspec.structs.replace(body, transport_certificate_pem=certificate))

    await site["a"].change(change)
    with pytest.raises(RefusedChangeError, match="names no usable key"):
        site["a"].wraps.destination("b")


async def test_more_keys_than_are_proven_at_once_are_all_asked_about(site: KeySite) -> None:
    held = sorted(await site["b"].wrapped())
    unknown = [f"{number:032x}" for number in range(2 * PROVEN_AT_ONCE + 1)]
    kek_id = (await site["b"].kek()).reference.kek_id
    look = Look(kek_id=kek_id, keys=(*held, *unknown, *held), prove=True)
    assert sorted(await site["a"].wraps.ask_missing("b", look)) == unknown


async def test_only_the_manager_has_keys_made_or_sent_on(site: KeySite) -> None:
    keys = tuple(site["a"].deks)
    peers = site["b"].environments.peers
    for path, body in (
        (BRING_PATH, Bring(environment="b", keys=keys)),
        (MAKE_PATH, Make(wanted=((str(FILES), KeyUse.DATA, None),))),
    ):
        with pytest.raises(PeerError, match="not_believed"):
            await peers.post("a", path, msgspec.json.encode(body))
    with pytest.raises(PeerError, match="not_believed"):
        await put_and_deliver(site)


async def put_and_deliver(site: KeySite) -> None:
    """b, which heals, delivers to a."""
    delivery = msgspec.structs.replace(await parcels_for(site, "b"), environment="a", kek_id="kek-a")
    await put_state(site, "b", EnvironmentState.HEALING)
    await site["b"].environments.peers.post("a", WRAPS_PATH, msgspec.json.encode(delivery), method="PUT")


async def test_messages_that_are_none_are_refused(site: KeySite) -> None:
    peers = site["a"].environments.peers
    for path, body in (
        (WRAPS_PATH, b"{"),
        (MAKE_PATH, b'{"wanted":[]}'),
        (BRING_PATH, b'{"environment":""}'),
    ):
        with pytest.raises(PeerError, match="bad-request"):
            await peers.post("b", path, body, method="PUT" if path == WRAPS_PATH else "POST")
    with pytest.raises(SealgateError):
        await site["a"].wraps.ask_missing("nowhere", Look(kek_id="kek-b", keys=()))
