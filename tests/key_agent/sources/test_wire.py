"""The frames between agent and worker: bounded, typed, and without room for a key."""

import io
import typing

import msgspec
import pytest

from envelope.keys import KeyId, KeyMaterial, KeyState
from key_agent.sources import wire
from key_agent.sources.source import Kek, WrapMethod, WrappedKey
from tests.key_agent.sources.conftest import REFERENCE, new_keys, owners

PIN = "a guessable PIN"
HELLO = wire.Hello(
    module_path="/module.so",
    module_arguments="",
    token_label="sealgate",
    token_serial=None,
    pin=PIN,
    agent_id="hq",
    signing_key_file=None,
    signing_certificate_file=None,
)
KEK = Kek(
    reference=REFERENCE,
    method=WrapMethod.GCM,
    token_serial="0001",
    canary_ciphertext=bytes(60),
    canary_sha256=bytes(32),
    created_at_ms=1,
)


def test_requests_survive_the_pipe() -> None:
    key = WrappedKey(
        owner=owners(1)[0],
        key_id=KeyId.random(),
        kek_id="kek-1",
        environment_id="env-1",
        method=WrapMethod.KW,
        wrapped=bytes(72),
        kcv=bytes(16),
        token_serial="0001",
        created_at_ms=1,
    )
    messages: list[wire.Message] = [
        HELLO,
        wire.Diagnose(kek=KEK, now_s=1.5),
        wire.Generate(kek=KEK, wanted=tuple(new_keys(3)), now_ms=1, budget_s=0.25),
        wire.Describe(methods=(WrapMethod.GCM,)),
    ]
    stream = io.BytesIO(b"".join(wire.encode(number, message) for number, message in enumerate(messages)))
    for number, message in enumerate(messages):
        read = wire.read_request(stream)
        assert read is not None
        assert (read.number, read.message) == (number, message)
    assert wire.read_request(stream) is None
    reply = wire.decode_reply(bytes(wire.encode(7, wire.Generated(keys=(key,))))[wire.LENGTH_SIZE :])
    assert reply.number == 7
    assert reply.message == wire.Generated(keys=(key,))


@pytest.mark.parametrize(
    "stream",
    [
        b"\0\0",
        b"\0\0\0\x05abc",
        (wire.FRAME_LIMIT + 1).to_bytes(4),
        b"\0\0\0\1\xc1",
        b"\0\0\0\5hello",
        bytes(wire.encode(1, wire.Done())),
    ],
    ids=["cut-length", "cut-body", "too-long", "no-msgpack", "another-type", "a-reply"],
)
def test_anything_else_is_a_protocol_error(stream: bytes) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.read_request(io.BytesIO(stream))


def test_an_oversized_message_is_not_sent() -> None:
    with pytest.raises(wire.ProtocolError, match="longer than a frame"):
        wire.encode(1, wire.Described(facts={"noise": bytes(wire.FRAME_LIMIT)}))


def test_a_reply_with_an_impossible_key_id_is_a_protocol_error() -> None:
    message = wire.Sealed(
        results=(
            wire.SealedEnvelopes(
                owner=owners(1)[0], tokens=(), failed_keys=((KeyId.random(), "x"),), failed_recipients=()
            ),
        )
    )
    frame = bytes(wire.encode(1, message))[wire.LENGTH_SIZE :]
    plain = msgspec.msgpack.decode(frame)
    plain["message"]["results"][0]["failed_keys"][0][0]["raw"] = b"short"
    with pytest.raises(wire.ProtocolError):
        wire.decode_reply(msgspec.msgpack.encode(plain))


def test_the_pin_is_in_no_repr() -> None:
    assert PIN not in repr(HELLO)
    assert PIN not in repr(wire.Numbered(1, HELLO))


def test_no_message_can_carry_key_material() -> None:
    """Walk through every type that can cross the pipe: KeyMaterial and bytearray are in none of them."""
    seen: set[object] = set()

    def walk(kind: object) -> None:
        if kind in seen:
            return
        seen.add(kind)
        for part in typing.get_args(kind):
            walk(part)
        if isinstance(kind, type) and hasattr(kind, "__annotations__"):
            for part in typing.get_type_hints(kind).values():
                walk(part)

    walk(wire.Request)
    walk(wire.Reply)
    assert {WrappedKey, KeyState, wire.Sealed} <= seen
    assert KeyMaterial not in seen
    assert bytearray not in seen
