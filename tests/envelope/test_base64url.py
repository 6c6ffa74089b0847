import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.base64url import b64u_decode, b64u_encode, encoded_length
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
