"""Azure's protocol request by request: what the service says directly and what it says through the proxy.

The SDK hides much (all states of a block list are the latest to it); here every request is written by hand,
and status, fields and body of both answers are compared whole.
"""

import asyncio
import base64
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from envelope.objects import sealed_length
from proxy.profiles.azure_blob.block_names import size_mark
from tests.integration.azure_site import Site, Way, site
from tests.integration.proxy_rig import Answer
from tests.proxy.profiles.azure_blob.test_bodies import crc64, md5
from tests.referees.comparison import Declared, Seen, opened

PARTS = {name: os.urandom(20_000 + 1000 * place) for place, name in enumerate("abcd")}
BLOCK_BLOB = {"x-ms-blob-type": "BlockBlob"}
_CHECKSUMS = frozenset({"content-md5", "x-ms-content-crc64", "x-ms-blob-content-md5"})
DECLARED = Declared(
    # Times and names that are anew in each container.
    unequal=frozenset(
        {
            "etag", "last-modified", "x-ms-access-tier-change-time", "x-ms-copy-id", "x-ms-creation-time",
            "x-ms-request-id",
        }
    ),
    # Azurite does not show a checksum that was sent with a block, as Azure does.
    direct_only=_CHECKSUMS,
    through_only=_CHECKSUMS | {"cache-control", "content-length"},
    refusals=frozenset({"bad-digest", "block-unknown", "malformed-document", "range-not-satisfiable"}),
    volatile=[
        (
            re.compile(rb"<(Etag|Last-Modified|Creation-Time|AccessTierChangeTime|Content-MD5)>[^<]*</\1>"),
            b"",
        ),
        (re.compile(rb"RequestId:[0-9a-f-]+\nTime:[0-9TZ:.-]+"), b""),
        (re.compile(rb"<(\w+)></\1>"), rb"<\1/>"),
        (re.compile(rb"box-(?:direct|forward|reverse)"), b"box"),
        (re.compile(rb", private$|^private$"), b""),
    ],
)  # fmt: skip


def name(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def block(letter: str, *, of: str = "blob") -> str:
    return f"/{of}?comp=block&blockid={quote(name(letter), safe='')}"


def block_list(*entries: tuple[str, str]) -> bytes:
    listed = "".join(f"<{source}>{name(letter)}</{source}>" for source, letter in entries)
    return f'<?xml version="1.0" encoding="utf-8"?><BlockList>{listed}</BlockList>'.encode()


def seen(method: str, answer: Answer) -> Seen:
    """Of a HEAD curl shows the head in place of a body."""
    return Seen(answer.status, answer.headers, b"" if method == "HEAD" else answer.body)


def steps() -> list[tuple[str, str, Mapping[str, str], bytes | None]]:
    """Method, path below the container, fields and body."""
    plain, small = PARTS["a"], b"small"
    b64 = base64.b64encode
    settings = {
        "x-ms-blob-content-type": "text/x", "x-ms-blob-content-language": "de", "x-ms-meta-a": "1",
        "x-ms-blob-content-disposition": "attachment", "x-ms-blob-content-encoding": "own",
        "x-ms-blob-cache-control": "no-cache", "x-ms-blob-content-md5": b64(md5(plain)).decode(),
    }  # fmt: skip
    right, wrong = b64(md5(plain)).decode(), b64(md5(b"other")).decode()
    crc, text_y = b64(crc64(plain)).decode(), {"x-ms-blob-content-type": "text/y"}
    tags = b"<Tags><TagSet><Tag><Key>a</Key><Value>b</Value></Tag></TagSet></Tags>"
    return [
        ("PUT", "?restype=container", {}, None),
        # Whole blobs and their checksums.
        ("PUT", "/whole", {**BLOCK_BLOB, **settings, "content-md5": right}, plain),
        ("GET", "/whole", {}, None),
        ("HEAD", "/whole", {}, None),
        ("PUT", "/whole", {**BLOCK_BLOB, "content-md5": wrong}, plain),
        ("GET", "/whole", {"x-ms-range": "bytes=5-9"}, None),
        ("GET", "/whole", {"range": "bytes=16000-"}, None),
        ("GET", "/whole", {"x-ms-range": "bytes=5-9", "x-ms-range-get-content-md5": "true"}, None),
        ("GET", "/whole", {"x-ms-range": "bytes=90000-90009"}, None),
        ("GET", "/whole", {"if-none-match": "*"}, None),
        ("PUT", "/whole", {**BLOCK_BLOB, "if-none-match": "*"}, small),
        ("PUT", "/crc", {**BLOCK_BLOB, "x-ms-content-crc64": crc}, plain),
        ("PUT", "/empty", BLOCK_BLOB, b""),
        ("GET", "/empty", {}, None),
        # Blocks: any order, sent again, taken from where the list says.
        ("PUT", block("c"), {"content-md5": b64(md5(PARTS["c"])).decode()}, PARTS["c"]),
        ("PUT", block("a"), {}, PARTS["a"]),
        ("PUT", block("b"), {}, PARTS["d"]),
        ("PUT", block("b"), {}, PARTS["b"]),
        ("PUT", block("d"), {"content-md5": wrong}, PARTS["d"]),
        ("PUT", block("e"), {}, b""),
        ("GET", "/blob", {}, None),
        ("GET", "/blob?comp=blocklist&blocklisttype=committed", {}, None),
        ("PUT", "/blob?comp=blocklist", {}, block_list(("Committed", "a"))),
        ("PUT", "/blob?comp=blocklist", {}, block_list(("Latest", "a"), ("Latest", "z"))),
        ("PUT", "/blob?comp=blocklist", {}, b"<BlockList><Latest>"),
        ("PUT", "/blob?comp=blocklist", {"if-match": '"0x1"'}, block_list(("Latest", "a"))),
        (
            "PUT", "/blob?comp=blocklist", settings,
            block_list(("Uncommitted", "b"), ("Latest", "a"), ("Latest", "c")),
        ),
        ("GET", "/blob", {}, None),
        ("HEAD", "/blob", {}, None),
        ("GET", "/blob", {"x-ms-range": "bytes=20990-41005"}, None),
        ("GET", "/blob?comp=blocklist&blocklisttype=all", {}, None),
        ("GET", "/blob?comp=blocklist", {}, None),
        # Committed again, with new ones.
        ("PUT", block("d"), {}, PARTS["d"]),
        ("PUT", block("a"), {}, PARTS["c"]),
        (
            "PUT", "/blob?comp=blocklist", {},
            block_list(("Committed", "a"), ("Latest", "a"), ("Uncommitted", "d"), ("Committed", "b")),
        ),
        ("GET", "/blob", {}, None),
        ("GET", "/blob?comp=blocklist&blocklisttype=all", {}, None),
        ("PUT", "/blob?comp=blocklist", {}, block_list(("Uncommitted", "d"))),
        ("PUT", "/blob?comp=blocklist", {}, block_list(("Committed", "c"))),
        ("PUT", "/blob?comp=blocklist", {}, block_list(("Committed", "d"), ("Committed", "d"))),
        ("GET", "/blob", {}, None),
        ("PUT", "/none?comp=blocklist", {"x-ms-meta-none": "1"}, block_list()),
        ("GET", "/none", {}, None),
        ("HEAD", "/none", {}, None),
        ("GET", "/none?comp=blocklist&blocklisttype=all", {}, None),
        # What is said of them.
        ("PUT", "/blob?comp=properties", {**text_y, "x-ms-blob-content-md5": right}, None),
        ("HEAD", "/blob", {}, None),
        ("PUT", "/whole?comp=properties", text_y, None),
        ("HEAD", "/whole", {}, None),
        ("PUT", "/missing?comp=properties", text_y, None),
        ("PUT", "/blob?comp=properties", {"x-ms-blob-content-type": "no", "if-match": '"0x1"'}, None),
        ("PUT", "/blob?comp=metadata", {"x-ms-meta-b": "2"}, None),
        ("GET", "/blob?comp=metadata", {}, None),
        ("PUT", "/blob?comp=tags", {}, tags),
        ("GET", "/blob?comp=tags", {}, None),
        ("PUT", "/blob?comp=tier", {"x-ms-access-tier": "Cool"}, None),
        ("HEAD", "/blob", {}, None),
        ("GET", "?restype=container&comp=list", {}, None),
        ("GET", "?restype=container&comp=list&prefix=b&include=metadata,tags,uncommittedblobs", {}, None),
        ("GET", "?restype=container&comp=list&delimiter=/&maxresults=2", {}, None),
        ("GET", "?restype=container", {}, None),
        ("GET", "?restype=container&comp=acl", {}, None),
        ("PUT", "?restype=container&comp=acl", {}, b"<SignedIdentifiers></SignedIdentifiers>"),
        ("DELETE", "/whole", {}, None),
        ("GET", "/whole", {}, None),
        ("DELETE", "?restype=container&comp=nonsense", {}, None),
    ]  # fmt: skip


# Azurite takes no notice of these parameters: it would delete the container, and gives the content.
REFUSED_HERE = {
    ("DELETE", "?restype=container&comp=nonsense"): "unknown-route",
    ("GET", "/blob?comp=metadata"): "object-invalid",
}


async def run(way: Way) -> list[Answer]:
    return [
        await way.ask(method, f"/box-{way.name}{path}", fields, body)
        for method, path, fields, body in steps()
    ]


async def test_every_request_is_answered_as_directly(tmp_path: Path) -> None:
    async with site(tmp_path) as place:
        direct = await run(place.ways["direct"])
        for via in ("forward", "reverse"):
            found = []
            through = await run(place.ways[via])
            for (method, path, fields, _body), one, two in zip(steps(), direct, through, strict=True):
                if (method, path) in REFUSED_HERE:
                    assert two.code == REFUSED_HERE[method, path]
                    continue
                differences = DECLARED.differences(seen(method, one), seen(method, two))
                if differences:
                    found.append(f"{method} {path} {fields}: {differences}")
            assert not found, f"{via}:\n" + "\n".join(found)


async def test_what_does_not_match_is_not_stored(tmp_path: Path) -> None:
    """Neither a blob nor a block nor a list; and what was there stays."""
    wrong_md5 = {"content-md5": base64.b64encode(md5(b"other")).decode()}
    wrong_crc = {"x-ms-content-crc64": base64.b64encode(crc64(b"other")).decode()}
    async with site(tmp_path) as place:
        way, direct = place.ways["forward"], place.ways["direct"]
        await way.ask("PUT", "/box?restype=container")
        assert (await way.ask("PUT", "/box/b", BLOCK_BLOB, b"first")).status == 201
        await way.ask("PUT", "/box/l?comp=block&blockid=QQ%3D%3D", {}, b"block")
        listed = b"<BlockList><Latest>QQ==</Latest></BlockList>"
        for fields, code in ((wrong_md5, "bad-digest"), (wrong_crc, "bad-checksum")):
            for path, body in (
                ("/box/b", PARTS["a"]),
                ("/box/l?comp=block&blockid=Qg%3D%3D", PARTS["a"]),
                ("/box/l?comp=blocklist", listed),
            ):
                answer = await way.ask("PUT", path, {**BLOCK_BLOB, **fields}, body)
                assert (answer.status, answer.code) == (400, code)
        assert (await way.ask("GET", "/box/b")).body == b"first"
        assert (await way.ask("GET", "/box/l")).status == 404
        waiting = await direct.ask("GET", "/box/l?comp=blocklist&blocklisttype=all")
        assert waiting.body.count(b"<Block>") == 1


async def test_a_block_that_is_sent_again_while_it_is_sent(tmp_path: Path) -> None:
    """Which of both counts is the service's affair elsewhere; here it is one of them, whole, and opens."""
    async with site(tmp_path) as place:
        way = place.ways["reverse"]
        await way.ask("PUT", "/box?restype=container")
        for _round in range(3):
            bodies = [os.urandom(50_000 + size) for size in range(6)]
            answers = await asyncio.gather(
                *(way.ask("PUT", f"/box{block('a')}", {}, body) for body in bodies)
            )
            assert {answer.status for answer in answers} == {201}
            assert (
                await way.ask("PUT", "/box/blob?comp=blocklist", {}, block_list(("Latest", "a")))
            ).status == 201
            read = await way.ask("GET", "/box/blob")
            assert read.body in bodies


async def test_sizes_are_right_whatever_became_of_the_mark(tmp_path: Path) -> None:
    async with site(tmp_path) as place:
        way, direct = place.ways["forward"], place.ways["direct"]
        await way.ask("PUT", "/box?restype=container")
        await way.ask("PUT", f"/box{block('a')}", {}, PARTS["a"])
        await way.ask("PUT", f"/box{block('b')}", {}, PARTS["b"])
        await way.ask("PUT", "/box/blob?comp=blocklist", {}, block_list(("Latest", "a"), ("Latest", "b")))
        plain_bytes = len(PARTS["a"]) + len(PARTS["b"])

        async def mark() -> str | None:
            return (await direct.ask("HEAD", "/box/blob")).headers.get("content-md5")

        async def sizes() -> list[int]:
            listed = await way.ask("GET", "/box?restype=container&comp=list")
            found = re.findall(rb"<Content-Length>(\d+)<", listed.body)
            return [int(found[0]), int((await way.ask("HEAD", "/box/blob")).headers["content-length"])]

        assert await mark() == size_mark(plain_bytes)
        own = {
            "x-ms-blob-content-type": "text/x",
            "x-ms-blob-content-md5": base64.b64encode(bytes(16)).decode(),
        }
        assert (await way.ask("PUT", "/box/blob?comp=properties", own)).status == 200
        assert await mark() == size_mark(plain_bytes), "it is kept, and the client's own is not"
        assert await sizes() == [plain_bytes, plain_bytes]
        # Somebody else clears it, or makes it lie: a list believes it, nobody else does.
        await direct.ask("PUT", "/box/blob?comp=properties", {"x-ms-blob-content-type": "text/x"})
        assert await mark() is None
        assert await sizes() == [plain_bytes, plain_bytes]
        lie = {"x-ms-blob-content-md5": size_mark(7)}
        await direct.ask("PUT", "/box/blob?comp=properties", lie)
        assert await sizes() == [7, plain_bytes]
        assert len((await way.ask("GET", "/box/blob")).body) == plain_bytes


async def test_blocks_of_a_copy(tmp_path: Path) -> None:
    """They are bound to the blob they were sent for: they can be committed anew, but not with new ones."""
    async with site(tmp_path) as place:
        way = place.ways["reverse"]
        await way.ask("PUT", "/box?restype=container")
        for letter in "abc":
            await way.ask("PUT", f"/box{block(letter)}", {}, PARTS[letter])
        listed = block_list(*(("Latest", letter) for letter in "abc"))
        assert (await way.ask("PUT", "/box/blob?comp=blocklist", {}, listed)).status == 201
        copy = await way.ask("PUT", "/box/copy", {"x-ms-copy-source": f"{way.url}/box/blob"})
        assert copy.status == 202
        assert (await way.ask("GET", "/box/copy")).body == PARTS["a"] + PARTS["b"] + PARTS["c"]
        await way.ask("PUT", f"/box{block('d', of='copy')}", {}, PARTS["d"])
        mixed = await way.ask(
            "PUT", "/box/copy?comp=blocklist", {}, block_list(("Committed", "a"), ("Latest", "d"))
        )
        assert (mixed.status, mixed.code) == (400, "blocks-of-a-copy")
        again = block_list(("Committed", "c"), ("Latest", "a"))
        assert (await way.ask("PUT", "/box/copy?comp=blocklist", {}, again)).status == 201
        assert (await way.ask("GET", "/box/copy")).body == PARTS["c"] + PARTS["a"]


async def test_blocks_that_came_another_way(tmp_path: Path) -> None:
    """A plaintext block that somebody has put at the service itself is never joined, and never shown."""
    async with site(tmp_path) as place:
        way, direct = place.ways["forward"], place.ways["direct"]
        await way.ask("PUT", "/box?restype=container")
        await direct.ask("PUT", f"/box{block('a')}", {}, PARTS["a"])
        shown = await way.ask("GET", "/box/blob?comp=blocklist&blocklisttype=all")
        assert b"<Block>" not in shown.body
        answer = await way.ask("PUT", "/box/blob?comp=blocklist", {}, block_list(("Latest", "a")))
        assert (answer.status, answer.code) == (400, "block-unknown")
        assert b"<Code>InvalidBlockList</Code>" in answer.body


async def committed(place: Site) -> tuple[list[str], bytes]:
    """A blob of three blocks; the stored names of its blocks, the manifest's last, and its plaintext."""
    way = place.ways["forward"]
    await way.ask("PUT", "/box?restype=container")
    for letter in "abc":
        await way.ask("PUT", f"/box{block(letter)}", {}, PARTS[letter])
    listed = block_list(*(("Latest", letter) for letter in "abc"))
    assert (await way.ask("PUT", "/box/blob?comp=blocklist", {}, listed)).status == 201
    answer = await place.ways["direct"].ask("GET", "/box/blob?comp=blocklist&blocklisttype=committed")
    return re.findall(r"<Name>([^<]+)</Name>", answer.body.decode()), b"".join(
        PARTS[letter] for letter in "abc"
    )


async def test_a_service_that_joins_other_blocks(tmp_path: Path) -> None:
    """Blocks left out, moved, repeated, without their manifest: nothing of it is served."""
    async with site(tmp_path) as place:
        way, direct = place.ways["forward"], place.ways["direct"]
        names, plain = await committed(place)
        assert (await way.ask("GET", "/box/blob")).body == plain
        stored = (await direct.ask("GET", "/box/blob")).body
        found = opened(
            [("blob", stored)],
            owner=place.service.owner,
            materials=place.rig.materials[place.service.owner],
            plaintexts=PARTS.values(),
        )
        assert found == {"blob": plain}
        one, two, three, manifest = names
        for joined in (
            [one, two, three],
            [one, three, manifest],
            [two, one, three, manifest],
            [one, two, three, three, manifest],
            [one, two, three, manifest, manifest],
            [manifest],
            [one],
        ):
            # Each time from what there was: blocks that are in no list are gone.
            await direct.ask("PUT", "/box/blob", BLOCK_BLOB, b"")
            await place_blocks(direct, names, stored)
            entries = "".join(f"<Latest>{name}</Latest>" for name in joined)
            made = await direct.ask(
                "PUT", "/box/blob?comp=blocklist", {}, f"<BlockList>{entries}</BlockList>".encode()
            )
            assert made.status == 201
            for fields in ({}, {"x-ms-range": "bytes=100-30000"}):
                answer = await way.ask("GET", "/box/blob", fields)
                assert (answer.status, answer.code) == (502, "object-invalid"), joined
                assert plain[100:116] not in answer.body


async def place_blocks(direct: Way, names: list[str], stored: bytes) -> None:
    """The four blocks of a stored blob, put to the service as they are."""
    sizes = [sealed_length(len(PARTS[letter])) for letter in "abc"]
    ends = [sum(sizes[:count]) for count in range(4)] + [len(stored)]
    for name, begin, end in zip(names, ends, ends[1:], strict=False):
        answer = await direct.ask(
            "PUT", f"/box/blob?comp=block&blockid={quote(name, safe='')}", {}, stored[begin:end]
        )
        assert answer.status == 201


async def test_a_database_that_is_away(tmp_path: Path) -> None:
    """Nothing is acknowledged that could not be committed later."""
    async with site(tmp_path) as place:
        way, database = place.ways["forward"], tmp_path / "uploads" / "directory.db"
        await way.ask("PUT", "/box?restype=container")
        for file in database.parent.glob("directory.db*"):
            file.unlink()
        for path, body in ((f"/box{block('b')}", PARTS["b"]), ("/box/blob?comp=blocklist", block_list())):
            answer = await way.ask("PUT", path, {}, body)
            assert (answer.status, answer.code) == (503, "uploads-unavailable")
        assert (await way.ask("PUT", "/box/whole", BLOCK_BLOB, PARTS["a"])).status == 201, "needs none"
