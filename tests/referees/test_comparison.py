"""The judges of "no difference" and "only ciphertext" can say no."""

import os
import re

import pytest

from envelope.derive import object_key
from envelope.keys import KeyId, NetworkService
from envelope.objects import Sealer
from tests.referees.comparison import Declared, Plaintexts, Seen, opened

OWNER = NetworkService("acme", "dav")
KID = KeyId.random()
MATERIAL = os.urandom(32)
PLAIN = os.urandom(1000)


def sealed(plain: bytes, *, material: bytes = MATERIAL) -> bytes:
    sealer = Sealer(object_key(material, OWNER, KID), OWNER, KID)
    return bytes(sealer.update(plain)) + bytes(sealer.finalize())


def judged(data: bytes) -> dict[str, bytes]:
    return opened([("f", data)], owner=OWNER, materials={KID: MATERIAL}, plaintexts=[PLAIN])


def test_what_is_sealed_opens() -> None:
    assert judged(sealed(PLAIN)) == {"f": PLAIN}


@pytest.mark.parametrize(
    "data",
    [PLAIN, b"", sealed(PLAIN)[:-1], sealed(PLAIN) + PLAIN[3:19], sealed(PLAIN, material=os.urandom(32))],
)
def test_whatever_else_lies_there_is_found(data: bytes) -> None:
    with pytest.raises((AssertionError, ValueError)):
        judged(data)


def test_what_opens_under_any_key_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.vectors.reference.open_object", lambda *_: PLAIN)
    with pytest.raises(AssertionError, match="not its key"):
        judged(sealed(PLAIN))


@pytest.mark.parametrize("start", range(17))
@pytest.mark.parametrize("place", [0, 5, 16, 100])
def test_sixteen_bytes_are_found_wherever_they_lie(start: int, place: int) -> None:
    known = Plaintexts([b"short", PLAIN])
    noise = os.urandom(300)
    assert not known.leak_into(noise)
    assert known.leak_into(noise[:place] + PLAIN[start : start + 16] + noise[place:])
    assert known.leak_into(noise + PLAIN[-16:])


@pytest.mark.parametrize(
    "other",
    [
        Seen(201, {"a": "1", "etag": '"x"'}, b"body"),
        Seen(200, {"a": "2", "etag": '"x"'}, b"body"),
        Seen(200, {"etag": '"x"'}, b"body"),
        Seen(200, {"a": "1", "etag": '"x"', "b": "1"}, b"body"),
        Seen(200, {"a": "1", "etag": '"x"'}, b"bodY"),
    ],
)
def test_each_difference_is_seen(other: Seen) -> None:
    direct = Seen(200, {"a": "1", "etag": '"x"', "date": "now"}, b"body")
    declared = Declared(volatile=[(re.compile(rb'"[xy]"'), b"TAG")])
    assert declared.differences(direct, Seen(200, {"a": "1", "etag": '"y"'}, b"body")) == []
    assert len(declared.differences(direct, other)) == 1


def test_declared_differences_are_none() -> None:
    direct, ours = Seen(200, {"a": "1", "b": "1"}, b""), Seen(200, {"a": "2", "c": "1"}, b"")
    assert len(Declared().differences(direct, ours)) == 3
    declared = Declared(unequal=frozenset({"a"}), direct_only=frozenset({"b"}), through_only=frozenset({"c"}))
    assert declared.differences(direct, ours) == []
    refused = Seen(400, {"sealgate-error": "bad-message"}, b"ours")
    theirs = Seen(400, {}, b"theirs")
    assert Declared(refusals=frozenset({"bad-message"})).differences(theirs, refused) == []
    assert Declared(refusals=frozenset({"other"})).differences(theirs, refused) != []
