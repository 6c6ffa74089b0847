"""What azure-storage-blob makes of errors: which exception, with which code, after how many tries. As JSON.

Run by `.venv-referees`; knows nothing of Sealgate. One JSON document on standard input: url, account, key,
ca, proxy (or null), container (it is there), steps: the names of those of STEPS to go, in order.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from azure.core import MatchConditions
from azure.core.exceptions import HttpResponseError
from azure.storage.blob import BlobServiceClient, LinearRetry

SPEC = json.load(sys.stdin)
TRIES = 3
service = BlobServiceClient(
    SPEC["url"],
    credential={"account_name": SPEC["account"], "account_key": SPEC["key"]},
    connection_verify=SPEC["ca"],
    proxies={"https": SPEC["proxy"]} if SPEC["proxy"] else {},
    retry_policy=LinearRetry(backoff=0, retry_total=TRIES - 1, random_jitter_range=0),
)
box = service.get_container_client(SPEC["container"])
FALSE_MD5 = {"Content-MD5": "1B2M2Y8AsgTpgAmY7PhCfg=="}
OTHER = '"0x8D0000000000000"'

STEPS: dict[str, Callable[..., Any]] = {
    "put": lambda hook: box.upload_blob("new", b"content", overwrite=True, raw_response_hook=hook),
    "put-once": lambda hook: box.upload_blob("sealed", b"content", overwrite=False, raw_response_hook=hook),
    "put-wrong-md5": lambda hook: box.upload_blob(
        "new", b"content", headers=FALSE_MD5, raw_response_hook=hook
    ),
    "get": lambda hook: box.download_blob("sealed", raw_response_hook=hook).readall(),
    "get-if": lambda hook: box.download_blob(
        "sealed", etag=OTHER, match_condition=MatchConditions.IfNotModified, raw_response_hook=hook
    ).readall(),
    "get-missing": lambda hook: box.download_blob("missing", raw_response_hook=hook).readall(),
    "get-beyond": lambda hook: box.download_blob(
        "sealed", offset=50_000_000, length=10, raw_response_hook=hook
    ).readall(),
    "head-missing": lambda hook: box.get_blob_client("missing").get_blob_properties(raw_response_hook=hook),
    "get-plain": lambda hook: box.download_blob("plain", raw_response_hook=hook).readall(),
    "head-short": lambda hook: box.get_blob_client("short").get_blob_properties(raw_response_hook=hook),
    "append": lambda hook: box.get_blob_client("log").create_append_blob(raw_response_hook=hook),
}

seen = {}
for name in SPEC["steps"]:
    answers: list[int] = []
    try:
        STEPS[name](lambda answer, answers=answers: answers.append(answer.http_response.status_code))
    except HttpResponseError as error:
        code = getattr(error, "error_code", None)
        seen[name] = [
            type(error).__name__,
            str(getattr(code, "value", code)),
            error.status_code,
            len(answers),
        ]
    else:
        seen[name] = ["none", "", answers[-1], len(answers)]
json.dump(seen, sys.stdout)
