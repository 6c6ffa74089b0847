"""A client's signatures for S3, written from the specification and sharing no line with sigv4.py.

request = sign("PUT", "/bucket/key", body_hash="UNSIGNED-PAYLOAD", now_s=NOW_S)   # -> RequestHead
url = presign("GET", "/bucket/key", now_s=NOW_S, expires_s=60)
"""

import datetime as dt
import hashlib
import hmac
from urllib.parse import quote, unquote

from proxy.messages.message import Fields, RequestHead

ACCESS_KEY = "test:tester"
SECRET = "the-clients-own-secret"
HOST = "s3.example.com"
EMPTY = hashlib.sha256(b"").hexdigest()


def stamp(now_s: float) -> str:
    return dt.datetime.fromtimestamp(now_s, dt.UTC).strftime("%Y%m%dT%H%M%SZ")


def derive(secret: str, day: str, region: str = "us-east-1") -> bytes:
    key = b"AWS4" + secret.encode()
    for step in (day, region, "s3", "aws4_request"):
        key = hmac.new(key, step.encode(), hashlib.sha256).digest()
    return key


def _canonical_query(query: str) -> str:
    pairs = [part.partition("=")[::2] for part in query.split("&") if part]
    coded = sorted((quote(unquote(name), safe="~"), quote(unquote(value), safe="~")) for name, value in pairs)
    return "&".join(f"{name}={value}" for name, value in coded)


def _signature(  # noqa: PLR0917 - the specification's order
    method: str, path: str, query: str, headers: list[tuple[str, str]], payload: str, date: str, secret: str
) -> str:
    lines = [f"{name}:{' '.join(value.split())}" for name, value in headers]
    names = ";".join(name for name, _ in headers)
    canonical = "\n".join([method, path, _canonical_query(query), *lines, "", names, payload])
    text = "\n".join(
        [
            "AWS4-HMAC-SHA256",
            date,
            f"{date[:8]}/us-east-1/s3/aws4_request",
            hashlib.sha256(canonical.encode()).hexdigest(),
        ]
    )
    return hmac.new(derive(secret, date[:8]), text.encode(), hashlib.sha256).hexdigest()


def chunk_signature(key: bytes, date: str, before: str, data: bytes) -> str:
    """Of one chunk of an aws-chunked body."""
    scope = f"{date[:8]}/us-east-1/s3/aws4_request"
    digest = hashlib.sha256(data).hexdigest()
    text = f"AWS4-HMAC-SHA256-PAYLOAD\n{date}\n{scope}\n{before}\n{EMPTY}\n{digest}"
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def sign(
    method: str,
    target: str,
    *,
    now_s: float,
    body_hash: str = EMPTY,
    headers: dict[str, str] | None = None,
    unsigned: dict[str, str] | None = None,
    secret: str = SECRET,
    access_key: str = ACCESS_KEY,
    host: str = HOST,
    signed_path: str | None = None,
) -> RequestHead:
    """*headers* are signed, *unsigned* are not. *signed_path*: what is signed in place of the target's."""
    path, _, query = target.partition("?")
    date = stamp(now_s)
    signed = {"host": host, "x-amz-date": date, "x-amz-content-sha256": body_hash, **(headers or {})}
    ordered = sorted(signed.items())
    signature = _signature(method, signed_path or path, query, ordered, body_hash, date, secret)
    authorization = (
        f"AWS4-HMAC-SHA256 Credential={access_key}/{date[:8]}/us-east-1/s3/aws4_request, "
        f"SignedHeaders={';'.join(name for name, _ in ordered)}, Signature={signature}"
    )
    fields = {**signed, **(unsigned or {}), "authorization": authorization}
    return head(method, target, fields, host=host)


def presign(
    method: str,
    target: str,
    *,
    now_s: float,
    expires_s: int = 60,
    headers: dict[str, str] | None = None,
    unsigned: dict[str, str] | None = None,
    secret: str = SECRET,
    host: str = HOST,
) -> RequestHead:
    path, _, query = target.partition("?")
    date = stamp(now_s)
    signed = sorted({"host": host, **(headers or {})}.items())
    names = quote(";".join(name for name, _ in signed), safe="")
    credential = quote(f"{ACCESS_KEY}/{date[:8]}/us-east-1/s3/aws4_request", safe="")
    query += "&" if query else ""
    query += (
        f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={credential}&X-Amz-Date={date}"
        f"&X-Amz-Expires={expires_s}&X-Amz-SignedHeaders={names}"
    )
    signature = _signature(method, path, query, signed, "UNSIGNED-PAYLOAD", date, secret)
    return head(
        method,
        f"{path}?{query}&X-Amz-Signature={signature}",
        {**dict(signed), **(unsigned or {})},
        host=host,
    )


def head(method: str, target: str, fields: dict[str, str], *, host: str = HOST) -> RequestHead:
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    return RequestHead(method=method, target=target, fields=Fields(raw), host=host)
