"""Rows have one form, and a signature that fits nothing else."""

import gc
import json
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from envelope.errors import FormatError, IntegrityError
from envelope.keys import KeyState, KeyUse
from key_agent.environments.shared import documents
from key_agent.environments.shared.documents import (
    BODIES,
    DekBody,
    Delta,
    EnvironmentBody,
    Kind,
    RingBody,
    ServiceBody,
    SharedRow,
    TenantBody,
    body_text,
    check_head,
    check_row,
    check_shape,
    decode_delta,
    digest_of,
    encode_delta,
    read_body,
    row_digest,
    sign_head,
    sign_row,
)
from key_agent.environments.states import EnvironmentState

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEYS = {"agent-a": KEY.public_key(), "agent-b": Ed25519PrivateKey.generate().public_key()}
RING = RingBody(service="acme/files", use=KeyUse.DATA)


def row(**changes: Any) -> SharedRow:
    made = sign_row(
        KEY, tenant="acme", kind=Kind.RING, row_id="ab" * 16, body=RING, term=3, epoch=17, signer="agent-a"
    )
    return msgspec.structs.replace(made, **changes)


def delta(**changes: Any) -> Delta:
    """Its head is signed as it is, then it is changed."""
    rows = (row(),)
    digest = digest_of((one.key, row_digest(one)) for one in rows)
    head = sign_head(KEY, tenant="acme", term=3, epoch=17, digest=digest)
    made = Delta(
        tenant="acme",
        term=3,
        epoch_from=16,
        epoch_to=17,
        rows=rows,
        digest=digest,
        signer="agent-a",
        signature=head.signature,
    )
    return msgspec.structs.replace(made, **changes)


def test_vector_of_a_row() -> None:
    made = row()
    assert made.body == '{"algorithm":null,"service":"acme/files","use":"data"}'
    assert made.signature == (
        "77f8d9b483e8aeca8ccce9fc4595f5f01bbabe499672b28ea3c2d36b2a8e2ced"
        "7562e0df1cfa0690af76686af8a3c5233c51a69a87a827956546ab3f0c0e7b0f"
    )
    assert row_digest(made).hex() == "bdc94369b6e334ae9d8c5fd16c149b92b306a96d6e486f0c8589606d7210209b"
    check_row("acme", made, KEYS)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": Kind.SERVICE},
        {"id": "ac" * 16},
        {"term": 4},
        {"epoch": 18},
        {"signer": "agent-b"},
        {"signer": "agent-c"},
        {"body": body_text(msgspec.structs.replace(RING, service="acme/file"))},
        {"signature": "00" * 64},
        {"signature": ""},
        # What moves between fields is another row too.
        {"id": "ab" * 16 + "3", "term": 17},
    ],
)
def test_a_row_with_anything_changed_is_not_believed(changes: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        check_row("acme", row(**changes), KEYS)


def test_a_row_of_another_tenant_is_not_believed() -> None:
    with pytest.raises(IntegrityError):
        check_row("acma", row(), KEYS)


def test_every_flipped_bit_of_a_signature_is_found() -> None:
    signature = bytes.fromhex(row().signature)
    for bit in range(len(signature) * 8):
        flipped = bytearray(signature)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            check_row("acme", row(signature=flipped.hex()), KEYS)


@pytest.mark.parametrize(
    "text",
    [
        '{"service":"acme/files","use":"data","algorithm":null}',  # another order
        '{"algorithm":null, "service":"acme/files","use":"data"}',  # a space
        '{"service":"acme/files","use":"data"}',  # a default left out
        '{"algorithm":null,"service":"acme/files","use":"data","x":1}',
        '{"algorithm":null,"algorithm":null,"service":"acme/files","use":"data"}',
        '{"algorithm":null,"service":"acme\\/files","use":"data"}',
        '{"algorithm":null,"service":"acme/files","use":"seal"}',
        "",
        "null",
    ],
)
def test_a_body_in_any_other_form_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        read_body(Kind.RING, text)


@given(reason=st.text(max_size=50), name=st.text(min_size=1, max_size=50), since_ms=st.integers(0, 2**53))
def test_any_text_has_one_form_in_ascii(reason: str, name: str, since_ms: int) -> None:
    body = EnvironmentBody(
        name=name,
        agent_id="agent",
        api_url="-",
        state=EnvironmentState.ACTIVE,
        since_ms=since_ms,
        reason=reason,
    )
    text = body_text(body)
    assert text.isascii()
    assert read_body(Kind.ENVIRONMENT, text) == body
    assert json.loads(text)["reason"] == reason
    assert body_text(read_body(Kind.ENVIRONMENT, text)) == text


def test_every_kind_has_a_body_that_refuses_unknown_fields() -> None:
    assert set(BODIES) == set(Kind)
    for kind, body in BODIES.items():
        assert body.__struct_config__.forbid_unknown_fields, kind
        assert body.__struct_config__.frozen, kind


def test_a_long_body_and_numbers_beyond_their_range_are_refused() -> None:
    with pytest.raises(FormatError):
        body_text(ServiceBody(pinned_dek="ab" * 40_000))
    with pytest.raises(FormatError):
        read_body(Kind.TENANT, body_text(TenantBody(home_environment="a")).replace("300", "3"))
    dek = DekBody(
        ring="-", service="acme/files", owner_environment="a", generator_environment="a", use=KeyUse.DATA,
        version=1, kcv="00" * 16, state=KeyState.ACTIVE, since_ms=0, created_at_ms=0,
    )  # fmt: skip
    with pytest.raises(FormatError):
        read_body(Kind.DEK, body_text(dek).replace('"version":1', '"version":2147483648'))


def test_a_delta_travels_with_its_head() -> None:
    made = delta()
    assert decode_delta(encode_delta(made)) == made
    check_shape(made)
    check_head("acme", made.head, KEY.public_key())


@pytest.mark.parametrize(
    "changes",
    [{"term": 4}, {"epoch_to": 18}, {"digest": "00" * 32}, {"signature": "00" * 64}, {"signature": ""}],
)
def test_a_head_with_anything_changed_is_not_believed(changes: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        check_head("acme", delta(**changes).head, KEY.public_key())


def test_a_head_is_its_tenants_and_its_signers() -> None:
    with pytest.raises(IntegrityError):
        check_head("acma", delta().head, KEY.public_key())
    with pytest.raises(IntegrityError):
        check_head("acme", delta().head, KEYS["agent-b"])


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch_from": 18},
        {"rows": (row(), row())},
        {"epoch_from": 17},
        {"rows": (row(epoch=16),)},
        {"rows": (row(epoch=18),)},
    ],
)
def test_a_delta_whose_epochs_make_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        check_shape(delta(**changes))


def test_what_is_too_long_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DELTA_BYTES", 100)
    with pytest.raises(FormatError, match="longer"):
        decode_delta(b"{" * 101)
    for data in (b"{", b"\xff", b"[]", b'{"tenant":1}'):
        with pytest.raises(FormatError, match="not a delta"):
            decode_delta(data)


def test_a_digest_depends_on_every_row_and_not_on_their_order() -> None:
    rows = [row(), row(id="cd" * 16), row(kind=Kind.SERVICE)]
    entries = [(one.key, row_digest(one)) for one in rows]
    assert digest_of(entries) == digest_of(reversed(entries))
    assert len({digest_of(entries[:count]) for count in range(4)}) == 4
    assert digest_of([(entries[0][0], entries[1][1])]) != digest_of(entries[:1])


def test_rows_are_not_the_collectors() -> None:
    """Tens of thousands of them would hold the event loop up each time it looks at everything (rule 6)."""
    row = SharedRow(kind=Kind.DEK, id="1", term=1, epoch=1, signer="agent-a", body="{}", signature="ab")
    assert not gc.is_tracked(row)
    shapes = [
        found
        for found in vars(documents).values()
        if isinstance(found, type) and issubclass(found, msgspec.Struct)
    ]
    assert len(shapes) >= 15
    assert [found.__name__ for found in shapes if found.__struct_config__.gc] == []
