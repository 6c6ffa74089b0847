"""Google's object storage through the proxy: what is refused, and the states of stored objects."""

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import pytest

from envelope.derive import object_key
from envelope.keys import KeyId, KeyState, NetworkService
from envelope.objects import Sealer
from tests.integration.gcs_site import Site, Way, place, strict_site
from tests.integration.proxy_rig import Answer
from tests.referees.comparison import Plaintexts
from tests.referees.strict_gcs import StrictGcs

PLAIN = os.urandom(40_000)
BOX = "referee-bucket"
G = 256 * 1024
UPLOAD = f"/upload/storage/v1/b/{BOX}/o"
OBJECTS = f"/storage/v1/b/{BOX}/o"
RELATED = {"content-type": "multipart/related; boundary=b"}
JSON = {"content-type": "application/json"}


def is_googles(answer: Answer, code: str) -> bool:
    """Whether a refusal has the shape of Google's errors, and our code."""
    if answer.code != code or not answer.headers["content-type"].startswith("application/json"):
        return False
    error = json.loads(answer.body)["error"]
    return bool(error["code"] == answer.status and error["errors"][0]["reason"] and error["message"])


def related(document: bytes, content: bytes = PLAIN) -> bytes:
    head = b"--b\r\nContent-Type: application/json\r\n\r\n" + document
    return head + b"\r\n--b\r\nContent-Type: text/x\r\n\r\n" + content + b"\r\n--b--\r\n"


def wrong(size: int) -> str:
    return base64.b64encode(bytes(size)).decode()


REFUSED: list[tuple[str, str, Mapping[str, str], bytes | None, str]] = [
    # Uploads that nobody has looked at, and what a service might take for another request.
    ("PUT", f"/{BOX}/p", {}, PLAIN, "unknown-route"),
    ("POST", f"/{BOX}", {"content-type": "multipart/form-data; boundary=b"}, PLAIN, "unknown-route"),
    ("POST", f"{OBJECTS}?uploadType=media&name=p", {}, PLAIN, "unknown-route"),
    ("POST", f"{UPLOAD}?name=p", {}, PLAIN, "unknown-route"),
    ("POST", f"{UPLOAD}?uploadType=other&name=p", {}, PLAIN, "unknown-route"),
    ("PUT", f"{UPLOAD}?uploadType=media&name=p", {}, PLAIN, "unknown-route"),
    ("POST", f"{UPLOAD}?uploadType=media&uploadType=resumable&name=p", {}, PLAIN, "bad-message"),
    ("POST", f"{UPLOAD}?uploadType=media&name=p&$alt=json", {}, PLAIN, "unknown-route"),
    ("POST", f"{UPLOAD}?uploadType=media&name=p", {"x-http-method-override": "PUT"}, PLAIN, "unknown-route"),
    ("POST", f"{UPLOAD}?uploadType=media&name=p", {"x-goog-upload-protocol": "raw"}, PLAIN, "unknown-route"),
    ("POST", "/batch/storage/v1", {"content-type": "multipart/mixed; boundary=b"}, PLAIN, "unknown-route"),
    ("POST", f"{OBJECTS}/p/compose", JSON, b'{"sourceObjects": [{"name": "p"}]}', "unknown-route"),
    ("PATCH", f"{OBJECTS}", JSON, b"{}", "unknown-route"),
    ("POST", f"{OBJECTS}/p", JSON, b"{}", "unknown-route"),
    ("POST", f"{OBJECTS}/../o?uploadType=media&name=p", {}, PLAIN, "unknown-route"),
    ("GET", f"{OBJECTS}/p?alt=proto", {}, None, "unknown-route"),
    # Documents that are none of an object's metadata.
    ("PATCH", f"{OBJECTS}/p", JSON, json.dumps({"note": PLAIN.hex()}).encode(), "malformed-document"),
    ("PATCH", f"{OBJECTS}/p", JSON, b"[1]", "malformed-document"),
    ("POST", f"{UPLOAD}?uploadType=resumable&name=p", JSON, b'{"content": "x"}', "malformed-document"),
    ("POST", f"{UPLOAD}?uploadType=multipart&name=p", RELATED, related(b'{"a": 1}'), "malformed-document"),
    # What the service would undo.
    ("POST", f"{UPLOAD}?uploadType=media&name=p&contentEncoding=gzip", {}, PLAIN, "content-coding"),
    ("POST", f"{UPLOAD}?uploadType=media&name=p", {"content-encoding": "gzip"}, PLAIN, "content-coding"),
    (
        "POST", f"{UPLOAD}?uploadType=multipart&name=p", RELATED, related(b'{"contentEncoding": "gzip"}'),
        "content-coding",
    ),
    # Digests of other content.
    ("POST", f"{UPLOAD}?uploadType=media&name=p", {"content-md5": wrong(16)}, PLAIN, "bad-digest"),
    ("POST", f"{UPLOAD}?uploadType=media&name=p", {"x-goog-hash": f"crc32c={wrong(4)}"}, PLAIN, "bad-digest"),
    (
        "POST", f"{UPLOAD}?uploadType=multipart&name=p", RELATED,
        related(json.dumps({"md5Hash": wrong(16)}).encode()), "bad-digest",
    ),
    ("POST", f"{UPLOAD}?uploadType=media&name=p", {"x-goog-hash": "crc32c=no"}, PLAIN, "invalid-digest"),
    # Bodies in parts that are none.
    ("POST", f"{UPLOAD}?uploadType=multipart&name=p", {"content-type": "text/x"}, PLAIN, "bad-message"),
    ("POST", f"{UPLOAD}?uploadType=multipart&name=p", RELATED, related(b"{}")[:-9], "bad-message"),
    ("POST", f"{UPLOAD}?uploadType=multipart&name=p", RELATED, b"x" + related(b"{}"), "bad-message"),
]  # fmt: skip


async def test_what_is_refused_reaches_nobody(tmp_path: Path) -> None:
    async with strict_site(tmp_path) as site:
        way = site.ways["forward"]
        found = []
        for method, target, fields, body, code in REFUSED:
            answer = await way.ask(method, target, fields, body)
            if not is_googles(answer, code):
                found.append(f"{method} {target} {dict(fields)}: {answer.status} {answer.code}, not {code}")
        assert not found, "\n".join(found)
        assert site.server.stored() == []
        assert site.server.held() == b""
        assert not [one for one in site.server.trouble if "batch" in one or "compose" in one]


# ---- states


def sealed_by(site: Site[StrictGcs], owner: NetworkService, key_id: KeyId) -> bytes:
    sealer = Sealer(object_key(site.rig.materials[owner][key_id], owner, key_id), owner, key_id)
    return bytes(sealer.update(PLAIN)) + sealer.finalize()


async def sizes(way: Way, name: str) -> tuple[str, str]:
    """As its metadata and as a list says it."""
    listed = json.loads((await way.ask("GET", f"{OBJECTS}?prefix={quote(name, safe='')}")).body)
    return json.loads((await way.ask("GET", place(BOX, name))).body)["size"], listed["items"][0]["size"]


async def test_plaintext_that_was_there_before(tmp_path: Path) -> None:
    """By policy: refused, read as it is, or not looked at. Sizes are right in each."""
    legacy = {f"/storage/v1/b/{box}": policy for box, policy in (("old", "migrate"), ("asis", "passthrough"))}
    legacy |= {
        f"/download/storage/v1/b/{box.rpartition('/')[2]}": policy for box, policy in list(legacy.items())
    }
    bodies = {"plain": PLAIN, "short": b"short", "empty": b""}
    async with strict_site(tmp_path, options={"legacy": legacy}) as site:
        way, direct = site.ways["forward"], site.ways["direct"]
        for box in ("old", "asis"):
            await direct.ask("POST", "/storage/v1/b?project=p", JSON, json.dumps({"name": box}).encode())
        for box in (BOX, "old", "asis"):
            for name, body in bodies.items():
                assert (await direct.put(box, name, body)).status == 200
            assert (await way.put(box, "sealed", PLAIN)).status == 200
        for name in ("plain", "short"):
            assert is_googles(await way.get(BOX, name), "not-sealed")
            assert is_googles(await way.get(BOX, name, {"range": "bytes=1-3"}), "not-sealed")
        assert is_googles(await way.get(BOX, "empty"), "object-invalid")
        for name, body in bodies.items():
            for box in ("old", "asis"):
                answer = await way.get(box, name)
                assert (answer.status, answer.body) == (200, body), (box, name)
            part = await way.get("old", name, {"range": "bytes=1-3"})
            if body:  # of nothing there is no range: a service may say so, or give it whole
                assert (part.status, part.body) == (206, body[1:4]), name
            size = json.loads((await way.ask("GET", place("old", name))).body)["size"]
            assert size == str(len(body)), name
        listed = json.loads((await way.ask("GET", "/storage/v1/b/old/o")).body)["items"]
        assert {item["name"]: item["size"] for item in listed} == {
            "plain": "40000", "short": "5", "empty": "0", "sealed": "40000"
        }  # fmt: skip
        for box in (BOX, "old"):
            assert (await way.get(box, "sealed")).body == PLAIN
        stored = await way.get("asis", "sealed")
        assert stored.body.startswith(b"\x89SGT")


async def test_objects_that_are_not_ours_or_not_whole(tmp_path: Path) -> None:
    async with strict_site(tmp_path) as site:
        way, direct, owner = site.ways["reverse"], site.ways["direct"], site.service.owner
        (key_id,) = site.rig.materials[owner]
        mine, stranger = sealed_by(site, owner, key_id), NetworkService("other", "objects")
        theirs = sealed_by(site, stranger, site.rig.push(stranger))
        broken = bytearray(mine)
        broken[20_000] ^= 1
        other_service = NetworkService(owner.tenant, "other")
        site.rig.materials[other_service] = site.rig.materials[owner]
        for name, body, code in (
            ("theirs", theirs, "key-unknown"),
            ("unknown", mine[:12] + os.urandom(16) + mine[28:], "key-unknown"),
            ("of another service", sealed_by(site, other_service, key_id), "object-invalid"),
            ("cut", mine[:-16_400], "object-invalid"),
            ("begun", mine[:60], "object-invalid"),
            ("no prefix", mine[88:], "not-sealed"),
        ):
            assert (await direct.put(BOX, name, body)).status == 200
            for fields in ({"range": "bytes=0-99"}, {"range": "bytes=-5"}):
                answer = await way.get(BOX, name, fields)
                assert is_googles(answer, code), (name, fields, answer.status, answer.code)
        # What is found as it streams cuts the answer, unless it is found at once.
        for name, body, intact in (
            ("cut", mine[:-16_400], 32_768),
            ("broken", bytes(broken), 16_384),
            ("appended", mine + b"x", 40_000),
        ):
            await direct.put(BOX, name, body)
            answer = await way.get(BOX, name)
            if not is_googles(answer, "object-invalid"):
                assert answer.exit_code != 0, name
                assert PLAIN[:intact].startswith(answer.body), name
        # Copies are the same objects, whoever makes them.
        assert (await way.put(BOX, "mine", PLAIN)).status == 200
        copied = await direct.ask("POST", f"{place(BOX, 'mine')}/copyTo/b/{BOX}/o/copy", JSON, b"{}")
        assert copied.status == 200
        assert (await way.get(BOX, "copy")).body == PLAIN
        assert await sizes(way, "copy") == ("40000", "40000")


@pytest.mark.parametrize("state", [KeyState.SUSPENDED, KeyState.DEACTIVATED, KeyState.DESTROYED], ids=str)
async def test_states_of_keys(tmp_path: Path, state: KeyState) -> None:
    async with strict_site(tmp_path) as site:
        way, owner = site.ways["forward"], site.service.owner
        assert (await way.put(BOX, "before", PLAIN)).status == 200
        session = (await way.ask("POST", f"{UPLOAD}?uploadType=resumable&name=long", JSON, b"{}")).headers
        (key_id,) = site.rig.materials[owner]
        site.rig.push(owner, key_id=key_id, state=state)
        code = {KeyState.SUSPENDED: "key-suspended", KeyState.DESTROYED: "key-destroyed"}.get(state)
        read = await way.get(BOX, "before")
        assert (read.body == PLAIN) if code is None else is_googles(read, code)
        for answer in (
            await way.put(BOX, "new", PLAIN),
            await way.ask("POST", f"{UPLOAD}?uploadType=multipart&name=new", RELATED, related(b"{}")),
            await way.ask("POST", f"{UPLOAD}?uploadType=resumable&name=new", JSON, b"{}"),
            await way.ask("PUT", session["location"], {}, PLAIN),
        ):
            assert answer.status >= 400
            assert answer.code is not None
            assert answer.code.startswith("key-") or answer.code == "no-active-key", answer.code
        assert site.server.contents(BOX).keys() == {"before"}
        assert not Plaintexts([PLAIN]).leak_into(site.server.held())
        new = site.rig.push(owner)
        assert (await way.put(BOX, "new", PLAIN)).status == 200
        assert site.server.contents(BOX)["new"][12:28] == new.raw
        assert (await way.get(BOX, "new")).body == PLAIN


async def test_what_is_sealed_already_is_sealed_again(tmp_path: Path) -> None:
    """By whichever protocol: the client gets back what it gave, with its sizes and digests."""
    async with strict_site(tmp_path) as site:
        way, owner = site.ways["reverse"], site.service.owner
        (key_id,) = site.rig.materials[owner]
        sealed = sealed_by(site, owner, key_id)
        answer = await way.put(BOX, "twice", sealed)
        assert (
            json.loads(answer.body)["md5Hash"]
            == base64.b64encode(hashlib.md5(sealed, usedforsecurity=False).digest()).decode()
        )
        await way.ask("POST", f"{UPLOAD}?uploadType=multipart&name=related", RELATED, related(b"{}", sealed))
        session = await way.ask("POST", f"{UPLOAD}?uploadType=resumable&name=long", JSON, b"{}")
        assert (await way.ask("PUT", session.headers["location"], {}, sealed)).status == 200
        for name in ("twice", "related", "long"):
            stored = site.server.contents(BOX)[name]
            assert stored.startswith(b"\x89SGT")
            assert sealed not in stored
            assert (await way.get(BOX, name)).body == sealed
            assert await sizes(way, name) == (str(len(sealed)), str(len(sealed)))


async def test_sizes_whatever_became_of_the_mark(tmp_path: Path) -> None:
    """No client sets it, or sees it. Who sets it at the service is believed by metadata, and nowhere else."""
    body = os.urandom(2 * G + 5)
    async with strict_site(tmp_path) as site:
        way, direct = site.ways["forward"], site.ways["direct"]
        mine = json.dumps({"metadata": {"sealgate-size": "7", "x": "y"}}).encode()
        session = await way.ask("POST", f"{UPLOAD}?uploadType=resumable&name=long", JSON, mine)
        done = session
        for at in (0, G, 2 * G):
            stop = min(at + G, len(body))
            said = {"content-range": f"bytes {at}-{stop - 1}/{len(body) if stop == len(body) else '*'}"}
            done = await way.ask("PUT", session.headers["location"], said, body[at:stop])
        assert done.status == 200
        await way.ask("POST", f"{UPLOAD}?uploadType=multipart&name=short", RELATED, related(mine))
        for name, plain in (("long", body), ("short", PLAIN)):
            for _ in ("as it was written", "as a client changed it"):
                resource = json.loads((await way.ask("GET", place(BOX, name))).body)
                assert resource["metadata"] == {"x": "y"}, name
                assert await sizes(way, name) == (str(len(plain)), str(len(plain))), name
                assert (await way.ask("PATCH", place(BOX, name), JSON, mine)).status == 200
            answer = await way.get(BOX, name)
            assert answer.body == plain
            assert not [field for field in answer.headers if "sealgate" in field]
        assert "sealgate-size" not in site.server.buckets.find(BOX, "short", {}).resource["metadata"]
        for mark, seen in (("7", "7"), ("?", str(len(body))), (str(10**12), str(len(body)))):
            document = json.dumps({"metadata": {"sealgate-size": mark}}).encode()
            assert (await direct.ask("PATCH", place(BOX, "long"), JSON, document)).status == 200
            assert await sizes(way, "long") == (seen, seen)
            assert (await way.get(BOX, "long")).body == body
            assert (await way.ask("HEAD", f"{place(BOX, 'long')}?alt=media")).headers[
                "content-length"
            ] == str(len(body))
