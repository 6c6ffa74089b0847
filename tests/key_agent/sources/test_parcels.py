"""Keys go from one environment's token to another's: every kind of KEK, and what must not arrive."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import load_pem_x509_certificate

from envelope.keys import KEY_MATERIAL_SIZE, KeyId, KeyUse, NetworkService, SigningAlgorithm
from key_agent.environments.keys.transport_key import transport_files
from key_agent.errors import KekRevokedError, KeySourceError
from key_agent.sources import wire
from key_agent.sources.envelopes import WrappedKeyError
from key_agent.sources.parcels import (
    check_transport_key,
    load_transport_key,
    open_peer_parcel,
    seal_parcel,
    transport_public_der,
)
from key_agent.sources.source import (
    Arrival,
    Destination,
    Kek,
    KekReference,
    KeySource,
    NewKey,
    Parcel,
    Route,
    WrapMethod,
    WrappedKey,
)
from key_agent.sources.worker_source import _check_exported, _check_imported
from tests.fakes.key_source import FakeKeySource
from tests.key_agent.sources.conftest import (
    REFERENCE,
    SOFTHSM_METHODS,
    FakeModule,
    MakeSource,
    new_keys,
    owners,
    request_for,
)
from tests.key_servers import BaoServer, KmipServer
from tests.pki import Tenant
from tests.softhsm import SoftHsm

ELSEWHERE = KekReference(
    kek_id="kek-b", label="sealgate-b", object_id=b"sealgate-b\0\0\0\1", environment_id="env-b"
)
ASYMMETRIC = ("rsa-oaep-1", "ecdh-es")


def destination(kek: Kek, transport: Path) -> Destination:
    """As the signed rows would describe it; *transport*: the directory of its transport key."""
    certificate_file, _ = transport_files(transport)
    key = load_pem_x509_certificate(certificate_file.read_bytes()).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return Destination(
        environment_id=kek.reference.environment_id,
        kek_id=kek.reference.kek_id,
        method=kek.method,
        public_key_der=kek.public_key_der,
        transport_key_der=transport_public_der(key),
    )


def arrivals(parcels: tuple[Parcel, ...], keys: list[WrappedKey]) -> list[Arrival]:
    """With what the signed rows say of *keys*."""
    rows = {key.key_id: key for key in keys}
    return [
        Arrival(
            parcel=parcel,
            kcv=rows[parcel.key_id].kcv,
            use=rows[parcel.key_id].use,
            algorithm=rows[parcel.key_id].algorithm,
            version=rows[parcel.key_id].version,
        )
        for parcel in parcels
    ]


@pytest.fixture
def transport(tmp_path: Path) -> Path:
    directory = tmp_path / "transport"
    directory.mkdir()
    return directory


async def importer(
    name: str, request: pytest.FixtureRequest, make_source: MakeSource
) -> tuple[KeySource, Kek]:
    if name == "fake":
        source: KeySource = FakeKeySource()
    elif name in ("openbao", "kmip"):
        server: BaoServer | KmipServer = request.getfixturevalue(f"{name}_server")
        server.clear()
        source = make_source(server.settings())
    else:
        source = make_source(method=name)
    return source, await source.create_kek(ELSEWHERE)


@pytest.mark.parametrize("name", ["fake", *SOFTHSM_METHODS, "openbao", "kmip"])
async def test_keys_arrive_whatever_kind_the_other_kek_is(
    request: pytest.FixtureRequest,
    make_source: MakeSource,
    acme: Tenant,
    transport: Path,
    name: str,
) -> None:
    """Data keys and signing keys: the same kcv, another wrap, and it opens there alone."""
    source = make_source(method="gcm")
    kek = await source.create_kek(REFERENCE)
    wanted = [*new_keys(2), NewKey(owner=owners(1)[0], use=KeyUse.SIGN, algorithm=SigningAlgorithm.ES256)]
    keys = [replace(key, version=7) for key in await source.generate(kek, wanted)]
    other, other_kek = await importer(name, request, make_source)
    to = destination(other_kek, transport)
    assert to.route is (Route.PUBLIC if name in ASYMMETRIC else Route.PEER)
    sent = await source.export_keys(kek, keys, [to])
    assert not sent.failed_keys
    assert [parcel.key_id for parcel in sent.parcels] == [key.key_id for key in keys]
    _, key_file = transport_files(transport)
    taken = await other.import_keys(other_kek, arrivals(sent.parcels, keys), transport_key_file=key_file)
    assert not taken.failed_keys
    for was, now in zip(keys, taken.keys, strict=True):
        assert (now.owner, now.key_id, now.kcv, now.use, now.algorithm, now.version) == (
            was.owner, was.key_id, was.kcv, was.use, was.algorithm, 7,
        )  # fmt: skip
        assert (now.kek_id, now.environment_id, now.method) == ("kek-b", "env-b", other_kek.method)
        assert was.wrapped not in now.wrapped
    if name != "fake":  # it has no signature to make envelopes with
        [result] = await other.seal_envelopes(
            other_kek, [request_for(taken.keys[0], acme.service(taken.keys[0].owner.service))]
        )
        assert not result.failed_keys
        assert result.tokens
    # Under the KEK that it came from it means nothing.
    [result] = await source.seal_envelopes(kek, [request_for(taken.keys[0])])
    assert set(result.failed_keys) == {keys[0].key_id}


async def test_from_one_to_three_and_back_it_is_the_same_key(
    make_source: MakeSource, hsm: SoftHsm, acme: Tenant, transport: Path
) -> None:
    """Three keys, three KEKs: nine wraps that all differ; and the material has survived every way."""
    methods = ("gcm", "rsa-oaep-1", "ecdh-es")
    sources = {method: make_source(method=method) for method in methods}
    keks = {
        method: await source.create_kek(
            replace(
                REFERENCE,
                kek_id=f"kek-{method}",
                label=f"l-{method}",
                environment_id=f"env-{method}",
            )
        )
        for method, source in sources.items()
    }
    _, key_file = transport_files(transport)
    keys = await sources["gcm"].generate(keks["gcm"], new_keys(3))
    others = [destination(keks[method], transport) for method in methods[1:]]
    sent = await sources["gcm"].export_keys(keks["gcm"], keys, others)
    wraps = {key.wrapped for key in keys}
    moved: dict[str, list[WrappedKey]] = {}
    for method in methods[1:]:
        mine = tuple(one for one in sent.parcels if one.environment_id == f"env-{method}")
        taken = await sources[method].import_keys(
            keks[method], arrivals(mine, keys), transport_key_file=key_file
        )
        assert {key.kcv for key in taken.keys} == {key.kcv for key in keys}
        moved[method] = list(taken.keys)
        wraps |= {key.wrapped for key in taken.keys}
    assert len(wraps) == 9
    for first, second in itertools.permutations(methods[1:], 2):
        back = await sources[first].export_keys(
            keks[first], moved[first], [destination(keks[second], transport)]
        )
        again = await sources[second].import_keys(
            keks[second], arrivals(back.parcels, keys), transport_key_file=key_file
        )
        assert [key.kcv for key in again.keys] == [key.kcv for key in keys]
    home = await sources["ecdh-es"].export_keys(
        keks["ecdh-es"], moved["ecdh-es"], [destination(keks["gcm"], transport)]
    )
    returned = await sources["gcm"].import_keys(
        keks["gcm"], arrivals(home.parcels, keys), transport_key_file=key_file
    )
    opened = [
        hsm.run(
            "unwrap-gcm",
            keks["gcm"].reference,
            arguments={"wrapped": one.wrapped.hex(), "binding": _binding(one).hex()},
        )
        for one in (keys[0], returned.keys[0])
    ]
    assert opened[0] == opened[1]
    assert len(opened[0]) == 2 * KEY_MATERIAL_SIZE


def _binding(key: WrappedKey) -> bytes:
    from envelope.derive import ekm_binding

    return ekm_binding(key.owner, key.key_id, kek_id=key.kek_id, environment_id=key.environment_id)


@pytest.mark.parametrize("method", ASYMMETRIC)
async def test_an_asymmetric_kek_wraps_nothing_that_others_send_it(
    make_source: MakeSource, fake: FakeModule, transport: Path, method: str
) -> None:
    """With every function broken that wraps or encrypts, keys are taken in all the same."""
    source = make_source(method="gcm")
    kek = await source.create_kek(REFERENCE)
    keys = await source.generate(kek, new_keys(2))
    other = make_source(fake.settings(method=method))
    other_kek = await other.create_kek(ELSEWHERE)
    sent = await source.export_keys(kek, keys, [destination(other_kek, transport)])
    fake.fail(C_EncryptInit="device-error", C_Encrypt="device-error", C_WrapKey="device-error")
    _, key_file = transport_files(transport)
    taken = await other.import_keys(other_kek, arrivals(sent.parcels, keys), transport_key_file=key_file)
    assert [key.key_id for key in taken.keys] == [key.key_id for key in keys]


@pytest.mark.parametrize("name", ["fake", "gcm", *ASYMMETRIC, "openbao"])
async def test_what_is_not_that_key_is_not_taken_in_and_spoils_no_other(
    request: pytest.FixtureRequest, make_source: MakeSource, transport: Path, tmp_path: Path, name: str
) -> None:
    source = make_source(method="gcm")
    kek = await source.create_kek(REFERENCE)
    keys = await source.generate(kek, new_keys(1) * 7)
    other, other_kek = await importer(name, request, make_source)
    to = destination(other_kek, transport)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    sent = list((await source.export_keys(kek, keys, [to])).parcels)
    elsewhere = replace(to, environment_id="env-c", kek_id="kek-c")
    [gone_astray] = (await source.export_keys(kek, [keys[6]], [elsewhere])).parcels
    flipped = bytearray(sent[0].sealed)
    flipped[len(flipped) // 2] ^= 1
    bad = [
        replace(sent[0], sealed=bytes(flipped)),
        replace(sent[1], sealed=sent[2].sealed),  # another key's
        replace(sent[2], sealed=sent[2].sealed[:-1]),
        replace(sent[3], owner=NetworkService("acme", "other")),
        replace(sent[4], route=Route.PEER if to.route is Route.PUBLIC else Route.PUBLIC),
        replace(gone_astray, environment_id="env-b", kek_id="kek-b"),
    ]
    coming = arrivals((*bad, sent[5]), keys)
    _, key_file = transport_files(transport)
    taken = await other.import_keys(other_kek, coming, transport_key_file=key_file)
    assert [key.key_id for key in taken.keys] == [keys[5].key_id]
    assert set(taken.failed_keys) == {parcel.key_id for parcel in bad}
    assert all(taken.failed_keys.values())
    # The signed rows speak of another key.
    [arrival] = arrivals((sent[0],), keys)
    wrong = await other.import_keys(
        other_kek, [replace(arrival, kcv=keys[1].kcv)], transport_key_file=key_file
    )
    assert set(wrong.failed_keys) == {sent[0].key_id}
    if to.route is Route.PEER:
        _, other_key_file = transport_files(stranger)
        lost = await other.import_keys(other_kek, [arrival], transport_key_file=other_key_file)
        assert set(lost.failed_keys) == {sent[0].key_id}


async def test_a_key_that_does_not_open_here_is_not_sent(make_source: MakeSource, transport: Path) -> None:
    source = make_source(method="gcm")
    kek = await source.create_kek(REFERENCE)
    good, bad = await source.generate(kek, new_keys(2))
    to = destination(kek, transport)
    sent = await source.export_keys(kek, [replace(bad, wrapped=good.wrapped), good], [to, to])
    assert [parcel.key_id for parcel in sent.parcels] == [good.key_id] * 2
    assert set(sent.failed_keys) == {bad.key_id}
    assert not (await source.export_keys(kek, [good], [])).parcels


@pytest.mark.parametrize("name", ["fake", "gcm", "rsa-oaep-1"])
async def test_nothing_leaves_and_nothing_is_taken_in_under_a_revoked_kek(
    request: pytest.FixtureRequest, make_source: MakeSource, hsm: SoftHsm, transport: Path, name: str
) -> None:
    source, kek = await importer(name, request, make_source)
    keys = await source.generate(kek, new_keys(1))
    to = destination(kek, transport)
    sent = await source.export_keys(kek, keys, [to])
    if isinstance(source, FakeKeySource):
        source.destroy(kek)
    else:
        where = {} if name == "gcm" else {"class": "PRIVATE_KEY"}
        assert hsm.run("destroy", kek.reference, arguments=where) == 1
    with pytest.raises(KekRevokedError):
        await source.export_keys(kek, keys, [to])
    _, key_file = transport_files(transport)
    with pytest.raises(KekRevokedError):
        await source.import_keys(kek, arrivals(sent.parcels, keys), transport_key_file=key_file)


async def test_many_travel_in_batches(make_source: MakeSource, transport: Path) -> None:
    source = make_source(method="gcm")
    kek = await source.create_kek(REFERENCE)
    other = make_source(method="ecdh-es")
    other_kek = await other.create_kek(ELSEWHERE)
    keys = await source.generate(kek, new_keys(1) * 300)
    sent = await source.export_keys(kek, keys, [destination(other_kek, transport)])
    assert len(sent.parcels) == 300
    _, key_file = transport_files(transport)
    taken = await other.import_keys(other_kek, arrivals(sent.parcels, keys), transport_key_file=key_file)
    assert [key.key_id for key in taken.keys] == [key.key_id for key in keys]


# A worker that answers for something else; the parcel itself; the key's file.

ROW = WrappedKey(
    owner=NetworkService("acme", "s3"),
    key_id=KeyId(b"k" * 16),
    kek_id="kek-a",
    environment_id="env-a",
    method=WrapMethod.GCM,
    wrapped=b"w",
    kcv=bytes(16),
    token_serial="1",
    created_at_ms=1,
)


def _destination(key: ec.EllipticCurvePrivateKey) -> Destination:
    return Destination(
        environment_id="env-b",
        kek_id="kek-b",
        method=WrapMethod.GCM,
        transport_key_der=transport_public_der(key.public_key()),
    )


def test_every_bit_of_a_parcel_counts() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    parcel = seal_parcel(b"m" * 32, ROW, _destination(key), b"c" * 32)
    assert open_peer_parcel(parcel, key) == b"m" * 32
    for position in range(8 * len(parcel.sealed)):
        changed = bytearray(parcel.sealed)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(WrappedKeyError):
            open_peer_parcel(replace(parcel, sealed=bytes(changed)), key)
    for size in range(len(parcel.sealed)):
        with pytest.raises(WrappedKeyError):
            open_peer_parcel(replace(parcel, sealed=parcel.sealed[:size]), key)
    other = seal_parcel(b"m" * 32, ROW, _destination(key), b"c" * 32)
    assert other.sealed != parcel.sealed
    for change in ({"kek_id": "kek-c"}, {"environment_id": "env-c"}, {"key_id": KeyId(b"l" * 16)}):
        with pytest.raises(WrappedKeyError):
            open_peer_parcel(replace(parcel, **change), key)


def test_a_destination_without_a_usable_key_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    for der in (b"", b"no key", transport_public_der(key.public_key())):
        to = replace(_destination(ec.generate_private_key(ec.SECP256R1())), transport_key_der=der)
        assert not check_transport_key(der)
        with pytest.raises(KeySourceError, match="env-b"):
            seal_parcel(b"m" * 32, ROW, to, b"c" * 32)
    with pytest.raises(KeySourceError):
        seal_parcel(
            b"m" * 32,
            ROW,
            replace(_destination(ec.generate_private_key(ec.SECP256R1())), public_key_der=b"no key"),
            b"c" * 32,
        )


def test_a_transport_key_that_others_can_read_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(KeySourceError):
        load_transport_key(tmp_path / "transport.key")
    _, key_file = transport_files(tmp_path)
    assert check_transport_key(transport_public_der(load_transport_key(key_file).public_key()))
    key_file.chmod(0o644)
    with pytest.raises(KeySourceError):
        load_transport_key(key_file)


def test_an_answer_about_other_keys_is_refused() -> None:
    to = _destination(ec.generate_private_key(ec.SECP256R1()))
    parcel = seal_parcel(b"m" * 32, ROW, to, b"c" * 32)
    other = replace(parcel, key_id=KeyId(b"o" * 16))
    good = wire.ExportDone(parcels=(parcel,), failed_keys=())
    assert _check_exported(good, [ROW], [to]) == 1
    for answer in (
        wire.ExportDone(parcels=(), failed_keys=()),
        wire.ExportDone(parcels=(other,), failed_keys=()),
        wire.ExportDone(parcels=(replace(parcel, kek_id="kek-c"),), failed_keys=()),
        wire.ExportDone(parcels=(parcel, parcel), failed_keys=()),
        wire.ExportDone(parcels=(), failed_keys=((other.key_id, "why"),)),
    ):
        with pytest.raises(KeySourceError):
            _check_exported(answer, [ROW], [to])
    kek = Kek(
        reference=ELSEWHERE,
        method=WrapMethod.GCM,
        token_serial="1",
        canary_ciphertext=b"c",
        canary_sha256=b"h",
        created_at_ms=1,
    )
    arrival = Arrival(parcel=parcel, kcv=bytes(16))
    made = replace(ROW, kek_id="kek-b", environment_id="env-b")
    assert _check_imported(wire.RewrapDone(keys=(made,), failed_keys=()), [arrival], kek) == 1
    for keys in ((), (replace(made, kcv=b"x" * 16),), (replace(made, environment_id="env-a"),), (made, made)):
        with pytest.raises(KeySourceError):
            _check_imported(wire.RewrapDone(keys=keys, failed_keys=()), [arrival], kek)
