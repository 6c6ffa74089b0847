"""What a boto3 program does with a bucket, step by step, and what it saw: run by `.venv-referees`, as JSON.

Arguments: endpoint, bucket, seed, server (`swift` or `moto`), mode of checksums. The bytes come from the
seed. Of ETags only their sameness is recorded: two steps that saw one tag say the same number.
"""

import hashlib
import io
import json
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import boto3
import urllib3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError

MIB = 1024 * 1024
ENDPOINT, BUCKET, SEED, SERVER, CHECKSUMS = sys.argv[1:6]
s3: Any = boto3.client(
    "s3",
    endpoint_url=ENDPOINT,
    config=Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"},
        retries={"total_max_attempts": 1},
        request_checksum_calculation=CHECKSUMS,
        response_checksum_validation=CHECKSUMS,
    ),
)
seen: list[dict[str, Any]] = []
contents: dict[str, str] = {}
tags: dict[str, int] = {}
proxy_url = os.environ.get("HTTPS_PROXY")
trust: Any = {"ca_certs": os.environ["AWS_CA_BUNDLE"]}
web: Any = urllib3.ProxyManager(proxy_url, **trust) if proxy_url else urllib3.PoolManager(**trust)


CANARY = hashlib.sha256(SEED.encode()).digest()[:8]


def data(name: str, size: int) -> bytes:
    """Random bytes, the seed's canary in every 16 of them: nothing of it can lie about unseen."""
    made = bytearray(random.Random(f"{SEED} {name}").randbytes(size))
    for at, byte in enumerate(CANARY):
        made[at::16] = bytes([byte]) * len(made[at::16])
    return bytes(made)


def tag(text: str | None) -> int | None:
    return None if text is None else tags.setdefault(text.strip('"'), len(tags))


def step(name: str, do: Callable[..., Any]) -> Any:
    try:
        result = do()
    except ClientError as error:
        told = error.response
        status = told["ResponseMetadata"]["HTTPStatusCode"]
        seen.append({"step": name, "status": status, "code": told["Error"].get("Code")})
        return None
    seen.append({"step": name, "saw": result})
    return result


def put(key: str, body: bytes, **more: Any) -> int | None:
    contents[key] = hashlib.sha256(body).hexdigest()
    return tag(s3.put_object(Bucket=BUCKET, Key=key, Body=body, **more)["ETag"])


_HEADS = ("ContentLength", "ContentType", "CacheControl", "ContentDisposition", "ContentEncoding", "Metadata")
_MORE = (
    "ContentRange",
    "AcceptRanges",
    "VersionId",
    "TagCount",
    "StorageClass",
    "ContentLanguage",
    "PartsCount",
)


def head_of(answer: dict[str, Any]) -> dict[str, Any]:
    found = {name: answer.get(name) for name in (*_HEADS, *_MORE)}
    # Opened answers are no shared cache's: `private` is added to what the service says.
    control = [part for part in (found["CacheControl"] or "").split(", ") if part not in ("", "private")]
    found["CacheControl"] = ", ".join(control)
    return {
        **found,
        "tag": tag(answer.get("ETag")),
        "dated": answer.get("LastModified") is not None,
        "status": answer["ResponseMetadata"]["HTTPStatusCode"],
        # A checksum of what is stored would be none of what was sent.
        "checksums": [],
    }


def get(key: str, expected: bytes, **more: Any) -> dict[str, Any]:
    answer = s3.get_object(Bucket=BUCKET, Key=key, **more)
    return {**head_of(answer), "right": answer["Body"].read() == expected}


def head(key: str, **more: Any) -> dict[str, Any]:
    return head_of(s3.head_object(Bucket=BUCKET, Key=key, **more))


def listed(answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "keys": [(item["Key"], item["Size"], tag(item["ETag"])) for item in answer.get("Contents", [])],
        "prefixes": [item["Prefix"] for item in answer.get("CommonPrefixes", [])],
        "more": answer.get("IsTruncated"),
        "count": answer.get("KeyCount"),
    }


def objects() -> None:
    body = data("small", 5000)
    step(
        "put",
        lambda: put(
            "dir/a b+c%.txt",
            body,
            ContentType="text/plain; charset=utf-8",
            CacheControl="max-age=60",
            ContentDisposition='attachment; filename="x.txt"',
            ContentEncoding="x-own",
            ContentLanguage="de",
            Metadata={"colour": "blue", "mtime": "1700000000.5"},
        ),
    )
    step("get", lambda: get("dir/a b+c%.txt", body))
    step("head", lambda: head("dir/a b+c%.txt"))
    for size in (0, 1, 16383, 16384, 16385, 100_000):
        step(f"put {size}", partial(put, f"size-{size}", data(f"size-{size}", size)))
        step(f"get {size}", partial(get, f"size-{size}", data(f"size-{size}", size)))
        step(f"head {size}", partial(head, f"size-{size}"))
    key, body = "size-100000", data("size-100000", 100_000)
    for text, begin, end in (
        ("0-0", 0, 1),
        ("16380-16390", 16380, 16391),
        ("99999-", 99_999, 100_000),
        ("-5", 99_995, 100_000),
        ("-200000", 0, 100_000),
        ("5-1000000", 5, 100_000),
        ("100000-", 0, 0),
        ("x", 0, 100_000),
    ):
        step(f"range {text}", partial(get, key, body[begin:end], Range=f"bytes={text}"))
    etag = s3.head_object(Bucket=BUCKET, Key=key)["ETag"]
    step("if match", lambda: get(key, body, IfMatch=etag))
    step("if match not", lambda: get(key, body, IfMatch='"00000000000000000000000000000000"'))
    step("if none match", lambda: get(key, body, IfNoneMatch=etag))
    step("head if none match", lambda: head(key, IfNoneMatch=etag))
    step("range if match", lambda: get(key, body[7:10], IfMatch=etag, Range="bytes=7-9"))
    step("not there", lambda: get("missing", b""))
    step("head not there", lambda: head("missing"))
    step("not there range", lambda: get("missing", b"", Range="bytes=0-5"))
    if SERVER == "swift":  # moto takes everything
        step("create only", lambda: put("size-1", data("size-1", 1), IfNoneMatch="*"))
        step(
            "wrong md5",
            lambda: s3.put_object(Bucket=BUCKET, Key="bad", Body=b"x", ContentMD5="A" * 22 + "=="),
        )


def lists() -> None:
    step("list", lambda: listed(s3.list_objects_v2(Bucket=BUCKET)))
    step("list 1", lambda: listed(s3.list_objects(Bucket=BUCKET)))
    step("list delimiter", lambda: listed(s3.list_objects_v2(Bucket=BUCKET, Delimiter="/")))
    step("list prefix", lambda: listed(s3.list_objects_v2(Bucket=BUCKET, Prefix="size-1")))
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, PaginationConfig={"PageSize": 3})
    step("list pages", lambda: [listed(page) for page in pages])
    step("buckets", lambda: BUCKET in [item["Name"] for item in s3.list_buckets()["Buckets"]])
    step("location", lambda: s3.get_bucket_location(Bucket=BUCKET).get("LocationConstraint"))


def begin(key: str, **more: Any) -> str:
    return str(s3.create_multipart_upload(Bucket=BUCKET, Key=key, **more)["UploadId"])


def part(key: str, upload: str, number: int, body: bytes) -> dict[str, Any]:
    answer = s3.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=number, Body=body)
    return {"PartNumber": number, "ETag": answer["ETag"]}


def complete(key: str, upload: str, parts: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    answer = s3.complete_multipart_upload(
        Bucket=BUCKET, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}, **more
    )
    return {"tag": tag(answer["ETag"]), "bucket": answer.get("Bucket") == BUCKET, "key": answer.get("Key")}


def parts_of(key: str, upload: str, **more: Any) -> list[Any]:
    answer = s3.list_parts(Bucket=BUCKET, Key=key, UploadId=upload, **more)
    return [(item["PartNumber"], item["Size"], tag(item["ETag"])) for item in answer.get("Parts", [])]


def multipart() -> None:
    key = "parts"
    pieces = {number: data(f"part {number}", size) for number, size in ((1, 5 * MIB), (3, 5 * MIB), (7, 777))}
    upload = begin(key, ContentType="video/mp4", Metadata={"a": "b"})
    last = part(key, upload, 7, pieces[7])
    third = part(key, upload, 3, pieces[3])
    part(key, upload, 1, data("superseded", 5 * MIB))
    first = part(key, upload, 1, pieces[1])
    part(key, upload, 5, data("omitted", 5 * MIB))
    step("uploads", lambda: [item["Key"] for item in s3.list_multipart_uploads(Bucket=BUCKET)["Uploads"]])
    step("parts", lambda: parts_of(key, upload))
    step("parts page", lambda: parts_of(key, upload, MaxParts=2))
    step("wrong tag", lambda: complete(key, upload, [first, {**third, "ETag": first["ETag"]}]))
    if SERVER == "swift":  # moto sorts them
        step("wrong order", lambda: complete(key, upload, [third, first]))
    step("complete", lambda: complete(key, upload, [first, third, last]))
    body = pieces[1] + pieces[3] + pieces[7]
    contents[key] = hashlib.sha256(body).hexdigest()
    step("get parts", lambda: get(key, body))
    step("head parts", lambda: head(key))
    edge = 5 * MIB
    for first_byte, last_byte in (
        (0, 9),
        (edge - 9, edge + 9),
        (2 * edge - 1, 2 * edge + 776),
        (3, 2 * edge + 5),
    ):
        step(
            f"range of parts {first_byte}-{last_byte}",
            partial(get, key, body[first_byte : last_byte + 1], Range=f"bytes={first_byte}-{last_byte}"),
        )
    step("suffix of parts", lambda: get(key, body[-1000:], Range="bytes=-1000"))
    if SERVER == "swift":  # moto has other parts here than there
        for number, piece in enumerate((*pieces.values(), b""), start=1):
            step(f"get part {number}", partial(get, key, piece, PartNumber=number))
            step(f"head part {number}", partial(head, key, PartNumber=number))
        step("get the only part", partial(get, "size-16384", data("size-16384", 16384), PartNumber=1))
        step("get no part", partial(get, "size-16384", b"", PartNumber=2))
    step("beyond parts", lambda: get(key, b"", Range=f"bytes={len(body)}-"))
    upload = begin("too small")
    small = [part("too small", upload, number, data(f"s{number}", 1000)) for number in (1, 2)]
    step("too small", lambda: complete("too small", upload, small))
    step(
        "abort",
        lambda: s3.abort_multipart_upload(Bucket=BUCKET, Key="too small", UploadId=upload)[
            "ResponseMetadata"
        ]["HTTPStatusCode"],
    )
    step("part of none", lambda: part("too small", upload, 1, b"x"))
    if SERVER == "swift":  # moto fails
        step("complete none", lambda: complete("too small", upload, small))
    only = data("only part", 100)
    upload = begin("only part")
    one = part("only part", upload, 1, only)
    step("complete one", lambda: complete("only part", upload, [one]))
    contents["only part"] = hashlib.sha256(only).hexdigest()
    step("get one", lambda: get("only part", only))
    settings = TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB, max_concurrency=4)
    body = data("transfer", 11 * MIB + 5)
    s3.upload_fileobj(io.BytesIO(body), BUCKET, "transfer", Config=settings)
    contents["transfer"] = hashlib.sha256(body).hexdigest()
    got = io.BytesIO()
    s3.download_fileobj(BUCKET, "transfer", got, Config=settings)
    step("transfer", lambda: got.getvalue() == body)


def copies() -> None:
    source = {"Bucket": BUCKET, "Key": "dir/a b+c%.txt"}
    small = data("small", 5000)

    def copy(key: str, where: dict[str, str], of: bytes, **more: Any) -> bool:
        contents[key] = hashlib.sha256(of).hexdigest()
        answer = s3.copy_object(Bucket=BUCKET, Key=key, CopySource=where, **more)["CopyObjectResult"]
        tag(answer["ETag"])
        return answer["LastModified"] is not None

    def without_tag(found: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in found.items() if name != "tag"}

    step("copy", lambda: copy("copy", source, small))
    step("get copy", lambda: get("copy", small))
    replaced = {"MetadataDirective": "REPLACE", "Metadata": {"new": "1"}, "ContentType": "a/b"}
    step("copy replace", lambda: copy("copy-2", source, small, **replaced))
    step("get replaced", lambda: get("copy-2", small))
    step(
        "copy to itself",
        lambda: copy(
            "copy-2", {"Bucket": BUCKET, "Key": "copy-2"}, small, **{**replaced, "Metadata": {"new": "2"}}
        ),
    )
    step("head itself", lambda: head("copy-2"))
    body = data("part 1", 5 * MIB) + data("part 3", 5 * MIB) + data("part 7", 777)
    step("copy parts", lambda: copy("copy-3", {"Bucket": BUCKET, "Key": "parts"}, body))
    step("get copy of parts", lambda: without_tag(get("copy-3", body)))
    step("copy parts replace", lambda: copy("copy-4", {"Bucket": BUCKET, "Key": "parts"}, body, **replaced))
    step("head replaced parts", lambda: without_tag(head("copy-4")))
    step("copy none", lambda: copy("copy-5", {"Bucket": BUCKET, "Key": "missing"}, b""))
    contents.pop("copy-5")
    wrong = {"CopySourceIfMatch": '"00000000000000000000000000000000"'}
    if step("copy if match", lambda: copy("copy-6", source, small, **wrong)) is None:  # moto does not look
        contents.pop("copy-6")
    upload = begin("copied parts")
    made = []
    for number, (first, last) in enumerate(((0, 5 * MIB - 1), (5 * MIB - 5, 5 * MIB + 4)), start=1):
        answer = s3.upload_part_copy(
            Bucket=BUCKET,
            Key="copied parts",
            UploadId=upload,
            PartNumber=number,
            CopySource={"Bucket": BUCKET, "Key": "parts"},
            CopySourceRange=f"bytes={first}-{last}",
        )["CopyPartResult"]
        made.append({"PartNumber": number, "ETag": answer["ETag"]})
    step("complete copies", lambda: complete("copied parts", upload, made)["key"])
    joined = body[: 5 * MIB] + body[5 * MIB - 5 : 5 * MIB + 5]
    contents["copied parts"] = hashlib.sha256(joined).hexdigest()
    step("get copied parts", lambda: without_tag(get("copied parts", joined)))


def links() -> None:
    body = data("presigned", 3000)

    def ask(method: str, url: str, **more: Any) -> list[Any]:
        answer = web.request(method, url, retries=False, **more)
        return [answer.status, answer.headers.get("content-length"), answer.data == body]

    url = s3.generate_presigned_url("put_object", {"Bucket": BUCKET, "Key": "presigned"}, ExpiresIn=60)
    step("presigned put", lambda: ask("PUT", url, body=body)[0])
    contents["presigned"] = hashlib.sha256(body).hexdigest()
    url = s3.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "presigned"}, ExpiresIn=60)
    step("presigned get", lambda: ask("GET", url))
    step("presigned range", lambda: ask("GET", url, headers={"Range": "bytes=5-9"})[:2])
    if SERVER == "swift":  # moto verifies nothing
        bad = url.replace("X-Amz-Signature=", "X-Amz-Signature=0")[:-1]
        step("presigned wrong", lambda: ask("GET", bad)[0])


def forms() -> None:
    def post(name: str, body: bytes, low: int, high: int, **changed: str) -> list[Any]:
        made = s3.generate_presigned_post(
            BUCKET,
            name,
            Fields={"Content-Type": "image/png", "x-amz-meta-from": "form", "success_action_status": "201"},
            Conditions=[
                ["content-length-range", low, high],
                {"Content-Type": "image/png"},
                {"x-amz-meta-from": "form"},
                {"success_action_status": "201"},
            ],
            ExpiresIn=60,
        )
        fields = {**made["fields"], **changed, "file": ("own name.png", body, "image/png")}
        answer = web.request("POST", made["url"], fields=fields, retries=False)
        code = answer.data.partition(b"<Code>")[2].partition(b"</Code>")[0].decode()
        return [answer.status, code]

    body = data("form", 20_000)
    step("form", lambda: post("form", body, 1, 20_000))
    contents["form"] = hashlib.sha256(body).hexdigest()
    step("get form", lambda: get("form", body))


def versions() -> None:
    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    bodies = [data(f"version {number}", 1000 + number) for number in range(2)]
    ids = [s3.put_object(Bucket=BUCKET, Key="versioned", Body=body).get("VersionId") for body in bodies]
    step("version ids", lambda: [bool(found) for found in ids])

    def old(name: str, **more: Any) -> dict[str, Any]:
        found = get(name, bodies[0], **more)
        return {**found, "VersionId": found["VersionId"] == ids[0]}

    step("old version", lambda: old("versioned", VersionId=ids[0]))
    step("old range", lambda: get("versioned", bodies[0][5:9], VersionId=ids[0], Range="bytes=5-8")["right"])

    def entries() -> list[Any]:
        answer = s3.list_object_versions(Bucket=BUCKET, Prefix="versioned")
        return [(item["Key"], item["Size"], item["IsLatest"]) for item in answer["Versions"]]

    step("versions", entries)
    step("delete", lambda: s3.delete_object(Bucket=BUCKET, Key="versioned").get("DeleteMarker"))
    step("deleted", lambda: head("versioned"))
    step(
        "copy of a version",
        lambda: (
            "VersionId"
            in s3.copy_object(
                Bucket=BUCKET,
                Key="restored",
                CopySource={"Bucket": BUCKET, "Key": "versioned", "VersionId": ids[0]},
            )
        ),
    )
    step("get restored", lambda: get("restored", bodies[0])["right"])
    contents["restored"] = hashlib.sha256(bodies[0]).hexdigest()


def settings() -> None:
    tagset = {"TagSet": [{"Key": "k", "Value": "v w"}]}
    step(
        "tag",
        lambda: s3.put_object_tagging(Bucket=BUCKET, Key="copy", Tagging=tagset)["ResponseMetadata"][
            "HTTPStatusCode"
        ],
    )
    step("tags", lambda: s3.get_object_tagging(Bucket=BUCKET, Key="copy")["TagSet"])
    step("acl", lambda: len(s3.get_object_acl(Bucket=BUCKET, Key="copy")["Grants"]))

    def attributes(key: str) -> list[Any]:
        found = s3.get_object_attributes(Bucket=BUCKET, Key=key, ObjectAttributes=["ETag", "ObjectSize"])
        return [found.get("ObjectSize"), tag(found.get("ETag"))]

    step("attributes", lambda: attributes("size-100000"))


def deletes() -> None:
    wanted = [{"Key": key} for key in ("size-0", "size-1", "missing")]
    step(
        "delete many",
        lambda: sorted(
            item["Key"] for item in s3.delete_objects(Bucket=BUCKET, Delete={"Objects": wanted})["Deleted"]
        ),
    )
    for key in ("size-0", "size-1"):
        contents.pop(key)
    step(
        "delete one",
        lambda: s3.delete_object(Bucket=BUCKET, Key="size-16383")["ResponseMetadata"]["HTTPStatusCode"],
    )
    contents.pop("size-16383")
    step("list rest", lambda: [item[:2] for item in listed(s3.list_objects_v2(Bucket=BUCKET))["keys"]])


step("create", lambda: s3.create_bucket(Bucket=BUCKET)["ResponseMetadata"]["HTTPStatusCode"])
step("no bucket", lambda: s3.head_bucket(Bucket=BUCKET + "-none"))
objects()
multipart()
links()
if CHECKSUMS == "when_supported":  # what follows has no content going up
    lists()
    copies()
    if SERVER == "moto":
        settings()
        forms()  # Swift knows none
    deletes()
    if SERVER == "moto":
        versions()
json.dump({"seen": seen, "contents": contents}, sys.stdout)
