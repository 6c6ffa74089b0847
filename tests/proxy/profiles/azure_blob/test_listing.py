"""Lists of blobs: sizes and digests as they stream, and what is asked about single entries."""

import asyncio
from typing import Any, cast

import pytest

from envelope.objects import sealed_length
from proxy.plans.conversing import Conversation
from proxy.plans.request import Mode
from proxy.profiles.azure_blob.addressing import read_target
from proxy.profiles.azure_blob.block_names import size_mark
from proxy.profiles.azure_blob.listing import Listing, mapper
from proxy.refusals import RefusedError
from tests.proxy.profiles.azure_blob.azure_signer import HOST, TOKEN, head, request, route

LIST = "/box?restype=container&comp=list&prefix=a"
MD5 = "AAAAAAAAAAAAAAAAAAAAAA=="


class Asked:
    """The part of a conversation that lists use; it knows sizes by target."""

    def __init__(self, sizes: dict[str, int | None], *, mode: Mode = Mode.FORWARD, **options: Any) -> None:
        self.request = request(head("GET", LIST, host="us.example"), route(mode=mode, **options))
        self.sizes = sizes
        self.seen: list[tuple[str, str | None, int]] = []

    async def composite_bytes(self, target: str, *, etag: str | None, stored_bytes: int) -> int | None:
        self.seen.append((target, etag, stored_bytes))
        return self.sizes[target]


def entry(name: str, size: int, *, md5: str | None = MD5, more: str = "", kind: str = "BlockBlob") -> str:
    digest = "" if md5 is None else f"<Content-MD5>{md5}</Content-MD5>"
    return (
        f"<Blob><Name>{name}</Name>{more}<Properties><Etag>0x8D</Etag><Content-Length>{size}</Content-Length>"
        f"{digest}<BlobType>{kind}</BlobType></Properties></Blob>"
    )


def document(*entries: str) -> bytes:
    head_ = f'<EnumerationResults ServiceEndpoint="https://{HOST}/"><Blobs>'
    return (
        f"<?xml version='1.0'?>{head_}{''.join(entries)}</Blobs><NextMarker/></EnumerationResults>".encode()
    )


async def shown(asked: Asked, *entries: str, target: str = LIST) -> str:
    listing = Listing(target=read_target(target, account_in_path=False))
    mapping = mapper(listing, cast("Conversation", asked))
    made = mapping.feed(document(*entries))
    while mapping.pending:
        await mapping.settle()
        made += mapping.feed(b"")
    return (made + mapping.finish()).decode()


async def test_sizes_by_arithmetic_and_by_mark() -> None:
    asked = Asked({})
    made = await shown(
        asked,
        entry("put at once", sealed_length(5000)),
        entry("in blocks", 12_345, md5=size_mark(9_000)),
        entry("waiting", 0, md5=None),
        entry("pages", 512, kind="PageBlob"),
    )
    expected = document(
        entry("put at once", 5000, md5=None),
        entry("in blocks", 9000, md5=None),
        entry("waiting", 0, md5=None),
        entry("pages", 512, md5=None, kind="PageBlob"),
    )
    assert made == expected.decode()
    assert asked.seen == []


async def test_what_has_no_md5_is_looked_at_with_the_clients_token() -> None:
    stored = sealed_length(7)
    version = "<Snapshot>2026-11-26T00:00:00.0000000Z</Snapshot>"
    target = f"/box/a%20%26b?{TOKEN}&snapshot=2026-11-26T00%3A00%3A00.0000000Z"
    asked = Asked({target: 6, f"/box/unread?{TOKEN}": None})
    made = await shown(
        asked,
        entry("a &amp;b", stored, md5=None, more=version),
        entry("unread", stored, md5=None),
        target=f"{LIST}&{TOKEN}",
    )
    assert "<Content-Length>6</Content-Length>" in made
    assert f"<Content-Length>{stored}</Content-Length>" in made, "what cannot be told stays"
    assert [(seen, etag) for seen, etag, _ in asked.seen] == [
        (target, '"0x8D"'),
        (f"/box/unread?{TOKEN}", '"0x8D"'),
    ]


async def test_a_size_that_no_object_has() -> None:
    made = await shown(Asked({}), entry("x", 50), entry("y", 60, md5=size_mark(60)))
    assert "<Content-Length>50</Content-Length>" in made
    assert "<Content-Length>60</Content-Length>" in made


async def test_migrating_each_is_looked_at() -> None:
    stored = sealed_length(7)
    asked = Asked({"/box/old": stored, "/box/new": 7}, legacy={"/box": "migrate"})
    made = await shown(asked, entry("old", stored), entry("new", stored))
    assert f"<Content-Length>{stored}</Content-Length>" in made
    assert "<Content-Length>7</Content-Length>" in made
    passing = Asked({}, legacy={"/box": "passthrough"})
    assert await shown(passing, entry("x", stored)) == document(entry("x", stored, md5=None)).decode()


async def test_sources_of_copies_in_reverse_mode() -> None:
    source = f"<CopySource>https://{HOST}/box/a?b</CopySource>"
    body = entry("x", sealed_length(1)).replace("</Properties>", f"{source}</Properties>")
    assert "<CopySource>https://us.example/box/a?b</CopySource>" in await shown(
        Asked({}, mode=Mode.REVERSE), body
    )
    assert source in await shown(Asked({}), body)


@pytest.mark.parametrize("body", ["<Blob><Name>x</Name>", "</Blobs>", "<!DOCTYPE x>"])
async def test_a_list_that_is_none(body: str) -> None:
    with pytest.raises(RefusedError):
        await asyncio.wait_for(shown(Asked({}), body), 30)
