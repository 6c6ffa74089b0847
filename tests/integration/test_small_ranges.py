"""Ranges of objects of no byte and of one, by real servers: directly, sealed, and plain on a migrate route.

1. What lay there before us is read as directly: whatever the server makes of a range, it makes of it by us.
2. Of what is sealed a range is judged here, by RFC 9110 14, alike for every service: an empty object has none
   (416), and a suffix of no bytes is none. Servers differ in that: Apache and WsgiDAV give 200, Azurite 500.
3. What may be ignored (several ranges, what is no range) is ignored by us, plain or sealed: the whole object.
"""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from proxy.tenants.model import LegacyPolicy
from tests.integration.azure_site import site as azure_site
from tests.integration.gcs_site import strict_site
from tests.integration.proxy_rig import Answer
from tests.integration.s3_rig import s3_site
from tests.integration.webdav_site import StartServer, dav_site
from tests.integration.whole_site import until
from tests.referees.apache import apache
from tests.referees.swift import swift
from tests.referees.wsgidav import wsgidav

BODIES: Mapping[str, bytes] = {"empty": b"", "one": b"x"}
KINDS = ("plain", "sealed")
INSIDE = ("bytes=0-0", "bytes=0-", "bytes=-5")
"""Of an object of one byte."""
OUTSIDE = ("bytes=1-", "bytes=2-9", "bytes=-0")
NONE = ("bytes=5-1", "bytes=-", "bytes=0-0,-1", "lines=0-1")

type Saw = tuple[int, bytes | None, str | None]
"""Status, body (of a success) and Content-Range."""
type Get = Callable[[str, str, str], Awaitable[Saw]]
"""Way, name, range."""


def saw(answer: Answer) -> Saw:
    body = answer.body if answer.status in (200, 206) else None
    return answer.status, body, answer.headers.get("content-range")


async def differences(get: Get) -> list[str]:
    """What is not as rule 1 says, then what is not as rules 2 and 3 say."""
    found = []
    for name, body in BODIES.items():
        whole: Saw = (200, body, None)
        for wanted in (*INSIDE, *OUTSIDE, *NONE):
            direct = await get("direct", f"{name}-plain", wanted) if wanted not in NONE else whole
            plain = await get("forward", f"{name}-plain", wanted)
            sealed = await get("forward", f"{name}-sealed", wanted)
            if wanted in NONE:
                expected = (whole, whole)
            elif body and wanted in INSIDE:
                expected = (direct, (206, body, "bytes 0-0/1"))
            else:
                expected = (direct, (416, None, f"bytes */{len(body)}"))
            if (plain, sealed) != expected:
                found.append(f"{name} {wanted}: {direct=} {plain=} {sealed=}")
    return found


@pytest.mark.parametrize("start", [wsgidav, apache])
async def test_webdav(tmp_path: Path, start: StartServer) -> None:
    async with dav_site(tmp_path, start, legacy=LegacyPolicy.MIGRATE) as site:
        for name, body in BODIES.items():
            for way, kind in (("direct", "plain"), ("forward", "sealed")):
                length = {"Content-Length": str(len(body))}
                put = await site.dav(way, "PUT", f"/{name}-{kind}", fields=length, body=body)
                assert put.status == 201

        async def is_told_by_its_tag() -> bool:
            """Apache's are weak for a second after a write: nothing that a range could be pinned to."""
            seen = [await site.dav("direct", "HEAD", f"/{name}-{kind}") for name in BODIES for kind in KINDS]
            return all(answer.headers["etag"].startswith('"') for answer in seen)

        await until(is_told_by_its_tag)

        async def get(way: str, name: str, wanted: str) -> Saw:
            return saw(await site.dav(way, "GET", f"/{name}", fields={"Range": wanted}))

        assert await differences(get) == []


async def test_azure(tmp_path: Path) -> None:
    async with azure_site(tmp_path, legacy=LegacyPolicy.MIGRATE) as site:
        await site.ways["direct"].ask("PUT", "/box?restype=container")
        block_blob = {"x-ms-blob-type": "BlockBlob"}
        for name, body in BODIES.items():
            for way, kind in (("direct", "plain"), ("forward", "sealed")):
                put = await site.ways[way].ask("PUT", f"/box/{name}-{kind}", block_blob, body)
                assert put.status == 201

        async def get(way: str, name: str, wanted: str) -> Saw:
            return saw(await site.ways[way].ask("GET", f"/box/{name}", {"range": wanted}))

        assert await differences(get) == []


async def test_gcs(tmp_path: Path) -> None:
    async with strict_site(tmp_path, legacy=LegacyPolicy.MIGRATE) as site:
        made = {"content-type": "application/json"}
        await site.ways["direct"].ask("POST", "/storage/v1/b?project=p", made, b'{"name":"box"}')
        for name, body in BODIES.items():
            for way, kind in (("direct", "plain"), ("forward", "sealed")):
                assert (await site.ways[way].put("box", f"{name}-{kind}", body)).status == 200

        async def get(way: str, name: str, wanted: str) -> Saw:
            return saw(await site.ways[way].get("box", name, {"range": wanted}))

        assert await differences(get) == []


async def test_s3(tmp_path: Path) -> None:
    async with s3_site(tmp_path, swift, legacy=LegacyPolicy.MIGRATE) as site:
        await site.calls([["create_bucket", {"Bucket": "box"}]])
        answers: dict[tuple[str, str, str], Saw] = {}
        reads = [(name, wanted) for name in BODIES for wanted in (*INSIDE, *OUTSIDE, *NONE)]
        for via, kinds in ((None, ("plain",)), ("forward", ("sealed", "plain"))):
            puts: list[list[object]] = [
                ["put_object", {"Bucket": "box", "Key": f"{name}-{kinds[0]}", "Body": body.decode()}]
                for name, body in BODIES.items()
            ]
            gets = [
                ["get_object", {"Bucket": "box", "Key": f"{name}-{kind}", "Range": wanted}]
                for kind in kinds
                for name, wanted in reads
            ]
            seen = await site.calls([*puts, *gets], via=via)
            assert [one["status"] for one in seen[: len(puts)]] == [200] * len(puts)
            keys = [(via or "direct", f"{name}-{kind}", wanted) for kind in kinds for name, wanted in reads]
            for key, one in zip(keys, seen[len(puts) :], strict=True):
                body = b"x" * one["answer"]["Body"]["bytes"] if "answer" in one else None
                answers[key] = (one["status"], body, one["headers"].get("content-range"))

        async def get(way: str, name: str, wanted: str) -> Saw:
            return answers[way, name, wanted]

        assert await differences(get) == []
