"""A heartbeat is its environment's answer to one question, or nothing."""

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from envelope.errors import IntegrityError
from key_agent.environments.peers.heartbeats import (
    CHALLENGE_SIZE,
    Heartbeat,
    check_heartbeat,
    new_challenge,
    sign_heartbeat,
)

KEY = Ed25519PrivateKey.generate()
BEAT = Heartbeat(
    tenant="acme",
    environment="aws-us",
    agent="hq-1",
    term=3,
    epoch=812,
    digest="ab" * 32,
    state="active",
    proven_ago_s=1.25,
    challenge="0f" * CHALLENGE_SIZE,
)


def check(found: Heartbeat, *, challenge: str = BEAT.challenge) -> None:
    check_heartbeat(
        found, KEY.public_key(), tenant="acme", environment="aws-us", agent="hq-1", challenge=challenge
    )


def test_a_signed_heartbeat_survives_the_wire() -> None:
    wire = msgspec.json.encode(sign_heartbeat(BEAT, KEY))
    found = msgspec.json.decode(wire, type=Heartbeat)
    check(found)
    assert msgspec.structs.replace(found, signature="00") == BEAT


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "globex"},
        {"environment": "gcp-eu"},
        {"agent": "hq-2"},
        {"term": 4},
        {"epoch": 813},
        {"digest": "ac" * 32},
        {"head": "ac" * 64},
        {"state": "healing"},
        {"proven_ago_s": 1.0},
        {"proven_ago_s": None},
        {"challenge": "0e" * CHALLENGE_SIZE},
        {"signature": "00" * 64},
        {"signature": "00"},
    ],
)
def test_whatever_is_changed_is_found(change: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match="not signed"):
        check(msgspec.structs.replace(sign_heartbeat(BEAT, KEY), **change))
    assert set(Heartbeat.__struct_fields__) == {
        "tenant", "environment", "agent", "term", "epoch", "digest", "head", "state", "proven_ago_s",
        "challenge", "signature",
    }  # fmt: skip


def test_another_key_another_question_and_another_speaker_are_refused() -> None:
    with pytest.raises(IntegrityError, match="not signed"):
        check(sign_heartbeat(BEAT, Ed25519PrivateKey.generate()))
    with pytest.raises(IntegrityError, match="another question"):
        check(sign_heartbeat(BEAT, KEY), challenge=new_challenge())
    for other in ({"environment": "gcp-eu"}, {"agent": "hq-2"}, {"tenant": "globex"}):
        with pytest.raises(IntegrityError, match="speaks for"):
            check(sign_heartbeat(msgspec.structs.replace(BEAT, **other), KEY))


@pytest.mark.parametrize(
    "wire",
    [b"{}", b"[]", b'{"tenant": 1}', msgspec.json.encode(BEAT).replace(b'"term":3', b'"term":-3'),
     msgspec.json.encode(BEAT).replace(b'"term":3', b'"term":3,"more":1'),
     msgspec.json.encode(BEAT).replace(b"1.25", b"-1.0")],
)  # fmt: skip
def test_what_is_no_heartbeat_is_not_read(wire: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(wire, type=Heartbeat)


def test_challenges_do_not_come_twice() -> None:
    assert len({new_challenge() for _ in range(1000)}) == 1000
