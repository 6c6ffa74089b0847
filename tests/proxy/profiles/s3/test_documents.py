"""Small documents of S3, rewritten in place: sizes and tags, late results, damage."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.keys import NetworkService
from envelope.multipart import Part
from envelope.objects import sealed_length
from proxy import refusals
from proxy.messages.message import BodyFrame, Fields, Framing, RequestHead
from proxy.plans.request import NO_EDITS, Mode, Request, Route
from proxy.profiles.s3.documents import (
    ResultMapper,
    check_request,
    elements_of,
    map_parts,
    map_result,
    own_location,
    root_of,
    spliced,
)
from proxy.refusals import RefusedError
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream
from proxy.uploads import Completion, KeptPart

HEX = "0123456789abcdef" * 2
RESULT = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    '<CompleteMultipartUploadResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    "<Location>https://s3.example:8443/bucket/key</Location><Bucket>bucket</Bucket><Key>a&amp;b</Key>"
    f"<ETag>&quot;{HEX}-3&quot;</ETag><ChecksumCRC32>AAAA</ChecksumCRC32><Other/>"
    "</CompleteMultipartUploadResult>"
).encode()


def request(mode: Mode = Mode.FORWARD, host: str = "s3.example:8443") -> Request:
    service = ServiceEntry(
        owner=NetworkService("tenant-a", "store"),
        upstream=Upstream(scheme="https", host="s3.example", port=8443),
        profile="s3",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=None,
        certificate=None,
        key_file=Path("key.pem"),
    )
    head = RequestHead(method="POST", target="/bucket/key?uploadId=x", fields=Fields(()), host=host)
    frame = BodyFrame(framing=Framing.NONE)
    return Request(head=head, frame=frame, edits=NO_EDITS, route=Route(service=service, mode=mode))


def kept(number: int, plain_bytes: int, tag: str) -> KeptPart:
    return KeptPart(part=Part(number, sealed_length(plain_bytes), os.urandom(32)), tag=tag)


# Elements.


def test_elements_know_where_they_are() -> None:
    document = b"<a x='1'><b> t&amp;u </b><c/><d><e></e></d></a>"
    found = {element.path: element for element in elements_of(document)}
    texts = {path[-1]: element.text for path, element in found.items()}
    assert texts == {"a": None, "b": " t&u ", "c": "", "d": None, "e": ""}
    b, c = found["a", "b"], found["a", "c"]
    assert document[b.begin : b.end] == b"<b> t&amp;u </b>"
    assert document[b.inner : b.close] == b" t&amp;u "
    assert document[c.begin : c.end] == b"<c/>"
    assert root_of(document) == "a"


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"text",
        b"<a>",
        b"<a></a><b></b>",
        b"<!DOCTYPE a [<!ENTITY e 'x'>]><a>&e;</a>",
        b"<a x='>'><b>1</b></a>",
        b"<a>" * 9 + b"</a>" * 9,
        b"<a>" + b"<b/>" * 40_001 + b"</a>",
    ],
)
def test_what_is_no_document_is_refused(document: bytes) -> None:
    with pytest.raises(RefusedError, match="service-answer"):
        elements_of(document)


def test_splices_change_what_they_name_and_nothing_else() -> None:
    assert spliced(b"0123456789", [(8, 8, b"x"), (2, 4, b"")]) == b"014567x89"
    with pytest.raises(RefusedError):
        spliced(b"0123456789", [(2, 5, b""), (4, 6, b"")])


# Results.


def test_a_result_has_the_clients_tag_and_no_checksum() -> None:
    got = map_result(RESULT, request())
    assert got == RESULT.replace(b"<ChecksumCRC32>AAAA</ChecksumCRC32>", b"").replace(
        b"&quot;" + HEX.encode() + b"-3&quot;", b'"' + HEX.encode() + b'-3"'
    )
    single = f"<CopyObjectResult><ETag>{HEX}</ETag></CopyObjectResult>".encode()
    assert (
        map_result(single, request()) == f"<CopyObjectResult><ETag>{HEX}-1</ETag></CopyObjectResult>".encode()
    )


@pytest.mark.parametrize(
    ("host", "text", "own"),
    [
        ("proxy.example:9443", "https://s3.example:8443/b/k%20x", "https://proxy.example:9443/b/k%20x"),
        ("proxy.example", "http://b.s3.example/k", "https://b.proxy.example/k"),
        ("b.proxy.example", "http://b.s3.example/k", "https://b.proxy.example/k"),
        ("proxy.example", "https://elsewhere.example/k", "https://elsewhere.example/k"),
        ("proxy.example", "https://evils3.example/k", "https://evils3.example/k"),
        ("proxy.example", "/b/k", "/b/k"),
        ("proxy.example", "http://[bad/k", "http://[bad/k"),
    ],
)
def test_addresses_are_ours_in_reverse_mode(host: str, text: str, own: str) -> None:
    assert own_location(text, request(Mode.REVERSE, host)) == own


def test_forward_mode_leaves_addresses_alone() -> None:
    assert b"https://s3.example:8443/bucket/key" in map_result(RESULT, request())
    reverse = map_result(RESULT, request(Mode.REVERSE, "proxy.example"))
    assert b"<Location>https://proxy.example/bucket/key</Location>" in reverse


# Results that stream.


def run(mapper: ResultMapper, pieces: Iterator[bytes]) -> list[bytes]:
    async def feed() -> list[bytes]:
        out = []
        for piece in pieces:
            out.append(mapper.feed(piece))
            if mapper.pending:
                await mapper.settle()
                assert not mapper.pending
        return [*out, mapper.finish()]

    return asyncio.run(feed())


def mapper() -> tuple[ResultMapper, list[str]]:
    roots: list[str] = []

    async def ended(root: str) -> None:
        roots.append(root)

    return ResultMapper(request(), ended), roots


@given(st.lists(st.integers(1, 60), max_size=30), st.sampled_from([b"", b"\n", b" \r\n "]))
def test_pieces_change_nothing_and_white_space_goes_on_at_once(cuts: list[int], space: bytes) -> None:
    late = space * 3 + RESULT.replace(b"?>\n", b"?>\n" + space * 20) + space
    made, roots = mapper()
    at, pieces = 0, []
    for cut in cuts:
        pieces.append(late[at : at + cut])
        at += cut
    pieces.append(late[at:])
    out = run(made, iter(pieces))
    expected = map_result(RESULT, request())
    assert b"".join(out).split() == expected.split()
    assert b"".join(out).count(b"\r") == late.count(b"\r")
    assert roots == ["CompleteMultipartUploadResult"]


def test_white_space_is_not_held_back() -> None:
    made, roots = mapper()
    declaration = b'<?xml version="1.0" encoding="UTF-8"?>\n'
    assert made.feed(declaration) == declaration
    assert made.feed(b"  \n") == b"  \n"
    assert made.feed(b" ") == b" "
    assert made.feed(b"<Error><Code>InternalError</Code>") == b""
    assert made.feed(b"</Error>") == b""
    assert made.pending
    asyncio.run(made.settle())
    assert (made.finish(), roots) == (b"<Error><Code>InternalError</Code></Error>", ["Error"])


@pytest.mark.parametrize(
    "body", [b"", b"  ", RESULT[:-1], RESULT + b"x", RESULT + RESULT, b"text", b"<a>" + b"x" * (1 << 20)]
)
def test_a_result_that_is_not_whole_has_no_end(body: bytes) -> None:
    made, roots = mapper()
    with pytest.raises(RefusedError, match="service-answer"):
        run(made, iter([body]))
    assert roots in ([], ["CompleteMultipartUploadResult"])


@pytest.mark.parametrize(("begin", "piece"), [(b"<a>", b"<b></b>"), (b"<a><!--", b">"), (b"<?xml ", b"x")])
def test_a_service_that_never_ends_a_result_is_not_read_for_ever(begin: bytes, piece: bytes) -> None:
    """With every piece it is looked at whether the document has ended: all of it, from its beginning."""
    made, roots = mapper()
    made.feed(begin)
    fed = 0

    def feed_all() -> None:
        nonlocal fed
        while fed < 200_000:
            made.feed(piece)
            fed += len(piece)

    with pytest.raises(RefusedError, match="service-answer"):
        feed_all()
    assert fed < 10_000
    assert roots == []


# Lists of parts.


def part(number: int, tag: str, size: int, more: str = "") -> str:
    return (
        f"<Part><PartNumber>{number}</PartNumber><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{tag}&quot;</ETag>{more}<Size>{size}</Size></Part>"
    )


def parts(*entries: str) -> bytes:
    inner = "".join(entries)
    inner = f"<Key>k</Key><MaxParts>9</MaxParts>{inner}"
    return f'<?xml version="1.0"?>\n<ListPartsResult>{inner}</ListPartsResult>'.encode()


def shown(document: bytes) -> list[tuple[int, str, int]]:
    found: list[tuple[int, str, int]] = []
    entry: dict[str, str] = {}
    for element in elements_of(document):
        if element.path[1:] == ("Part",):
            found.append((int(entry["PartNumber"]), entry["ETag"].strip('"'), int(entry["Size"])))
        entry[element.path[-1]] = element.text or ""
    return found


def test_parts_have_the_sizes_of_their_plaintext() -> None:
    tags = ["a" * 32, "b" * 32]
    document = parts(
        part(1, tags[0], sealed_length(5_000_000), "<ChecksumCRC32>AAAA</ChecksumCRC32>"),
        part(2, tags[1], sealed_length(77)),
    )
    remembered = [kept(1, 5_000_000, tags[0]), kept(2, 77, tags[1])]
    got = map_parts(document, remembered, None)
    assert shown(got) == [(1, tags[0] + "-1", 5_000_000), (2, tags[1] + "-1", 77)]
    assert b"Checksum" not in got
    assert b"<Key>k</Key><MaxParts>9</MaxParts>" in got
    assert shown(map_parts(document, [], None)) == shown(got)


def test_the_part_that_is_ours_is_in_no_list() -> None:
    tag = "a" * 32
    document = parts(part(1, tag, sealed_length(9)), part(2, "c" * 32, 4000))
    completion = Completion(asked=b"", request=b"", final_number=2, is_joined=False)
    assert shown(map_parts(document, [kept(1, 9, tag)], completion)) == [(1, tag + "-1", 9)]


def test_a_part_with_the_manifest_on_it_is_shown_as_the_client_knows_it() -> None:
    tags = ["a" * 32, "b" * 32]
    document = parts(part(1, tags[0], sealed_length(9)), part(2, "c" * 32, 4000))
    completion = Completion(asked=b"", request=b"", final_number=2, is_joined=True)
    remembered = [kept(1, 9, tags[0]), kept(2, 77, tags[1])]
    assert shown(map_parts(document, remembered, completion))[1] == (2, tags[1] + "-1", 77)


def test_a_part_that_nobody_remembers_is_shown_as_it_is() -> None:
    document = parts(part(1, "a" * 32, 50))
    assert shown(map_parts(document, [], None)) == [(1, "a" * 32 + "-1", 50)]


@pytest.mark.parametrize(
    "document",
    [
        b"<Error/>",
        parts("<Part><PartNumber>1</PartNumber></Part>"),
        parts("<Part><PartNumber>x</PartNumber><ETag>a</ETag><Size>1</Size></Part>"),
        parts("<Part><PartNumber>1</PartNumber><ETag>a</ETag><Size>-1</Size></Part>"),
    ],
)
def test_a_list_that_is_none_is_refused(document: bytes) -> None:
    with pytest.raises(RefusedError, match="service-answer"):
        map_parts(document, [], None)


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        ("CreateBucket", b""),
        ("CreateBucket", b"<CreateBucketConfiguration xmlns='http://s3.amazonaws.com/doc/2006-03-01/'/>"),
        ("PutBucketPolicy", b'{"Version": "2012-10-17"}'),
        ("DeleteObjects", b"<?xml version='1.0'?><Delete><Object><Key>k</Key></Object></Delete>"),
    ],
)
def test_documents_of_the_protocol_pass(operation: str, body: bytes) -> None:
    check_request(operation, body)


@pytest.mark.parametrize(
    "operation", ["CreateBucket", "PutBucketPolicy", "PutBucketTagging", "DeleteObjects"]
)
@pytest.mark.parametrize(
    "body", [b"content", b"\x00\xff" * 8, b"<half>", b"[1]", b"[" * 5000, b"<!DOCTYPE a><a/>", b" "]
)
def test_content_is_no_document(operation: str, body: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        check_request(operation, body)
    assert caught.value.refusal is refusals.MALFORMED_DOCUMENT


def test_another_document_creates_no_bucket() -> None:
    with pytest.raises(RefusedError):
        check_request("CreateBucket", b"<report/>")
