"""Requests to Azure Blob as their clients sign them, for tests: heads with SharedKey, or with a token."""

import base64
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import msgspec

from envelope.keys import NetworkService
from proxy.messages.message import Fields, RequestHead
from proxy.plans.planner import request_of
from proxy.plans.request import Mode, Request, Route
from proxy.profiles.azure_blob.options import AzureBlobOptions
from proxy.profiles.azure_signatures import authorization, parse_key
from proxy.tenants.model import LegacyPolicy, Listen, ServiceEntry, Upstream
from proxy.vault.model import Secrets, UpstreamCredential

ACCOUNT = "mystorage"
KEY_TEXT = base64.b64encode(bytes(range(64))).decode()
KEY = parse_key(KEY_TEXT)
NOW_S = 1_795_000_000.0
HOST = "mystorage.blob.core.windows.net"
TOKEN = "sv=2026-06-06&sig=c2lnbmVk&sp=rw"


def credential(secrets: Secrets | None = None, *, not_after_s: float | None = None) -> UpstreamCredential:
    return UpstreamCredential(
        access_key=ACCOUNT,
        upstream_access_key=ACCOUNT,
        not_after_s=not_after_s,
        created_at_s=0,
        sealed=msgspec.json.encode(secrets or Secrets(client_secret=KEY_TEXT)),
        opener=lambda sealed: sealed,
    )


ENTRY = ServiceEntry(
    owner=NetworkService("acme", "blobs"),
    upstream=Upstream("https", HOST, 443),
    profile="azure-blob",
    legacy=LegacyPolicy.STRICT,
    reverse_listen=Listen("127.0.0.1", 8443),
    certificate=None,
    key_file=Path("unused"),
    credentials={ACCOUNT: credential()},
)


def head(
    method: str,
    target: str,
    fields: Mapping[str, str] | None = None,
    *,
    host: str = HOST,
    http2: bool = False,
) -> RequestHead:
    raw = [(name.encode(), value.encode()) for name, value in (fields or {}).items()]
    return RequestHead(method=method, target=target, fields=Fields(raw), host=host, http2=http2)


def signed(
    method: str,
    target: str,
    fields: Mapping[str, str] | None = None,
    *,
    key: bytes = KEY,
    account: str = ACCOUNT,
    at_s: float = NOW_S,
    host: str = HOST,
) -> RequestHead:
    date = format_datetime(datetime.fromtimestamp(at_s, UTC), usegmt=True)
    given = {"x-ms-date": date, "x-ms-version": "2026-06-06", **(fields or {})}
    given["authorization"] = authorization(key, method, target, given, account)
    return head(method, target, given, host=host)


def route(*, mode: Mode = Mode.FORWARD, entry: ServiceEntry = ENTRY, **options: Any) -> Route:
    return Route(service=entry, mode=mode, options=AzureBlobOptions.of(options))


def request(its_head: RequestHead, to: Route | None = None) -> Request:
    return request_of(its_head, to or route(), now_s=NOW_S)


def without_vault() -> ServiceEntry:
    return replace(ENTRY, credentials={})
