"""What a look at the KEK proves, whatever its owner, the server or the network does."""

import time
from dataclasses import replace

import pytest

from key_agent.errors import KeySourceError
from key_agent.sources.servers import keks, material
from key_agent.sources.servers.diagnosis import diagnose
from key_agent.sources.servers.kmip import Kmip
from key_agent.sources.servers.server import (
    CANARY_NAME,
    Item,
    KeyGoneError,
    KeyServer,
    ServerThrottledError,
    ServerUnavailableError,
    Standing,
    name_of,
)
from key_agent.sources.source import NewKey
from key_agent.sources.verdict import Verdict
from tests.key_agent.sources.servers.subjects import (
    NOW_S,
    OWNER,
    Subject,
    make_kek,
    new_reference,
    of_bao,
    of_kmip,
    verdict_of,
)
from tests.key_servers import BaoServer, KmipServer


def test_what_its_owner_does_is_proven(subject: Subject, server: KeyServer) -> None:
    destroyed, disabled = make_kek(server), make_kek(server)
    subject.hand.destroy(name_of(destroyed.reference))
    subject.hand.disable(name_of(disabled.reference))
    assert verdict_of(server, destroyed) is Verdict.KEK_DESTROYED
    assert verdict_of(server, disabled) is Verdict.KEK_DISABLED
    for kek in (destroyed, disabled):
        with pytest.raises(KeySourceError):
            material.generate(server, kek, [NewKey(owner=OWNER)], now_ms=NOW_S * 1000, budget_s=1)
        with pytest.raises(KeyGoneError):
            server.open(name_of(kek.reference), [Item(kek.canary_ciphertext, b"x")])
        server.close()
        with pytest.raises(KeyGoneError):
            server.seal(name_of(kek.reference), [Item(b"never", b"x")])
        # Nobody has made it anew by encrypting.
        assert server.find(name_of(kek.reference)).standing is not Standing.USABLE


def test_the_end_of_its_time(server: KeyServer) -> None:
    kek = replace(make_kek(server), valid_from_s=NOW_S, valid_until_s=NOW_S + 10)
    assert verdict_of(server, kek) is Verdict.OK
    assert verdict_of(server, kek, NOW_S - 1) is Verdict.KEK_EXPIRED
    assert verdict_of(server, kek, NOW_S + 10) is Verdict.KEK_EXPIRED


def test_another_server_is_no_revocation_but_withdraws(server: KeyServer) -> None:
    kek = replace(make_kek(server), token_serial="another")
    assert verdict_of(server, kek) is Verdict.TOKEN_CHANGED
    with pytest.raises(KeySourceError, match="another server"):
        keks.destroy_kek(server, kek)
    gone = replace(kek, reference=new_reference())
    assert verdict_of(server, gone) is Verdict.TOKEN_CHANGED


def test_an_outdated_version_is_a_disabled_kek(bao: BaoServer) -> None:
    server = of_bao(bao).connect()
    kek = make_kek(server)
    name = name_of(kek.reference)
    bao.ask("POST", f"transit/keys/{name}/rotate", {})
    assert verdict_of(server, kek) is Verdict.OK  # new seals by the new version, old ones open
    bao.outdate(name)
    assert verdict_of(server, kek) is Verdict.KEK_DISABLED
    server.close()


def test_outages_of_openbao_are_none_of_the_keys(bao: BaoServer) -> None:
    server = of_bao(bao).connect()
    kek = make_kek(server)
    good = bao.token_file.read_text()
    bao.token_file.write_text("s.nobody")
    assert verdict_of(server, kek) is Verdict.DENIED
    bao.token_file.write_text(good)
    assert verdict_of(server, kek) is Verdict.OK
    # Its rights are taken away, and what it asks about is somebody else's: no word about the key.
    bao.ask(
        "PUT", "sys/policies/acl/agent", {"policy": 'path "transit/random/*" { capabilities = ["update"] }'}
    )
    assert verdict_of(server, kek) is Verdict.DENIED
    bao.ask("PUT", "sys/policies/acl/agent", {"policy": bao.POLICY})
    assert verdict_of(server, kek) is Verdict.OK
    bao.throttle(rate=1, interval_s=30)
    found = [diagnose(server, kek, now_s=NOW_S) for _ in range(3)]
    assert (found[-1].verdict, 0 < found[-1].retry_after_s <= 30) == (Verdict.THROTTLED, True), found
    with pytest.raises(ServerThrottledError) as caught:
        server.open(name_of(kek.reference), [Item(kek.canary_ciphertext, b"x")])
    assert caught.value.retry_after_s > 0
    bao.throttle(rate=None)
    assert verdict_of(server, kek) is Verdict.OK
    bao.ask("PUT", "sys/seal")
    assert verdict_of(server, kek) is Verdict.UNREACHABLE
    bao.unseal()
    assert verdict_of(server, kek) is Verdict.OK
    bao.ask("DELETE", "sys/mounts/transit")
    assert verdict_of(server, kek) is Verdict.DENIED  # it does not say more of what is not there
    bao.ask("POST", "sys/mounts/transit", {"type": "transit"})
    # An emptied engine of the same name: that is an emptied token.
    assert verdict_of(server, kek) is Verdict.TOKEN_CHANGED
    server.close()


def test_outages_of_any_server(subject: Subject, server: KeyServer) -> None:
    kek = make_kek(server)
    subject.hand.freeze()
    before = time.monotonic()
    assert verdict_of(server, kek) is Verdict.UNREACHABLE
    assert time.monotonic() - before < 30
    subject.hand.thaw()
    # The answer to the question that timed out is nobody's answer.
    assert verdict_of(server, kek) is Verdict.OK
    subject.hand.kill()
    assert verdict_of(server, kek) is Verdict.UNREACHABLE
    with pytest.raises(ServerUnavailableError):
        server.open(name_of(kek.reference), [Item(kek.canary_ciphertext, b"x")])
    subject.hand.start()
    if isinstance(subject.hand, BaoServer):
        assert verdict_of(server, kek) is Verdict.UNREACHABLE  # sealed
        subject.hand.unseal()
    assert verdict_of(server, kek) is Verdict.OK


def test_another_kmip_user_sees_neither_key(kmip: KmipServer) -> None:
    ours = of_kmip(kmip).connect()
    kek = make_kek(ours)
    certificate_file, key_file = kmip.user("globex")
    theirs = Kmip(
        "127.0.0.1",
        kmip.port,
        canary_name=CANARY_NAME,
        ca_file=kmip.ca_file,
        certificate_file=certificate_file,
        key_file=key_file,
        timeout_s=2,
    )
    assert verdict_of(theirs, kek) is Verdict.TOKEN_CHANGED
    assert verdict_of(ours, kek) is Verdict.OK
    for server in (ours, theirs):
        server.close()
