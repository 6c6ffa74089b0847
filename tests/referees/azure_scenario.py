"""What a program with azure-storage-blob does with a container, step by step, and what it saw: as JSON.

Run by `.venv-referees`; knows nothing of Sealgate. One JSON document on standard input: url (the account's),
account, key, token_key (to sign tokens with), container, ca, proxy (or null), seed, of which the bytes come.
Of ETags only their sameness is recorded: two steps that saw one tag say the same number.
"""

import hashlib
import io
import json
import random
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from azure.core import MatchConditions
from azure.core.exceptions import AzureError, HttpResponseError
from azure.storage.blob import (
    BlobBlock,
    BlobSasPermissions,
    BlobServiceClient,
    BlockState,
    ContainerSasPermissions,
    ContentSettings,
    generate_blob_sas,
    generate_container_sas,
)

KIB = 1024
OTHER = '"0x8D0000000000000"'
"""An ETag of no blob."""
SPEC = json.load(sys.stdin)
CANARY = hashlib.sha256(SPEC["seed"].encode()).digest()[:8]
seen: list[dict[str, Any]] = []
contents: dict[str, str] = {}
bodies: list[tuple[str, bytes]] = []
tags: dict[str, int] = {}
OPTIONS: dict[str, Any] = {
    "connection_verify": SPEC["ca"],
    "proxies": {"https": SPEC["proxy"]} if SPEC["proxy"] else {},
    "retry_total": 0,
    # Uploads as azcopy's and SDKs' for large files: blocks, several at a time; downloads by ranges.
    "max_single_put_size": 64 * KIB,
    "max_block_size": 48 * KIB,
    "max_single_get_size": 64 * KIB,
    "max_chunk_get_size": 50_000,
}
KEY = {"account_name": SPEC["account"], "account_key": SPEC["key"]}
service = BlobServiceClient(SPEC["url"], credential=KEY, **OPTIONS)
box = service.get_container_client(SPEC["container"])


def data(name: str, size: int) -> bytes:
    """Random bytes, the seed's canary in every 16 of them: nothing of it can lie about unseen."""
    made = bytearray(random.Random(f"{SPEC['seed']} {name}").randbytes(size))
    for at, byte in enumerate(CANARY):
        made[at::16] = bytes([byte]) * len(made[at::16])
    return bytes(made)


def kept(name: str, body: bytes) -> bytes:
    contents[name] = hashlib.sha256(body).hexdigest()
    bodies.append((name, body))
    return body


def tag(text: str | None) -> int | None:
    return None if text is None else tags.setdefault(text.strip('"'), len(tags))


def step(name: str, do: Callable[..., Any]) -> Any:
    try:
        result = do()
    except HttpResponseError as error:
        code = getattr(error, "error_code", None)
        seen.append(
            {"step": name, "status": error.status_code, "code": code and str(getattr(code, "value", code))}
        )
        return None
    except AzureError as error:
        seen.append({"step": name, "error": type(error).__name__, "message": str(error)[:200]})
        return None
    seen.append({"step": name, "saw": result})
    return result


def shape(name: str, body: bytes, offset: int) -> dict[str, Any]:
    """Which of the bodies it is, or where in it it lies: their bytes differ from way to way."""
    if len(body) < 16:  # it may lie anywhere
        latest = next((plain for known, plain in reversed(bodies) if known == name), b"")
        return {"bytes": len(body), "is": latest[offset : offset + len(body)] == body}
    places = ([name, plain.find(body)] for name, plain in reversed(bodies) if body in plain)
    return {"bytes": len(body), "is": next(places, None)}


def sent(answer: dict[str, Any]) -> dict[str, Any]:
    """Of an upload's answer."""
    return {"etag": tag(answer.get("etag")), "has": sorted(name for name, value in answer.items() if value)}


def properties(of: Any) -> dict[str, Any]:
    found = of.get_blob_properties()
    settings = found.content_settings
    return {
        "size": found.size,
        "etag": tag(found.etag),
        "type": found.content_type if hasattr(found, "content_type") else settings.content_type,
        "settings": [
            settings.content_type, settings.content_encoding, settings.content_language,
            settings.content_disposition, settings.cache_control,
        ],
        "metadata": found.metadata,
        "blob_type": found.blob_type,
        "lease": [found.lease.status, found.lease.state],
        "copy": [found.copy.status, bool(found.copy.id), (found.copy.source or "").partition(SPEC["url"])[2]],
        "tags": found.tag_count,
        "tier": str(found.blob_tier),
    }  # fmt: skip


def read(of: Any, **more: Any) -> dict[str, Any]:
    stream = of.download_blob(**more)
    body = stream.readall()
    found = stream.properties
    return {
        **shape(of.blob_name, body, more.get("offset", 0)),
        "of": found.size,
        "type": found.content_settings.content_type,
        "meta": found.metadata,
    }


def listed(**more: Any) -> list[Any]:
    return [
        [item.name, item.size, item.snapshot is not None, item.content_settings.content_type, item.metadata,
         tag(item.etag), item.blob_type and item.blob_type.value, item.lease.state]
        for item in box.list_blobs(**more)
    ]  # fmt: skip


def blocks(of: Any) -> list[Any]:
    committed, uncommitted = of.get_block_list("all")
    # Of a list that waits the order is the service's own.
    return [
        [(block.id, block.size) for block in committed],
        sorted((block.id, block.size) for block in uncommitted),
    ]


def whole() -> None:
    settings = ContentSettings(
        content_type="text/x-test", content_encoding="x-own", content_language="de",
        content_disposition='attachment; filename="a b.txt"', cache_control="no-cache",
    )  # fmt: skip
    for size in (0, 1, 16383, 16384, 60_000):
        name = f"a b/{size}+\u00e4"
        blob = box.get_blob_client(name)
        body = kept(name, data(name, size))
        metadata = {"author": "me", "a_b": "1", "a1": "2"}
        step(f"put {size}", lambda blob=blob, body=body, metadata=metadata: sent(
            blob.upload_blob(body, content_settings=settings, metadata=metadata)
        ))  # fmt: skip
        step(f"get {size}", lambda blob=blob: read(blob))
        step(f"head {size}", lambda blob=blob: properties(blob))
    blob = box.get_blob_client("validated")
    body = kept("validated", data("validated", 30_000))
    step("put validated", lambda: sent(blob.upload_blob(body, validate_content=True)))
    step("get validated", lambda: read(blob, validate_content=True))
    step("get range validated", lambda: read(blob, offset=5, length=100, validate_content=True))
    step("exists", blob.exists)


def in_blocks() -> None:
    for size in (64 * KIB + 1, 480 * KIB, 1024 * KIB + 1):
        name = f"blocks/{size}"
        blob = box.get_blob_client(name)
        body = kept(name, data(name, size))
        step(f"blocks {size}", lambda blob=blob, body=body: sent(
            blob.upload_blob(io.BytesIO(body), max_concurrency=4, validate_content=True, metadata={"x": "y"})
        ))  # fmt: skip
        step(f"blocks get {size}", lambda blob=blob: read(blob, max_concurrency=4))
        step(f"blocks head {size}", lambda blob=blob: properties(blob))
        for offset, length in ((0, 1), (49_151, 2), (49_152, 49_152), (size - 1, 1), (100, 200_000)):
            step(
                f"blocks range {size} {offset} {length}",
                lambda blob=blob, o=offset, n=length: read(blob, offset=o, length=n),
            )
    name = "by hand"
    blob = box.get_blob_client(name)
    parts = {letter: data(f"{name} {letter}", 20_000 + place * 777) for place, letter in enumerate("abcdef")}
    for letter in "fbaec":
        step(f"stage {letter}", lambda letter=letter: sent(blob.stage_block(letter * 3, parts[letter])))
    step("stage b again", lambda: sent(blob.stage_block("bbb", parts["d"])))
    step("waiting", lambda: blocks(blob))
    step("not there yet", lambda: read(blob))
    step("unknown block", lambda: sent(blob.commit_block_list([BlobBlock("zzz")])))
    step(
        "commit", lambda: sent(blob.commit_block_list([BlobBlock("ccc"), BlobBlock("aaa"), BlobBlock("bbb")]))
    )
    kept(name, parts["c"] + parts["a"] + parts["d"])
    step("committed", lambda: blocks(blob))
    step("committed get", lambda: read(blob))
    step("stage d", lambda: sent(blob.stage_block("ddd", parts["d"])))
    step("stage a anew", lambda: sent(blob.stage_block("aaa", parts["f"])))
    step("both", lambda: blocks(blob))
    # This SDK lists all as the latest, whatever their state.
    mixed = [BlobBlock("aaa", BlockState.COMMITTED), BlobBlock("ddd"), BlobBlock("ccc"), BlobBlock("ccc")]
    settings = ContentSettings(content_type="text/mixed")
    step(
        "commit mixed",
        lambda: sent(
            blob.commit_block_list(
                mixed, content_settings=settings, metadata={"m": "1"}, validate_content=True
            )
        ),
    )
    kept(name, parts["f"] + parts["d"] + parts["c"] + parts["c"])
    step("mixed get", lambda: read(blob))
    step("mixed head", lambda: properties(blob))
    step("mixed blocks", lambda: blocks(blob))
    step("fewer", lambda: sent(blob.commit_block_list([BlobBlock("ccc"), BlobBlock("aaa")])))
    kept(name, parts["c"] + parts["f"])
    step("fewer get", lambda: read(blob))
    step("left out before", lambda: sent(blob.commit_block_list([BlobBlock("ddd")])))
    step("left out before get", lambda: read(blob))
    empty = box.get_blob_client("no blocks")
    kept("no blocks", b"")
    step("empty list", lambda: sent(empty.commit_block_list([])))
    step("empty list head", lambda: properties(empty))
    step("empty list blocks", lambda: blocks(empty))
    for length in (1, 48, 56, 57, 64):
        ids = [chr(65 + place) * length for place in range(3)]
        name = f"ids of {length}"
        named = box.get_blob_client(name)
        for place in (2, 0, 1):
            step(
                f"id {length} {place}",
                lambda i=ids[place], p=place, n=named: sent(n.stage_block(i, data(f"{p}", 1000 + p))),
            )
        kept(name, b"".join(data(f"{place}", 1000 + place) for place in range(3)))
        step(
            f"ids {length}", lambda n=named, i=ids: sent(n.commit_block_list([BlobBlock(name) for name in i]))
        )
        step(f"ids {length} get", lambda n=named: read(n))
        if length <= 40:
            step(f"ids {length} list", lambda n=named: blocks(n))


def reading() -> None:
    blob = box.get_blob_client("a b/60000+\u00e4")
    etag = blob.get_blob_properties().etag
    other = OTHER
    same, differs, there = (
        MatchConditions.IfNotModified,
        MatchConditions.IfModified,
        MatchConditions.IfMissing,
    )
    for offset, length in ((0, 1), (16383, 2), (59_999, 1), (59_999, 100), (1, None), (20_000, 30_000)):
        step(f"range {offset} {length}", lambda o=offset, n=length: read(blob, offset=o, length=n))
    step("range beyond", lambda: read(blob, offset=70_000, length=5))
    step("range of empty", lambda: read(box.get_blob_client("a b/0+\u00e4"), offset=0, length=5))
    step("if same", lambda: read(blob, etag=etag, match_condition=same))
    step("if same, other", lambda: read(blob, etag=other, match_condition=same))
    step("if differs", lambda: read(blob, etag=other, match_condition=differs))
    step("if differs, same", lambda: read(blob, etag=etag, match_condition=differs))
    step("head if same, other", lambda: blob.get_blob_properties(etag=other, match_condition=same).size)
    step("range if same", lambda: read(blob, offset=3, length=9, etag=etag, match_condition=same))
    past, future = datetime(2020, 1, 1, tzinfo=UTC), datetime(2090, 1, 1, tzinfo=UTC)
    step("if modified since", lambda: read(blob, if_modified_since=future))
    step("if unmodified since", lambda: read(blob, if_unmodified_since=past))
    step("put if missing", lambda: sent(blob.upload_blob(b"x", overwrite=False)))
    step(
        "put if same, other",
        lambda: sent(blob.upload_blob(b"x", overwrite=True, etag=other, match_condition=same)),
    )
    large = box.get_blob_client("blocks/65537")
    step("blocks if missing", lambda: sent(large.upload_blob(data("n", 70_000), overwrite=False)))
    step("commit if missing", lambda: (
        large.stage_block("qqq", data("n", 20)),
        sent(large.commit_block_list([BlobBlock("qqq")], etag="*", match_condition=there)),
    )[1])  # fmt: skip
    step("missing", lambda: read(box.get_blob_client("missing")))
    step("missing head", lambda: properties(box.get_blob_client("missing")))
    step("missing box", lambda: read(service.get_blob_client("box-missing", "x")))


def copy(name: str, to: str, **more: Any) -> None:
    source, target = box.get_blob_client(name), box.get_blob_client(to)
    if (
        step(f"copy to {to}", lambda: target.start_copy_from_url(source.url, **more)["copy_status"])
        is not None
    ):
        contents[to] = contents[name]


def changing() -> None:
    for name in ("a b/16384+\u00e4", "blocks/491520"):
        blob = box.get_blob_client(name)
        step(
            f"{name} headers",
            lambda blob=blob: sent(
                blob.set_http_headers(ContentSettings(content_type="text/new", content_md5=bytearray(16)))
            ),
        )
        step(f"{name} headers seen", lambda blob=blob: properties(blob))
        step(f"{name} headers if", lambda blob=blob: sent(blob.set_http_headers(
            ContentSettings(content_type="no"), etag=OTHER, match_condition=MatchConditions.IfNotModified
        )))  # fmt: skip
        step(f"{name} metadata", lambda blob=blob: sent(blob.set_blob_metadata({"new": "1"})))
        snapshot = step(f"{name} snapshot", lambda blob=blob: sorted(blob.create_snapshot())) and None
        snapshot = blob.create_snapshot(metadata={"snap": "1"})["snapshot"]
        body = kept(name, data(f"{name} new", 33_333))
        step(f"{name} over", lambda blob=blob, body=body: sent(blob.upload_blob(body, overwrite=True)))
        step(f"{name} new", lambda blob=blob: [read(blob), properties(blob)])
        old = box.get_blob_client(name, snapshot=snapshot)
        step(f"{name} old", lambda old=old: [read(old), read(old, offset=9, length=99), properties(old)])
        step(f"{name} lease", lambda blob=blob: blob.acquire_lease(lease_duration=-1) and 1)
        step(f"{name} leased put", lambda blob=blob: sent(blob.upload_blob(b"x", overwrite=True)))
        step(
            f"{name} leased blocks",
            lambda blob=blob: sent(blob.upload_blob(data("l", 70_000), overwrite=True)),
        )
        step(f"{name} tags", lambda blob=blob: sent(blob.set_blob_tags({"colour": "blue"})))
    for name in ("a b/60000+\u00e4", "blocks/491520", "blocks/1048577", "by hand"):
        copy(name, f"copy of {name}")
        target = box.get_blob_client(f"copy of {name}")
        step(f"copied {name}", lambda t=target: [read(t), properties(t), read(t, offset=11, length=30_000)])
    copy("blocks/1048577", "other copy", metadata={"only": "this"})
    step(
        "copied, other",
        lambda: [read(box.get_blob_client("other copy")), properties(box.get_blob_client("other copy"))],
    )
    step(
        "copy missing",
        lambda: box.get_blob_client("x").start_copy_from_url(box.get_blob_client("missing").url)[
            "copy_status"
        ],
    )


def lists() -> None:
    step("list", listed)
    step("list all", lambda: listed(include=["metadata", "snapshots", "copy", "uncommittedblobs", "tags"]))
    step("list prefix", lambda: listed(name_starts_with="a b/"))
    step(
        "list pages",
        lambda: [[item.name for item in page] for page in box.list_blobs(results_per_page=3).by_page()],
    )
    step("walk", lambda: [item.name for item in box.walk_blobs(delimiter="/")])
    step("list none", lambda: listed(name_starts_with="none"))
    step(
        "containers",
        lambda: [
            item.name == SPEC["container"]
            for item in service.list_containers(name_starts_with=SPEC["container"])
        ],
    )


def by_token() -> None:
    ends = datetime.now(UTC) + timedelta(hours=1)
    account = {"account_name": SPEC["account"], "account_key": SPEC["token_key"], "expiry": ends}
    token = generate_blob_sas(
        container_name=SPEC["container"],
        blob_name="by token",
        permission=BlobSasPermissions(read=True, write=True, create=True),
        **account,
    )
    stranger = BlobServiceClient(SPEC["url"], credential=token, **OPTIONS).get_blob_client(
        SPEC["container"], "by token"
    )
    body = kept("by token", data("by token", 100_000))
    step("token put", lambda: sent(stranger.upload_blob(body, max_concurrency=2)))
    step("token get", lambda: read(stranger, max_concurrency=2))
    step("token head", lambda: properties(stranger))
    step("token delete", stranger.delete_blob)
    token = generate_container_sas(
        container_name=SPEC["container"], permission=ContainerSasPermissions(read=True, list=True), **account
    )
    reader = BlobServiceClient(SPEC["url"], credential=token, **OPTIONS).get_container_client(
        SPEC["container"]
    )
    step("token list", lambda: [[item.name, item.size] for item in reader.list_blobs()])
    nobody = BlobServiceClient(SPEC["url"], **OPTIONS).get_blob_client(SPEC["container"], "by token")
    step("nobody", lambda: read(nobody))


def ending() -> None:
    step("delete", lambda: box.delete_blob("validated"))
    contents.pop("validated", None)
    step("deleted", lambda: read(box.get_blob_client("validated")))
    step("delete with snapshots", lambda: box.delete_blob("a b/16383+\u00e4", delete_snapshots="include"))
    contents.pop("a b/16383+\u00e4", None)
    step("delete missing", lambda: box.delete_blob("missing"))
    step("account", lambda: sorted(service.get_account_information()))
    step("service", lambda: sorted(service.get_service_properties()))
    step("acl", lambda: bool(box.set_container_access_policy(signed_identifiers={}, public_access="blob")))
    step("acl seen", lambda: box.get_container_access_policy()["public_access"])
    nobody = BlobServiceClient(SPEC["url"], **OPTIONS).get_blob_client(SPEC["container"], "by token")
    step("everybody", lambda: [read(nobody, offset=50, length=7), read(nobody)])
    step("everybody puts", lambda: sent(nobody.upload_blob(b"x", overwrite=True)))


step("create", lambda: bool(box.create_container(metadata={"box": "1"})))
step("create again", lambda: bool(box.create_container()))
whole()
in_blocks()
reading()
changing()
by_token()
lists()
ending()
json.dump({"seen": seen, "contents": contents}, sys.stdout, default=str)
