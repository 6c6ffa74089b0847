"""The native API alone: what opens and what does not, states, batches, who may, what is recorded."""

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envelope.keys import KeyState, SigningAlgorithm
from proxy.encryption_service.call import Answer, Call, Peer
from proxy.encryption_service.dialects.dialect import Trouble
from proxy.encryption_service.dialects.native import NativeDialect
from proxy.encryption_service.dialects.native_errors import PROBLEM_JSON
from proxy.encryption_service.limits import Limits, Quota
from proxy.encryption_service.model import DialectName, Op
from tests.proxy.encryption_service.echo import Client
from tests.proxy.encryption_service.service_rig import PEER, ServiceRig
from tests.proxy.encryption_service.serving import serving

HELLO = base64.b64encode(b"hello").decode()
AAD = base64.b64encode(b"invoice 7").decode()
OTHER = base64.b64encode(b"invoice 8").decode()


class NativeRig:
    def __init__(self, directory: Path, *, limits: Limits | None = None) -> None:
        self.rig = ServiceRig(directory, limits=limits)
        self.rig.add_dialect(DialectName.NATIVE)
        self.key = self.rig.add_key("orders")
        self.rig.push(self.key)
        self.token = self.rig.add_bearer(DialectName.NATIVE)
        self.dialect = NativeDialect(
            core=self.rig.core,
            access=self.rig.access,
            limiter=self.rig.limiter,
            directory=lambda: self.rig.directory,
            clock=self.rig.clock,
        )

    def answer(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        token: str | None = "",
        headers: tuple[tuple[str, str], ...] = (),
        raw: bytes | None = None,
        peer: Peer = PEER,
    ) -> Answer:
        if token is not None:
            headers = (("authorization", f"Bearer {token or self.token}"), *headers)
        answer = self.dialect.handle(
            Call(
                method=method,
                path=path if path.startswith("/") else f"/sealgate/v1/{path}",
                headers=headers,
                body=raw if raw is not None else b"" if body is None else json.dumps(body).encode(),
                peer=peer,
            )
        )
        assert isinstance(answer, Answer)
        assert answer.body.count(b"\n") == 1
        return answer

    def call(self, path: str, body: Any = None, **more: Any) -> tuple[int, Any]:
        answer = self.answer(path, body, **more)
        document = json.loads(answer.body)
        if answer.status >= 400:
            assert answer.content_type == PROBLEM_JSON
            assert set(document) == {"type", "title", "status", "code", "detail", "next_step"}
            assert document["status"] == answer.status
        return answer.status, document

    def code(self, path: str, body: Any = None, **more: Any) -> tuple[int, str]:
        status, document = self.call(path, body, **more)
        return status, document.get("code", "")

    def get(self, path: str, **more: Any) -> tuple[int, Any]:
        return self.call(path, method="GET", **more)

    def encrypt(self, key: str = "orders", **more: str) -> str:
        status, document = self.call(f"keys/{key}/encrypt", {"plaintext": HELLO, **more})
        assert status == 200, document
        return str(document["ciphertext"])

    def decrypt(self, ciphertext: str, key: str = "orders", **more: str) -> tuple[int, str]:
        status, document = self.call(f"keys/{key}/decrypt", {"ciphertext": ciphertext, **more})
        return status, document["plaintext"] if status == 200 else document["code"]


@pytest.fixture
def native(tmp_path: Path) -> Iterator[NativeRig]:
    rig = NativeRig(tmp_path)
    yield rig
    rig.rig.close()


FAILED = (422, "does-not-verify")


def test_every_bit_and_every_cut_of_a_ciphertext_counts(native: NativeRig) -> None:
    ciphertext = native.encrypt(aad=AAD)
    raw = base64.b64decode(ciphertext)
    assert native.decrypt(ciphertext, aad=AAD) == (200, HELLO)
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        status, _ = native.decrypt(base64.b64encode(changed).decode(), aad=AAD)
        assert status in {404, 422}, bit  # 404: another version's number
    for size in range(len(raw)):
        status, _ = native.decrypt(base64.b64encode(raw[:size]).decode(), aad=AAD)
        assert status in {404, 422}


def test_a_ciphertext_opens_as_it_was_made_alone(native: NativeRig) -> None:
    plain, bound, derived = native.encrypt(), native.encrypt(aad=AAD), native.encrypt(context=AAD)
    assert native.decrypt(derived, context=AAD) == (200, HELLO)
    for text, more in (
        (plain, {"aad": AAD}),
        (plain, {"context": AAD}),
        (bound, {}),
        (bound, {"aad": OTHER}),
        (bound, {"context": AAD}),
        (derived, {}),
        (derived, {"context": OTHER}),
        (derived, {"aad": AAD}),
    ):
        assert native.decrypt(text, **more) == FAILED
    native.rig.push(native.rig.add_key("second"))
    assert native.decrypt(plain, key="second") == FAILED
    native.rig.add_dialect(DialectName.NATIVE, tenant="globex")
    native.rig.push(native.rig.add_key("orders", tenant="globex"))
    foreign = native.rig.add_bearer(DialectName.NATIVE, tenant="globex")
    assert native.code("keys/orders/decrypt", {"ciphertext": plain}, token=foreign) == FAILED


def test_reencrypt_brings_old_ciphertexts_to_the_active_version_and_to_another_key(native: NativeRig) -> None:
    old = native.encrypt(aad=AAD)
    native.rig.push(native.key, KeyState.DEACTIVATED, KeyState.ACTIVE)
    _, document = native.call("keys/orders/reencrypt", {"ciphertext": old, "aad": AAD})
    assert document["version"] == 2
    assert native.decrypt(document["ciphertext"], aad=AAD) == (200, HELLO)
    native.rig.push(native.rig.add_key("second"))
    body = {"ciphertext": old, "aad": AAD, "source_key": "orders"}
    _, document = native.call("keys/second/reencrypt", body)
    assert native.decrypt(document["ciphertext"], key="second", aad=AAD) == (200, HELLO)
    assert native.rig.records()[-2]["resource"] == "from orders"
    narrow = native.rig.add_bearer(DialectName.NATIVE, keys=frozenset({"second"}))
    assert native.code("keys/second/reencrypt", body, token=narrow) == (403, "access-denied")
    native.rig.add_key("orders", operations=frozenset({Op.ENCRYPT, Op.DECRYPT}))
    assert native.code("keys/second/reencrypt", body) == (409, "usage-refused")


def test_a_data_key_is_what_its_ciphertext_holds(native: NativeRig) -> None:
    for size in (16, 32, 1024):
        _, document = native.call("keys/orders/generate-data-key", {"size_bytes": size, "aad": AAD})
        assert len(base64.b64decode(document["plaintext"])) == size
        assert native.decrypt(document["ciphertext"], aad=AAD) == (200, document["plaintext"])
    _, document = native.call("keys/orders/generate-data-key", {"wrapped_only": True})
    assert set(document) == {"key", "version", "ciphertext"}
    for size in (0, 1025, -1):
        assert native.code("keys/orders/generate-data-key", {"size_bytes": size}) == (400, "malformed")


@pytest.mark.parametrize(
    "algorithm", [SigningAlgorithm.ES256, SigningAlgorithm.PS256, SigningAlgorithm.EDDSA]
)
def test_signatures(native: NativeRig, algorithm: SigningAlgorithm) -> None:
    key = native.rig.add_key("seal", algorithm=algorithm)
    native.rig.push(key)
    status, signed = native.call("keys/seal/sign", {"message": HELLO})
    assert (status, signed["algorithm"], signed["version"]) == (200, algorithm, 1)
    body = {"message": HELLO, "signature": signed["signature"], "version": 1}
    assert native.call("keys/seal/verify", body)[1]["valid"] is True
    assert native.call("keys/seal/verify", {**body, "message": OTHER})[1]["valid"] is False
    assert native.call("keys/seal/verify", {**body, "signature": HELLO})[1]["valid"] is False
    assert native.code("keys/seal/verify", {**body, "version": 2}) == (404, "key-version-unknown")
    assert native.code("keys/seal/sign", {}) == (400, "malformed")
    assert native.code("keys/seal/sign", {"message": HELLO, "digest": HELLO}) == (400, "malformed")
    assert native.code("keys/seal/sign", {"digest": HELLO}) == (400, "input-refused")
    assert native.code("keys/orders/sign", {"message": HELLO}) == (409, "usage-refused")
    assert native.code("keys/seal/encrypt", {"plaintext": HELLO}) == (409, "usage-refused")
    native.rig.push(key, KeyState.DEACTIVATED, KeyState.ACTIVE)
    assert native.call("keys/seal/verify", body)[1]["valid"] is True
    assert native.call("keys/seal/sign", {"message": HELLO})[1]["version"] == 2


def test_a_signature_verifies_with_the_public_key_that_is_described(native: NativeRig) -> None:
    native.rig.push(native.rig.add_key("seal", algorithm=SigningAlgorithm.ES256))
    digest = hashes.Hash(hashes.SHA256())
    digest.update(b"hello")
    body = {"digest": base64.b64encode(digest.finalize()).decode()}
    _, signed = native.call("keys/seal/sign", body)
    _, described = native.get("keys/seal")
    public = load_pem_public_key(described["versions"][0]["public_key"].encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(base64.b64decode(signed["signature"]), b"hello", ec.ECDSA(hashes.SHA256()))


def test_a_batch_has_a_result_or_an_error_for_each_item(native: NativeRig) -> None:
    items = [
        {"plaintext": base64.b64encode(str(i).encode()).decode(), "reference": str(i)} for i in range(1000)
    ]
    _, sealed = native.call("keys/orders/encrypt/batch", {"items": items})
    assert (sealed["failed"], len(sealed["results"])) == (0, 1000)
    back = [
        {"ciphertext": result["result"]["ciphertext"], "reference": result["reference"]}
        for result in sealed["results"]
    ]
    back[7]["ciphertext"], back[8]["ciphertext"] = HELLO, back[7]["ciphertext"]
    back[8]["aad"] = AAD
    _, opened = native.call("keys/orders/decrypt/batch", {"items": back})
    assert opened["failed"] == 2
    for number, result in enumerate(opened["results"]):
        assert result["reference"] == str(number)
        if number in {7, 8}:
            assert result["error"]["code"] == "does-not-verify"
            assert "result" not in result
        else:
            assert result["result"]["plaintext"] == items[number]["plaintext"]
    assert native.rig.records()[-1]["items"] == 1000
    assert native.code("keys/orders/encrypt/batch", {"items": [*items, items[0]]}) == (400, "malformed")
    assert native.code("keys/orders/encrypt/batch", {"items": []}) == (400, "malformed")
    _, signed = native.call("keys/orders/sign/batch", {"items": [{"message": HELLO}]})
    assert signed["code"] == "usage-refused"
    native.rig.push(native.rig.add_key("seal", algorithm=SigningAlgorithm.ES256))
    _, signed = native.call("keys/seal/sign/batch", {"items": [{"message": HELLO}, {}]})
    assert [result.get("error", {}).get("code") for result in signed["results"]] == [None, "malformed"]


STATES = [
    ((KeyState.ACTIVE,), (200, ""), (200, HELLO)),
    ((KeyState.DEACTIVATED,), (409, "key-deactivated"), (200, HELLO)),
    ((KeyState.SUSPENDED,), (423, "key-suspended"), (423, "key-suspended")),
    ((KeyState.COMPROMISED,), (423, "key-compromised"), (423, "key-compromised")),
    ((KeyState.COMPROMISED, KeyState.ACTIVE), (200, ""), (423, "key-compromised")),
    ((KeyState.DESTROYED, KeyState.ACTIVE), (200, ""), (410, "key-version-gone")),
    ((KeyState.DESTROYED,), (404, "key-not-found"), (404, "key-not-found")),
]


@pytest.mark.parametrize(("states", "encrypts", "decrypts"), STATES, ids=str)
def test_the_state_of_a_key_decides(
    native: NativeRig,
    states: tuple[KeyState, ...],
    encrypts: tuple[int, str],
    decrypts: tuple[int, str],
) -> None:
    ciphertext = native.encrypt()
    native.rig.push(native.key, *states)
    assert native.code("keys/orders/encrypt", {"plaintext": HELLO}) == encrypts
    assert native.decrypt(ciphertext) == decrypts


async def test_revoked_and_stale_are_told_apart(native: NativeRig) -> None:
    ciphertext = native.encrypt()
    native.rig.withdraw(native.key)
    assert native.decrypt(ciphertext) == (403, "revoked")
    assert native.code("keys/orders/encrypt/batch", {"items": [{"plaintext": HELLO}]}) == (403, "revoked")
    assert native.get("status")[1] == {"tenant": "acme", "standing": "revoked"}
    assert native.get("keys/orders")[1]["standing"] == "revoked"
    native.rig.push(native.key)
    await native.rig.clock.advance(315)
    assert native.decrypt(ciphertext) == (200, HELLO)
    assert native.get("status")[1]["standing"] == "degraded"
    await native.rig.clock.advance(20)
    assert native.decrypt(ciphertext) == (503, "stale")
    answer = native.answer("keys/orders/encrypt", {"plaintext": HELLO})
    assert dict(answer.headers)["retry-after"] == "5"
    assert native.get("status")[1]["standing"] == "stale"


def test_a_blocked_key_is_described_and_not_used(native: NativeRig) -> None:
    native.rig.add_key("orders", blocked=True)
    assert native.code("keys/orders/encrypt", {"plaintext": HELLO}) == (423, "key-blocked")
    _, described = native.get("keys/orders")
    assert described["blocked"] is True
    assert described["versions"] == [
        {"version": 1, "key_id": str(native.rig.key_id(native.key)), "state": "active"}
    ]


def test_a_token_is_for_its_keys_operations_and_network(native: NativeRig) -> None:
    native.rig.push(native.rig.add_key("second"))
    narrow = native.rig.add_bearer(
        DialectName.NATIVE,
        keys=frozenset({"orders"}),
        operations=frozenset({Op.ENCRYPT}),
        networks=("10.0.0.0/8",),
    )
    near = Peer(address="::ffff:10.1.2.3")
    body = {"plaintext": HELLO}
    assert native.code("keys/orders/encrypt", body, token=narrow, peer=near) == (200, "")
    assert native.code("keys/orders/encrypt", body, token=narrow) == (401, "not-authenticated")
    for path in ("keys/second/encrypt", "keys/none/encrypt"):
        assert native.code(path, body, token=narrow, peer=near) == (403, "access-denied")
    assert native.code("keys/orders/decrypt", {"ciphertext": HELLO}, token=narrow, peer=near) == (
        403,
        "access-denied",
    )
    for path in ("keys/second", "keys/none"):
        assert native.get(path, token=narrow, peer=near)[0] == 403
    _, listed = native.get("keys", token=narrow, peer=near)
    assert [(key["name"], key["operations"]) for key in listed["keys"]] == [("orders", ["encrypt"])]
    assert [key["name"] for key in native.get("keys")[1]["keys"]] == ["orders", "second"]


def test_strangers_learn_nothing(native: NativeRig) -> None:
    for path in ("keys", "keys/orders", "keys/orders/encrypt", "keys/none/decrypt", "status", "no/such"):
        for token in ("wrong", None, native.token[:-1], native.rig.add_bearer(DialectName.TRANSIT)):
            answer = native.answer(path, raw=b"{", token=token, method="GET" if path == "keys" else "POST")
            assert answer.status == 401
            assert dict(answer.headers)["www-authenticate"].startswith("Bearer")
    native.rig.revoke(native.token.split(".")[1])
    assert native.get("keys")[0] == 401


def test_paths_methods_and_media_types(native: NativeRig) -> None:
    body = {"plaintext": HELLO}
    for path in (
        "keys/",
        "keys/orders/",
        "keys/orders/encrypt/",
        "keys/orders/nosuch",
        "keys/orders/generate-data-key/batch",
        "keys/orders/seal/batch",
        "keys/Orders/encrypt",
        "keys/%6frders/encrypt",
        "keys/../keys/orders/encrypt",
        "keys//orders/encrypt",
        "/sealgate/v1",
    ):
        assert native.code(path, body) == (404, "not-found"), path
    answer = native.answer("keys/orders/encrypt", method="GET")
    assert (answer.status, dict(answer.headers)["allow"]) == (405, "POST")
    answer = native.answer("keys", method="DELETE")
    assert (answer.status, dict(answer.headers)["allow"]) == (405, "GET")
    text = (("content-type", "text/plain"),)
    assert native.code("keys/orders/encrypt", body, headers=text)[0] == 415
    utf8 = (("content-type", "Application/JSON; charset=utf-8"),)
    assert native.code("keys/orders/encrypt", body, headers=utf8)[0] == 200
    twice = (("authorization", f"Bearer {native.token}"),)
    assert native.code("keys/orders/encrypt", body, headers=twice) == (400, "malformed")
    assert native.code("keys/orders/seal", None) == (400, "malformed")


@pytest.mark.parametrize("path", ["/openapi.json", "/sealgate/v1/openapi.json"])
def test_the_document_is_served_to_everybody(native: NativeRig, path: str) -> None:
    answer = native.answer(path, method="GET", token=None)
    assert (answer.status, json.loads(answer.body)["openapi"]) == (200, "3.1.0")
    assert native.dialect.claims(path)


@pytest.mark.parametrize("trouble", Trouble)
def test_what_the_http_layer_refuses_has_the_dialects_shape(native: NativeRig, trouble: Trouble) -> None:
    answer = native.dialect.refuse(trouble, None)
    assert answer.status >= 400
    assert answer.content_type == PROBLEM_JSON
    assert json.loads(answer.body)["next_step"]


def test_quota_is_429_with_retry_after(tmp_path: Path) -> None:
    quota = Quota(requests_per_s=10, burst=10)
    native = NativeRig(tmp_path, limits=Limits(tenant=quota, credential=quota))
    body = {"items": [{"plaintext": HELLO}] * 10}
    assert native.code("keys/orders/encrypt", {"plaintext": HELLO})[0] == 200
    answer = native.answer("keys/orders/encrypt/batch", body)
    assert (answer.status, json.loads(answer.body)["code"]) == (429, "quota")
    assert int(dict(answer.headers)["retry-after"]) >= 1
    native.rig.close()


def test_each_call_leaves_one_record_without_secrets(native: NativeRig) -> None:
    request_id = (("x-request-id", "ticket\x1b[31m-4711"),)
    ciphertext = native.answer("keys/orders/encrypt", {"plaintext": HELLO, "aad": AAD}, headers=request_id)
    native.decrypt(json.loads(ciphertext.body)["ciphertext"])
    native.call("keys/none/encrypt", {"plaintext": HELLO})
    native.call("keys/orders/encrypt", raw=b"{")
    native.get("keys")
    records = native.rig.records()
    assert [(record["operation"], record["outcome"], record.get("error", "")) for record in records] == [
        ("encrypt", "ok", ""),
        ("decrypt", "refused", "does-not-verify"),
        ("encrypt", "refused", "key-not-found"),
        ("encrypt", "refused", "malformed"),
        ("list-keys", "ok", ""),
    ]
    assert records[0]["request_id"] == "ticket�[31m-4711"
    assert records[0]["key_id"] == str(native.rig.key_id(native.key))
    log = native.rig.audit_file.read_text()
    for secret in (HELLO, AAD, "hello", "invoice", native.token):
        assert secret not in log


def test_without_a_record_there_is_no_answer(native: NativeRig) -> None:
    ciphertext = native.encrypt()
    native.rig.audit_file.rename(native.rig.audit_file.with_suffix(".moved"))
    for path, body in (
        ("keys/orders/encrypt", {"plaintext": HELLO}),
        ("keys/orders/decrypt", {"ciphertext": ciphertext}),
        ("keys/orders/decrypt", {"ciphertext": HELLO}),
        ("keys/orders/generate-data-key", {}),
        ("keys/orders/decrypt/batch", {"items": [{"ciphertext": ciphertext}]}),
    ):
        assert native.code(path, body) == (500, "not-recorded")
    assert native.code("keys", method="GET") == (500, "not-recorded")


def test_a_plaintext_of_20_mib_goes_through(native: NativeRig) -> None:
    plaintext = base64.b64encode(os.urandom(20 << 20)).decode()
    _, document = native.call("keys/orders/encrypt", {"plaintext": plaintext})
    assert native.decrypt(document["ciphertext"]) == (200, plaintext)


WORDS = ["keys", "orders", "encrypt", "decrypt", "sign", "batch", "seal", "status", "", "..", "%2F", "\udcff"]
PATHS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(WORDS), max_size=5).map("/".join))
CALLS = st.builds(
    Call,
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "x", "\udc80"]),
    path=PATHS.map("/sealgate/v1/{}".format),
    headers=st.lists(
        st.tuples(
            st.sampled_from(["authorization", "content-type", "x-request-id", "sealgate-name", "x"]),
            st.one_of(st.text(max_size=20), st.just("application/json"), st.just("Bearer TOKEN")),
        ),
        max_size=4,
    ).map(tuple),
    body=st.binary(max_size=40),
    peer=st.just(PEER),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=CALLS, is_known=st.booleans())
def test_whatever_comes_is_answered_in_shape(native: NativeRig, call: Call, is_known: bool) -> None:
    sent = tuple((name, value.replace("TOKEN", native.token)) for name, value in call.headers)
    if is_known and "authorization" not in dict(sent):
        sent = (("authorization", f"Bearer {native.token}"), *sent)
    answer = native.dialect.handle(replace(call, headers=sent))
    assert isinstance(answer, Answer)
    assert answer.body.count(b"\n") == 1
    assert isinstance(json.loads(answer.body), dict)
    assert answer.status < 500


async def test_nothing_of_a_strangers_body_is_read(tmp_path: Path) -> None:
    """Of 32 MiB a part has come: who is not known is told so by then, who is known is waited for."""
    native = NativeRig(tmp_path)
    try:
        async with serving([native.dialect]) as url:
            port = int(url.rpartition(":")[2])
            for token, path in (("wrong", "keys/orders/encrypt"), ("wrong", "keys/orders/seal"), ("", "x")):
                stranger = await Client.connect(port)
                await stranger.send(part(f"/sealgate/v1/{path}", token, "Expect: 100-continue\r\n"))
                assert (await stranger.reply()).status == 401
                assert await stranger.ended() == b""
            stranger = await Client.connect(port)
            await stranger.send(part("/sealgate/v1/keys/orders/encrypt", "wrong") + bytes(1000))
            assert (await stranger.reply()).status == 401
            known = await Client.connect(port)
            await known.send(
                part("/sealgate/v1/keys/orders/encrypt", native.token, "Expect: 100-continue\r\n")
            )
            assert (await known.reply()).status == 100
    finally:
        Client.close_all()
        native.rig.close()


def part(path: str, token: str, headers: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n{headers}"
    return f"{head}Content-Length: {32 << 20}\r\n\r\n".encode()
