"""Forms for S3: a judge who knows what S3 documents, and nothing of ours, takes what comes out."""

import base64
import email
import email.policy
import hashlib
import hmac
import json
import os
import random
from collections.abc import Iterable
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import msgspec
import pytest

from envelope.keys import KeyId, NetworkService
from envelope.objects import Opener, Sealer, sealed_length
from proxy.messages.message import BodyFrame, Fields, Framing, RequestHead
from proxy.plans.conversing import PartOf
from proxy.plans.request import NO_EDITS, Mode, Request, Route
from proxy.profiles.s3.options import S3Options
from proxy.profiles.s3.post_form import MAX_FIELDS_BYTES, FormUpload
from proxy.refusals import RefusedError
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream
from proxy.vault.model import Secrets, UpstreamCredential

OWNER = NetworkService("tenant-a", "store")
KEY = os.urandom(32)
KEY_ID = KeyId(os.urandom(16))
NOW_S = 1_767_607_200.0  # 2026-01-05T10:00:00Z
BOUNDARY = b"----WebKitFormBoundary7MA4YWxk"
CLIENT, CLIENT_SECRET = "AKIDCLIENT", "the client's own secret".replace(" ", "-")
SCOPE = "20260105/eu-central-1/s3/aws4_request"


def credential(**more: Any) -> UpstreamCredential:
    held = Secrets(
        client_secret=CLIENT_SECRET,
        upstream_secret=more.get("upstream_secret"),
        session_token=more.get("token"),
    )
    return UpstreamCredential(
        access_key=CLIENT,
        upstream_access_key=more.get("upstream_access_key", CLIENT),
        not_after_s=more.get("not_after_s"),
        created_at_s=0,
        sealed=msgspec.json.encode(held),
        opener=lambda sealed: sealed,
    )


GATEWAY = credential(upstream_access_key="AKIDUPSTREAM", upstream_secret="upstream-secret")


def request(entry: UpstreamCredential | None, **options: str) -> Request:
    service = ServiceEntry(
        owner=OWNER,
        upstream=Upstream(scheme="https", host="s3.example", port=443),
        profile="s3",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=None,
        certificate=None,
        key_file=Path("key.pem"),
        credentials={} if entry is None else {CLIENT: entry},
    )
    head = RequestHead(method="POST", target="/bucket", fields=Fields(()))
    frame = BodyFrame(framing=Framing.CHUNKED)
    route = Route(service=service, mode=Mode.FORWARD, options=S3Options.of(options))
    return Request(head=head, frame=frame, edits=NO_EDITS, route=route, now_s=NOW_S)


def signed(secret: str, policy: str) -> str:
    """As S3 documents it, by nothing of ours."""
    key = b"AWS4" + secret.encode()
    for step in SCOPE.split("/"):
        key = hmac.digest(key, step.encode(), hashlib.sha256)
    return hmac.digest(key, policy.encode(), hashlib.sha256).hex()


def policy_fields(
    conditions: Iterable[Any], *, secret: str = CLIENT_SECRET, expiration: str = "2026-01-05T11:00:00Z"
) -> dict[str, str]:
    document = {
        "expiration": expiration,
        "conditions": [
            {"bucket": "bucket"},
            ["starts-with", "$key", "in/"],
            {"x-amz-credential": f"{CLIENT}/{SCOPE}"},
            ["eq", "$X-Amz-Credential", f"{CLIENT}/{SCOPE}"],
            *conditions,
        ],
    }
    policy = base64.b64encode(json.dumps(document).encode()).decode()
    return {
        "key": "in/${filename}",
        "x-amz-algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"{CLIENT}/{SCOPE}",
        "x-amz-date": "20260105T100000Z",
        "policy": policy,
        "x-amz-signature": signed(secret, policy),
        "x-amz-meta-note": "grüße",
    }


def form(fields: dict[str, str], content: bytes, *, more: bytes = b"", head: str = "") -> bytes:
    parts = [
        f'--{BOUNDARY.decode()}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    parts.append(
        b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="file"; filename="a b.png"\r\n'
        b"Content-Type: image/png\r\n" + head.encode() + b"\r\n" + content + b"\r\n"
    )
    return b"".join([*parts, more, b"--", BOUNDARY, b"--\r\n"])


def new_sealer(part: PartOf | None = None) -> Sealer:
    assert part is None
    return Sealer(KEY, OWNER, KEY_ID)


def upload(body: bytes, entry: UpstreamCredential | None, *, step: int = 1000, **options: str) -> bytes:
    made = FormUpload(BOUNDARY, len(body), request(entry, **options), new_sealer)
    out = bytearray()
    for at in range(0, len(body), step):
        piece = made.feed(body[at : at + step])
        assert not piece or made.out_bytes is not None  # known with the first output
        out += piece
    out += made.finish()
    assert made.out_bytes == len(out)
    return bytes(out)


def fed(made: FormUpload, body: bytes, sent: bytearray) -> None:
    for at in range(0, len(body), 512):
        sent += made.feed(body[at : at + 512])


def read(body: bytes) -> dict[str, bytes]:
    head = b'Content-Type: multipart/form-data; boundary="' + BOUNDARY + b'"\r\n\r\n'
    message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    found: dict[str, bytes] = {}
    for item in message.iter_parts():
        assert isinstance(item, EmailMessage)
        raw = item.get_payload(decode=True)
        assert isinstance(raw, bytes)
        found[str(item.get_param("name", header="content-disposition")).lower()] = raw
    return found


def judge(body: bytes, access_key: str, secret: str) -> bytes:
    """What S3 would store. AssertionError where it would refuse."""
    fields = read(body)
    content = fields.pop("file")
    policy = fields["policy"].decode()
    assert signed(secret, policy) == fields["x-amz-signature"].decode()
    assert fields["x-amz-credential"].decode() == f"{access_key}/{SCOPE}"
    for item in json.loads(base64.b64decode(policy))["conditions"]:
        if isinstance(item, dict):
            [(name, value)] = item.items()
            assert name == "bucket" or fields[name.lower()].decode() == value
        elif item[0] == "eq":
            assert fields[item[1][1:].lower()].decode() == item[2]
        elif item[0] == "starts-with":
            assert fields[item[1][1:]].decode().startswith(item[2])
        else:
            assert item[0] == "content-length-range"
            assert item[1] <= len(content) <= item[2]
    return content


def unsealed(stored: bytes) -> bytes:
    opener = Opener(OWNER, lambda _header: KEY)
    return bytes(opener.update(stored)) + opener.finalize()


@pytest.mark.parametrize("step", [1, 97, 4096, 1 << 20])
@pytest.mark.parametrize("entry", [credential(), GATEWAY], ids=["same key", "gateway key"])
def test_the_service_takes_the_form_with_the_file_sealed(entry: UpstreamCredential, step: int) -> None:
    secret = os.urandom(3000 if step == 1 else 50_000)
    fields = policy_fields([["content-length-range", 0, len(secret)]])
    out = upload(form(fields, secret), entry, step=step)
    stored = judge(out, entry.upstream_access_key, entry.open().signs_with.decode())
    assert unsealed(stored) == secret
    got = read(out)
    untouched = ("key", "x-amz-algorithm", "x-amz-date", "x-amz-meta-note")
    assert {name: got[name].decode() for name in untouched} == {name: fields[name] for name in untouched}
    assert not any(secret[at : at + 16] in out for at in range(0, len(secret), 16))


def test_a_policy_that_needs_no_change_goes_as_it_came() -> None:
    fields = policy_fields([])
    out = upload(form(fields, b"x" * 100), credential())
    assert out.partition(b'name="file"')[0] == form(fields, b"").partition(b'name="file"')[0]
    judge(out, CLIENT, CLIENT_SECRET)


@pytest.mark.parametrize(
    ("low", "high", "code"), [(0, 99, "content-too-large"), (101, 200, "content-too-small")]
)
def test_limits_are_the_plaintexts(low: int, high: int, code: str) -> None:
    body = form(policy_fields([["content-length-range", low, high]]), b"x" * 100)
    for entry in (credential(), GATEWAY, None):
        made = FormUpload(BOUNDARY, len(body), request(entry), new_sealer)
        with pytest.raises(RefusedError, match=code):
            made.feed(body)


def test_the_very_limits_are_allowed() -> None:
    fields = policy_fields([["content-length-range", 100, 100]])
    stored = judge(upload(form(fields, b"x" * 100), GATEWAY), "AKIDUPSTREAM", "upstream-secret")
    assert len(stored) == sealed_length(100)


def test_an_unknown_access_key_is_the_services_to_judge() -> None:
    fields = policy_fields([], secret="some other secret")
    out = upload(form(fields, b"x" * 100), None)
    assert read(out)["policy"].decode() == fields["policy"]
    assert judge(out, CLIENT, "some other secret") != b"x" * 100


def test_an_anonymous_form_goes_on_sealed() -> None:
    out = upload(form({"key": "k"}, b"x" * 100), None)
    assert unsealed(read(out)["file"]) == b"x" * 100


def test_whom_the_options_keep_out() -> None:
    """The same as of requests that are signed in their heads; what is allowed to whom else stays allowed."""
    unknown = form(policy_fields([], secret="some other secret"), b"x" * 100)
    with pytest.raises(RefusedError, match="access-key-unknown"):
        upload(unknown, None, unknown_keys="refuse")
    assert upload(unknown, None, anonymous="refuse")
    nobody = form({"key": "k"}, b"x" * 100)
    with pytest.raises(RefusedError, match="request-not-signed"):
        upload(nobody, None, anonymous="refuse")
    assert upload(nobody, None, unknown_keys="refuse")
    known = form(policy_fields([]), b"x" * 100)
    assert judge(
        upload(known, credential(), unknown_keys="refuse", anonymous="refuse"), CLIENT, CLIENT_SECRET
    )


@pytest.mark.parametrize("name", ["x-amz-meta-md5chksum", "X-Amz-Meta-Sha256", "x-amz-meta-crc32c"])
def test_digests_in_metadata_are_refused_unless_they_are_to_stay(name: str) -> None:
    fields = policy_fields([["starts-with", f"${name}", ""]])
    body = form({**fields, name: "d41d8cd98f00b204e9800998ecf8427e"}, b"x" * 100)
    with pytest.raises(RefusedError, match="unknown-route"):
        upload(body, credential())
    kept = read(upload(body, credential(), metadata_digests="keep"))
    assert kept[name.lower()] == b"d41d8cd98f00b204e9800998ecf8427e"


def changed(**fields: str) -> dict[str, str]:
    found = {**policy_fields([]), **fields}
    return {name: value for name, value in found.items() if value != "-"}


def policy_of(text: str) -> dict[str, str]:
    policy = base64.b64encode(text.encode()).decode()
    return changed(policy=policy, **{"x-amz-signature": signed(CLIENT_SECRET, policy)})


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        (changed(**{"x-amz-signature": "0" * 64}), "signature-mismatch"),
        (changed(**{"x-amz-signature": "x"}), "authorization-malformed"),
        (changed(**{"x-amz-signature": "-"}), "authorization-malformed"),
        (changed(**{"x-amz-algorithm": "AWS4-ECDSA-P256-SHA256"}), "signature-version"),
        (changed(**{"x-amz-date": "20260106T100000Z"}), "authorization-malformed"),
        (changed(**{"x-amz-security-token": "t"}), "session-token"),
        (changed(AWSAccessKeyId="k", signature="s"), "signature-version"),
        (changed(policy="-"), "authorization-malformed"),
        (changed(policy="not base64!"), "malformed-document"),
        (policy_fields([], expiration="2026-01-05T09:59:59Z"), "signature-expired"),
        (policy_fields([], expiration="tomorrow"), "malformed-document"),
        (policy_fields([["content-length-range", "a", "b"]]), "malformed-document"),
        (policy_fields([["content-length-range", 5]]), "malformed-document"),
        (policy_fields([["content-length-range", 5, 4]]), "malformed-document"),
        (policy_of('{"expiration":"2026-01-05T11:00:00Z"}'), "malformed-document"),
        (
            policy_of('{"expiration":"2026-01-05T11:00:00Z","conditions":[],"conditions":[]}'),
            "malformed-document",
        ),
        (policy_of('{"expiration":"2026-01-05T11:00:00Z","conditions":[],"other":1}'), "malformed-document"),
        (policy_of("[" * 30_000), "malformed-document"),
        (changed(**{"x-amz-checksum-crc32": "AAAAAA=="}), "unknown-route"),
        (changed(**{"Content-MD5": "AAAA"}), "unknown-route"),
        (changed(KEY="twice"), "bad-message"),
        (changed(note="x" * 65_537), "too-large"),
        ({**{f"note-{number}": "x" * 60_000 for number in range(3)}, **policy_fields([])}, "too-large"),
    ],
)
def test_forms_that_are_refused_before_anything_is_sent(fields: dict[str, str], code: str) -> None:
    body = form(fields, b"x" * 100)
    made = FormUpload(BOUNDARY, len(body), request(credential()), new_sealer)
    sent = bytearray()
    with pytest.raises(RefusedError, match=code):
        fed(made, body, sent)
    assert not sent
    assert made.out_bytes is None


def test_other_shapes_of_forms_are_refused() -> None:
    another = b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="submit"\r\n\r\nGo\r\n'
    second = another.replace(b'"submit"', b'"x"; filename="y"')
    for more in (another, second):
        with pytest.raises(RefusedError):
            upload(form(policy_fields([]), b"x" * 100, more=more), credential())
    hidden = form(policy_fields([]), b"x").replace(b'name="file"', b'name="document"')
    with pytest.raises(RefusedError, match="unknown-route"):
        upload(hidden, credential())
    with pytest.raises(RefusedError, match="bad-message"):
        upload(b"--" + BOUNDARY + b"--\r\n", credential())
    cut = form(policy_fields([]), b"x" * 100)[:-2]  # the end is counted on
    with pytest.raises(RefusedError, match="bad-length"):
        upload(cut, credential())


def test_a_key_that_has_ended_and_one_with_a_session_token_sign_nothing() -> None:
    body = form(policy_fields([["content-length-range", 0, 1000]]), b"x" * 100)
    for entry, code in (
        (credential(not_after_s=NOW_S), "access-key-unknown"),
        (credential(token="token"), "cannot-sign-anew"),
    ):
        with pytest.raises(RefusedError, match=code):
            upload(body, entry)


def test_a_files_own_length_is_put_right() -> None:
    out = upload(form(policy_fields([]), b"x" * 99_990, head="Content-Length: 99990\r\n"), credential())
    assert b"Content-Length: %d\r\n" % sealed_length(99_990) in out


def test_any_cut_gives_the_same_form() -> None:
    fields = policy_fields([["content-length-range", 0, 100_000]])
    secret = os.urandom(20_000)
    body = form(fields, secret)
    for _ in range(30):
        made = FormUpload(BOUNDARY, len(body), request(GATEWAY), new_sealer)
        at, out = 0, b""
        while at < len(body):
            size = random.choice([1, 2, 3, 50, 500, 5000])
            out += made.feed(body[at : at + size])
            at += size
        out += made.finish()
        assert unsealed(judge(out, "AKIDUPSTREAM", "upstream-secret")) == secret


def test_what_is_held_back_is_bounded() -> None:
    endless = b"".join(
        b"--"
        + BOUNDARY
        + b'\r\nContent-Disposition: form-data; name="n%d"\r\n\r\n' % number
        + b"x" * 1000
        + b"\r\n"
        for number in range(1000)
    )
    made = FormUpload(BOUNDARY, 1 << 30, request(None), new_sealer)
    with pytest.raises(RefusedError, match="too-large"):
        fed(made, endless[: MAX_FIELDS_BYTES + 10_000], bytearray())
