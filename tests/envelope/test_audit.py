import hashlib
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.audit import (
    EMPTY,
    MAX_LINE_BYTES,
    BrokenChainError,
    Head,
    Value,
    check_line,
    encode_event,
    verify,
)
from envelope.errors import FormatError, IntegrityError, MisuseError

WALL_S = 1_800_000_000.0


def chain(count: int, head: Head = EMPTY) -> list[bytes]:
    lines = []
    for number in range(count):
        line, head = encode_event(
            head,
            wall_s=WALL_S + number,
            action="object.sealed",
            fields={"service": "acme/s3", "number": number},
        )
        lines.append(line)
    return lines


def rehash(body: dict[str, object]) -> bytes:
    """The line an attacker would write who knows how hashes are made, but not what follows."""
    text = json.dumps(body, separators=(",", ":")).encode()
    return text[:-1] + b',"hash":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def test_a_line_is_as_documented() -> None:
    line, head = encode_event(
        EMPTY,
        wall_s=WALL_S + 0.25,
        action="key.withdrawn",
        outcome="ok",
        fields={"b": None, "a": "x", "n": 3},
    )
    body = (
        b'{"seq":1,"time":"2027-01-15T08:00:00.250Z","action":"key.withdrawn","outcome":"ok","a":"x","b":null,"n":3,'
        b'"prev":"' + b"0" * 64 + b'"}'
    )
    digest = hashlib.sha256(body).hexdigest()
    assert line == body[:-1] + b',"hash":"' + digest.encode() + b'"}\n'
    assert head == Head(1, digest)
    assert json.loads(line)["hash"] == digest


def test_a_chain_verifies_from_any_known_head() -> None:
    lines = chain(5)
    head = verify(lines)
    assert head.seq == 5
    middle = verify(lines[:2])
    assert verify(lines[2:], start=middle) == head
    assert verify([]) == EMPTY


text = st.text(max_size=60)


@given(
    fields=st.dictionaries(
        st.from_regex(r"f[a-z0-9_]{0,8}", fullmatch=True),
        st.none() | text | st.integers() | st.booleans(),
        max_size=5,
    ),
    wall_s=st.floats(min_value=1e9, max_value=4e9),
)
def test_whatever_the_fields_hold_verifies_and_is_one_ascii_line(
    fields: dict[str, Value], wall_s: float
) -> None:
    first, head = encode_event(EMPTY, wall_s=wall_s, action="a", fields=fields)
    second, last = encode_event(head, wall_s=wall_s, action="b", fields=fields)
    assert verify([first, second]) == last
    assert first.isascii()
    assert first.count(b"\n") == 1
    assert all(byte >= 0x20 for byte in first[:-1])
    event = json.loads(first)
    assert {name: event[name] for name in fields} == fields


def test_text_with_surrogates() -> None:
    line, head = encode_event(EMPTY, wall_s=WALL_S, action="a", fields={"path": "caf\udce9"})
    assert verify([line]) == head


def test_every_flipped_bit_shows() -> None:
    first, second = chain(2)
    for position in range(len(first)):
        for bit in range(8):
            changed = bytearray(first)
            changed[position] ^= 1 << bit
            with pytest.raises(BrokenChainError):
                # Joined and split again as a file would be: a flipped bit can make a line break.
                verify((bytes(changed) + second).splitlines(keepends=True))


def test_every_truncation_shows() -> None:
    (line,) = chain(1)
    for length in range(1, len(line)):
        with pytest.raises(BrokenChainError):
            verify([line[:length]])


def delete(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines[2:]]


def delete_first(lines: list[bytes]) -> list[bytes]:
    return lines[1:]


def swap(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], lines[3]]


def double(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1], lines[1], *lines[2:]]


def edit(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b"acme", b"acne"), *lines[2:]]


def edit_and_rehash(lines: list[bytes]) -> list[bytes]:
    body = json.loads(lines[1])
    del body["hash"]
    body["service"] = "acne/s3"
    return [lines[0], rehash(body), *lines[2:]]


def insert(lines: list[bytes]) -> list[bytes]:
    head = verify(lines[:2])
    extra, _ = encode_event(head, wall_s=WALL_S, action="forged", fields={})
    return [*lines[:2], extra, *lines[2:]]


def splice(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], *chain(1), lines[3]]


def empty_line(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], b"\n", *lines[2:]]


@pytest.mark.parametrize(
    ("tamper", "line_number"),
    [
        (delete, 2),
        (delete_first, 1),
        (swap, 2),
        (double, 3),
        (edit, 2),
        (edit_and_rehash, 3),
        (insert, 4),
        (splice, 3),
        (empty_line, 3),
    ],
)
def test_tampering_is_located(tamper: Callable[[list[bytes]], list[bytes]], line_number: int) -> None:
    with pytest.raises(BrokenChainError) as caught:
        verify(tamper(chain(4)))
    assert caught.value.line_number == line_number


@pytest.mark.parametrize("seq", [1, 3, 0, -1])
def test_numbers_have_no_gap_though_hashes_fit(seq: int) -> None:
    first, second = chain(2)
    body = json.loads(second)
    del body["hash"]
    body["seq"] = seq
    with pytest.raises(BrokenChainError, match=f"event {seq} stands where 2 should"):
        verify([first, rehash(body)])


def test_a_cut_end_shows_only_against_a_recorded_head() -> None:
    lines = chain(4)
    recorded = verify(lines[:3])
    assert verify(lines[:2]).seq == 2  # documented: the chain alone cannot tell
    with pytest.raises(BrokenChainError, match="event 3 with its recorded hash"):
        verify(lines[:2], expected=recorded)
    assert verify(lines, expected=recorded).seq == 4
    assert verify(lines[3:], start=recorded, expected=recorded).seq == 4


def test_a_rewritten_chain_shows_against_a_recorded_head() -> None:
    recorded = verify(chain(3))
    rewritten = [line for number, line in enumerate(chain(4)) if number != 3]
    body = json.loads(rewritten[2])
    del body["hash"]
    body["number"] = 99
    forged = [*rewritten[:2], rehash(body)]
    assert verify(forged).seq == 3
    with pytest.raises(BrokenChainError):
        verify(forged, expected=recorded)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body | {"seq": True},
        lambda body: body | {"seq": "1"},
        lambda body: body | {"time": "yesterday"},
        lambda body: body | {"action": "A b"},
        lambda body: body | {"outcome": 3},
        lambda body: body | {"prev": "0" * 63},
        lambda body: {"time": body["time"], **body},
        lambda body: {name: value for name, value in body.items() if name != "outcome"},
        lambda body: {name: value for name, value in body.items() if name != "prev"},
        lambda body: body | {"zz": 1},  # behind prev
        lambda body: {
            "seq": 1,
            "time": body["time"],
            "action": "a",
            "outcome": "ok",
            "B": 1,
            "prev": "0" * 64,
        },
        lambda body: {
            "seq": 1,
            "time": body["time"],
            "action": "a",
            "outcome": "ok",
            "f": 1.5,
            "prev": "0" * 64,
        },
        lambda body: {
            "seq": 1,
            "time": body["time"],
            "action": "a",
            "outcome": "ok",
            "f": [],
            "prev": "0" * 64,
        },
        lambda body: {
            "seq": 1,
            "time": body["time"],
            "action": "a",
            "outcome": "ok",
            "g": 1,
            "f": 1,
            "prev": "0" * 64,
        },
    ],
)
def test_what_is_not_an_event_is_refused_though_its_hash_fits(
    change: Callable[[dict[str, object]], dict[str, object]],
) -> None:
    (line,) = chain(1)
    body = json.loads(line)
    del body["hash"]
    assert check_line(rehash(body)[:-1], EMPTY).seq == 1
    with pytest.raises(FormatError):
        check_line(rehash(change(body))[:-1], EMPTY)


@pytest.mark.parametrize(
    "text",
    [
        b'{"seq":1, "time":"2027-01-15T08:00:00.000Z","action":"a","outcome":"ok","prev":"%b"}',
        b'{"seq":1,"seq":1,"time":"2027-01-15T08:00:00.000Z","action":"a","outcome":"ok","prev":"%b"}',
        b'{"seq":1,"time":"2027-01-15T08:00:00.000Z","action":"\\u0061","outcome":"ok","prev":"%b"}',
        b'{"seq":1,"time":"2027-01-15T08:00:00.000Z","action":"a","outcome":"ok","f":NaN,"prev":"%b"}',
        b'["%b"]',
        b'"%b"',
        b"%b",
    ],
)
def test_there_is_one_way_to_write_an_event(text: bytes) -> None:
    body = text % (b"0" * 64)
    digest = hashlib.sha256(body).hexdigest().encode()
    with pytest.raises(FormatError):
        check_line(body[:-1] + b',"hash":"' + digest + b'"}', EMPTY)


def test_the_hash_covers_the_line() -> None:
    line = chain(1)[0].rstrip(b"\n")
    with pytest.raises(IntegrityError, match="hash does not fit"):
        check_line(line[:-3] + (b"0" if line[-3:-2] != b"0" else b"1") + line[-2:], EMPTY)


@pytest.mark.parametrize(
    "name", ["seq", "time", "action", "outcome", "prev", "hash", "Upper", "1st", "a-b", "", "a\n"]
)
def test_field_names(name: str) -> None:
    with pytest.raises(MisuseError, match="not a name"):
        encode_event(EMPTY, wall_s=WALL_S, action="a", fields={name: 1})


@pytest.mark.parametrize("value", [b"secret", 1.5, [1], {"a": 1}, object()])
def test_field_values(value: object) -> None:
    with pytest.raises(MisuseError) as caught:
        encode_event(EMPTY, wall_s=WALL_S, action="a", fields={"f": value})  # type: ignore[dict-item]
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("word", ["", "Two words", "line\nbreak", "a\n", '"'])
def test_actions_and_outcomes_are_words(word: str) -> None:
    with pytest.raises(MisuseError):
        encode_event(EMPTY, wall_s=WALL_S, action=word, fields={})
    with pytest.raises(MisuseError):
        encode_event(EMPTY, wall_s=WALL_S, action="a", outcome=word, fields={})


def test_a_line_has_a_limit() -> None:
    with pytest.raises(MisuseError, match="at most"):
        encode_event(EMPTY, wall_s=WALL_S, action="a", fields={"path": "x" * MAX_LINE_BYTES})
