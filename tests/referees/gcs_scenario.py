"""What a program with google-cloud-storage does with a bucket, step by step, and what it saw: as JSON.

Run by `.venv-referees`; knows nothing of Sealgate. One JSON document on standard input: url (of the service),
bucket, ca, proxy (or null), seed, of which the bytes come, scratch, a file to write, and strict: whether the
service knows what Google's does. Of ETags and generations only their sameness is recorded: two steps that saw
one say the same number. Digests are `right`, `wrong` or absent.
"""

import base64
import hashlib
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import google_crc32c
import requests
from google.api_core.exceptions import GoogleAPICallError
from google.auth.credentials import AnonymousCredentials
from google.auth.transport.requests import AuthorizedSession
from google.cloud import storage
from google.cloud.storage import blob as blob_module
from google.cloud.storage import transfer_manager
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

KIB = 1024
GRANULE = 256 * KIB
SPEC = json.load(sys.stdin)
STRICT: bool = SPEC["strict"]
CANARY = hashlib.sha256(SPEC["seed"].encode()).digest()[:8]
# Above it the client uses its other protocol.
MULTIPART_BYTES = blob_module._MAX_MULTIPART_SIZE
seen: list[dict[str, Any]] = []
contents: dict[str, str] = {}
bodies: dict[str, list[bytes]] = {}
tags: dict[str, int] = {}
session = AuthorizedSession(AnonymousCredentials())
session.trust_env = False
session.verify = SPEC["ca"]
session.proxies = {"https": SPEC["proxy"]} if SPEC["proxy"] else {}
client = storage.Client(
    project="referee",
    credentials=AnonymousCredentials(),
    client_options={"api_endpoint": SPEC["url"]},
    _http=session,
)
box = client.bucket(SPEC["bucket"])
# Its own, which all its calls share: a second try would hide what the first one met.
blob_module.DEFAULT_RETRY._predicate = lambda _error: False


def data(name: str, size: int) -> bytes:
    """Random bytes, the seed's canary in every 16 of them: nothing of it can lie about unseen."""
    made = bytearray(random.Random(f"{SPEC['seed']} {name}").randbytes(size))
    for at, byte in enumerate(CANARY):
        made[at::16] = bytes([byte]) * len(made[at::16])
    return bytes(made)


def kept(name: str, body: bytes) -> bytes:
    contents[name] = hashlib.sha256(body).hexdigest()
    bodies.setdefault(name, []).append(body)
    return body


def tag(text: object) -> int | None:
    return None if text is None else tags.setdefault(str(text), len(tags))


def step(name: str, do: Callable[..., Any]) -> Any:
    try:
        result = do()
    except GoogleAPICallError as error:
        seen.append({"step": name, "status": error.code, "error": type(error).__name__})
        return None
    except InvalidResponse as error:
        seen.append({"step": name, "status": error.response.status_code, "error": "InvalidResponse"})
        return None
    except (DataCorruption, requests.RequestException, ValueError) as error:
        seen.append({"step": name, "error": type(error).__name__, "message": str(error)[:300]})
        return None
    seen.append({"step": name, "saw": result})
    return result


def shape(name: str, body: bytes, offset: int = 0) -> dict[str, Any]:
    """Which of the bodies that were written it is, or where in one it lies; 0 is the latest."""
    written = list(reversed(bodies.get(name, [])))
    places = [place for place, plain in enumerate(written) if plain[offset : offset + len(body)] == body]
    return {"bytes": len(body), "is": places[:1]}


def judged(name: str, blob: Any) -> dict[str, str | None]:
    """The digests that it says, against those of what was written last."""
    body = bodies[name][-1] if name in bodies else b""
    crc = base64.b64encode(google_crc32c.Checksum(body).digest()).decode()
    md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
    pairs = {"crc32c": (blob.crc32c, crc), "md5": (blob.md5_hash, md5)}
    return {
        kind: None if said is None else "right" if said == true else "wrong"
        for kind, (said, true) in pairs.items()
    }


def resource(blob: Any) -> dict[str, Any]:
    return {
        "name": blob.name,
        "size": blob.size,
        "type": blob.content_type,
        "settings": [blob.cache_control, blob.content_disposition, blob.content_language],
        "encoding": blob.content_encoding,
        "metadata": blob.metadata,
        "class": blob.storage_class,
        "generation": tag(blob.generation),
        "metageneration": blob.metageneration,
        # The emulator's is the MD5 of what is stored.
        "etag": tag(blob.etag) if STRICT else bool(blob.etag),
        "links": [bool(blob.media_link), bool(blob.self_link)],
        "components": blob.component_count,
    }


def sent(blob: Any) -> dict[str, Any]:
    """What the answer to an upload said."""
    return {**resource(blob), "answered": judged(blob.name, blob)}


def later(name: str, **more: Any) -> dict[str, Any]:
    """What the service says of it to who asks."""
    blob = box.blob(name, **more)
    blob.reload()
    return {**resource(blob), "kept": judged(name, blob)}


def read(name: str, **more: Any) -> dict[str, Any]:
    blob = box.blob(name)
    body = blob.download_as_bytes(**more)
    return {
        **shape(name, body, more.get("start") or 0),
        "type": blob.content_type,
        "metadata": blob.metadata,
    }


def put(blob: Any, body: bytes, **more: Any) -> dict[str, Any]:
    kept(blob.name, body)
    blob.upload_from_string(body, **more)
    return sent(blob)


def stream(blob: Any, body: bytes, *, told: bool, **more: Any) -> dict[str, Any]:
    """A resumable upload. *told*: the service hears at its begin how long it will be."""
    kept(blob.name, body)
    blob_module._MAX_MULTIPART_SIZE = -1
    try:
        blob.upload_from_file(io.BytesIO(body), size=len(body) if told else None, **more)
    finally:
        blob_module._MAX_MULTIPART_SIZE = MULTIPART_BYTES
    return sent(blob)


def whole() -> None:
    """uploadType=multipart: what the client does with all that is small."""
    for size in (0, 1, 16383, 16384, 16385, 60_000):
        name = f"a b/{size}+\u00e4"
        blob = box.blob(name)
        blob.metadata = {"author": "me", "Colour": "bl\u00fce"}
        blob.cache_control = "no-cache"
        blob.content_disposition = 'attachment; filename="a b.txt"'
        blob.content_language = "de"
        body = data(name, size)
        step(f"put {size}", lambda b=blob, d=body: put(b, d, content_type="text/x-test"))
        step(f"get {size}", lambda n=name: read(n))
        step(f"head {size}", lambda n=name: later(n))
    for checksum in ("md5", "crc32c", None):
        name = f"checked by {checksum}"
        step(f"put {name}", lambda n=name, c=checksum: put(box.blob(n), data(n, 30_000), checksum=c))
        step(f"get {name}", lambda n=name, c=checksum: read(n, checksum=c))
    name = "boundaries"
    body = b"\r\n--===============0000000000000000000==--\r\n--\r\n\r\n--" * 40
    step("put boundaries", lambda: put(box.blob(name), body))
    step("get boundaries", lambda: read(name))
    step("exists", lambda: [box.blob(name).exists(), box.blob("missing").exists()])


def resumable() -> None:
    for size in (0, 1, GRANULE - 1, GRANULE, GRANULE + 1, 4 * GRANULE, 5 * GRANULE + 12_345):
        for told in (True, False):
            name = f"resumable/{size} {told}"
            blob = box.blob(name, chunk_size=GRANULE)
            blob.metadata = {"x": "y"}
            body = data(name, size)
            step(name, lambda b=blob, d=body, t=told: stream(b, d, told=t, content_type="text/x-long"))
            step(f"{name} head", lambda n=name: later(n))
            step(f"{name} get", lambda n=name: read(n))
    name = "resumable/large chunks"
    step(name, lambda: stream(box.blob(name, chunk_size=3 * GRANULE), data(name, 7 * GRANULE + 1), told=True))
    size = 7 * GRANULE + 1
    for start, end in (
        (0, 0),
        (GRANULE - 1, GRANULE),
        (GRANULE, 3 * GRANULE - 1),
        (size - 1, None),
        (100, 9999),
    ):
        step(f"{name} {start}-{end}", lambda s=start, e=end: read(name, start=s, end=e))
    for checksum in ("crc32c", None):
        name = f"resumable/checked by {checksum}"
        blob = box.blob(name, chunk_size=GRANULE)
        body = data(name, 2 * GRANULE + 5)
        step(name, lambda b=blob, d=body, c=checksum: stream(b, d, told=True, checksum=c))
        step(f"{name} get", lambda n=name: read(n))
    name = "resumable/one request md5"
    step(name, lambda: stream(box.blob(name), data(name, 2 * GRANULE + 5), told=True, checksum="md5"))
    name = "resumable/over"
    for size in (2 * GRANULE + 1, GRANULE + 7):
        blob = box.blob(name, chunk_size=GRANULE)
        step(f"{name} {size}", lambda b=blob, s=size: stream(b, data(f"over {s}", s), told=True))
        step(f"{name} {size} get", lambda: read(name))
    written()
    by_session()


def written() -> None:
    """The client's files, that are written and read piece by piece."""
    name, body = "written", data("written", 3 * GRANULE + 999)

    def write() -> None:
        with box.blob(name).open("wb", chunk_size=GRANULE) as file:
            for at in range(0, len(body), 100_001):
                file.write(body[at : at + 100_001])

    kept(name, body)
    step("file written", write)
    step("file head", lambda: later(name))

    def pieces() -> list[Any]:
        with box.blob(name).open("rb", chunk_size=100_000) as file:
            found: list[Any] = [shape(name, file.read(5))]
            for place, whence in ((GRANULE - 2, 0), (70_000, 1), (-9, 2)):
                at = file.seek(place, whence)
                found.append([at, shape(name, file.read(50_000), at)])
            return [*found, len(file.read())]

    def concurrently() -> dict[str, Any]:
        transfer_manager.download_chunks_concurrently(
            box.blob(name), SPEC["scratch"], chunk_size=100_000, worker_type=transfer_manager.THREAD,
            max_workers=3, crc32c_checksum=False,
        )  # fmt: skip
        return shape(name, Path(SPEC["scratch"]).read_bytes())

    if STRICT:  # both follow mediaLink
        step("file read", pieces)
        step("file in chunks", concurrently)


def by_session() -> None:
    """An upload that another program carries out by the session's address alone."""
    name, body = "by session", data("by session", 2 * GRANULE + 100)
    url = box.blob(name).create_resumable_upload_session(content_type="text/s")
    kept(name, body)

    def ask(place: str, piece: bytes = b"") -> list[Any]:
        answer = session.put(url, data=piece, headers={"Content-Range": place}, allow_redirects=False)
        result: dict[str, Any] = answer.json() if answer.status_code == 200 else {}
        return [
            answer.status_code,
            answer.headers.get("Range"),
            result.get("size"),
            result.get("contentType"),
        ]

    if STRICT:
        step("session asked", lambda: ask("bytes */*"))
    step("session first", lambda: ask(f"bytes 0-{GRANULE - 1}/*", body[:GRANULE]))
    step("session asked again", lambda: ask("bytes */*"))
    if STRICT:
        step("session second", lambda: ask(f"bytes 0-{2 * GRANULE - 1}/*", body[: 2 * GRANULE]))
    else:  # it refuses bytes that it has
        part = body[GRANULE : 2 * GRANULE]
        step("session second", lambda: ask(f"bytes {GRANULE}-{2 * GRANULE - 1}/*", part))
    step("session last", lambda: ask(f"bytes {2 * GRANULE}-{len(body) - 1}/{len(body)}", body[2 * GRANULE :]))
    step("session get", lambda: read(name))


def reading() -> None:
    name = "a b/60000+\u00e4"
    for start, end in ((0, 0), (16383, 16384), (59_999, None), (59_999, 70_000), (1, None), (20_000, 49_999)):
        step(f"range {start} {end}", lambda s=start, e=end: read(name, start=s, end=e))
    step("missing", lambda: read("missing"))
    step("missing head", lambda: later("missing"))
    step("missing box", lambda: client.bucket("box-missing").blob("x").download_as_bytes())

    def fields() -> list[str | None]:
        url = f"{SPEC['url']}/storage/v1/b/{SPEC['bucket']}/o/{quote(name, safe='')}?alt=media"
        answer = session.get(url, headers={"accept-encoding": "gzip"})
        return [answer.headers.get(name) for name in ("content-type", "content-length", "content-encoding")]

    step("fields of a read", fields)
    if not STRICT:
        return
    step("range beyond", lambda: read(name, start=70_000))
    step("range of empty", lambda: read("a b/0+\u00e4", start=0, end=5))
    known = box.get_blob(name)
    other = known.generation + 1
    for what, number in (("same", known.generation), ("other", other)):
        for rule in ("if_generation_match", "if_generation_not_match"):
            step(f"read {rule} {what}", lambda r=rule, n=number: read(name, **{r: n}))
    step("read metageneration", lambda: read(name, if_metageneration_match=known.metageneration))
    step("read metageneration other", lambda: read(name, if_metageneration_match=77))
    for rule, etag in (("if_etag_match", known.etag), ("if_etag_match", "other")):
        step(f"read {rule} {tag(etag)}", lambda r=rule, e=etag: read(name, **{r: e}))
    step("read if not etag", lambda: read(name, if_etag_not_match=known.etag))
    step("put if absent", lambda: box.blob(name).upload_from_string(b"x", if_generation_match=0))
    step("put if other", lambda: box.blob(name).upload_from_string(b"x", if_generation_match=other))
    blob = box.blob("resumable/over", chunk_size=GRANULE)
    had = contents["resumable/over"], bodies["resumable/over"][-1]
    step("stream if absent", lambda: stream(blob, data("no", GRANULE + 3), told=True, if_generation_match=0))
    contents["resumable/over"] = had[0]
    bodies["resumable/over"].append(had[1])
    step("stream if absent get", lambda: read("resumable/over"))
    new = box.blob("new by condition", chunk_size=GRANULE)
    step(
        "stream if absent, new",
        lambda: stream(new, data("new", GRANULE + 3), told=True, if_generation_match=0),
    )
    step("delete if other", lambda: box.blob(name).delete(if_generation_match=other))


def changing() -> None:
    for name in ("a b/16384+\u00e4", "resumable/262145 True"):
        blob = box.blob(name)

        def change(blob: Any = blob) -> dict[str, Any]:
            blob.reload()
            blob.metadata = {"new": "1"}
            blob.content_type = "text/new"
            blob.cache_control = "private, max-age=5"
            blob.patch()
            return resource(blob)

        step(f"{name} patch", change)
        step(f"{name} patched", lambda n=name: [later(n), read(n)])
        body = data(f"{name} new", 33_333)
        step(f"{name} over", lambda n=name, d=body: put(box.blob(n), d))
        step(f"{name} over get", lambda n=name: [later(n), read(n)])
    for name in ("a b/60000+\u00e4", "resumable/1323065 True", "written"):
        source = box.blob(name)
        body = bodies[name][-1]
        kept(f"copy of {name}", body)
        step(f"copy {name}", lambda s=source, n=name: resource(box.copy_blob(s, box, f"copy of {n}")))
        step(f"copied {name}", lambda n=name: [later(f"copy of {n}"), read(f"copy of {n}")])
        kept(f"rewritten {name}", body)
        target = box.blob(f"rewritten {name}")
        step(f"rewrite {name}", lambda s=source, t=target: rewritten(t, s))
        new = f"rewritten {name}"
        step(new, lambda n=new: [later(n), read(n), read(n, start=7, end=99)])
    step("copy missing", lambda: resource(box.copy_blob(box.blob("missing"), box, "x")))
    name = "checked by None"
    kept("renamed", bodies[name][-1])
    step("rename", lambda: resource(box.rename_blob(box.blob(name), "renamed")))
    del contents[name]
    step("renamed", lambda: [later("renamed"), read("renamed"), box.blob(name).exists()])
    target = box.blob("rewritten anew")
    target.metadata, target.content_type = {"only": "this"}, "text/anew"
    kept("rewritten anew", bodies["written"][-1])
    step("rewrite anew", lambda: rewritten(target, box.blob("written")))
    step("rewritten anew", lambda: [later("rewritten anew"), read("rewritten anew")])
    moved = box.blob("copy of written")
    moved.reload()
    step("class", lambda: moved.update_storage_class("NEARLINE") and None)
    step("of another class", lambda: [later("copy of written"), read("copy of written")])
    if STRICT:
        step("update", lambda: updated("written"))
        step("patch if other", lambda: box.blob("written").patch(if_metageneration_match=77))


def rewritten(target: Any, source: Any) -> list[Any]:
    token, done, size = target.rewrite(source)
    rounds = 1
    while token is not None:
        token, done, size = target.rewrite(source, token=token)
        rounds += 1
    return [rounds, done, size, resource(target)]


def updated(name: str) -> list[Any]:
    blob = box.blob(name)
    blob.reload()
    blob.content_type = "text/updated"
    blob.update()
    return [resource(blob), read(name)]


def lists() -> None:
    def listed(**more: Any) -> list[Any]:
        return [
            [*resource(blob).values(), {"kept": judged(blob.name, blob)}] for blob in box.list_blobs(**more)
        ]

    step("list", listed)
    step("list whole", lambda: listed(projection="full"))
    step("list prefix", lambda: [row[:3] for row in listed(prefix="a b/")])

    def folders() -> list[Any]:
        found = box.list_blobs(delimiter="/")
        return [[[blob.name, blob.size] for blob in found], sorted(found.prefixes)]

    step("list folders", folders)
    if not STRICT:
        return

    def pages() -> list[Any]:
        found = box.list_blobs(page_size=4, fields="items(name,size),nextPageToken")
        return [[[blob.name, blob.size] for blob in page] for page in found.pages]

    step("list pages", pages)
    step("list versions", lambda: sorted([row[0], row[1], row[8]] for row in listed(versions=True)))
    step("list missing", lambda: [blob.name for blob in client.bucket("box-missing").list_blobs()])


def buckets() -> None:
    step("bucket", lambda: [client.bucket(SPEC["bucket"]).exists(), client.bucket("box-missing").exists()])
    step("buckets", lambda: SPEC["bucket"] in [bucket.name for bucket in client.list_buckets()])
    found = client.get_bucket(SPEC["bucket"])
    step("bucket settings", lambda: [found.storage_class, found.location_type, sorted(found.labels)])


def deleting() -> None:
    for name in ("checked by md5", "resumable/1 True"):
        step(f"delete {name}", lambda n=name: box.blob(n).delete())
        step(f"deleted {name}", lambda n=name: [box.blob(n).exists(), read(n)])
        del contents[name]
    step("delete missing", lambda: box.blob("missing").delete())


client.create_bucket(SPEC["bucket"])
for part in (whole, resumable, reading, changing, lists, buckets, deleting):
    part()
json.dump({"seen": seen, "contents": contents}, sys.stdout)
