"""Completing an upload in parts: which parts count, where the manifest goes, what S3 would refuse."""

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.multipart import Part, upload_ref
from envelope.objects import plain_length, sealed_length
from proxy.profiles.s3.multipart import (
    ListedPart,
    PartRules,
    asked_for,
    check_part_number,
    completion_document,
    plan_completion,
    read_completion,
)
from proxy.refusals import RefusedError
from proxy.uploads import KeptPart

REF = upload_ref("an upload")
MIB = 1024 * 1024
GIB = 1024 * MIB
RULES = PartRules()


def kept(number: int, plain_bytes: int, tag: str = "", *, is_held: bool = False) -> KeptPart:
    part = Part(number, sealed_length(plain_bytes), os.urandom(32))
    return KeptPart(part=part, tag=tag or f"{number:032x}", is_held=is_held)


def listed(*parts: KeptPart) -> list[ListedPart]:
    return [ListedPart(number=found.part.number, tag=found.tag) for found in parts]


def test_a_manifest_is_a_part_more_behind_a_large_last_part() -> None:
    parts = [kept(1, 8 * MIB), kept(2, 8 * MIB), kept(7, 5 * MIB)]
    plan = plan_completion(listed(*parts), parts, RULES, upload_ref=REF)
    assert (plan.final_number, plan.joined) == (8, None)
    assert plan.manifest.parts == tuple(found.part for found in parts)
    assert plan.manifest.upload_ref == REF
    got = read_completion(plan.request("f" * 32))
    assert [entry.number for entry in got] == [1, 2, 7, 8]
    assert [entry.tag for entry in got] == [*(found.tag for found in parts), "f" * 32]


def test_a_manifest_is_joined_to_a_small_last_part() -> None:
    parts = [kept(1, 8 * MIB), kept(2, 1, is_held=True)]
    plan = plan_completion(listed(*parts), parts, RULES, upload_ref=REF)
    assert (plan.final_number, plan.joined) == (2, parts[1])
    got = read_completion(plan.request("f" * 32))
    assert [(entry.number, entry.tag) for entry in got] == [(1, parts[0].tag), (2, "f" * 32)]


def test_the_service_judges_stored_bytes_and_the_rule_is_about_what_it_sees() -> None:
    edge = plain_length(sealed_length(5 * MIB - 5208))
    assert sealed_length(edge) == 5 * MIB
    assert not RULES.is_held(edge)
    assert RULES.is_held(edge - 1)


def test_a_part_that_is_no_last_one_is_judged_by_its_plaintext() -> None:
    parts = [kept(1, 5 * MIB - 1), kept(2, 8 * MIB)]
    with pytest.raises(RefusedError, match="part-too-small"):
        plan_completion(listed(*parts), parts, RULES, upload_ref=REF)
    exact = [kept(1, 5 * MIB), kept(2, 8 * MIB)]
    assert plan_completion(listed(*exact), exact, RULES, upload_ref=REF).final_number == 3


def test_the_list_may_omit_parts_and_choose_among_those_sent_twice() -> None:
    first, again, third = kept(1, 8 * MIB, "a" * 32), kept(1, 9 * MIB, "b" * 32), kept(3, 6 * MIB)
    everything = [again, first, kept(2, 8 * MIB), third, kept(4, 1)]
    for chosen in (first, again):
        plan = plan_completion(listed(chosen, third), everything, RULES, upload_ref=REF)
        assert plan.parts == (chosen, third)
        assert plan.manifest.plain_bytes == chosen.part.plain_bytes + 6 * MIB


def test_a_manifest_takes_the_place_of_no_part_that_was_left_out() -> None:
    parts = [kept(number, 8 * MIB) for number in (1, 2, 3, 9)]
    assert plan_completion(listed(*parts[:2]), parts, RULES, upload_ref=REF).final_number == 10
    parts.append(kept(10_000, 1, is_held=True))
    assert plan_completion(listed(*parts[:2]), parts, RULES, upload_ref=REF).final_number == 3


def test_letters_of_tags_are_compared_without_case() -> None:
    part = kept(1, 8 * MIB, "AB" * 16)
    plan = plan_completion([ListedPart(number=1, tag="ab" * 16)], [part], RULES, upload_ref=REF)
    assert plan.parts == (part,)


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        ([(2, "b"), (1, "a")], "part-order"),
        ([(1, "a"), (1, "a")], "part-order"),
        ([(1, "a"), (2, "other")], "part-unknown"),
        ([(1, "b")], "part-unknown"),
        ([(3, "a")], "part-unknown"),
        ([], "malformed-document"),
    ],
)
def test_what_s3_refuses(entries: list[tuple[int, str]], code: str) -> None:
    known = [kept(1, 8 * MIB, "a"), kept(2, 8 * MIB, "b")]
    wanted = [ListedPart(number=number, tag=tag) for number, tag in entries]
    with pytest.raises(RefusedError, match=code):
        plan_completion(wanted, known, RULES, upload_ref=REF)


def test_a_small_last_part_whose_bytes_are_lost_is_to_be_sent_again() -> None:
    parts = [kept(1, 8 * MIB), kept(2, 1)]
    with pytest.raises(RefusedError, match="part-unknown"):
        plan_completion(listed(*parts), parts, RULES, upload_ref=REF)


@pytest.mark.parametrize(
    ("text", "plain_bytes", "number"),
    [("1", 8 * MIB, 1), ("9999", 5 * GIB, 9999), ("10000", 1, 10_000), ("0001", None, 1)],
)
def test_part_numbers(text: str, plain_bytes: int | None, number: int) -> None:
    assert check_part_number(text, plain_bytes, RULES) == number


@pytest.mark.parametrize(
    ("text", "plain_bytes"),
    [
        ("0", 1),
        ("10001", 1),
        ("-1", 1),
        ("", 1),
        ("１", 1),
        ("000001", 1),
        ("10000", 5 * MIB),
        ("10000", None),
    ],
)
def test_part_numbers_that_are_not_usable(text: str, plain_bytes: int | None) -> None:
    with pytest.raises(RefusedError, match="part-number"):
        check_part_number(text, plain_bytes, RULES)


def test_swift_has_a_thousand_parts() -> None:
    rules = PartRules(max_parts=1000)
    with pytest.raises(RefusedError, match="part-number"):
        check_part_number("1000", 8 * MIB, rules)
    assert check_part_number("1000", 100, rules) == 1000
    last = [kept(1000, 100, is_held=True)]
    assert plan_completion(listed(*last), last, rules, upload_ref=REF).final_number == 1000


def test_an_object_of_terabytes_is_exact() -> None:
    """10,000 parts of 512 MiB, 4.88 TiB: every number of it, through the manifest and back."""
    parts = [kept(number, 512 * MIB) for number in range(1, 10_000)]
    parts.append(kept(10_000, 4 * MIB + 12_345, is_held=True))
    plan = plan_completion(listed(*parts), parts, RULES, upload_ref=REF)
    assert plan.manifest.plain_bytes == 9_999 * 512 * MIB + 4 * MIB + 12_345
    assert plan.manifest.parts_bytes == 9_999 * sealed_length(512 * MIB) + sealed_length(4 * MIB + 12_345)
    assert type(plan.manifest).parse(plan.manifest.encode()) == plan.manifest
    assert len(read_completion(plan.request("f" * 32))) == 10_000


def test_the_largest_part_of_a_service_that_takes_5_gib() -> None:
    assert sealed_length(5_363_471_256) <= 5 * GIB < sealed_length(5_363_471_257)


# Documents.


def document(inner: str, *, namespace: str = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"') -> bytes:
    return f"<CompleteMultipartUpload{namespace}>{inner}</CompleteMultipartUpload>".encode()


PART = "<Part><PartNumber>1</PartNumber><ETag>a</ETag></Part>"


def test_documents_as_clients_write_them() -> None:
    text = document(
        "\n <Part>\n  <ETag>&quot;9a-1&quot;</ETag>\n  <ChecksumCRC32>AAAAAA==</ChecksumCRC32>"
        "<PartNumber> 12 </PartNumber></Part><Part><PartNumber>13</PartNumber><ETag>bb</ETag></Part>"
    )
    assert read_completion(text) == [
        ListedPart(number=12, tag="9a-1", checksums={"ChecksumCRC32": "AAAAAA=="}),
        ListedPart(number=13, tag="bb"),
    ]
    assert [found.number for found in read_completion(document(PART, namespace=""))] == [1]
    assert read_completion(b'\xef\xbb\xbf<?xml version="1.0"?>' + document(PART)) != []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not xml",
        document(PART)[:-1],
        document(PART) + b"<more/>",
        b'<!DOCTYPE x [<!ENTITY e "1">]>' + document(PART),
        b"<!DOCTYPE x>" + document(PART),
        document("<Part><PartNumber>&e;</PartNumber><ETag>a</ETag></Part>"),
        document("<Part><PartNumber>1</PartNumber></Part>"),
        document("<Part><ETag>a</ETag></Part>"),
        document("<Part><PartNumber>1</PartNumber><PartNumber>2</PartNumber><ETag>a</ETag></Part>"),
        document("<Part><PartNumber>x</PartNumber><ETag>a</ETag></Part>"),
        document("<Part><PartNumber>1<a/></PartNumber><ETag>a</ETag></Part>"),
        document("<Part>text<PartNumber>1</PartNumber><ETag>a</ETag></Part>"),
        document("<Other/>"),
        document(PART, namespace=' xmlns="urn:other"'),
        document(f"<Part><PartNumber>1</PartNumber><ETag>{'a' * 1025}</ETag></Part>"),
        b"<Complete>" + PART.encode() + b"</Complete>",
        document(PART * 10_001),
    ],
)
def test_what_is_no_such_document(text: bytes) -> None:
    with pytest.raises(RefusedError, match="malformed-document"):
        read_completion(text)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damage_is_a_refusal_and_never_another_error(noise: bytes, at: int) -> None:
    good = document(PART)
    at %= len(good)
    with contextlib.suppress(RefusedError):
        read_completion(good[:at] + noise + good[at:])


@given(
    st.lists(
        st.tuples(st.integers(1, 99_999), st.text("abcdef0123456789-<&\"'", min_size=1, max_size=40)),
        max_size=20,
    )
)
def test_what_is_written_is_read(parts: list[tuple[int, str]]) -> None:
    clean = [(number, tag) for number, tag in parts if tag.strip('"')]
    got = read_completion(completion_document(clean))
    assert [(entry.number, entry.tag) for entry in got] == [(number, tag.strip('"')) for number, tag in clean]


def test_two_lists_are_one_wish_if_they_say_the_same() -> None:
    one = [ListedPart(number=1, tag="AB"), ListedPart(number=12, tag="c")]
    assert asked_for(one) == asked_for([ListedPart(number=1, tag="ab"), ListedPart(number=12, tag="c")])
    assert asked_for(one) != asked_for([ListedPart(number=1, tag="ab")])
    assert asked_for(one) != asked_for([ListedPart(number=11, tag="ab"), ListedPart(number=2, tag="c")])
