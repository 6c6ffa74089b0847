"""What the native API reads: strict JSON, strict base64, nothing that crashes."""

import base64
import contextlib
import json
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.encryption_service.dialects import native_bodies as bodies
from proxy.encryption_service.dialects.native_bodies import Ciphertext, MalformedError, Reader
from proxy.encryption_service.dialects.native_openapi import JSON_CALLS

READERS: list[Reader[object]] = [
    Reader(kind) for call in JSON_CALLS.values() for kind in (call.request, call.batch) if kind is not None
]
ENCRYPT: Reader[bodies.EncryptRequest] = Reader(bodies.EncryptRequest)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(min_value=-(10**30), max_value=10**30),
        st.floats(),
        st.text(),
        st.binary(max_size=40).map(lambda raw: base64.b64encode(raw).decode()),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner)),
    max_leaves=8,
)
NAMES = st.sampled_from(["plaintext", "ciphertext", "aad", "context", "items", "size_bytes", "message", "x"])


@given(body=st.dictionaries(NAMES, VALUES, max_size=5), raw=st.binary(max_size=100))
def test_whatever_comes_is_read_or_refused(body: dict[str, object], raw: bytes) -> None:
    for reader in READERS:
        for text in (json.dumps(body).encode(), raw):
            with contextlib.suppress(MalformedError):
                reader.read(text)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"plaintext":' + b"[" * 100_000,
        b'{"plaintext":"aGk=","unknown":' + b'{"a":' * 100_000,
        b'{"plaintext":"aGk=","unknown":1}',
        b'{"plaintext":"aGk="}{}',
        b'{"plaintext":null}',
        b'{"plaintext":5}',
        b'{"plaintext":NaN}',
        b'{"plaintext":"\\ud800"}',
        b'{"plaintext":"\xff"}',
        b'\xef\xbb\xbf{"plaintext":"aGk="}',
        b"{'plaintext':'aGk='}",
        b'{"PLAINTEXT":"aGk="}',
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_hostile_json_is_refused_in_one_short_line(raw: bytes) -> None:
    with pytest.raises(MalformedError) as caught:
        ENCRYPT.read(raw)
    text = str(caught.value)
    assert 0 < len(text) <= 512
    assert text.isprintable()


@given(text=st.text(alphabet=string.ascii_letters + string.digits + "+/=-_ \r\n\t", max_size=20))
def test_base64_is_standard_and_padded(text: str) -> None:
    is_one = re.fullmatch(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?", text)
    body = json.dumps({"plaintext": text}).encode()
    if is_one:
        assert ENCRYPT.read(body).plaintext == base64.b64decode(text, validate=True)
        return
    with pytest.raises(MalformedError):
        ENCRYPT.read(body)


def test_the_last_of_duplicate_names_counts() -> None:
    read = ENCRYPT.read(b'{"plaintext":"aGk=","plaintext":"aGE="}')
    assert read.plaintext == b"ha"


@given(
    version=st.integers(min_value=1, max_value=0xFFFFFFFF),
    nonce=st.binary(min_size=24, max_size=24),
    ciphertext=st.binary(max_size=50),
    tag=st.binary(min_size=16, max_size=16),
)
def test_a_ciphertext_comes_apart_as_it_was_put_together(
    version: int, nonce: bytes, ciphertext: bytes, tag: bytes
) -> None:
    packed = bodies.pack(version, nonce, ciphertext, tag)
    assert Ciphertext.parse(packed) == Ciphertext(version, nonce, ciphertext, tag)


@given(packed=st.binary(max_size=80))
def test_what_is_no_ciphertext_is_none(packed: bytes) -> None:
    parsed = Ciphertext.parse(packed)
    if parsed is None:
        assert len(packed) < 45 or packed[:1] != b"\x01"
    else:
        assert bodies.pack(parsed.version, parsed.nonce, parsed.ciphertext, parsed.tag) == packed
