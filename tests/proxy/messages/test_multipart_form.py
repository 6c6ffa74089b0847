"""Forms with files: every byte of what passes, not a byte of what is sealed, whatever the pieces."""

import email
import email.policy
import itertools
import os
from collections.abc import Sequence
from email.message import EmailMessage

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.keys import KeyId, NetworkService
from envelope.objects import Opener, Sealer, sealed_length
from proxy import refusals
from proxy.messages.multipart_form import (
    MAX_HEAD_BYTES,
    MAX_PARTS,
    PASS,
    Collect,
    FormPart,
    FormRewriter,
    Rule,
    Through,
    Treatment,
    boundary_of,
    ending_bytes,
)
from proxy.refusals import RefusedError

BOUNDARY = b"----WebKitFormBoundary7MA4YWxk"
OWNER = NetworkService("tenant-a", "drive")
KEY = os.urandom(32)
KEY_ID = KeyId(os.urandom(16))


def part(content: bytes, *lines: str) -> bytes:
    return b"".join((b"--", BOUNDARY, b"\r\n", "\r\n".join(lines).encode(), b"\r\n\r\n", content, b"\r\n"))


def text(name: str, value: bytes) -> bytes:
    return part(value, f'Content-Disposition: form-data; name="{name}"')


def upload(name: str, value: bytes, *more: str, filename: str = "a b.txt") -> bytes:
    return part(
        value,
        f'Content-Disposition: form-data; name="{name}"; filename="{filename}"',
        "Content-Type: text/plain",
        *more,
    )


def form(*parts: bytes) -> bytes:
    return b"".join((*parts, b"--", BOUNDARY, b"--\r\n"))


def rewritten(body: bytes, rule: Rule, *, step: int = 7) -> bytes:
    rewriter = FormRewriter(BOUNDARY, rule)
    out = b"".join(rewriter.feed(body[at : at + step]) for at in range(0, len(body), step))
    return out + rewriter.finish()


def everything_passes(_part: FormPart) -> Treatment:
    return PASS


def files_sealed(found: FormPart) -> Treatment:
    return Through(body=Sealer(KEY, OWNER, KEY_ID)) if found.is_file else PASS


def unsealed(stored: bytes) -> bytes:
    opener = Opener(OWNER, lambda _header: KEY)
    return bytes(opener.update(stored) + opener.finalize())


def contents(body: bytes) -> list[tuple[str, bytes]]:
    """Names and contents, as the standard library's parser of mail sees them."""
    head = b'Content-Type: multipart/form-data; boundary="' + BOUNDARY + b'"\r\n\r\n'
    message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    found = []
    for item in message.iter_parts():
        assert isinstance(item, EmailMessage)
        raw = item.get_payload(decode=True)
        assert isinstance(raw, bytes)
        found.append((str(item.get_param("name", header="content-disposition")), raw))
    return found


@pytest.mark.parametrize("step", [1, 2, 3, 31, 4096, 1 << 20])
def test_files_are_sealed_and_all_else_stays(step: int) -> None:
    secret = os.urandom(40_000) + b"\r\n--" + BOUNDARY[:-1] + b"\r\n-- \r\n"
    before, after = text("csrf", b"t0ken==\r\n--"), text("note", "grüß\n".encode())
    body = form(before, upload("doc", secret), upload("empty", b""), after)
    out = rewritten(body, files_sealed, step=step)
    names = ["csrf", "doc", "empty", "note"]
    got = contents(out)
    assert [name for name, _ in got] == names
    assert got[0] == contents(body)[0]
    assert unsealed(got[1][1]) == secret
    assert len(got[1][1]) == sealed_length(len(secret))
    assert unsealed(got[2][1]) == b""
    sealed_parts = upload("doc", got[1][1]) + upload("empty", got[2][1])
    assert out == form(before, sealed_parts, after)
    assert not any(secret[at : at + 16] in out for at in range(0, 40_000, 16))


def test_the_length_of_a_sole_file_is_known_when_its_head_is() -> None:
    secret = b"x" * 100_000
    body = form(text("key", b"name"), upload("file", secret))
    seen: list[int] = []

    def rule(found: FormPart) -> Treatment:
        if not found.is_file:
            return PASS
        plain = len(body) - found.content_at - ending_bytes(BOUNDARY)
        seen.append(plain)
        return Through(body=Sealer(KEY, OWNER, KEY_ID), plain_bytes=plain)

    out = rewritten(body, rule)
    assert seen == [100_000]
    assert len(out) == len(body) - 100_000 + sealed_length(100_000)


def test_a_content_of_another_length_than_known_is_refused() -> None:
    body = form(upload("file", b"x" * 100))
    for wrong in (99, 101):

        def rule(_found: FormPart, wrong: int = wrong) -> Through:
            return Through(body=Sealer(KEY, OWNER, KEY_ID), plain_bytes=wrong)

        with pytest.raises(RefusedError, match="bad-length"):
            rewritten(body, rule)


def test_a_parts_own_length_becomes_the_stored_one() -> None:
    body = form(upload("file", b"x" * 20_000, "Content-Length: 20000", "X-Other: 20000"))
    out = rewritten(body, files_sealed)
    assert b"\r\nContent-Length: %d\r\nX-Other: 20000\r\n" % sealed_length(20_000) in out
    for lie in ("19999", "20001"):
        with pytest.raises(RefusedError, match="bad-length"):
            rewritten(form(upload("file", b"x" * 20_000, f"Content-Length: {lie}")), files_sealed)


def test_a_field_is_collected_and_replaced() -> None:
    def rule(found: FormPart) -> Treatment:
        return Collect(function=bytes.upper, limit_bytes=10) if found.name == "policy" else PASS

    body = form(text("a", b"left"), text("policy", b"abc"), text("b", b"left"))
    assert rewritten(body, rule) == form(text("a", b"left"), text("policy", b"ABC"), text("b", b"left"))
    with pytest.raises(RefusedError, match="too-large"):
        rewritten(form(text("policy", b"x" * 11)), rule)


def test_what_replaces_a_field_cannot_end_it() -> None:
    def rule(_found: FormPart) -> Collect:
        return Collect(function=lambda _value: b"x\r\n--" + BOUNDARY + b"--\r\n")

    with pytest.raises(RefusedError, match="bad-message"):
        rewritten(form(text("policy", b"abc")), rule)


def test_a_part_can_be_refused_by_its_rule() -> None:
    def rule(_found: FormPart) -> Treatment:
        raise RefusedError(refusals.UNKNOWN_ROUTE)

    rewriter = FormRewriter(BOUNDARY, rule)
    with pytest.raises(RefusedError, match="unknown-route"):
        rewriter.feed(form(text("a", b"b")))
    with pytest.raises(RefusedError):
        rewriter.feed(b"")
    with pytest.raises(RefusedError):
        rewriter.finish()


@pytest.mark.parametrize(
    ("line", "filename"),
    [
        ('form-data; name="f"; filename="C:\\dir\\x.txt"', "C:\\dir\\x.txt"),
        ('form-data; name="f"; filename="say \\"hi\\".txt"', 'say \\"hi\\".txt'),
        ("Form-Data;name=f;filename=x.txt", "x.txt"),
        ("form-data; name=\"f\"; filename*=UTF-8''na%C3%AFve.txt", "UTF-8''na%C3%AFve.txt"),
        ('form-data; name="f"; filename="n.txt"; filename*=UTF-8\'\'%C3%AF.txt;', "n.txt"),
        ('form-data; name="f"; filename=""', ""),
        ('form-data; name="f"', None),
    ],
)
def test_names_of_files_as_clients_write_them(line: str, filename: str | None) -> None:
    seen: list[FormPart] = []

    def rule(found: FormPart) -> Treatment:
        seen.append(found)
        return PASS

    body = form(part(b"x", "content-disposition: " + line, "CONTENT-TYPE: Text/Plain; charset=utf-8"))
    assert rewritten(body, rule) == body
    assert (seen[0].name, seen[0].filename, seen[0].is_file) == ("f", filename, filename is not None)
    assert seen[0].content_type == "text/plain"


NAMED = 'Content-Disposition: form-data; name="f"'
FILE = NAMED + '; filename="x"'


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"preamble\r\n" + form(text("a", b"b")), id="preamble"),
        pytest.param(b"\r\n\r\n" + form(text("a", b"b")), id="two line ends first"),
        pytest.param(form(text("a", b"b")) + b"epilogue", id="epilogue"),
        pytest.param(form(text("a", b"b")) + b"\r\n", id="two line ends last"),
        pytest.param(form(text("a", b"b"))[:-4], id="no last delimiter"),
        pytest.param(form(text("a", b"b"))[:-3], id="half a last delimiter"),
        pytest.param(form(text("a", b"x\n--" + BOUNDARY + b"\r\ny")), id="bare line feed"),
        pytest.param(form(text("a", b"x\r\n--" + BOUNDARY + b"xx\r\ny")), id="longer boundary"),
        pytest.param(form(text("a", b"x\r\n--" + BOUNDARY + b" \r\n\r\ny")), id="padding"),
        pytest.param(form(text("a", b"x\r\n--" + BOUNDARY + b"\ny")), id="line feed behind the delimiter"),
        pytest.param(form(text("a", b"--" + BOUNDARY + b"\r\n" + NAMED.encode())), id="no content at all"),
        pytest.param(form(part(b"x", NAMED + "; other=1")), id="another parameter"),
        pytest.param(form(part(b"x", NAMED + ";", ' filename="x"')), id="folded head"),
        pytest.param(form(part(b"x", "Content-Type: text/plain")), id="no disposition"),
        pytest.param(form(part(b"x", NAMED, NAMED)), id="two dispositions"),
        pytest.param(form(part(b"x", NAMED + '; name="g"')), id="two names"),
        pytest.param(form(part(b"x", "Content-Disposition: form-data")), id="no name"),
        pytest.param(form(part(b"x", 'Content-Disposition: form-data; name="a\\"b"')), id="escaped name"),
        pytest.param(form(part(b"x", NAMED + "; name*=UTF-8''g")), id="extended name"),
        pytest.param(form(part(b"x", NAMED + '; filename="a\\"; name="g"')), id="ends for some"),
        pytest.param(form(part(b"x", 'Content-Disposition: attachment; name="f"')), id="no form data"),
        pytest.param(form(part(b"x", NAMED + " x")), id="text behind a parameter"),
        pytest.param(form(part(b"x", NAMED, "Content-Type : text/plain")), id="space before the colon"),
        pytest.param(form(part(b"x", NAMED, "Content-Type: multipart/mixed; boundary=b")), id="nested"),
        pytest.param(form(part(b"x", FILE, "Content-Transfer-Encoding: base64")), id="coded twice"),
        pytest.param(form(part(b"x", FILE, "Content-MD5: AAAAAAAAAAAAAAAAAAAAAA==")), id="digest"),
        pytest.param(form(part(b"x", FILE, "Content-Length: +1")), id="length"),
        pytest.param(form(part(b"x", NAMED, "X: " + "x" * MAX_HEAD_BYTES)), id="long head"),
        pytest.param(form(*[text("a", b"")] * (MAX_PARTS + 1)), id="many parts"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"--" + BOUNDARY + b"--\n", id="line feed last"),
        pytest.param(b"x=1&y=2", id="another kind of form"),
    ],
)
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_what_two_readers_could_take_for_two_forms_is_refused(body: bytes, step: int) -> None:
    with pytest.raises(RefusedError):
        rewritten(body, files_sealed, step=step)


def test_a_form_without_parts_and_one_behind_a_line_end_are_forms() -> None:
    empty = b"--" + BOUNDARY + b"--"
    assert rewritten(empty, everything_passes) == empty
    assert rewritten(b"\r\n" + form(text("a", b"b")), everything_passes) == b"\r\n" + form(text("a", b"b"))


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=abcdef", b"abcdef"),
        ('Multipart/Form-Data; charset=utf-8; Boundary="a b:cdef"', b"a b:cdef"),
        ("multipart/form-data; boundary=" + "x" * 70, b"x" * 70),
    ],
)
def test_boundaries(content_type: str, boundary: bytes) -> None:
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=abcde",
        "multipart/form-data; boundary=abcdef; boundary=ghijkl",
        'multipart/form-data; boundary="abcdef "',
        "multipart/form-data; boundary=" + "x" * 71,
        "multipart/form-data; boundary=abc\xe9def",
        "multipart/mixed; boundary=abcdef",
        "application/x-www-form-urlencoded; boundary=abcdef",
    ],
)
def test_boundaries_that_may_not_be_used(content_type: str) -> None:
    with pytest.raises(RefusedError, match="bad-message"):
        boundary_of(content_type)


def cut(body: bytes, cuts: Sequence[int]) -> list[bytes]:
    at = sorted({0, len(body), *(place % (len(body) + 1) for place in cuts)})
    return [body[begin:end] for begin, end in itertools.pairwise(at)]


def run(pieces: Sequence[bytes], rule: Rule) -> bytes | None:
    """What comes out; None if it was refused."""
    rewriter = FormRewriter(BOUNDARY, rule)
    try:
        return b"".join([rewriter.feed(piece) for piece in pieces]) + rewriter.finish()
    except RefusedError:
        return None


_TOKENS: list[bytes] = [
    b"\r",
    b"\n",
    b"\r\n",
    b"--",
    b"--" + BOUNDARY,
    b"\r\n--" + BOUNDARY,
    b"\r\n\r\n",
    b'Content-Disposition: form-data; name="f"',
    b'; filename="x"',
    b"x",
    BOUNDARY[:9],
]
_SOUPS = st.lists(st.sampled_from(_TOKENS) | st.binary(max_size=4), max_size=24).map(b"".join)
_CUTS = st.lists(st.integers(0, 10_000), max_size=8)


@given(_SOUPS, _CUTS)
def test_what_passes_is_what_came_and_pieces_change_nothing(soup: bytes, cuts: list[int]) -> None:
    body = form(text("a", b"b"), upload("f", soup), text("c", soup))
    for candidate in (body, soup, b"--" + BOUNDARY + soup):
        whole = run([candidate], everything_passes)
        assert whole in (None, candidate)
        assert run(cut(candidate, cuts), everything_passes) == whole


@given(_SOUPS, st.integers(0, 10_000), st.binary(max_size=3), st.integers(0, 3))
def test_no_damage_lets_a_file_out(soup: bytes, place: int, inserted: bytes, dropped: int) -> None:
    """A canary in a file's content never leaves while anybody could take it for a file's."""
    canary = b"CANARY-" + os.urandom(16).hex().encode()
    good = form(text("a", b"b"), upload("f", soup + canary))
    at = place % len(good)
    damaged = good[:at] + inserted + good[at + dropped :]
    out = run([damaged], files_sealed)
    if out is not None and canary in out:
        # Then it is in no file, even to a reader that splits at delimiters wherever they stand.
        around = damaged.partition(canary)[0].rpartition(b"--" + BOUNDARY)[2]
        assert b"filename" not in around.lstrip().partition(b"\r\n\r\n")[0]


def test_memory_does_not_grow_with_contents() -> None:
    rewriter = FormRewriter(BOUNDARY, everything_passes)
    sent = rewriter.feed(form(upload("f", b""))[: -len(BOUNDARY) - 8])
    piece = os.urandom(1 << 16)
    for _ in range(64):
        sent = rewriter.feed(piece)
        assert len(rewriter._pending) <= len(BOUNDARY) + 4
        assert len(sent) > 0
