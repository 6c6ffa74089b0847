"""What real key servers answer, and what is no answer."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest

from key_agent.sources.envelopes import canary_binding
from key_agent.sources.servers import openbao
from key_agent.sources.servers.kmip import Kmip
from key_agent.sources.servers.openbao import OpenBao
from key_agent.sources.servers.server import (
    Item,
    KeyGoneError,
    KeyServer,
    ServerUnavailableError,
    Unopened,
    Unsupported,
    name_of,
)
from tests.key_agent.sources.servers.subjects import (
    Subject,
    make_kek,
    of_bao,
    of_kmip,
)
from tests.key_servers import BaoServer, KmipServer


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


def test_a_kmip_key_that_was_killed_in_mid_batch_opens_nothing(kmip: KmipServer) -> None:
    server = of_kmip(kmip).connect()
    kek = make_kek(server)
    name = name_of(kek.reference)
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
    real = of_bao(bao).connect()
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
    kek = make_kek(server)
    name = name_of(kek.reference)
    binding = canary_binding(kek.reference)
    good = Item(kek.canary_ciphertext, binding)
    results = server.open(name, [good, replace(good, binding=b"other"), good])
    assert isinstance(results[0], bytes)
    assert results[0] == results[2]
    assert isinstance(results[1], Unopened)
    assert not results[1].is_disallowed
