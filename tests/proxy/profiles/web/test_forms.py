"""Forms of web applications: Python's own parser of mail judges what comes out, and nothing of ours."""

import email
import email.policy
import hashlib
import os
from email.message import EmailMessage

import pytest

from envelope.keys import KeyId, NetworkService
from envelope.objects import Opener, Sealer, sealed_length
from proxy.messages.message import ExpectedDigest
from proxy.plans.conversing import PartOf
from proxy.profiles.web.forms import MAX_TEXTS_BYTES, SealedForm
from proxy.profiles.web.options import WebOptions
from proxy.refusals import RefusedError

OWNER = NetworkService("acme", "drive")
KEY, KEY_ID = os.urandom(32), KeyId(os.urandom(16))
BOUNDARY = b"----WebKitFormBoundary7MA4YWxk"
FILE = os.urandom(40_000)


def sealer(part: PartOf | None = None) -> Sealer:
    assert part is None
    return Sealer(KEY, OWNER, KEY_ID)


def text(name: str, value: bytes = b"value") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value


def file(content: bytes, name: str = "f", filename: str = "report.pdf", more: str = "") -> bytes:
    head = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'
    return f"{head}Content-Type: application/pdf\r\n{more}\r\n".encode() + content


def form(*parts: bytes) -> bytes:
    body = b"".join(b"--" + BOUNDARY + b"\r\n" + part + b"\r\n" for part in parts)
    return body + b"--" + BOUNDARY + b"--\r\n"


def sent(
    body: bytes,
    *,
    step: int = 1000,
    digests: tuple[ExpectedDigest, ...] = (),
    said: bool = True,
    **options: object,
) -> tuple[bytes, int | None]:
    """What the service gets, and the length that it is told."""
    total_bytes = len(body) if said else None
    made = SealedForm(BOUNDARY, WebOptions.of(options), sealer, total_bytes=total_bytes, digests=digests)
    out, told = b"", False
    length: int | None = None
    for at in range(0, len(body), step):
        piece = made.feed(body[at : at + step])
        if piece and not told:
            told, length = True, made.out_bytes
        out += piece
    last = made.finish()
    return out + last, length if told else made.out_bytes


def parts_of(body: bytes) -> list[tuple[EmailMessage, bytes]]:
    head = b"Content-Type: multipart/form-data; boundary=" + BOUNDARY + b"\r\n\r\n"
    parsed = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    assert isinstance(parsed, EmailMessage)
    found = []
    for part in parsed.iter_parts():
        assert isinstance(part, EmailMessage)
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        found.append((part, content))
    return found


def contents(body: bytes) -> list[bytes]:
    """Behind each part's head, byte for byte: a parser of mail would mend line ends."""
    pieces = body.split(b"--" + BOUNDARY)[1:-1]
    return [piece.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for piece in pieces]


def opened(stored: bytes) -> bytes:
    opener = Opener(OWNER, lambda _header: KEY)
    return bytes(opener.update(stored)) + opener.finalize()


@pytest.mark.parametrize("step", [1, 7, 16384, 1 << 20])
def test_files_are_sealed_and_all_else_stays(step: int) -> None:
    content = FILE if step > 1 else FILE[:500]
    body = form(text("act", b"bput"), file(content), text("note", "grüße".encode()), file(b"", name="g"))
    out, length = sent(body, step=step)
    assert length is None, "held, or in chunks"
    act, first, note, second = contents(out)
    assert (act, note) == (b"bput", "grüße".encode())
    assert (opened(first), opened(second)) == (content, b"")
    assert len(second) == 104
    heads = [part.partition(b"\r\n\r\n")[0] for part in body.split(b"--" + BOUNDARY)]
    assert [part.partition(b"\r\n\r\n")[0] for part in out.split(b"--" + BOUNDARY)] == heads
    names = [part.get_filename() for part, _ in parts_of(out)]
    assert names == [None, "report.pdf", None, "report.pdf"]


def test_no_file_was_chosen() -> None:
    body = form(text("a"), file(b"", filename=""))
    assert sent(body)[0] == body
    out, _ = sent(form(file(b"x", filename="")))
    assert opened(contents(out)[0]) == b"x"
    with pytest.raises(RefusedError, match="bad-message"):
        sent(form(file(b"", filename="", more="Content-Length: 0\r\n")))


@pytest.mark.parametrize("size", [0, 1, 16383, 16384, 40_000])
@pytest.mark.parametrize("more", ["", "Content-Length: {}\r\n"], ids=["", "with a length of its own"])
def test_the_last_file_streams_with_a_length(size: int, more: str) -> None:
    body = form(text("act", b"bput"), file(FILE[:size], more=more.format(size)))
    out, length = sent(body, form_length="last")
    assert length == len(out)
    assert opened(contents(out)[1]) == FILE[:size]
    if more:
        assert parts_of(out)[1][0]["content-length"] == str(sealed_length(size))


def test_the_last_file_begins_to_stream_at_once() -> None:
    body = form(text("a"), file(FILE * 10))
    made = SealedForm(BOUNDARY, WebOptions.of({"form_length": "last"}), sealer, total_bytes=len(body))
    begun = made.feed(body[:100_000])
    assert made.out_bytes is not None
    assert len(begun) > 80_000


def test_where_the_last_file_is_not_the_last_part_its_form_is_cut() -> None:
    for body in (form(file(FILE), text("a")), form(file(FILE), file(FILE))):
        with pytest.raises(RefusedError, match=r"unknown-route|bad-length"):
            sent(body, form_length="last")
    with pytest.raises(RefusedError, match="length-required"):
        sent(form(file(FILE)), form_length="last", said=False)


@pytest.mark.parametrize("form_length", ["held", "last", "chunked"])
def test_a_form_without_a_file_stays(form_length: str) -> None:
    body = form(text("user", b"alice"), text("password", b"secret"), file(b"", filename=""))
    out, length = sent(body, form_length=form_length)
    assert out == body
    assert length in (None, len(body))


def test_texts_are_short() -> None:
    body = form(text("a", b"x" * 4097), file(FILE))
    with pytest.raises(RefusedError, match="too-large"):
        sent(body)
    assert contents(sent(body, field_bytes=4097)[0])[0] == b"x" * 4097
    many = form(*(text(f"t{number}", b"x" * 4000) for number in range(MAX_TEXTS_BYTES // 4000 + 1)))
    for form_length in ("held", "last"):
        with pytest.raises(RefusedError, match="too-large"):
            sent(many, form_length=form_length)


def test_a_rule_for_a_part() -> None:
    body = form(file(b'{"a": 1}', name="meta", filename="blob"), file(FILE))
    assert contents(sent(body, fields={"meta": "clear"})[0])[0] == b'{"a": 1}'
    assert opened(contents(sent(body)[0])[0]) == b'{"a": 1}'
    for name in ("meta", "f"):
        with pytest.raises(RefusedError, match="unknown-route"):
            sent(body, fields={name: "refuse"})
    with pytest.raises(RefusedError, match="too-large"):
        sent(form(file(FILE, name="meta")), fields={"meta": "clear"})


def test_chunks_of_a_file_are_noticed() -> None:
    with pytest.raises(RefusedError, match="partial-write"):
        sent(form(text("dztotalchunkcount", b"3"), file(FILE)))
    with pytest.raises(RefusedError, match="partial-write"):
        sent(form(file(FILE), text("chunks", b"3")))
    assert opened(contents(sent(form(text("chunks", b"1"), file(FILE)))[0])[1]) == FILE


@pytest.mark.parametrize("form_length", ["held", "last", "chunked"])
def test_digests_are_of_the_form_as_it_came(form_length: str) -> None:
    body = form(text("a"), file(FILE))
    right = ExpectedDigest(algorithm="sha256", value=hashlib.sha256(body).digest())
    sent(body, digests=(right,), form_length=form_length)
    with pytest.raises(RefusedError, match="bad-digest"):
        sent(body.replace(b"report", b"raport"), digests=(right,), form_length=form_length)


def test_each_file_has_a_salt_of_its_own() -> None:
    first, second = contents(sent(form(file(FILE), file(FILE)))[0])
    assert first != second
    assert opened(first) == opened(second)
