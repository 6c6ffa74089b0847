"""What the transit dialect reads: two roads, one result; base64 as Go reads it; nothing that crashes."""

import base64
import binascii
import contextlib
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.encryption_service.dialects import transit_bodies as bodies
from proxy.encryption_service.dialects.transit_bodies import BodyError, Reader

KINDS = [
    bodies.EncryptBody,
    bodies.DecryptBody,
    bodies.RewrapBody,
    bodies.DataKeyBody,
    bodies.SignBody,
    bodies.VerifyBody,
    bodies.NoBody,
]
NAMES = [
    "plaintext",
    "ciphertext",
    "context",
    "associated_data",
    "key_version",
    "batch_input",
    "partial_failure_response_code",
    "bits",
    "input",
    "signature",
    "hmac",
    "prehashed",
    "salt_length",
    "reference",
    "hash_algorithm",
    "marshaling_algorithm",
    "unknown",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**30), max_value=10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    st.binary(max_size=40).map(lambda raw: base64.b64encode(raw).decode()),
    st.sampled_from(["", "1", "-1", "0x1", "true", "t", "x", "vault:v1:AAAA", "\u2028"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)


@given(body=BODIES, kind=st.sampled_from(KINDS))
def test_the_fast_road_and_the_slow_one_agree(body: dict[str, object], kind: type) -> None:
    reader: Reader[bodies.EncryptBody] = Reader(kind, max_items=1000)
    raw = json.dumps(body).encode()
    try:
        fast = reader._decode(raw)
    except Exception:  # noqa: BLE001 - the fast road gives up without a reason
        fast = None
    try:
        slow, ignored = reader._read_slowly(raw)
    except BodyError as error:
        refusal = error.text
        assert fast is None or "value out of range" in refusal
        return
    if fast is not None:
        assert fast == slow
        assert ignored == []


@given(raw=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode())))
def test_whatever_comes_is_read_or_refused(raw: bytes) -> None:
    for kind in KINDS:
        reader: Reader[bodies.EncryptBody] = Reader(kind, max_items=10)  # type: ignore[arg-type]
        with contextlib.suppress(BodyError):
            reader.read(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"plaintext":' + b"[" * 100_000,
        b'{"key_version":' + b"9" * 5000 + b"}",
        b'{"plaintext":"\\ud800"}',
        b'{"plaintext":"\xed\xa0\x80"}',
        b'{"plaintext":"\xff"}',
        b'{"plaintext":NaN}',
        b'{"plaintext":Infinity}',
        b'\xef\xbb\xbf{"plaintext":""}',
        b'{"plaintext":"a"}{}',
        b"{'plaintext':'a'}",
        b'{"plaintext":"\x00"}',
        b"\x00",
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_hostile_json_is_the_clients_fault(raw: bytes) -> None:
    with pytest.raises(BodyError) as caught:
        Reader(bodies.EncryptBody, max_items=10).read(raw)
    assert len(caught.value.text) < 500
    assert "\\ud800" not in caught.value.text
    assert "\n" not in caught.value.text


def test_the_last_of_duplicate_names_counts_on_both_roads() -> None:
    reader = Reader(bodies.EncryptBody, max_items=10)
    assert reader.read(b'{"plaintext":"a","plaintext":"b"}')[0].plaintext == "b"
    assert reader.read(b'{"plaintext":"a","plaintext":"b","x":1}') == (
        bodies.EncryptBody(plaintext="b"),
        ["x"],
    )


def test_more_values_than_a_batch_can_need_are_not_even_read() -> None:
    reader = Reader(bodies.EncryptBody, max_items=10)
    raw = b'{"x":[' + b"1," * 100_000 + b"1]}"
    with pytest.raises(BodyError, match="high complexity"):
        reader.read(raw)
    big = b'{"plaintext":"' + b"A" * 1_000_000 + b'"}'
    assert len(reader.read(big)[0].plaintext or "") == 1_000_000


@pytest.mark.parametrize(("items", "is_read"), [(0, False), (1, True), (10, True), (11, False)])
def test_a_batch_has_one_to_max_items(items: int, is_read: bool) -> None:
    raw = json.dumps({"batch_input": [{"plaintext": ""}] * items}).encode()
    reader = Reader(bodies.EncryptBody, max_items=10)
    if is_read:
        assert len(reader.read(raw)[0].batch_input or []) == items
        return
    with pytest.raises(BodyError):
        reader.read(raw)


# Base64.

NEARLY_BASE64 = st.one_of(
    st.text(alphabet="AQgwz019+/=\r\n -_é\x00", max_size=24),
    st.binary(max_size=30).map(lambda raw: base64.b64encode(raw).decode()),
    st.text(max_size=12),
)


@given(text=NEARLY_BASE64)
@example(text="AAAA=")  # Python 3.12 takes it
@example(text="AAAA\r\n====")
def test_base64_decodes_exactly_where_gos_rules_say(text: str) -> None:
    """That these are Go's rules is asked of the real `bao` in test_transit_against_bao.py."""
    at = bodies.illegal_base64_at(text)
    if at is None:
        expected = binascii.a2b_base64(text.replace("\r", "").replace("\n", ""))
        assert bodies.decode_base64(text) == expected
        return
    assert 0 <= at <= len(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BodyError, match=f"illegal base64 data at input byte {at}$"):
        bodies.decode_base64(text)


@given(raw=st.binary(max_size=100))
def test_base64_round_trip(raw: bytes) -> None:
    assert bodies.decode_base64(bodies.encode_base64(raw)) == raw


# Ciphertexts and signatures.


@given(
    version=st.integers(min_value=1, max_value=bodies.MAX_VERSION),
    nonce=st.binary(min_size=24, max_size=24),
    ciphertext=st.binary(max_size=50),
    tag=st.binary(min_size=16, max_size=16),
)
def test_ciphertext_round_trip(version: int, nonce: bytes, ciphertext: bytes, tag: bytes) -> None:
    text = bodies.format_ciphertext(version, nonce, ciphertext, tag)
    assert text.count(":") == 2
    assert bodies.parse_ciphertext(text) == bodies.Ciphertext(version, nonce, ciphertext, tag)


@given(text=st.one_of(st.text(max_size=60), st.text(alphabet="vault:v0123AZaz+/=_-\n", max_size=90)))
def test_only_what_is_made_here_parses(text: str) -> None:
    try:
        parsed = bodies.parse_ciphertext(text)
    except BodyError:
        pass
    else:
        made = bodies.format_ciphertext(parsed.version, parsed.nonce, parsed.ciphertext, parsed.tag)
        assert made == text, "one ciphertext has one spelling"
    for jws in (False, True):
        try:
            version, signature = bodies.parse_signature(text, jws=jws)
        except BodyError:
            continue
        assert 1 <= version <= bodies.MAX_VERSION
        assert isinstance(signature, bytes)


@pytest.mark.parametrize(("text", "jws"), [("vault:v1:AAAA=", False), ("vault:v1:AAAA====", True)])
def test_a_signature_has_no_padding_behind_whole_groups(text: str, jws: bool) -> None:
    with pytest.raises(BodyError):
        bodies.parse_signature(text, jws=jws)


@pytest.mark.parametrize("jws", [False, True])
@given(raw=st.binary(max_size=80))
def test_signature_round_trip(jws: bool, raw: bytes) -> None:
    text = bodies.format_signature(3, raw, jws=jws)
    assert bodies.parse_signature(text, jws=jws) == (3, raw)
    if jws:
        assert not set("+/=") & set(text)


def test_another_format_is_not_taken_for_this_one() -> None:
    packed = base64.b64encode(b"\x02" + bytes(60)).decode()
    with pytest.raises(BodyError, match="authentication failed"):
        bodies.parse_ciphertext(f"vault:v1:{packed}")
