"""The border between HTTP and dialects."""

import pytest

from envelope.errors import MisuseError
from proxy.encryption_service.call import Answer, Call, DuplicateHeaderError, Peer, StreamingAnswer

CALL = Call(
    method="POST",
    path="/v1/%2e/x",
    headers=(("host", "a"), ("x-forwarded-for", "1"), ("x-forwarded-for", "2"), ("empty", "")),
    body=b"plaintext",
    peer=Peer(address="127.0.0.1", certificate_der=b"certificate"),
)


def test_headers_are_asked_for_by_name() -> None:
    assert CALL.header("host") == "a"
    assert CALL.header("empty") == ""
    assert CALL.header("absent") is None
    assert CALL.values("x-forwarded-for") == ["1", "2"]
    assert CALL.values("absent") == []


def test_a_header_that_decides_stands_once() -> None:
    with pytest.raises(DuplicateHeaderError):
        CALL.header("x-forwarded-for")


def test_bodies_and_certificates_are_not_shown() -> None:
    assert "plaintext" not in repr(CALL)
    assert "certificate'" not in repr(CALL)
    assert "secret" not in repr(Answer(status=200, body=b"secret"))


@pytest.mark.parametrize("header", [("a", "b\r\nSet-Cookie: x"), ("a\n", "b"), ("", "b"), ("a", "\0")])
def test_an_answers_header_is_one_line(header: tuple[str, str]) -> None:
    with pytest.raises(MisuseError):
        Answer(status=200, headers=(header,))
    with pytest.raises(MisuseError):
        StreamingAnswer(status=200, chunks=iter(()), headers=(header,))  # type: ignore[arg-type]
