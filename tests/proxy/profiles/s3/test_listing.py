"""Lists as clients are to see them. The rewriter itself is tested in test_xml_rewriting.py."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast
from xml.etree import ElementTree as ET

import pytest

from envelope.objects import sealed_length
from proxy import refusals
from proxy.plans.conversing import Conversation
from proxy.plans.profile_options import StoredPolicy
from proxy.plans.request import Route
from proxy.profiles.s3.addressing import Address, Level
from proxy.profiles.s3.listing import Listing, mapper
from proxy.profiles.s3.options import S3Options
from proxy.profiles.s3.routes import ROUTES
from proxy.refusals import RefusedError
from tests.proxy.profiles.s3.s3_signer import head
from tests.proxy.profiles.s3.test_bodies import request_of

HEX = "0123456789abcdef0123456789abcdef"
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


class Talk:
    """Of a conversation what a list needs: the request, and sizes of composites."""

    def __init__(self, sizes: Mapping[str, int | None], policy: StoredPolicy, target: str) -> None:
        request = request_of(head("GET", target, {}))
        options = S3Options(legacy={"/b": policy})
        self.request = replace(
            request, route=Route(service=request.service, mode=request.route.mode, options=options)
        )
        self.sizes = sizes
        self.asked: list[tuple[str, str | None, int]] = []

    async def composite_bytes(self, target: str, *, etag: str | None, stored_bytes: int) -> int | None:
        self.asked.append((target, etag, stored_bytes))
        return self.sizes.get(target)


def contents(
    *entries: tuple[str, str, int], root: str = "ListBucketResult", entry: str = "Contents"
) -> bytes:
    inner = "".join(
        f"<{entry}><Key>{key}</Key><ETag>&quot;{etag}&quot;</ETag><Size>{size}</Size>"
        f"<ChecksumAlgorithm>CRC32</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>"
        f"<VersionId>v 1</VersionId></{entry}>"
        for key, etag, size in entries
    )
    return f'<?xml version="1.0"?>\n<{root} xmlns="{NAMESPACE}"><Name>b</Name>{inner}</{root}>'.encode()


async def mapped(
    document: bytes,
    *,
    target: str = "/b?list-type=2",
    sizes: Mapping[str, int | None] | None = None,
    policy: StoredPolicy = StoredPolicy.STRICT,
    virtual: bool = False,
    step: int = 50,
    **parameters: str,
) -> tuple[str, Talk]:
    talk = Talk(sizes or {}, policy, target)
    listing = Listing(
        operation=ROUTES["GET", Level.BUCKET, ""],
        bucket=Address(bucket="b", key="", virtual_host=virtual),
        parameters={name.replace("_", "-"): value for name, value in parameters.items()},
    )
    through = mapper(listing, cast("Conversation", talk))
    made = b""
    for at in range(0, len(document), step):
        made += through.feed(document[at : at + step])
        if through.pending:
            await through.settle()
    return (made + through.finish()).decode(), talk


def shown(document: str) -> list[tuple[Any, ...]]:
    root = ET.fromstring(document)
    return [
        tuple(
            entry.findtext(f"{{{NAMESPACE}}}{name}") for name in ("Key", "ETag", "Size", "ChecksumAlgorithm")
        )
        for entry in root
        if entry.tag != f"{{{NAMESPACE}}}Name"
    ]


@pytest.mark.parametrize("step", [1, 100, 10_000])
@pytest.mark.parametrize(
    ("root", "entry"), [("ListBucketResult", "Contents"), ("ListVersionsResult", "Version")]
)
async def test_sizes_by_arithmetic_and_mapped_tags(root: str, entry: str, step: int) -> None:
    sizes = [0, 1, 16_384, 5_363_471_256]
    document = contents(*((f"k{n}", HEX, sealed_length(n)) for n in sizes), root=root, entry=entry)
    made, talk = await mapped(document, step=step)
    assert shown(made) == [(f"k{n}", f'"{HEX}-1"', str(n), None) for n in sizes]
    assert talk.asked == []
    # All that is not sizes, tags and checksums is there, byte for byte.
    assert made.startswith(f'<?xml version="1.0"?>\n<{root} xmlns="{NAMESPACE}"><Name>b</Name>')
    assert "ChecksumType" not in made


async def test_objects_in_parts_are_asked_for_by_their_own_target() -> None:
    document = contents(("a b/\u00e4&amp;+", f"{HEX}-3", 1_000_000), ("c", f"{HEX}-2", 500))
    target = "/b/a%20b/%C3%A4%26%2B?versionId=v%201"
    made, talk = await mapped(document, sizes={target: 999_000})
    assert shown(made) == [
        ("a b/\u00e4&+", f'"{HEX}-3"', "999000", None),
        ("c", f'"{HEX}-2"', "500", None),
    ], "what cannot be told stays as it is stored"
    assert talk.asked[0] == (target, f'"{HEX}-3"', 1_000_000)


async def test_keys_that_are_encoded_and_buckets_in_host_names() -> None:
    document = contents(("a+b%2Fc%2B%C3%A4", f"{HEX}-3", 1_000_000))
    _, talk = await mapped(document, virtual=True, encoding_type="url")
    assert talk.asked[0][0] == "/a%20b/c%2B%C3%A4?versionId=v%201"


async def test_what_is_no_sealed_size_stays() -> None:
    document = contents(("old", HEX, 5), ("marker/", HEX, 0), ("odd", HEX, 88 + 16_400))
    made, talk = await mapped(document)
    assert [size for _, _, size, _ in shown(made)] == ["5", "0", str(88 + 16_400)]
    assert talk.asked == []


async def test_on_the_way_to_be_migrated_every_plausible_size_is_looked_at() -> None:
    document = contents(("old", HEX, 104), ("new", HEX, 1104), ("short", HEX, 5))
    sizes = {"/b/old?versionId=v%201": 104, "/b/new?versionId=v%201": 1000}
    made, talk = await mapped(document, policy=StoredPolicy.MIGRATE, sizes=sizes)
    assert [size for _, _, size, _ in shown(made)] == ["104", "1000", "5"]
    assert len(talk.asked) == 2


async def test_what_is_served_as_it_is_stored_is_listed_so() -> None:
    made, talk = await mapped(
        contents(("k", HEX, 104), ("p", f"{HEX}-2", 9)), policy=StoredPolicy.PASSTHROUGH
    )
    assert [size for _, _, size, _ in shown(made)] == ["104", "9"]
    assert talk.asked == []


@pytest.mark.parametrize("root", ["GetObjectAttributesResponse", "GetObjectAttributesOutput"])
async def test_attributes(root: str) -> None:
    document = (
        f'<{root} xmlns="{NAMESPACE}"><ETag>{HEX}</ETag>'
        "<Checksum><ChecksumCRC32>AAAAAA==</ChecksumCRC32></Checksum>"
        f"<ObjectParts><TotalPartsCount>3</TotalPartsCount></ObjectParts><ObjectSize>104</ObjectSize></{root}>"
    ).encode()
    made, _ = await mapped(document, target="/b/k?attributes")
    assert made == f'<{root} xmlns="{NAMESPACE}"><ETag>{HEX}-1</ETag><ObjectSize>0</ObjectSize></{root}>'


@pytest.mark.parametrize(
    "document",
    [
        b"not xml",
        contents(("k", HEX, 104))[:-5],
        b"<!DOCTYPE a><ListBucketResult/>",
        contents(("k<x/>", HEX, 104)).replace(b"<Size>104", b"<Size><b/>104"),
    ],
)
async def test_what_is_no_list_is_refused(document: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        await mapped(document)
    assert caught.value.refusal == refusals.SERVICE_ANSWER
