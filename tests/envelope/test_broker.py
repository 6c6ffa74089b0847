"""What travels through a broker: strict on both ends, and receipts that only the session's ends can make."""

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.broker import (
    MAX_ENVELOPES,
    BrokeredDelivery,
    agent_tag,
    answer_subject,
    answered_message,
    decode_delivery,
    delivery_subject,
    open_answer,
    proxy_tag,
    seal_answer,
)
from envelope.errors import FormatError, IntegrityError, MisuseError, SealgateError

AGENT = agent_tag("acme", "hq")
DELIVERY = BrokeredDelivery(
    message_id=bytes(range(16)), agent=AGENT, is_challenged=True, tokens=("a.b.c.d.e", "f.g.h.i.j")
)


@pytest.mark.parametrize("is_challenged", [True, False])
@pytest.mark.parametrize("count", [1, 2, MAX_ENVELOPES])
def test_a_delivery_comes_back(count: int, *, is_challenged: bool) -> None:
    delivery = replace(DELIVERY, is_challenged=is_challenged, tokens=("a.b.c.d.e",) * count)
    assert decode_delivery(delivery.encode()) == delivery


@pytest.mark.parametrize(
    "tokens", [(), ("",), ("a", ""), ("a\nb\n",), ("a b",), ("ä",), ("a",) * (MAX_ENVELOPES + 1)]
)
def test_what_is_no_delivery_is_not_made(tokens: tuple[str, ...]) -> None:
    with pytest.raises(MisuseError):
        replace(DELIVERY, tokens=tokens).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda message: message[:38],
        lambda message: b"SGBD\x02" + message[5:],
        lambda message: message[:5] + b"\x02" + message[6:],
        lambda message: message + b"\n",
        lambda message: message + b"\xff",
        lambda message: message + b" ",
        lambda message: message + b"\nx" * MAX_ENVELOPES,
    ],
)
def test_what_is_no_delivery_is_refused(change: object) -> None:
    assert callable(change)
    with pytest.raises(FormatError):
        decode_delivery(change(DELIVERY.encode()))


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_a_format_error(message: bytes) -> None:
    for read in (decode_delivery, answered_message):
        try:
            read(message)
        except FormatError:
            continue


def test_names_do_not_stand_in_subjects() -> None:
    subjects = [
        delivery_subject("proxy-1", withdraws=True),
        delivery_subject("proxy-1", withdraws=False),
        answer_subject(AGENT, "proxy-1"),
    ]
    assert len(set(subjects)) == 3
    assert not any(name in subject for subject in subjects for name in ("proxy-1", "acme", "hq"))
    assert agent_tag("ab", "c") != agent_tag("a", "bc")
    assert proxy_tag("a") != agent_tag("a", "")


def test_receipts_are_for_one_session_agent_proxy_and_message() -> None:
    place = {"challenge": os.urandom(16), "message_id": os.urandom(16), "agent": AGENT}
    answer = seal_answer(b"receipts", proxy_id="proxy-1", **place)
    assert answered_message(answer) == place["message_id"]
    assert b"receipts" not in answer
    assert open_answer(answer, proxy_id="proxy-1", **place) == b"receipts"
    for name in place:
        with pytest.raises(IntegrityError):
            open_answer(answer, proxy_id="proxy-1", **(place | {name: os.urandom(16)}))
    with pytest.raises(IntegrityError):
        open_answer(answer, proxy_id="proxy-2", **place)
    for at in range(len(answer)):
        with pytest.raises(SealgateError):
            open_answer(
                answer[:at] + bytes((answer[at] ^ 1,)) + answer[at + 1 :], proxy_id="proxy-1", **place
            )
    assert seal_answer(b"receipts", proxy_id="proxy-1", **place) != answer
