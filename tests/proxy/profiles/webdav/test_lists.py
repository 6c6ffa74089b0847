"""Multi-status answers: whose sizes change, and to what; which digests go; whose addresses are ours."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from envelope.errors import KeyUnavailableError, Unavailable
from envelope.keys import NetworkService
from envelope.objects import sealed_length
from proxy import refusals
from proxy.messages.message import BodyFrame, Fields, Framing, RequestHead
from proxy.plans.conversing import Conversation, Inspected, StoredKind
from proxy.plans.profile_options import ProfileOptions, StoredPolicy
from proxy.plans.request import NO_EDITS, Mode, Request, Route
from proxy.profiles.webdav.lists import (
    address_mapper,
    is_nextcloud,
    list_mapper,
    needs_a_look,
    with_etags,
)
from proxy.profiles.xml_rewriting import XmlError
from proxy.refusals import RefusedError
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream

type Sizes = Mapping[str, int | Exception | None]


class Talk:
    """A conversation whose service has these objects."""

    def __init__(self, request: Request, sizes: Sizes) -> None:
        self.request = request
        self.sizes = sizes
        self.asked: list[tuple[str, str | None, int]] = []
        self.inspected: list[str] = []

    async def composite_bytes(self, target: str, *, etag: str | None, stored_bytes: int) -> int | None:
        self.asked.append((target, etag, stored_bytes))
        return self._size(target)

    async def inspect(self, target: str) -> Inspected | None:
        self.inspected.append(target)
        size = self._size(target)
        if size is None:
            return None
        return Inspected(
            kind=StoredKind.SIMPLE, stored_bytes=1128, plain_bytes=size, etag=None, manifest=None
        )

    def _size(self, target: str) -> int | None:
        found = self.sizes[target]
        if isinstance(found, Exception):
            raise found
        return found


def request(
    target: str = "/",
    *,
    mode: Mode = Mode.FORWARD,
    legacy: LegacyPolicy = LegacyPolicy.STRICT,
    options: ProfileOptions | None = None,
) -> Request:
    service = ServiceEntry(
        owner=NetworkService("acme", "dav"),
        upstream=Upstream.parse("https://dav.example"),
        profile="webdav",
        legacy=legacy,
        reverse_listen=None,
        certificate=None,
        key_file=Path("/unused"),
    )
    return Request(
        head=RequestHead(method="PROPFIND", target=target, fields=Fields([]), host="proxy.example"),
        frame=BodyFrame(framing=Framing.NONE),
        edits=NO_EDITS,
        route=Route(service=service, mode=mode, options=options or ProfileOptions()),
    )


def response(href: str, *properties: str, missing: str = "") -> str:
    found = (
        f"<d:propstat><d:prop>{''.join(properties)}</d:prop><d:status>HTTP/1.1 200 OK</d:status></d:propstat>"
    )
    lost = f"<d:propstat><d:prop>{missing}</d:prop><d:status>HTTP/1.1 404 Not Found</d:status></d:propstat>"
    return f"<d:response><d:href>{href}</d:href>{found}{lost if missing else ''}</d:response>"


def multistatus(*responses: str) -> bytes:
    return (
        '<?xml version="1.0"?>\n<d:multistatus xmlns:d="DAV:" xmlns:oc="http://owncloud.org/ns">'
        + "\n".join(responses)
        + "</d:multistatus>\n"
    ).encode()


def length(stored_bytes: int | str) -> str:
    return f"<d:getcontentlength>{stored_bytes}</d:getcontentlength>"


def oc_size(stored_bytes: int) -> str:
    return f"<oc:size>{stored_bytes}</oc:size>"


COLLECTION = "<d:resourcetype><d:collection/></d:resourcetype>"
TAG = '<d:getetag>"v1"</d:getetag>'


async def mapped(talk: Talk, document: bytes, *, drop_etags: bool = False, step: int = 37) -> bytes:
    mapper = list_mapper(cast("Conversation", cast("Any", talk)), drop_etags=drop_etags)
    out = b""
    for at in range(0, len(document), step):
        out += mapper.feed(document[at : at + step])
        if mapper.pending:
            await mapper.settle()
    return out + mapper.finish()


def sizes(document: bytes) -> list[str]:
    return re.findall(r"<(?:d:getcontentlength|oc:size)>([^<]*)<", document.decode())


@pytest.mark.parametrize("plain_bytes", [0, 1, 16383, 16384, 16385, 10**12])
async def test_sizes_of_files_are_those_of_the_plaintext(plain_bytes: int) -> None:
    stored = sealed_length(plain_bytes)
    talk = Talk(request(), {})
    out = await mapped(talk, multistatus(response("/f", length(stored), oc_size(stored))))
    assert sizes(out) == [str(plain_bytes)] * 2
    assert talk.asked == []


async def test_collections_and_what_is_no_object_of_ours_keep_theirs() -> None:
    document = multistatus(
        response("/c", length(sealed_length(5)), oc_size(sealed_length(5)), COLLECTION),
        response("/d/", oc_size(sealed_length(5))),
        response("/e", length(0)),
        response("/f", length(103)),
        response("/g", length(88 + 16400 + 15)),
        response("/h", length("many"), missing="<d:getcontentlength/>"),
        response("/i", f"<x:getcontentlength xmlns:x='urn:other'>{sealed_length(5)}</x:getcontentlength>"),
    )
    assert await mapped(Talk(request(), {}), document) == document


async def test_digests_of_ciphertext_go_and_nothing_else() -> None:
    digests = (
        "<oc:checksums><oc:checksum>SHA1:00</oc:checksum></oc:checksums>",
        "<d:getcontentmd5>AA==</d:getcontentmd5>",
    )
    document = multistatus(response("/f", TAG, *digests, length(sealed_length(7))))
    expected = multistatus(response("/f", TAG, length(7)))
    assert await mapped(Talk(request(), {}), document) == expected


async def test_where_it_may_be_a_composite_the_object_is_looked_at() -> None:
    path = "/remote.php/dav/files/alice/f"
    talk = Talk(request("/remote.php/dav/files/alice/"), {path: 10_000_000})
    out = await mapped(talk, multistatus(response(path, TAG, length(10_002_000), oc_size(10_002_000))))
    assert sizes(out) == ["10000000"] * 2
    assert talk.asked == [(path, '"v1"', 10_002_000)]


@pytest.mark.parametrize("mode", Mode)
async def test_a_look_goes_to_the_service_and_nowhere_else(mode: Mode) -> None:
    talk = Talk(request(legacy=LegacyPolicy.MIGRATE, mode=mode), {"/f": 1})
    out = await mapped(
        talk,
        multistatus(
            response("https://other.example/f", TAG, length(1128)),
            response("https://dav.example/f", TAG, length(1128)),
        ),
    )
    assert [target for target, _, _ in talk.asked] == ["/f"]
    assert sizes(out) == ["1024", "1"]


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (500, ["500"]),
        (None, []),
        (RefusedError(refusals.NOT_SEALED), ["1128"]),
        (RefusedError(refusals.OBJECT_INVALID), []),
        (KeyUnavailableError(Unavailable.UNKNOWN, "no key"), []),
    ],
)
async def test_a_size_that_cannot_be_told_is_left_out(
    found: int | Exception | None, shown: list[str]
) -> None:
    talk = Talk(request(legacy=LegacyPolicy.MIGRATE), {"/f": found})
    assert sizes(await mapped(talk, multistatus(response("/f", TAG, length(1128))))) == shown


async def test_each_path_has_its_own_policy() -> None:
    options = ProfileOptions(legacy={"/old": StoredPolicy.MIGRATE, "/raw": StoredPolicy.PASSTHROUGH})
    talk = Talk(request(options=options), {"/old/f": 1128})
    out = await mapped(
        talk,
        multistatus(*(response(f"/{name}/f", TAG, length(1128)) for name in ("old", "raw", "new"))),
    )
    assert sizes(out) == ["1128", "1128", "1024"]


async def test_absolute_addresses_become_paths_in_reverse_mode_only() -> None:
    document = multistatus(
        response(
            "https://dav.example/f",
            "<d:lockroot><d:href>https://dav.example:443/f</d:href></d:lockroot>",
            "<x:href xmlns:x='urn:x'>https://dav.example/f</x:href>",
            "<d:owner><d:href>https://people.example/me</d:href></d:owner>",
        )
    )
    expected = document.replace(b"<d:href>https://dav.example/f", b"<d:href>/f").replace(
        b"<d:href>https://dav.example:443/f", b"<d:href>/f"
    )
    assert await mapped(Talk(request(), {}), document) == document
    assert await mapped(Talk(request(mode=Mode.REVERSE), {}), document) == expected
    mapper = address_mapper(request(mode=Mode.REVERSE))
    assert mapper.feed(document) + mapper.finish() == expected


@pytest.mark.parametrize(
    "document",
    [
        b"<prop xmlns='DAV:'><lockdiscovery><href>https://dav.example/f</href></lockdiscovery></prop>",
        b"<error xmlns='DAV:'><lock-token-submitted><href>https://dav.example/f</href></lock-token-submitted></error>",
    ],
)
def test_addresses_in_locks_and_errors_too(document: bytes) -> None:
    mapper = address_mapper(request(mode=Mode.REVERSE))
    out = mapper.feed(document) + mapper.finish()
    assert out == document.replace(b"https://dav.example", b"")


def test_etags_are_asked_for_where_the_client_has_not() -> None:
    asked = b"<?xml version='1.0'?><d:propfind xmlns:d='DAV:'><d:prop><d:displayname/></d:prop></d:propfind>"
    assert with_etags(asked) == (
        asked.replace(b"</d:prop></", b'<getetag xmlns="DAV:"/></d:prop></'),
        True,
    )
    for others in (
        asked.replace(b"<d:displayname/>", b"<d:getetag/>"),
        b"<propfind xmlns='DAV:'><allprop/></propfind>",
        b"<propfind xmlns='DAV:'><propname/></propfind>",
    ):
        assert with_etags(others) == (others, False)
    with pytest.raises(XmlError):
        with_etags(asked[:-1])


async def test_etags_the_client_has_not_asked_for_are_taken_out_again() -> None:
    talk = Talk(request(legacy=LegacyPolicy.MIGRATE), {"/f": 5})
    out = await mapped(talk, multistatus(response("/f", length(1128), TAG)), drop_etags=True)
    assert out == multistatus(response("/f", length(5)))
    assert talk.asked == [("/f", '"v1"', 1128)]


async def test_an_etag_without_quotes_is_meant_with_them() -> None:
    talk = Talk(request(legacy=LegacyPolicy.MIGRATE), {"/f": 5})
    await mapped(talk, multistatus(response("/f", length(1128), "<d:getetag>v1</d:getetag>")))
    assert talk.asked == [("/f", '"v1"', 1128)]


@pytest.mark.parametrize("tag", ["", '<d:getetag>W/"v1"</d:getetag>'])
@pytest.mark.parametrize(("stored", "shown"), [(1128, ["1024"]), (1129, [])])
async def test_without_a_strong_etag_the_object_is_looked_at_each_time(
    tag: str, stored: int, shown: list[str]
) -> None:
    talk = Talk(request(legacy=LegacyPolicy.MIGRATE), {"/f": 1024})
    assert sizes(await mapped(talk, multistatus(response("/f", length(stored), tag)))) == shown
    assert (talk.asked, talk.inspected) == ([], ["/f"])


@pytest.mark.parametrize(
    ("target", "is_one"),
    [
        ("/remote.php/dav/files/a/f", True),
        ("/cloud/remote.php/webdav/f?x", True),
        ("/public.php/dav/files/token/f", True),
        ("/remote.php/dav", True),
        ("/f", False),
        ("/x?/remote.php/dav/", False),
        ("/remote.phpx/dav/", False),
    ],
)
def test_where_objects_may_be_joined(target: str, *, is_one: bool) -> None:
    assert is_nextcloud(target) is is_one
    assert needs_a_look(request(), target) is is_one
