"""What strangers write into the audit log stays one bounded, printable field."""

import json

import pytest

from envelope import audit
from envelope.keys import KeyId
from proxy.encryption_service.errors import AccessDenied, KeyRefused, NotRecorded, Refusal
from proxy.encryption_service.model import DialectName
from proxy.encryption_service.recording import (
    MAX_CHARS,
    MAX_DETAILS,
    Entry,
    Outcome,
    clean,
    error_code,
    fields_of,
    refused,
)

BAD = "".join(map(chr, [*range(32), *range(0x7F, 0xA0), 0x200B, 0x202E, 0x2028, 0x2029, 0xFEFF, 0xD800]))


@pytest.mark.parametrize("text", ["", "plain", "a" * MAX_CHARS, "Größe 東京 🔑", "{}\"'\\"])
def test_harmless_text_stands_as_it_is(text: str) -> None:
    assert clean(text) == text


def test_nothing_that_a_terminal_obeys_gets_through() -> None:
    for character in BAD:
        assert clean(f"a{character}b") == "a�b"
    assert clean('ok"\n{"seq":9,"action":"forged"}') == 'ok"�{"seq":9,"action":"forged"}'
    assert clean("\x1b[2J") == "�[2J"


@pytest.mark.parametrize("character", ["a", "\n", "é", "東", "🔑", "\ud800", '"'])
def test_length_is_bounded_also_when_it_is_escaped(character: str) -> None:
    cleaned = clean(character * 100_000)
    assert len(cleaned) <= MAX_CHARS
    assert len(json.dumps(cleaned)) <= 3100


def test_the_longest_entry_fits_a_line() -> None:
    longest = "🔑" * 10_000
    entry = Entry(
        dialect=DialectName.KACLS,
        operation=longest,
        tenant=longest,
        key=longest,
        version=2**31 - 1,
        key_id=KeyId.random(),
        caller=longest,
        credential_id=longest,
        request_id=longest,
        resource=longest,
        reason=longest,
        error=longest,
        items=1000,
        latency_us=10**9,
        detail={f"d{number}": longest for number in range(100)},
    )
    fields = fields_of(entry)
    assert sum(name.startswith("d") for name in fields) == MAX_DETAILS + 1  # and the dialect
    line, _head = audit.encode_event(audit.EMPTY, wall_s=0, action="service-call", fields=fields)
    assert len(line) < audit.MAX_LINE_BYTES


def test_empty_fields_are_left_out() -> None:
    fields = fields_of(Entry(dialect=DialectName.XKS, operation="health"))
    assert fields == {"dialect": "xks", "operation": "health", "latency_us": 0}


def test_details_replace_nothing() -> None:
    entry = Entry(dialect=DialectName.XKS, operation="x", tenant="acme", detail={"tenant": "globex"})
    assert fields_of(entry)["tenant"] == "acme"


def test_what_came_of_a_call_in_the_end() -> None:
    entry = Entry(dialect=DialectName.XKS, operation="encrypt", tenant="acme")
    after = refused(entry, KeyRefused(Refusal.SUSPENDED, "text for people"))
    assert (after.outcome, after.error, after.tenant) == (Outcome.REFUSED, "key-refused:suspended", "acme")
    assert refused(entry, NotRecorded("disk")).outcome is Outcome.FAILED
    assert error_code(AccessDenied("no")) == "access-denied"
