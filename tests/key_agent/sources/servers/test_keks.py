"""KEKs at real key servers: made, proven, adopted, destroyed."""

from dataclasses import replace

import pytest

from key_agent.errors import KeySourceError, UnsupportedError
from key_agent.sources.servers import keks, material
from key_agent.sources.servers.server import (
    KeyServer,
    Unsupported,
    name_of,
)
from key_agent.sources.source import KekType, NewKey
from key_agent.sources.verdict import Verdict
from tests.key_agent.sources.conftest import REFERENCE
from tests.key_agent.sources.servers.subjects import NOW_S, OWNER, make_kek, new_reference, of_bao, verdict_of
from tests.key_servers import BaoServer


def test_a_kek_is_made_proven_and_told(server: KeyServer) -> None:
    kek = make_kek(server)
    assert verdict_of(server, kek) is Verdict.OK
    assert kek.method is server.method
    assert kek.token_serial == server.identity()
    with pytest.raises(KeySourceError, match="exists"):
        make_kek(server, kek.reference)
    again = keks.create_kek(
        server, kek.reference, KekType.AES_256, None, replace_unfinished=True, now_ms=NOW_S * 1000
    )
    assert verdict_of(server, again) is Verdict.OK
    assert verdict_of(server, kek) is Verdict.KEK_REPLACED
    with pytest.raises(UnsupportedError):
        keks.create_kek(
            server, new_reference(), KekType.RSA_3072, None, replace_unfinished=False, now_ms=NOW_S * 1000
        )
    keks.destroy_kek(server, again)
    keks.destroy_kek(server, again)
    assert verdict_of(server, again) is Verdict.KEK_DESTROYED
    assert keks.try_method(server) == "ok"


def test_an_adopted_key_needs_no_more_than_its_use(bao: BaoServer) -> None:
    subject = of_bao(bao)
    server = subject.connect()
    make_kek(server)  # and with it the canary key
    bao.make("sealgate-ours")
    bao.new_token("use-only")
    try:
        server.close()
        reference = replace(REFERENCE, label="sealgate-ours", object_id=b"")
        kek = keks.adopt_kek(server, reference, None, None, NOW_S + 5, now_ms=NOW_S * 1000)
        assert kek.is_adopted
        assert verdict_of(server, kek) is Verdict.OK
        assert material.generate(server, kek, [NewKey(owner=OWNER)], now_ms=NOW_S * 1000, budget_s=1)
        with pytest.raises(Unsupported, match="its owner has to do it"):
            keks.destroy_kek(server, kek)
        with pytest.raises(Unsupported):
            make_kek(server)
    finally:
        bao.new_token("agent")
        server.close()


def test_a_weaker_key_of_that_name_is_no_kek(bao: BaoServer) -> None:
    server = of_bao(bao).connect()
    kek = make_kek(server)
    name = name_of(kek.reference)
    bao.destroy(name)
    bao.ask("POST", f"transit/keys/{name}", {"type": "aes256-gcm96", "exportable": True})
    assert verdict_of(server, kek) is Verdict.KEK_REPLACED
    reference = replace(REFERENCE, label=name, object_id=b"")
    with pytest.raises(UnsupportedError, match="exportable"):
        keks.adopt_kek(server, reference, None, None, None, now_ms=NOW_S * 1000)
    server.close()
