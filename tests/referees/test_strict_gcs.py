"""The strict emulator does what Google's pages say, request by request."""

import base64
import hashlib
import json
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests import pki
from tests.referees.strict_gcs import Fault, FaultKind, StrictGcs, strict_gcs
from tests.referees.strict_gcs_objects import FaultError, selected
from tests.referees.strict_gcs_sessions import GRANULE_BYTES as G
from tests.referees.strict_gcs_sessions import Place

BODY = os.urandom(3 * G + 100)
UPLOAD = "/upload/storage/v1/b/referee-bucket/o"
OBJECTS = "/storage/v1/b/referee-bucket/o"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def held(self) -> str | None:
        return self.headers.get("Range")

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


@dataclass(frozen=True, slots=True)
class Client:
    session: aiohttp.ClientSession
    server: StrictGcs

    async def ask(
        self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        url = target if target.startswith("https:") else self.server.url + target
        async with self.session.request(
            method, url, data=body, headers=headers, allow_redirects=False
        ) as answer:
            return Answer(answer.status, dict(answer.headers), await answer.read())

    async def begin(self, name: str, query: str = "", document: bytes = b"{}", **headers: str) -> str:
        given = {key.replace("_", "-"): value for key, value in headers.items()}
        answer = await self.ask("POST", f"{UPLOAD}?uploadType=resumable&name={name}{query}", document, given)
        assert answer.status == 200, answer
        return answer.headers["Location"]

    async def put(self, url: str, place: str | None, body: bytes = b"", **headers: str) -> Answer:
        given = {key.replace("_", "-"): value for key, value in headers.items()}
        if place is not None:
            given["Content-Range"] = f"bytes {place}"
        return await self.ask("PUT", url, body, given)


@asynccontextmanager
async def started(directory: Path) -> AsyncIterator[Client]:
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, directory, "ca")
    pair = pki.write_credential(pki.issue_server(ca, ["localhost"]), directory, "server")
    connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=ca_file))
    async with strict_gcs(*pair) as server, aiohttp.ClientSession(connector=connector) as session:
        session._retry_connection = False  # as aiohttp's own test client: a cut is to be seen
        yield Client(session, server)


def chunk(start: int, stop: int, total: int | str = "*") -> tuple[str, bytes]:
    return f"{start}-{stop - 1}/{total}", BODY[start:stop]


async def test_a_session_step_by_step(tmp_path: Path) -> None:
    total = len(BODY)
    async with started(tmp_path) as client:
        url = await client.begin("a", document=b'{"metadata": {"x": "y"}}', X_Upload_Content_Type="text/x")
        for place, body, status, held in (
            ("*/*", b"", 308, None),
            (*chunk(0, G), 308, G),
            ("*/*", b"", 308, G),
            (*chunk(0, G), 308, G),
            (*chunk(0, 2 * G), 308, 2 * G),
            (*chunk(2 * G, 2 * G + 7), 308, 2 * G),
            (*chunk(2 * G, total, total + 1), 308, 3 * G),
            (f"*/{total}", b"", 400, None),
            (*chunk(3 * G, total + 1, total + 1), 400, None),
        ):
            answer = await client.put(url, place, body)
            assert answer.status == status, (place, answer)
            assert answer.held == (None if held is None else f"bytes=0-{held - 1}"), place
        assert client.server.trouble == [
            "a chunk of 7 bytes is not the last",
            f"a chunk of {G + 100} bytes is not the last",
            "Content-Length and Content-Range differ",
        ]
        done = await client.put(url, *chunk(3 * G, total, total + 1))
        assert done.status == 308
        url = await client.begin("a", document=b'{"metadata": {"x": "y"}}', X_Upload_Content_Type="text/x")
        assert (await client.put(url, *chunk(0, 3 * G))).status == 308
        done = await client.put(url, *chunk(3 * G, total, total))
        assert done.status == 200
        assert done.json["size"] == str(total)
        assert done.json["contentType"] == "text/x"
        assert done.json["metadata"] == {"x": "y"}
        assert done.json["md5Hash"] == base64.b64encode(hashlib.md5(BODY).digest()).decode()
        for place in ("*/*", f"*/{total}", f"0-{G - 1}/{total}"):
            assert (await client.put(url, place, BODY[:G] if place[0] == "0" else b"")).json == done.json
        assert client.server.stored() == [("referee-bucket/a", BODY)]
        assert (await client.ask("GET", f"{OBJECTS}/a?alt=media")).body == BODY


@pytest.mark.parametrize("size", [0, 1, G - 1, G, G + 1])
async def test_ways_to_end(tmp_path: Path, size: int) -> None:
    async with started(tmp_path) as client:
        ways: dict[str, list[tuple[str | None, bytes]]] = {
            "whole": [(None, BODY[:size])],
            "node": [(f"0-*/{size}", BODY[:size])],
            "asked": [(f"*/{size}", b"")] if size == 0 else [chunk(0, size, size)],
        }
        if size == G:
            ways["later"] = [chunk(0, size), (f"*/{size}", b"")]
        for way, requests in ways.items():
            url = await client.begin(way)
            answers = [await client.put(url, place, body) for place, body in requests]
            assert [answer.status for answer in answers] == [*[308] * (len(answers) - 1), 200], way
        assert dict(client.server.stored()) == {f"referee-bucket/{way}": BODY[:size] for way in ways}
        assert client.server.trouble == []


async def test_what_is_refused_of_a_session(tmp_path: Path) -> None:
    async with started(tmp_path) as client:
        url = await client.begin("a", X_Upload_Content_Length=str(len(BODY)))
        gap = await client.put(url, *chunk(G, 2 * G))
        assert gap.status == 503
        assert gap.headers["Content-Type"].startswith("text/plain")
        assert gap.body.endswith(
            b"the upload offset is 262144 byte(s), which exceeds already uploaded size of 0 byte(s)."
        )
        for place, body in (
            ("nonsense", b""), ("5-4/9", b""), ("0-9/5", BODY[:10]), (f"0-{G - 1}/{G}", BODY[:G]),
            ("*/*", b"x"), (f"0-{G - 1}/*", BODY[:9]),
        ):  # fmt: skip
            assert (await client.put(url, place, body)).status == 400, place
        assert client.server.held() == b""
        assert (await client.put(url, *chunk(0, G))).held == f"bytes=0-{G - 1}"
        client.server.trouble.clear()
        other = await client.put(url, f"0-{2 * G - 1}/*", os.urandom(G) + BODY[G : 2 * G])
        assert other.held == f"bytes=0-{2 * G - 1}"
        assert client.server.held() == BODY[: 2 * G], "what is held stays"
        assert client.server.trouble[0].startswith("other bytes at ")
        assert (await client.ask("DELETE", url)).status == 499
        for status in (499, 499):
            assert (await client.put(url, "*/*")).status == status
        assert (await client.put(url + "x", "*/*")).status == 404
        url = await client.begin("a")
        client.server.end_sessions(410)
        assert (await client.put(url, *chunk(0, G))).status == 410
        assert client.server.stored() == []


async def test_digests_and_conditions(tmp_path: Path) -> None:
    async with started(tmp_path) as client:
        wrong = base64.b64encode(bytes(16)).decode()
        url = await client.begin("a", document=json.dumps({"md5Hash": wrong}).encode())
        assert (await client.put(url, None, BODY)).status == 400
        assert (await client.put(url, "*/*")).status == 410
        url = await client.begin("a")
        assert (await client.put(url, None, BODY, X_Goog_Hash="crc32c=AAAAAA==")).status == 400
        for headers in ({"Content-MD5": wrong}, {"X-Goog-Hash": f"md5={wrong}"}):
            answer = await client.ask("POST", f"{UPLOAD}?uploadType=media&name=a", BODY, headers)
            assert answer.status == 400
        assert client.server.stored() == []
        late = await client.begin("a", "&ifGenerationMatch=0")
        made = await client.ask("POST", f"{UPLOAD}?uploadType=media&name=a&ifGenerationMatch=0", BODY)
        assert made.status == 200
        assert (await client.put(late, None, b"late")).status == 412
        for query in ("&ifGenerationMatch=0", "&ifGenerationMatch=7"):
            for how in ("media", "resumable"):
                answer = await client.ask("POST", f"{UPLOAD}?uploadType={how}&name=a{query}", b"{}")
                assert answer.status == 412
                assert answer.json["error"]["errors"][0]["reason"] == "conditionNotMet"
        generation = made.json["generation"]
        assert (await client.ask("DELETE", f"{OBJECTS}/a?ifGenerationMatch=7")).status == 412
        assert (await client.ask("GET", f"{OBJECTS}/a?ifGenerationNotMatch={generation}")).status == 304
        assert (await client.ask("GET", f"{OBJECTS}/a?generation=7")).status == 404
        changed = await client.ask("PATCH", f"{OBJECTS}/a", b'{"metadata": {"n": "1"}}')
        assert (changed.json["generation"], changed.json["metageneration"]) == (generation, "2")
        assert (await client.ask("PATCH", f"{OBJECTS}/a", b'{"size": "1"}')).status == 400
        assert (await client.ask("PATCH", f"{OBJECTS}/a?ifMetagenerationMatch=1", b"{}")).status == 412


@pytest.mark.parametrize("kind", list(FaultKind), ids=lambda kind: kind.value)
async def test_faults(tmp_path: Path, kind: FaultKind) -> None:
    async with started(tmp_path) as client:
        url = await client.begin("a")
        client.server.faults.append(Fault(kind, after_bytes=G + 5))
        try:
            answer: Answer | None = await client.put(url, *chunk(0, 3 * G))
        except aiohttp.ClientError:
            answer = None
        kept = 3 * G if kind is FaultKind.SILENT else G
        status = {FaultKind.ERROR: 503, FaultKind.PARTIAL: 308}.get(kind)
        assert (None if answer is None else answer.status) == status or kind is FaultKind.ERROR
        assert (await client.put(url, "*/*")).held == f"bytes=0-{kept - 1}"
        assert (await client.put(url, *chunk(kept, len(BODY), len(BODY)))).status == 200
        assert client.server.stored() == [("referee-bucket/a", BODY)]


async def test_multipart_and_what_it_does_not_take(tmp_path: Path) -> None:
    async with started(tmp_path) as client:
        parts = [
            b'Content-Type: application/json\r\n\r\n{"name": "a"}',
            b"Content-Type: text/x\r\n\r\n" + BODY,
        ]
        headers = {"Content-Type": 'multipart/related; boundary="b b"'}

        def joined(*parts: bytes) -> bytes:
            return b"".join(b"--b b\r\n" + part + b"\r\n" for part in parts) + b"--b b--\r\n"

        target = f"{UPLOAD}?uploadType=multipart"
        answer = await client.ask("POST", target, joined(*parts), headers)
        assert (answer.status, answer.json["contentType"]) == (200, "text/x")
        assert client.server.stored() == [("referee-bucket/a", BODY)]
        for body in (
            joined(*parts)[:-10],
            joined(parts[0]),
            joined(parts[1], parts[0]),
            b"x" + joined(*parts),
        ):
            assert (await client.ask("POST", target, body, headers)).status == 400
        for method, path in (
            ("POST", "/batch/storage/v1"),
            ("PUT", "/referee-bucket/a"),
            ("POST", f"{OBJECTS}/a"),
        ):
            assert (await client.ask(method, path, b"{}")).status in (404, 405)
        assert len(client.server.trouble) == 3


def test_parts_of_answers() -> None:
    value = {"items": [{"name": "a", "size": "1", "metadata": {"x": "1", "y": "2"}}], "nextPageToken": "t"}
    assert selected(value, "items(name,metadata/x),nextPageToken") == {
        "items": [{"name": "a", "metadata": {"x": "1"}}],
        "nextPageToken": "t",
    }
    assert selected(value, "items/size") == {"items": [{"size": "1"}]}
    assert selected(value, "*") == value
    for bad in ("items(", "items)", "a b$"):
        with pytest.raises(FaultError):
            selected(value, bad)


def test_places() -> None:
    assert Place.of(None) == Place(is_rest=True)
    assert Place.of("bytes 0-9/*") == Place(stop=10)
    assert Place.of("bytes 5-*/20") == Place(start=5, total=20, is_rest=True)
    assert Place.of("bytes */7") == Place(total=7, is_status=True)
    for bad in ("", "bytes 1-", "bytes 0-9", "octets 0-9/10", "bytes 0-9/9", "bytes 2-1/*"):
        with pytest.raises(FaultError):
            Place.of(bad)
