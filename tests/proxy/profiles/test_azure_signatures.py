"""SharedKey, judged by the signer of Microsoft's own SDK (in the referees' environment)."""

import base64
import json
import subprocess
from pathlib import Path

import pytest

from proxy.profiles.azure_signatures import (
    authorization,
    is_signed,
    parse_authorization,
    parse_key,
    signature,
    string_to_sign,
)

PYTHON = Path(__file__).parents[3] / ".venv-referees" / "bin" / "python"
KEY_TEXT = base64.b64encode(bytes(range(64))).decode()
KEY = parse_key(KEY_TEXT)

# Signs the requests of standard input as azure-storage-blob does.
_SDK = """
import json, sys
from azure.core.pipeline import PipelineContext, PipelineRequest
from azure.core.pipeline.transport import HttpRequest
from azure.storage.blob._shared.authentication import SharedKeyCredentialPolicy

for line in sys.stdin:
    account, key, method, url, headers = json.loads(line)
    request = HttpRequest(method, url, headers=headers)
    SharedKeyCredentialPolicy(account, key).on_request(PipelineRequest(request, PipelineContext(None)))
    print(request.headers["Authorization"])
"""

CASES = [
    ("GET", "/container?restype=container&comp=list", {}),
    ("PUT", "/container/blob", {"Content-Length": "11", "x-ms-blob-type": "BlockBlob"}),
    ("PUT", "/container/a%20b/%C3%A4", {"Content-Length": "0", "Content-Type": "text/plain"}),
    ("GET", "/container/blob", {"x-ms-range": "bytes=0-99", "If-Match": '"0x8D"'}),
    # Not with Range: the SDK signs a field `byte_range` in its place, and never sends a Range.
    ("GET", "/container/blob", {"If-Modified-Since": "Wed, 25 Nov 2026 00:00:00 GMT"}),
    ("PUT", "/c/b?comp=block&blockid=MDA%3D", {"Content-Length": "5", "Content-MD5": "AAAA"}),
    ("PUT", "/c/b?comp=metadata", {"x-ms-meta-b": "2", "x-ms-meta-a": "1", "Content-Length": "0"}),
    ("PUT", "/c/b?comp=metadata",
     {"x-ms-meta-a_b": "1", "x-ms-meta-a1": "2", "x-ms-meta-aa": "3", "x-ms-meta-a": "4"}),
    ("PUT", "/c/b?comp=metadata",
     {"x-ms-meta-a-b": "1", "x-ms-meta-ab": "2", "x-ms-meta-aa": "3", "x-ms-meta-ab-": "4"}),
    ("DELETE", "/c/b?snapshot=2026-11-25T00%3A00%3A00.0000000Z", {"x-ms-delete-snapshots": "only"}),
    ("HEAD", "/", {}),
]  # fmt: skip


@pytest.mark.skipif(not PYTHON.exists(), reason="no referees' environment: make referees")
def test_the_sdk_signs_the_same() -> None:
    asked: list[tuple[str, str, str, str, dict[str, str]]] = []
    for method, target, headers in CASES:
        fields: dict[str, str] = {
            "x-ms-date": "Thu, 26 Nov 2026 01:00:00 GMT",
            "x-ms-version": "2026-06-06",
            **headers,
        }
        asked.append(("account1", KEY_TEXT, method, f"https://account1.blob.example{target}", fields))
    done = subprocess.run(
        [str(PYTHON), "-c", _SDK],
        input="\n".join(json.dumps(case) for case in asked),
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = done.stdout.splitlines()
    for (method, target, _), (*_, fields), shown in zip(CASES, asked, theirs, strict=True):
        signed = {name.lower(): value for name, value in fields.items()}
        assert authorization(KEY, method, target, signed, "account1") == shown, (method, target)
        assert is_signed(KEY, method, target, {**signed, "authorization": shown})


def test_what_is_signed() -> None:
    headers = {"x-ms-date": "now", "date": "then", "content-length": "0", "x-ms-meta-a": "  1 \t 2 "}
    text = string_to_sign("PUT", "/c/b?Comp=x&a=2&a=1", headers, "acc").decode()
    assert text.split("\n") == [
        "PUT", *[""] * 11, "x-ms-date:now", "x-ms-meta-a:1 2", "/acc/c/b", "a:1,2", "comp:x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"method": "GET"},
        {"target": "/c/b?comp=blocklist"},
        {"target": "/c/other?comp=block"},
        {"content-length": "6"},
        {"content-md5": "AAAAAAAAAAAAAAAAAAAAAA=="},
        {"x-ms-meta-a": "2"},
        {"x-ms-new": "1"},
        {"range": "bytes=0-1"},
    ],
)
def test_everything_that_is_signed_counts(change: dict[str, str]) -> None:
    headers = {"x-ms-date": "now", "content-length": "5", "x-ms-meta-a": "1"}
    headers["authorization"] = authorization(KEY, "PUT", "/c/b?comp=block", headers, "acc")
    assert is_signed(KEY, "PUT", "/c/b?comp=block", headers)
    changed = dict(change)
    method, target = changed.pop("method", "PUT"), changed.pop("target", "/c/b?comp=block")
    assert not is_signed(KEY, method, target, {**headers, **changed})


def test_another_key_or_account() -> None:
    headers = {"x-ms-date": "now"}
    headers["authorization"] = authorization(KEY, "GET", "/c", headers, "acc")
    assert not is_signed(bytes(64), "GET", "/c", headers)
    headers["authorization"] = headers["authorization"].replace("acc:", "other:")
    assert not is_signed(KEY, "GET", "/c", headers)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "SharedKey",
        "SharedKey acc",
        "SharedKey acc:",
        "SharedKey acc:AAAA",
        "SharedKeyLite acc:" + "A" * 43 + "=",
        "sharedkey acc:" + "A" * 43 + "=",
        "SharedKey ACC:" + "A" * 43 + "=",
        "SharedKey acc:" + "A" * 43 + "=\n",
        "Bearer acc",
    ],
)
def test_what_is_no_shared_key(value: str) -> None:
    assert parse_authorization(value) is None
    assert not is_signed(KEY, "GET", "/", {"authorization": value})


@pytest.mark.parametrize("text", ["", "!", "AAAA", base64.b64encode(bytes(63)).decode()])
def test_what_is_no_account_key(text: str) -> None:
    with pytest.raises(ValueError, match="account key") as caught:
        parse_key(text)
    assert not text or text not in str(caught.value)


def test_a_signature_has_32_bytes() -> None:
    assert len(signature(KEY, "GET", "/", {}, "acc")) == 32
