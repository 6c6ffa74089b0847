"""What every key source promises: the fake of the other tests keeps it as the real one does."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
import pytest
from cryptography import x509

from envelope.certificates import fingerprint
from envelope.keys import KeyId, KeyMaterial, KeyState, KeyUse, NetworkService, SigningAlgorithm
from envelope.material import Expectation, Signer, open_envelope
from key_agent.errors import KekRevokedError, KeySourceError, UnsupportedError
from key_agent.sources.servers.server import name_of
from key_agent.sources.signing_keys import is_key_for
from key_agent.sources.source import Kek, KeySource, NewKey, Verdict, WrappedKey
from tests.fakes.key_source import FakeKeySource
from tests.key_agent.sources.conftest import (
    AGENT,
    ANOTHER_REFERENCE,
    KINDS,
    NONCE,
    REFERENCE,
    SOFTHSM_METHODS,
    FakeModule,
    MakeSource,
    new_keys,
    owners,
    request_for,
)
from tests.key_servers import BaoServer, KmipServer
from tests.nss import Nss
from tests.pki import Tenant
from tests.softhsm import SoftHsm

SHORT_KEYS = (SigningAlgorithm.ES256, SigningAlgorithm.EDDSA)
ALL_ALGORITHMS = (*SHORT_KEYS, SigningAlgorithm.PS256, SigningAlgorithm.RS256)


@dataclass
class Subject:
    """A source and the hand of the enterprise on its token."""

    source: KeySource
    destroy: Callable[[Kek], object]
    disable: Callable[[Kek], object]
    replace: Callable[[Kek], object]
    algorithms: tuple[SigningAlgorithm, ...] = ALL_ALGORITHMS
    """Whose keys it can wrap."""
    can_enable: bool = True
    """A disabled KEK can be enabled again."""


SUBJECTS = {
    "fake": None,
    **{f"softhsm-{method}": method for method in SOFTHSM_METHODS},
    "nss-kw": "kw",
    "nss-ecdh-es": "ecdh-es",
    "vendor-iv-in-place": "gcm-in-place",
    "vendor-iv-appended-16": "gcm-appended",
    "openbao": None,
    "kmip": None,
}
# A process or two and an RSA key per test: what does not depend on the method is tried on these.
FEW = ["fake", "softhsm-gcm", "nss-kw", "vendor-iv-appended-16", "openbao", "kmip"]
on_few = pytest.mark.parametrize("subject", FEW, indirect=True)


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest, make_source: MakeSource, hsm: SoftHsm, acme: Tenant) -> Subject:
    name, method = request.param, SUBJECTS[request.param]
    if name in ("openbao", "kmip"):
        server: BaoServer | KmipServer = request.getfixturevalue(f"{name}_server")
        server.clear()

        def at(act: Callable[[str], object]) -> Callable[[Kek], object]:
            return lambda kek: act(name_of(kek.reference))

        return Subject(
            make_source(server.settings()),
            destroy=at(server.destroy),
            disable=at(server.disable),
            replace=at(server.replace),
            can_enable=name == "openbao",
        )
    if method is None:
        signing = acme.agent_signing(AGENT)
        fake = FakeKeySource(agent_id=AGENT, signing_key=signing.key, signing_certificate=signing.certificate)
        return Subject(fake, destroy=fake.destroy, disable=fake.disable, replace=fake.replace)
    kind = KINDS[method]
    if name.startswith("nss"):
        nss: Nss = request.getfixturevalue("nss")

        def by_hand(action: str, kek: Kek, **arguments: object) -> object:
            return nss.run(action, kek.reference, **arguments)

        settings = msgspec.structs.replace(nss.settings(), method=method)
    else:

        def by_hand(action: str, kek: Kek, **arguments: object) -> object:
            return hsm.run(action, kek.reference, arguments=arguments)

        settings = hsm.settings(method=method)
        if name.startswith("vendor"):
            vendor: FakeModule = request.getfixturevalue("fake")
            vendor.be(name.removeprefix("vendor-"))
            # Not told its method: it is found out by doing.
            settings = vendor.settings()
    return Subject(
        make_source(settings),
        destroy=lambda kek: by_hand("destroy", kek, **kind.where),
        disable=lambda kek: by_hand("set", kek, name=kind.opening, value=False, **kind.where),
        replace=lambda kek: (by_hand("destroy", kek, **kind.where), by_hand("make", kek, **kind.make)),
        algorithms=SHORT_KEYS if name == "nss-kw" else ALL_ALGORITHMS,  # NSS unwraps at most 256 bytes
    )


async def _arrived(
    subject: Subject,
    kek: Kek,
    key: WrappedKey,
    acme: Tenant,
    hsm: SoftHsm,
    *,
    state: KeyState = KeyState.ACTIVE,
) -> KeyMaterial:
    """*key* as the proxy gets it."""
    service = acme.service(key.owner.service)
    [result] = await subject.source.seal_envelopes(kek, [request_for(key, service, state=state)])
    assert result.owner == key.owner
    assert not result.failed_keys
    signing = getattr(subject.source, "signing_certificate", None)
    if signing is None:
        signing = x509.load_pem_x509_certificate((hsm.directory / "signing.pem").read_bytes())
    claims = open_envelope(
        result.tokens["proxy-0"],
        Expectation(
            owner=key.owner,
            audience="proxy-0",
            recipient_certificate=service.certificate,
            recipient_key=service.key,
            signers={fingerprint(signing): Signer(signing, AGENT)},
            now_s=1_800_000_001,
            validity_s=330,
            nonce=NONCE,
            last_sequence=0,
            seen_token_ids=(),
        ),
    )
    [arrived] = claims.keys
    assert (arrived.key_id, arrived.state) == (key.key_id, state)
    return arrived


@on_few
async def test_keys_arrive(subject: Subject, acme: Tenant, hsm: SoftHsm) -> None:
    kek = await subject.source.create_kek(REFERENCE)
    first, second = await subject.source.generate(kek, new_keys(2))
    await _arrived(subject, kek, first, acme, hsm)
    assert first.kek_id == second.kek_id == REFERENCE.kek_id
    assert first.token_serial == kek.token_serial


@on_few
async def test_the_version_that_the_registry_gave_arrives(
    subject: Subject, acme: Tenant, hsm: SoftHsm
) -> None:
    kek = await subject.source.create_kek(REFERENCE)
    [key] = await subject.source.generate(kek, new_keys(1))
    assert key.version == 1
    arrived = await _arrived(subject, kek, replace(key, version=17), acme, hsm)
    assert arrived.version == 17
    tombstone = await _arrived(subject, kek, replace(key, version=18), acme, hsm, state=KeyState.DESTROYED)
    assert (tombstone.version, bytes(tombstone.secret)) == (18, b"")


@on_few
async def test_tombstones_travel_alone_only_where_there_is_nothing_else(
    subject: Subject, acme: Tenant, hsm: SoftHsm
) -> None:
    """A `set` of tombstones takes everything else back: no key that failed may lead to one."""
    kek = await subject.source.create_kek(REFERENCE)
    [gone] = await subject.source.generate(kek, new_keys(1))
    [live] = await subject.source.generate(kek, new_keys(1))
    bad = replace(live, wrapped=live.wrapped[:-1] + bytes([live.wrapped[-1] ^ 1]))
    request = request_for(gone, acme.service(gone.owner.service), state=KeyState.DESTROYED)
    for also, tokens in ((live, {"proxy-0"}), (bad, set())):
        both = replace(request, keys=(*request.keys, (also, KeyState.ACTIVE)))
        [result] = await subject.source.seal_envelopes(kek, [both])
        assert set(result.tokens) == tokens
    await _arrived(subject, kek, gone, acme, hsm, state=KeyState.DESTROYED)


async def test_signing_keys_arrive_move_and_are_told_from_others(
    subject: Subject, acme: Tenant, hsm: SoftHsm
) -> None:
    old = await subject.source.create_kek(REFERENCE)
    new = await subject.source.create_kek(ANOTHER_REFERENCE)
    [owner] = owners(1)
    wanted = [NewKey(owner=owner, use=KeyUse.SIGN, algorithm=name) for name in subject.algorithms]
    keys = await subject.source.generate(old, [*wanted, NewKey(owner=owner)])
    moved = await subject.source.rewrap(old, new, [replace(key, version=3) for key in keys])
    assert not moved.failed_keys
    for was, now, kek in [
        *((key, key, old) for key in keys),
        *zip(keys, moved.keys, [new] * len(keys), strict=True),
    ]:
        assert (now.use, now.algorithm, now.kcv) == (was.use, was.algorithm, was.kcv)
        assert now.version == (1 if kek is old else 3)
        arrived = await _arrived(subject, kek, now, acme, hsm)
        assert (arrived.use, arrived.algorithm, arrived.version) == (now.use, now.algorithm, now.version)
        if now.use is KeyUse.SIGN:
            assert is_key_for(now.algorithm, bytes(arrived.secret))
    # A row that lies about what its key is for.
    es256, eddsa, data = keys[0], keys[1], keys[-1]
    lies = [
        replace(es256, algorithm="EdDSA"),
        replace(eddsa, use=KeyUse.DATA, algorithm=None),
        replace(data, use=KeyUse.SIGN, algorithm="ES256"),
    ]
    [result] = await subject.source.seal_envelopes(old, [request_for(lies, acme.service(owner.service))])
    assert set(result.failed_keys) == {key.key_id for key in lies}
    for name in set(SigningAlgorithm) - set(subject.algorithms):
        with pytest.raises(UnsupportedError, match="choose an algorithm with shorter keys"):
            await subject.source.generate(old, [NewKey(owner=owner, use=KeyUse.SIGN, algorithm=name)])


@on_few
async def test_keys_move_to_another_kek(subject: Subject, acme: Tenant, hsm: SoftHsm) -> None:
    old = await subject.source.create_kek(REFERENCE)
    new = await subject.source.create_kek(ANOTHER_REFERENCE)
    keys = await subject.source.generate(old, new_keys(3))
    before = await _arrived(subject, old, keys[0], acme, hsm)
    moved = await subject.source.rewrap(old, new, keys)
    assert not moved.failed_keys
    for was, now in zip(keys, moved.keys, strict=True):
        assert (now.owner, now.key_id, now.kcv) == (was.owner, was.key_id, was.kcv)
        assert (now.kek_id, now.method, now.token_serial) == ("kek-2", new.method, new.token_serial)
        assert now.wrapped != was.wrapped
    # The old KEK is needed no more, and the old wrapping means nothing to the new one.
    subject.destroy(old)
    after = await _arrived(subject, new, moved.keys[0], acme, hsm, state=KeyState.DEACTIVATED)
    assert bytes(after.secret) == bytes(before.secret)
    disguised = replace(keys[1], kek_id="kek-2")
    [result] = await subject.source.seal_envelopes(new, [request_for(disguised)])
    assert set(result.failed_keys) == {disguised.key_id}
    assert not (await subject.source.rewrap(new, new, [])).keys


@on_few
async def test_a_key_that_does_not_move_is_left_alone(subject: Subject) -> None:
    old = await subject.source.create_kek(REFERENCE)
    new = await subject.source.create_kek(ANOTHER_REFERENCE)
    good, exchanged, cut, wrong_kcv, elsewhere, other = await subject.source.generate(old, new_keys(1) * 6)
    bad = [
        replace(exchanged, wrapped=good.wrapped),
        replace(cut, wrapped=cut.wrapped[:-8]),
        replace(wrong_kcv, kcv=good.kcv),
        replace(elsewhere, kek_id="kek-2"),
        replace(other, owner=NetworkService("acme", "other")),
    ]
    moved = await subject.source.rewrap(old, new, [*bad, good])
    assert [key.key_id for key in moved.keys] == [good.key_id]
    assert set(moved.failed_keys) == {key.key_id for key in bad}
    assert all(moved.failed_keys.values())


@on_few
@pytest.mark.parametrize(
    ("hand", "verdict"),
    [
        ("destroy", Verdict.KEK_DESTROYED),
        ("disable", Verdict.KEK_DISABLED),
        ("replace", Verdict.KEK_REPLACED),
    ],
)
@pytest.mark.parametrize("which", ["old", "new"])
async def test_nothing_moves_from_or_to_a_revoked_kek(
    subject: Subject, hand: str, verdict: Verdict, which: str
) -> None:
    old = await subject.source.create_kek(REFERENCE)
    new = await subject.source.create_kek(ANOTHER_REFERENCE)
    keys = await subject.source.generate(old, new_keys(1))
    getattr(subject, hand)(old if which == "old" else new)
    with pytest.raises(KekRevokedError) as caught:
        await subject.source.rewrap(old, new, keys)
    assert caught.value.verdict is verdict


@pytest.mark.parametrize(
    ("hand", "verdict"),
    [
        ("destroy", Verdict.KEK_DESTROYED),
        ("disable", Verdict.KEK_DISABLED),
        ("replace", Verdict.KEK_REPLACED),
    ],
)
async def test_revocations(subject: Subject, hand: str, verdict: Verdict) -> None:
    kek = await subject.source.create_kek(REFERENCE)
    [key] = await subject.source.generate(kek, new_keys(1))
    assert (await subject.source.diagnose(kek)).verdict is Verdict.OK
    getattr(subject, hand)(kek)
    assert (await subject.source.diagnose(kek)).verdict is verdict
    for attempt in (
        subject.source.seal_envelopes(kek, [request_for(key)]),
        subject.source.generate(kek, new_keys(1)),
    ):
        with pytest.raises(KekRevokedError) as caught:
            await attempt
        assert caught.value.verdict is verdict
        assert caught.value.diagnosis.verdict is verdict


async def test_the_owners_own_hand(subject: Subject) -> None:
    kek = await subject.source.create_kek(REFERENCE)
    if subject.can_enable:
        await subject.source.set_kek_enabled(kek, enabled=False)
        assert (await subject.source.diagnose(kek)).verdict is Verdict.KEK_DISABLED
        await subject.source.set_kek_enabled(kek, enabled=True)
    else:
        with pytest.raises(UnsupportedError, match="taken back"):
            await subject.source.set_kek_enabled(kek, enabled=False)
    assert (await subject.source.diagnose(kek)).verdict is Verdict.OK
    await subject.source.destroy_kek(kek)
    await subject.source.destroy_kek(kek)
    assert (await subject.source.diagnose(kek)).verdict is Verdict.KEK_DESTROYED
    with pytest.raises(KeySourceError):
        await subject.source.set_kek_enabled(kek, enabled=True)


async def test_a_kek_of_the_owners_is_adopted_and_left_as_it_is(
    subject: Subject, acme: Tenant, hsm: SoftHsm
) -> None:
    made = await subject.source.create_kek(REFERENCE)
    adopted = await subject.source.adopt_kek(REFERENCE, kek_type=made.kek_type)
    assert (adopted.is_adopted, made.is_adopted) == (True, False)
    assert (adopted.method, adopted.token_serial) == (made.method, made.token_serial)
    assert adopted.public_key_der == made.public_key_der
    [key] = await subject.source.generate(adopted, new_keys(1))
    await _arrived(subject, adopted, key, acme, hsm)
    assert (await subject.source.diagnose(made)).verdict is Verdict.OK
    with pytest.raises(UnsupportedError):
        await subject.source.adopt_kek(ANOTHER_REFERENCE)


@on_few
async def test_a_kek_ends_when_the_registry_says_so(subject: Subject) -> None:
    past_s, future_s = 1_000_000_000, 4_000_000_000
    kek = await subject.source.create_kek(REFERENCE, valid_until_s=future_s)
    [key] = await subject.source.generate(kek, new_keys(1))
    assert kek.valid_until_s == future_s
    assert (await subject.source.diagnose(replace(kek, valid_from_s=past_s))).verdict is Verdict.OK
    for over in (replace(kek, valid_until_s=past_s), replace(kek, valid_from_s=future_s)):
        assert (await subject.source.diagnose(over)).verdict is Verdict.KEK_EXPIRED
        with pytest.raises(KekRevokedError) as caught:
            await subject.source.seal_envelopes(over, [request_for(key)])
        assert caught.value.verdict is Verdict.KEK_EXPIRED
        with pytest.raises(KekRevokedError):
            await subject.source.generate(over, new_keys(1))


@on_few
async def test_a_kek_is_made_once(subject: Subject) -> None:
    await subject.source.create_kek(REFERENCE)
    with pytest.raises(KeySourceError):
        await subject.source.create_kek(REFERENCE)
    again = await subject.source.create_kek(REFERENCE, replace_unfinished=True)
    assert (await subject.source.diagnose(again)).verdict is Verdict.OK


@on_few
async def test_failures_of_one_key_or_recipient_are_values(
    subject: Subject, acme: Tenant, globex: Tenant
) -> None:
    kek = await subject.source.create_kek(REFERENCE)
    good, bad = await subject.source.generate(kek, new_keys(1) * 2)
    bad = replace(bad, wrapped=good.wrapped)
    request = request_for([good, bad], acme.service("service-0"), globex.service("service-0"))
    only_bad = request_for(bad, acme.service("service-0"))
    mixed, nothing = await subject.source.seal_envelopes(kek, [request, only_bad])
    assert set(mixed.failed_keys) == set(nothing.failed_keys) == {bad.key_id}
    assert set(mixed.tokens) == {"proxy-0"}
    assert set(mixed.failed_recipients) == {"proxy-1"}
    assert not nothing.tokens
    assert isinstance(next(iter(mixed.failed_keys)), KeyId)


@on_few
async def test_description_and_end(subject: Subject) -> None:
    facts = await subject.source.describe()
    assert {"module", "token", "methods"} <= facts.keys() or {"server", "methods"} <= facts.keys()
    await subject.source.close()
    await subject.source.close()
