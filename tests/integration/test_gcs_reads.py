"""Reads of Google's object storage request by request: status, every field, body, directly and through us.

The SDK hides most of it; here every request is written by hand.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.integration.gcs_site import THROUGH, Way, place, strict_site
from tests.integration.proxy_rig import Answer
from tests.referees.comparison import Declared, Seen

PLAIN = os.urandom(40_000)
JSON = {"content-type": "application/json"}
DECLARED = Declared(
    # Of what each way has stored for itself.
    unequal=frozenset({"etag", "last-modified", "x-goog-generation"}),
    # It would be of what is stored.
    direct_only=frozenset({"x-goog-hash"}),
    refusals=frozenset({"range-not-satisfiable"}),
    # An opened answer is for no shared cache; what we have read ourselves comes uncoded.
    volatile=(
        (re.compile(rb", private$"), b""),
        (re.compile(rb"box-(?:direct|forward|reverse)"), b"box"),
        (re.compile(rb"https://localhost:[0-9]+/"), b"https://service/"),
        (re.compile(rb'"(?:generation|etag|id|timeCreated|updated|timeStorageClassUpdated)": "[^"]*"'), b""),
        (re.compile(rb"generation=[0-9]+"), b""),
        (re.compile(rb'"(?:md5Hash|crc32c)": "[^"]*", '), b""),
    ),
)


def seen(method: str, answer: Answer) -> Seen:
    fields = dict(answer.headers)
    # A document is shorter without digests, and the buckets' names are not of one length.
    if answer.status >= 300 or "json" in fields.get("content-type", ""):
        fields.pop("content-length", None)
    if method == "HEAD":  # of what is stored no more than its plaintext's length is said: Content-Length
        fields.pop("x-goog-stored-content-length", None)
        return Seen(answer.status, fields, b"")  # curl shows the head for it
    return Seen(answer.status, fields, answer.body)


async def written(way: Way, bucket: str) -> None:
    await way.ask("POST", "/storage/v1/b?project=p", JSON, f'{{"name": "{bucket}"}}'.encode())
    for name, body in (("a b/\u00e4", PLAIN), ("empty", b""), ("one", b"1")):
        assert (await way.put(bucket, name, body)).status == 200
    document = b'{"cacheControl": "max-age=7", "contentLanguage": "de", "metadata": {"x": "y"}}'
    assert (await way.ask("PATCH", place(bucket, "a b/\u00e4"), JSON, document)).status == 200


def requests(bucket: str, etag: str, generation: str) -> list[tuple[str, str, Mapping[str, str]]]:
    content = f"{place(bucket, 'a b/\u00e4')}?alt=media"
    download = content.replace("/storage/", "/download/storage/")
    return [
        ("GET", content, {}),
        ("GET", download, {}),
        ("HEAD", content, {}),
        *(
            ("GET", content, {"range": f"bytes={text}"})
            for text in (
                "0-0",
                "16383-16384",
                "39999-",
                "39990-50000",
                "-5",
                "-50000",
                "40000-",
                "7-3",
                "x-y",
            )
        ),
        ("GET", download, {"range": "bytes=5-9"}),
        ("GET", content, {"range": "lines=1-2"}),
        # A bare one is no entity tag, and no date: RFC 9110 13.1.5 does not say what it is then.
        *([("GET", content, {"range": "bytes=5-9", "if-range": etag})] if etag.startswith('"') else ()),
        ("GET", content, {"if-none-match": etag}),
        ("GET", content, {"if-none-match": '"other"'}),
        ("GET", content, {"if-match": '"other"'}),
        ("GET", content, {"if-match": f'"other", {etag}', "range": "bytes=5-9"}),
        ("GET", f"{content}&generation={generation}", {}),
        ("GET", f"{content}&generation=1", {}),
        ("GET", f"{content}&ifGenerationMatch=1", {}),
        ("GET", f"{content}&ifGenerationNotMatch={generation}", {}),
        ("GET", f"{content}&ifMetagenerationMatch=2", {"range": "bytes=0-9"}),
        ("GET", f"{place(bucket, 'empty')}?alt=media", {}),
        ("HEAD", f"{place(bucket, 'empty')}?alt=media", {}),
        ("GET", f"{place(bucket, 'empty')}?alt=media", {"range": "bytes=0-9"}),
        ("GET", f"{place(bucket, 'one')}?alt=media", {"range": "bytes=0-9"}),
        ("GET", f"{place(bucket, 'missing')}?alt=media", {}),
        ("HEAD", f"{place(bucket, 'missing')}?alt=media", {}),
        ("GET", f"{place(bucket, 'missing')}?alt=media", {"range": "bytes=0-9"}),
        # What is said of them.
        ("GET", place(bucket, "a b/\u00e4"), {}),
        ("GET", place(bucket, "a b/\u00e4"), {"accept-encoding": "identity"}),
        ("GET", f"{place(bucket, 'a b/\u00e4')}?fields=name,size,metadata/x", {}),
        ("GET", f"{place(bucket, 'a b/\u00e4')}?fields=size", {}),
        ("GET", f"{place(bucket, 'a b/\u00e4')}?ifMetagenerationNotMatch=2", {}),
        ("GET", place(bucket, "missing"), {}),
        ("GET", f"/storage/v1/b/{bucket}/o", {}),
        ("GET", f"/storage/v1/b/{bucket}/o?maxResults=1&delimiter=/", {}),
        ("GET", f"/storage/v1/b/{bucket}/o?prefix=none", {}),
        ("GET", f"/storage/v1/b/{bucket}/o?fields=items(name,size),nextPageToken", {}),
        ("GET", f"/storage/v1/b/{bucket}/o?fields=items/size", {}),
        ("GET", f"/storage/v1/b/{bucket}/o?fields=items/name", {}),
        ("GET", "/storage/v1/b/box-missing/o", {}),
        ("GET", f"/storage/v1/b/{bucket}", {}),
        ("DELETE", f"/storage/v1/b/{bucket}", {}),
        ("DELETE", f"{place(bucket, 'one')}?ifGenerationMatch=1", {}),
        ("DELETE", place(bucket, "one"), {}),
        ("DELETE", place(bucket, "one"), {}),
    ]


async def run(way: Way) -> list[tuple[str, Answer]]:
    bucket = f"box-{way.name}"
    await written(way, bucket)
    head = (await way.ask("HEAD", f"{place(bucket, 'a b/\u00e4')}?alt=media")).headers
    asked = requests(bucket, head["etag"], head["x-goog-generation"])
    return [
        (f"{method} {target} {dict(fields)}", await way.ask(method, target, fields))
        for method, target, fields in asked
    ]


@pytest.mark.parametrize("quotes", [True, False], ids=["quoted-etags", "bare-etags"])
async def test_every_read_is_answered_as_directly(tmp_path: Path, *, quotes: bool) -> None:
    async with strict_site(tmp_path) as site:
        site.server.quotes = quotes
        direct = await run(site.ways["direct"])
        assert {answer.status for _, answer in direct} >= {200, 204, 206, 304, 404, 409, 412, 416}
        for way in THROUGH:
            found = []
            for (asked, one), (_, two) in zip(direct, await run(site.ways[way]), strict=True):
                method = asked.partition(" ")[0]
                if "fields=items/size" in asked:  # of whom is not said: then no size is
                    assert two.body == b'{"items": [{}, {}, {}]}'
                    continue
                if lines := DECLARED.differences(seen(method, one), seen(method, two)):
                    found.append(f"{asked}: {lines}")
            assert not found, f"{way}:\n" + "\n".join(found)
        assert site.server.trouble == []
