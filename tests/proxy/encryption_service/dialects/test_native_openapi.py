"""The document says what the handlers do: each path is served, and schemathesis finds no other answer."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.parameters import ParameterLocation
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from envelope.keys import SigningAlgorithm
from proxy.encryption_service.dialects.native_openapi import (
    JSON_CALLS,
    TENANT_CALLS,
    WELL_KNOWN_KEYS,
    make_document,
)
from proxy.encryption_service.model import DialectName, NativeSettings
from tests.proxy.encryption_service.dialects.test_native import NativeRig
from tests.proxy.encryption_service.serving import serving

BEYOND_A_SCHEMA = (
    "decrypt",
    "reencrypt",
    "open",
    "sign",
    "verify",
    "generate-data-key",
    "v1/encrypt",
    "token",
    "jwks",
)
"""No schema tells which base64 is a ciphertext, which keys there are, or 32 from 32.0: 4xx is right."""


class Api(NamedTuple):
    url: str
    native: NativeRig


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The native API in the real server, in a thread: schemathesis calls it as a client from outside."""
    ready, url = threading.Event(), ""
    native = NativeRig(tmp_path_factory.mktemp("native"))
    native.rig.push(native.rig.add_key("signing", algorithm=SigningAlgorithm.ES256))
    native.rig.add_dialect(DialectName.NATIVE, NativeSettings(published_keys=("signing",)))
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        nonlocal url
        async with serving([native.dialect]) as url:
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="native-api")
    thread.start()
    assert ready.wait(20)
    yield Api(url, native)
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)
    loop.close()
    native.rig.close()


def test_each_path_of_the_document_is_served(api: Api) -> None:
    document = make_document()
    json_paths = [*JSON_CALLS, *(f"{name}/batch" for name, call in JSON_CALLS.items() if call.batch)]
    assert sorted(document["paths"]) == sorted(
        [f"/sealgate/v1/keys/{{key}}/{name}" for name in [*json_paths, "seal", "open"]]
        + [
            f"/sealgate/v1/{name}"
            for name in [*TENANT_CALLS, "keys", "keys/{key}", "status", "jwks/{tenant}"]
        ]
        + [WELL_KNOWN_KEYS]
    )
    for path, item in document["paths"].items():
        method = "POST" if "post" in item else "GET"
        named = _named(path)
        if api.native.dialect.wants_stream(method, named):
            continue
        status, answer = api.native.call(named, raw=b"{", method=method)
        assert status != 404, path
        if method == "POST":
            assert (status, answer["code"]) == (400, "malformed"), path


def _named(path: str) -> str:
    return path.replace("{key}", "orders").replace("{tenant}", "acme")


def examples_of(operation: Any, url: str, headers: dict[str, str]) -> set[int]:
    """Which statuses good and bad examples of *operation* get; schemathesis checks each answer."""
    seen: set[int] = set()
    is_judged = any(word in operation.label for word in BEYOND_A_SCHEMA)
    excluded = [checks.positive_data_acceptance] if is_judged else []
    cases = st.one_of(
        operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
        operation.as_strategy(generation_mode=GenerationMode.NEGATIVE),
    )

    @given(case=cases, key=st.sampled_from(["orders", "signing", ""]))
    @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def call(case: Any, key: str) -> None:
        # What is wrong on purpose is left so.
        wrong = {where for where, info in case.meta.components.items() if info.mode.is_negative}
        if key and "key" in (case.path_parameters or {}) and ParameterLocation.PATH not in wrong:
            case.path_parameters["key"] = key
        if key and isinstance(case.body, dict) and "key" in case.body and ParameterLocation.BODY not in wrong:
            case.body["key"] = key
        sent = {} if ParameterLocation.HEADER in wrong else headers
        answer = case.call_and_validate(base_url=url, headers=sent, excluded_checks=excluded)
        seen.add(answer.status_code)
        assert answer.status_code < 500

    call()
    return seen


def test_answers_are_what_the_document_says(api: Api) -> None:
    """Examples of each operation, good and bad, from the document alone."""
    schema = schemathesis.openapi.from_url(f"{api.url}/openapi.json")
    headers = {"Authorization": f"Bearer {api.native.token}"}
    called: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        called[operation.label] = examples_of(operation, api.url, headers)
    assert len(called) == 22
    assert all(called.values())
    served = {label for label, statuses in called.items() if 200 in statuses}
    assert len(served) > 8, called


def test_without_a_token_the_document_is_all_there_is(api: Api, tmp_path: Path) -> None:
    del tmp_path
    for path in make_document()["paths"]:
        named = _named(path)
        for method in ("GET", "POST", "DELETE"):
            if not api.native.dialect.wants_stream(method, named):
                expected = {401} if "{tenant}" not in path else {200, 405}
                assert api.native.answer(named, method=method, token=None).status in expected
    document = json.loads(api.native.answer("/openapi.json", method="GET", token=None).body)
    assert document == json.loads(json.dumps(make_document()))
