"""What boto3 makes of a list of calls, as JSON. Run by the referees' Python; knows nothing of Sealgate.

    python boto3_calls.py < SPEC.json

SPEC: {"endpoint", "access_key", "secret_key", "ca", "proxy" (or null), "style" ("path" or "virtual"),
"config" (botocore Config arguments), "calls": [[operation, arguments], ...]}. In arguments
{"bytes": n, "seed": s} is a body of n bytes, {"use": [index, "name", ...]} something in an earlier answer.
The operation "presign" takes [operation, arguments] and is a request by a presigned URL, with the further
arguments "headers" and "body".

Prints a list: {"status", "headers", "answer"} or {"status", "headers", "error", "message"} for each call;
bodies as {"bytes", "sha256"}.
"""

import hashlib
import json
import random
import ssl
import sys
import urllib.error
import urllib.request
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError


def body(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


def resolve(value: Any, answers: list[Any]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"bytes", "seed"}:
            return body(value["bytes"], value["seed"])
        if set(value) == {"use"}:
            index, *names = value["use"]
            found = answers[index]["answer"]
            for name in names:
                found = found[name]
            return found
        return {name: resolve(item, answers) for name, item in value.items()}
    if isinstance(value, list):
        return [resolve(item, answers) for item in value]
    return value


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items() if name != "ResponseMetadata"}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if hasattr(value, "read"):
        value = value.read()
        return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
    return str(value)


def call(client: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        made = getattr(client, operation)(**arguments)
        answer = plain(made)
    except ClientError as error:
        data = error.response
        meta = data.get("ResponseMetadata", {})
        return {
            "status": meta.get("HTTPStatusCode"),
            "headers": meta.get("HTTPHeaders", {}),
            "error": data["Error"].get("Code"),
            "message": data["Error"].get("Message"),
        }
    except BotoCoreError as error:
        return {"status": None, "headers": {}, "error": type(error).__name__, "message": str(error)}
    meta = made["ResponseMetadata"]
    return {"status": meta["HTTPStatusCode"], "headers": meta["HTTPHeaders"], "answer": answer}


def by_url(
    client: Any, operation: str, arguments: dict[str, Any], answers: list[Any], opener: Any
) -> dict[str, Any]:
    arguments = dict(arguments)
    headers, data = arguments.pop("headers", {}), resolve(arguments.pop("body", None), answers)
    url = client.generate_presigned_url(operation, Params=resolve(arguments, answers), ExpiresIn=60)
    method = {"put_object": "PUT", "head_object": "HEAD", "delete_object": "DELETE"}.get(operation, "GET")
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with opener.open(request, timeout=60) as answer:
            content = answer.read()
            status, fields = answer.status, dict(answer.headers)
    except urllib.error.HTTPError as error:
        content, status, fields = error.read(), error.code, dict(error.headers)
    shown = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"status": status, "headers": {k.lower(): v for k, v in fields.items()}, "answer": shown}


def opener_for(spec: dict[str, Any]) -> Any:
    return urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=spec["ca"])),
        urllib.request.ProxyHandler({"https": spec["proxy"]} if spec["proxy"] else {}),
    )


def main() -> None:
    spec = json.load(sys.stdin)
    settings = {
        "signature_version": "s3v4",
        "retries": {"max_attempts": 1, "mode": "standard"},
        "s3": {"addressing_style": spec.get("style", "path")},
        **spec.get("config", {}),
    }
    if spec["proxy"]:
        settings["proxies"] = {"https": spec["proxy"]}
    client = boto3.client(
        "s3",
        endpoint_url=spec["endpoint"],
        aws_access_key_id=spec["access_key"],
        aws_secret_access_key=spec["secret_key"],
        region_name="us-east-1",
        verify=spec["ca"],
        config=Config(**settings),
    )
    opener = opener_for(spec)
    answers: list[Any] = []
    for operation, arguments in spec["calls"]:
        if operation == "presign":
            name, details = arguments
            answers.append(by_url(client, name, details, answers, opener))
        else:
            answers.append(call(client, operation, resolve(arguments, answers)))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
