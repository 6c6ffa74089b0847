"""The signing half of AWS Signature Version 4, as AWS's documentation words it, for tests alone.

It shares no line with proxy/encryption_service/sigv4.py, so that the two judge each other; a third judge is
curl's `--aws-sigv4`.
"""

import hashlib
import hmac
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    access_key_id: str
    secret: str = field(repr=False)


def amz_date(now_s: float) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))


def authorization(
    credentials: Credentials,
    *,
    headers: Sequence[tuple[str, str]],
    body: bytes,
    path: str,
    method: str = "POST",
    region: str = "us-east-1",
    service: str = "kms-xks-proxy",
    signed: Iterable[str] = ("host", "x-amz-date"),
    day: str | None = None,
) -> str:
    """The Authorization header for a request with *headers*, of which x-amz-date is one."""
    names = sorted(signed)
    values: dict[str, list[str]] = {}
    for name, value in headers:
        values.setdefault(name.lower(), []).append(" ".join(value.split()))
    date = values["x-amz-date"][0]
    day = date[:8] if day is None else day
    canonical = f"{method}\n{path}\n\n"
    for name in names:
        canonical += f"{name}:{','.join(values[name])}\n"
    canonical += "\n" + ";".join(names) + "\n" + hashlib.sha256(body).hexdigest()
    scope = f"{day}/{region}/{service}/aws4_request"
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    to_sign = f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{hashed}"
    key = ("AWS4" + credentials.secret).encode()
    for part in (day, region, service, "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
    return (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key_id}/{scope}, "
        f"SignedHeaders={';'.join(names)}, Signature={signature}"
    )


def signed_headers(
    credentials: Credentials,
    *,
    path: str,
    body: bytes,
    now_s: float,
    host: str = "xks.example.com",
    region: str = "us-east-1",
) -> tuple[tuple[str, str], ...]:
    """The headers of one POST as AWS KMS sends it: host and x-amz-date are signed."""
    headers = [("host", host), ("x-amz-date", amz_date(now_s)), ("content-type", "application/json")]
    headers.append(
        ("authorization", authorization(credentials, headers=headers, body=body, path=path, region=region))
    )
    return tuple(headers)
