import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.base64url import b64u_decode, b64u_encode, decode_secret, encode_secret, encoded_length
from envelope.errors import FormatError


@given(st.binary(max_size=200))
def test_round_trip_and_length(data: bytes) -> None:
    text = b64u_encode(data)
    assert b64u_decode(text) == data
    assert len(text) == encoded_length(len(data))
    assert text == base64.urlsafe_b64encode(data).decode().rstrip("=")


@given(st.text(alphabet="AQgwZ-_+/=. \n\0é", max_size=12))
def test_a_value_has_one_spelling(text: str) -> None:
    try:
        data = b64u_decode(text)
    except FormatError:
        return
    assert b64u_encode(data) == text


@pytest.mark.parametrize(
    "text", ["A", "AA==", "AB", "AAB", "A+", "A/", "AA\n", " AA", "AA.", "ＡＡ", "AAAAA"]
)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        b64u_decode(text)


@given(st.binary(max_size=200) | st.binary(min_size=180, max_size=600))
def test_secrets_are_written_alike(data: bytes) -> None:
    text = encode_secret(data)
    assert text == b64u_encode(data).encode()
    assert decode_secret(text) == decode_secret(memoryview(text)) == data
    assert encode_secret(bytearray(data)) == encode_secret(memoryview(data)) == text


@given(st.text(alphabet="AQgwZ-_+/=. \n\0!", max_size=12))
def test_secrets_are_read_alike(text: str) -> None:
    try:
        data = b64u_decode(text)
    except FormatError:
        with pytest.raises(FormatError):
            decode_secret(text.encode())
    else:
        assert decode_secret(text.encode()) == data


def test_reading_and_writing_a_secret_leaves_its_arguments_alone() -> None:
    data, text = bytearray(b"\xfb\xff" * 20), bytearray(b"-_8" * 4)
    encode_secret(data)
    decode_secret(text)
    assert data == b"\xfb\xff" * 20
    assert text == b"-_8" * 4


@pytest.mark.parametrize("size", [191, 192, 193, 194, 383, 384, 385, 577])
def test_secrets_of_several_steps_have_one_spelling(size: int) -> None:
    text = encode_secret(bytes(range(256)) * 3)[:size]
    for at in range(0, size, 7):
        for wrong in (b"=", b"+", b"/", b"\n", b" ", b"\xff"):
            changed = text[:at] + wrong + text[at + 1 :]
            with pytest.raises(FormatError):
                decode_secret(changed)
    try:
        expected = b64u_decode(text.decode())
    except FormatError:
        with pytest.raises(FormatError):
            decode_secret(text)
    else:
        assert decode_secret(text) == expected
