"""KEKs and key material at real key servers, as the worker handles them: no process in between."""

import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from envelope.keys import KeyId, NetworkService
from key_agent.errors import KeySourceError, UnsupportedError
from key_agent.sources.envelopes import WrappedKeyError, canary_binding
from key_agent.sources.servers import openbao, work
from key_agent.sources.servers.kmip import Kmip
from key_agent.sources.servers.openbao import OpenBao
from key_agent.sources.servers.server import (
    Item,
    KeyGoneError,
    KeyServer,
    ServerThrottledError,
    ServerUnavailableError,
    Standing,
    Unopened,
    Unsupported,
)
from key_agent.sources.source import Kek, KekReference, KekType, NewKey
from key_agent.sources.verdict import Verdict
from tests.key_agent.sources.conftest import ANOTHER_REFERENCE, REFERENCE
from tests.key_servers import BaoServer, KmipServer, running

NOW_S = 1_800_000_000
OWNER = NetworkService("acme", "s3")


@dataclass
class Subject:
    """A server, how to reach it, and its owner."""

    hand: BaoServer | KmipServer
    connect: Callable[[], KeyServer]


def _bao(hand: BaoServer) -> Subject:
    def connect() -> KeyServer:
        return OpenBao(
            hand.url, lambda: hand.token_file.read_text().strip(), ca_file=hand.ca_file, timeout_s=2.0
        )

    return Subject(hand, connect)


def _kmip(hand: KmipServer) -> Subject:
    def connect() -> KeyServer:
        return Kmip(
            "127.0.0.1",
            hand.port,
            canary_name=work.CANARY_NAME,
            ca_file=hand.ca_file,
            certificate_file=hand.certificate_file,
            key_file=hand.key_file,
            timeout_s=2.0,
        )

    return Subject(hand, connect)


@pytest.fixture(scope="module")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaoServer]:
    with running(BaoServer(tmp_path_factory.mktemp("bao") / "server")) as server:
        yield server


@pytest.fixture(scope="module")
def kmip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KmipServer]:
    with running(KmipServer(tmp_path_factory.mktemp("kmip") / "server")) as server:
        yield server


@pytest.fixture(params=["bao", "kmip"])
def subject(request: pytest.FixtureRequest) -> Subject:
    made = request.getfixturevalue(request.param)
    return _bao(made) if isinstance(made, BaoServer) else _kmip(made)


@pytest.fixture
def server(subject: Subject) -> Iterator[KeyServer]:
    made = subject.connect()
    yield made
    made.close()


def _reference(number: int | None = None) -> KekReference:
    """Another name for each test: the servers live as long as the module's tests."""
    unique = os.urandom(6) if number is None else number.to_bytes(6)
    return replace(REFERENCE, object_id=b"sealgate-kek" + unique)


def _make(server: KeyServer, reference: KekReference | None = None) -> Kek:
    return work.create_kek(
        server, reference or _reference(), None, None, replace_unfinished=False, now_ms=NOW_S * 1000
    )


def _verdict(server: KeyServer, kek: Kek, now_s: float = NOW_S) -> Verdict:
    return work.diagnose(server, kek, now_s=now_s).verdict


def test_a_kek_is_made_proven_and_told(server: KeyServer) -> None:
    kek = _make(server)
    assert _verdict(server, kek) is Verdict.OK
    assert kek.method is server.method
    assert kek.token_serial == server.identity()
    with pytest.raises(KeySourceError, match="exists"):
        _make(server, kek.reference)
    again = work.create_kek(
        server, kek.reference, KekType.AES_256, None, replace_unfinished=True, now_ms=NOW_S * 1000
    )
    assert _verdict(server, again) is Verdict.OK
    assert _verdict(server, kek) is Verdict.KEK_REPLACED
    with pytest.raises(UnsupportedError):
        work.create_kek(
            server, _reference(), KekType.RSA_3072, None, replace_unfinished=False, now_ms=NOW_S * 1000
        )
    work.destroy_kek(server, again)
    work.destroy_kek(server, again)
    assert _verdict(server, again) is Verdict.KEK_DESTROYED
    assert work.try_method(server) == "ok"


def test_what_its_owner_does_is_proven(subject: Subject, server: KeyServer) -> None:
    destroyed, disabled = _make(server), _make(server)
    subject.hand.destroy(work.name_of(destroyed.reference))
    subject.hand.disable(work.name_of(disabled.reference))
    assert _verdict(server, destroyed) is Verdict.KEK_DESTROYED
    assert _verdict(server, disabled) is Verdict.KEK_DISABLED
    for kek in (destroyed, disabled):
        with pytest.raises(KeySourceError):
            work.generate(server, kek, [NewKey(owner=OWNER)], now_ms=NOW_S * 1000, budget_s=1)
        with pytest.raises(KeyGoneError):
            server.open(work.name_of(kek.reference), [Item(kek.canary_ciphertext, b"x")])
        server.close()
        with pytest.raises(KeyGoneError):
            server.seal(work.name_of(kek.reference), [Item(b"never", b"x")])
        # Nobody has made it anew by encrypting.
        assert server.find(work.name_of(kek.reference)).standing is not Standing.USABLE


def test_the_end_of_its_time(server: KeyServer) -> None:
    kek = replace(_make(server), valid_from_s=NOW_S, valid_until_s=NOW_S + 10)
    assert _verdict(server, kek) is Verdict.OK
    assert _verdict(server, kek, NOW_S - 1) is Verdict.KEK_EXPIRED
    assert _verdict(server, kek, NOW_S + 10) is Verdict.KEK_EXPIRED


def test_another_server_is_no_revocation_but_withdraws(server: KeyServer) -> None:
    kek = replace(_make(server), token_serial="another")
    assert _verdict(server, kek) is Verdict.TOKEN_CHANGED
    with pytest.raises(KeySourceError, match="another server"):
        work.destroy_kek(server, kek)
    gone = replace(kek, reference=_reference())
    assert _verdict(server, gone) is Verdict.TOKEN_CHANGED


def test_keys_open_in_their_place_only(server: KeyServer) -> None:
    kek, other_kek = _make(server), _make(server)
    owners = [NetworkService("acme", f"service-{number}") for number in range(3)]
    rows = work.generate(
        server, kek, [NewKey(owner=owner) for owner in owners], now_ms=NOW_S * 1000, budget_s=30
    )
    assert [row.owner for row in rows] == owners
    good = rows[0]

    def refused(row: object, owner: NetworkService = owners[0], under: Kek = kek) -> str:
        opener = work._Opener(server, under, NOW_S)
        opener.prepare([(owner, row)])  # type: ignore[list-item]
        with pytest.raises(WrappedKeyError) as caught:
            opener.reveal(owner, row)  # type: ignore[arg-type]
        return str(caught.value)

    opener = work._Opener(server, kek, NOW_S)
    opener.prepare([(row.owner, row) for row in rows])
    revealed = [opener.reveal(row.owner, row) for row in rows]
    assert len({bytes(material) for material in revealed}) == 3
    assert bytes(32) not in revealed
    opener.wipe()
    refused(replace(good, key_id=KeyId.random()))
    refused(replace(good, wrapped=rows[1].wrapped))
    refused(replace(good, wrapped=good.wrapped[:-8]))
    refused(replace(good, wrapped=b""))
    refused(good, owner=owners[1])
    refused(replace(good, owner=owners[1]), owner=owners[1])
    refused(replace(good, kcv=rows[1].kcv))
    disguised = replace(good, kek_id=other_kek.reference.kek_id)
    assert other_kek.reference.kek_id == kek.reference.kek_id  # only the binding's names are alike
    assert isinstance(refused(disguised, under=other_kek), str)
    for index in range(0, len(good.wrapped), 11):
        refused(replace(good, wrapped=work._changed(good.wrapped, index)))


def test_keys_move(server: KeyServer) -> None:
    old, new = _make(server), _make(server, replace(_reference(), kek_id=ANOTHER_REFERENCE.kek_id))
    rows = work.generate(server, old, [NewKey(owner=OWNER)] * 3, now_ms=NOW_S * 1000, budget_s=30)
    bad = replace(rows[2], wrapped=rows[1].wrapped)
    moved, failed = work.rewrap(server, old, new, [*rows[:2], bad], now_ms=NOW_S * 1000, budget_s=30)
    assert [(row.key_id, row.kcv) for row in moved] == [(row.key_id, row.kcv) for row in rows[:2]]
    assert [key_id for key_id, _ in failed] == [bad.key_id]
    opener = work._Opener(server, new, NOW_S)
    opener.prepare([(OWNER, moved[0])])
    assert len(opener.reveal(OWNER, moved[0])) == 32


def test_an_adopted_key_needs_no_more_than_its_use(bao: BaoServer) -> None:
    subject = _bao(bao)
    server = subject.connect()
    _make(server)  # and with it the canary key
    bao.make("sealgate-ours")
    bao.new_token("use-only")
    try:
        server.close()
        reference = replace(REFERENCE, label="sealgate-ours", object_id=b"")
        kek = work.adopt_kek(server, reference, None, None, NOW_S + 5, now_ms=NOW_S * 1000)
        assert kek.is_adopted
        assert _verdict(server, kek) is Verdict.OK
        assert work.generate(server, kek, [NewKey(owner=OWNER)], now_ms=NOW_S * 1000, budget_s=1)
        with pytest.raises(Unsupported, match="its owner has to do it"):
            work.destroy_kek(server, kek)
        with pytest.raises(Unsupported):
            _make(server)
    finally:
        bao.new_token("agent")
        server.close()


def test_an_outdated_version_is_a_disabled_kek(bao: BaoServer) -> None:
    server = _bao(bao).connect()
    kek = _make(server)
    name = work.name_of(kek.reference)
    bao.ask("POST", f"transit/keys/{name}/rotate", {})
    assert _verdict(server, kek) is Verdict.OK  # new seals by the new version, old ones open
    bao.outdate(name)
    assert _verdict(server, kek) is Verdict.KEK_DISABLED
    server.close()


def test_a_weaker_key_of_that_name_is_no_kek(bao: BaoServer) -> None:
    server = _bao(bao).connect()
    kek = _make(server)
    name = work.name_of(kek.reference)
    bao.destroy(name)
    bao.ask("POST", f"transit/keys/{name}", {"type": "aes256-gcm96", "exportable": True})
    assert _verdict(server, kek) is Verdict.KEK_REPLACED
    reference = replace(REFERENCE, label=name, object_id=b"")
    with pytest.raises(UnsupportedError, match="exportable"):
        work.adopt_kek(server, reference, None, None, None, now_ms=NOW_S * 1000)
    server.close()


def test_outages_of_openbao_are_none_of_the_keys(bao: BaoServer) -> None:
    server = _bao(bao).connect()
    kek = _make(server)
    good = bao.token_file.read_text()
    bao.token_file.write_text("s.nobody")
    assert _verdict(server, kek) is Verdict.DENIED
    bao.token_file.write_text(good)
    assert _verdict(server, kek) is Verdict.OK
    # Its rights are taken away, and what it asks about is somebody else's: no word about the key.
    bao.ask(
        "PUT", "sys/policies/acl/agent", {"policy": 'path "transit/random/*" { capabilities = ["update"] }'}
    )
    assert _verdict(server, kek) is Verdict.DENIED
    bao.ask("PUT", "sys/policies/acl/agent", {"policy": bao.POLICY})
    assert _verdict(server, kek) is Verdict.OK
    bao.throttle(rate=1, interval_s=30)
    found = [work.diagnose(server, kek, now_s=NOW_S) for _ in range(3)]
    assert (found[-1].verdict, 0 < found[-1].retry_after_s <= 30) == (Verdict.THROTTLED, True), found
    with pytest.raises(ServerThrottledError) as caught:
        server.open(work.name_of(kek.reference), [Item(kek.canary_ciphertext, b"x")])
    assert caught.value.retry_after_s > 0
    bao.throttle(rate=None)
    assert _verdict(server, kek) is Verdict.OK
    bao.ask("PUT", "sys/seal")
    assert _verdict(server, kek) is Verdict.UNREACHABLE
    bao.unseal()
    assert _verdict(server, kek) is Verdict.OK
    bao.ask("DELETE", "sys/mounts/transit")
    assert _verdict(server, kek) is Verdict.DENIED  # it does not say more of what is not there
    bao.ask("POST", "sys/mounts/transit", {"type": "transit"})
    # An emptied engine of the same name: that is an emptied token.
    assert _verdict(server, kek) is Verdict.TOKEN_CHANGED
    server.close()


def test_outages_of_any_server(subject: Subject, server: KeyServer) -> None:
    kek = _make(server)
    subject.hand.freeze()
    before = time.monotonic()
    assert _verdict(server, kek) is Verdict.UNREACHABLE
    assert time.monotonic() - before < 30
    subject.hand.thaw()
    # The answer to the question that timed out is nobody's answer.
    assert _verdict(server, kek) is Verdict.OK
    subject.hand.kill()
    assert _verdict(server, kek) is Verdict.UNREACHABLE
    with pytest.raises(ServerUnavailableError):
        server.open(work.name_of(kek.reference), [Item(kek.canary_ciphertext, b"x")])
    subject.hand.start()
    if isinstance(subject.hand, BaoServer):
        assert _verdict(server, kek) is Verdict.UNREACHABLE  # sealed
        subject.hand.unseal()
    assert _verdict(server, kek) is Verdict.OK


def test_a_server_under_another_authority_is_not_spoken_to(subject: Subject, tmp_path: Path) -> None:
    from certs import pki

    foreign = tmp_path / "ca.pem"
    foreign.write_bytes(pki.certificate_pem(pki.make_server_ca("foreign").certificate))
    hand = subject.hand
    server: KeyServer
    if isinstance(hand, BaoServer):
        server = OpenBao(hand.url, lambda: "s.secret", ca_file=foreign, timeout_s=30)
    else:
        server = Kmip(
            "127.0.0.1",
            hand.port,
            canary_name="x",
            ca_file=foreign,
            certificate_file=hand.certificate_file,
            key_file=hand.key_file,
            timeout_s=30,
        )
    with pytest.raises(ServerUnavailableError, match="does not verify"):
        server.describe()


def test_kmip_checks_the_servers_name(kmip: KmipServer) -> None:
    server = Kmip(
        "localhost",
        kmip.port,
        canary_name="x",
        ca_file=kmip.ca_file,
        certificate_file=kmip.certificate_file,
        key_file=kmip.key_file,
        timeout_s=2,
    )
    with pytest.raises(ServerUnavailableError, match="does not verify"):
        server.identity()


def test_another_kmip_user_sees_neither_key(kmip: KmipServer) -> None:
    ours = _kmip(kmip).connect()
    kek = _make(ours)
    certificate_file, key_file = kmip.user("globex")
    theirs = Kmip(
        "127.0.0.1",
        kmip.port,
        canary_name=work.CANARY_NAME,
        ca_file=kmip.ca_file,
        certificate_file=certificate_file,
        key_file=key_file,
        timeout_s=2,
    )
    assert _verdict(theirs, kek) is Verdict.TOKEN_CHANGED
    assert _verdict(ours, kek) is Verdict.OK
    for server in (ours, theirs):
        server.close()


def test_a_kmip_key_that_was_killed_in_mid_batch_opens_nothing(kmip: KmipServer) -> None:
    server = _kmip(kmip).connect()
    kek = _make(server)
    name = work.name_of(kek.reference)
    binding = canary_binding(kek.reference)
    assert isinstance(server, Kmip)
    whole = server._mac

    def revoke_then(*arguments: object) -> bytes:
        mac = whole(*arguments)  # type: ignore[arg-type]
        kmip.disable(name)
        return mac

    server._mac = revoke_then  # type: ignore[method-assign, assignment]
    with pytest.raises((KeyGoneError, ServerUnavailableError)):
        server.open(name, [Item(kek.canary_ciphertext, binding)])
    server.close()


def _answered(answer: tuple[int, object], *_: object, **__: object) -> tuple[int, object]:
    return answer


def test_nothing_is_an_answer_that_is_none(bao: BaoServer) -> None:
    """What a broken or hostile server may say."""
    server = OpenBao("https://127.0.0.1:1", lambda: "s.x", timeout_s=1)
    with pytest.raises(ServerUnavailableError, match="no answer"):
        server.find("k")
    with pytest.raises(Unsupported, match="no name"):
        server.find("../sys/seal")
    real = _bao(bao).connect()
    assert isinstance(real, OpenBao)
    answers: list[tuple[int, object]] = [
        (200, {"data": {"batch_results": []}}),
        (200, {"data": {"batch_results": [{"plaintext": "***"}]}}),
        (200, {"data": {"batch_results": [{"plaintext": 7}]}}),
        (200, {"data": {"batch_results": ["x"]}}),
        (200, []),
        (200, {"errors": ["encryption key not found"]}),
        (500, {"errors": ["encryption key not found"]}),
        (400, {"errors": ["something new"]}),
        (403, {"errors": ["permission denied"]}),
    ]
    for answer in answers:
        real._call = functools.partial(_answered, answer)  # type: ignore[method-assign]
        with pytest.raises(ServerUnavailableError):
            real.open("sealgate-k", [Item(b"vault:v1:x", b"b")])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 0),
        ("0", 0),
        ("7", 7),
        ("86400", 86400),
        ("-1", 0),
        ("1e9", 0),
        ("nan", 0),
        ("1000000", 0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0),
    ],
)
def test_how_long_to_wait_is_a_number_of_seconds_or_nothing(text: str | None, seconds: float) -> None:
    assert openbao._seconds(text) == seconds


def test_unopened_is_told_from_gone(server: KeyServer) -> None:
    kek = _make(server)
    name = work.name_of(kek.reference)
    binding = canary_binding(kek.reference)
    good = Item(kek.canary_ciphertext, binding)
    results = server.open(name, [good, replace(good, binding=b"other"), good])
    assert isinstance(results[0], bytes)
    assert results[0] == results[2]
    assert isinstance(results[1], Unopened)
    assert not results[1].is_disallowed
